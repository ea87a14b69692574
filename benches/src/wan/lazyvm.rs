//! A move by lazyvm, as a user makes it: `serve` at the source, `resume` at the destination.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::emulator::SOURCE;
use super::guest::{Guest, Images};
use super::peer::kill_listener;
use super::process::{Process, wait_for};
use super::trial::{End, Order, Record, Told, Trial};
use super::{Setup, WanError, lock};

/// Nobody else is in the namespace.
const STATUS_ADDRESS: &str = "127.0.0.1:9100";

/// How often `resume` is asked for its counts; it brings them up to date ten times a second.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);

/// How long `serve` may take for its ticket.
pub const TICKET_WITHIN: Duration = Duration::from_secs(30);

/// How long a destination may take to let go of what it listens at.
const END_WITHIN: Duration = Duration::from_secs(5);

/// Moves a guest.
///
/// # Errors
/// [`WanError`].
pub fn run(setup: &Setup, images: Option<&Images>) -> Result<Record, WanError> {
    let trial = Trial::new(setup, images)?;
    let _guest = trial.start_guest()?;
    let ticket = trial.file("ticket");
    let mut serve = serve(&trial, setup, &ticket)?;
    let order = trial.order()?;
    let (record, _arrived) = resumed(&trial, setup, &ticket, "report", &order)?;
    wait_for("the end of serve", END_WITHIN, || {
        Ok(serve.has_ended()?.then_some(()))
    })?;
    Ok(record)
}

/// What has arrived. It ends when this is dropped.
pub struct Arrived {
    _resume: Process,
    _qemu: QemuOfResume,
}

/// Resumes the guest and watches it; what is called `name` is this one's alone.
///
/// # Errors
/// [`WanError`].
pub fn resumed(
    trial: &Trial<'_>,
    setup: &Setup,
    ticket: &Path,
    name: &str,
    order: &Order,
) -> Result<(Record, Arrived), WanError> {
    let qemu = QemuOfResume(trial.socket(End::Destination));
    let report = trial.file(&format!("{name}.json"));
    let mut resume = resume(trial, setup, ticket, &report)?;
    let samples = Mutex::new(Vec::new());
    let done = AtomicBool::new(false);
    let (complete_at, report) = thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            trial.emulator.destination.within(|| {
                sample(&samples, &done);
                Ok(())
            })
        });
        let complete = resume.wait_for("the end of the move", setup.within, || {
            let Ok(bytes) = fs::read(&report) else {
                return Ok(None);
            };
            let report: Value = serde_json::from_slice(&bytes).map_err(WanError::Report)?;
            Ok(Some((Instant::now(), report)))
        });
        done.store(true, Ordering::Relaxed);
        let _ = sampler.join();
        complete
    })?;
    let told = Told {
        complete_at,
        downtime_us: number(&report, "downtime_us"),
        faults: number(&report, "faults"),
        fault_us: report.get("fault_us").cloned(),
        faults_over_time: lock(&samples).clone(),
    };
    let record = trial.watch(order, &told, "lazyvm")?;
    let arrived = Arrived {
        _resume: resume,
        _qemu: qemu,
    };
    Ok((record, arrived))
}

fn serve(trial: &Trial<'_>, setup: &Setup, ticket: &Path) -> Result<Process, WanError> {
    let mut command = Command::new(&setup.lazyvm);
    let kind = match setup.guest {
        Guest::Payload => "--vm",
        Guest::Qemu => "--qemu",
    };
    command
        .args(["serve", kind])
        .arg(trial.socket(End::Source))
        .args(["--listen", &format!("{SOURCE}:0"), "--ticket-file"])
        .arg(ticket)
        .args(["--mode", setup.mode.name()])
        .args(&setup.serve_flags);
    let mut serve = trial.start(End::Source, "serve", command)?;
    wait_for_ticket(&mut serve, ticket, TICKET_WITHIN)?;
    Ok(serve)
}

/// Waits until `serve` has written its ticket.
///
/// # Errors
/// [`WanError`].
pub fn wait_for_ticket(
    serve: &mut Process,
    ticket: &Path,
    within: Duration,
) -> Result<(), WanError> {
    serve.wait_for("the ticket", within, || {
        Ok(fs::metadata(ticket)
            .is_ok_and(|file| file.len() > 0)
            .then_some(()))
    })
}

fn resume(
    trial: &Trial<'_>,
    setup: &Setup,
    ticket: &Path,
    report: &Path,
) -> Result<Process, WanError> {
    let mut command = Command::new(&setup.lazyvm);
    command
        .arg("resume")
        .arg(format!("@{}", ticket.display()))
        .arg("--report")
        .arg(report)
        .args(["--status-addr", STATUS_ADDRESS])
        .args(&setup.resume_flags);
    match setup.guest {
        Guest::Payload => {
            command
                .arg("--stay")
                .arg("--control")
                .arg(trial.socket(End::Destination))
                .arg("--serial")
                .arg(trial.console(End::Destination));
        }
        Guest::Qemu => {
            command
                .args(["--qemu", "--"])
                .args(trial.qemu_words(End::Destination));
        }
    }
    trial.start(End::Destination, "resume", command)
}

/// The QEMU that `resume` has started, which is nobody's child any more. It ends when this is dropped.
struct QemuOfResume(PathBuf);

impl Drop for QemuOfResume {
    fn drop(&mut self) {
        kill_listener(&self.0);
    }
}

/// Asks for the number of faults until it is over.
fn sample(samples: &Mutex<Vec<(Instant, u64)>>, done: &AtomicBool) {
    while !done.load(Ordering::Relaxed) {
        if let Some(faults) = faults_now() {
            lock(samples).push((Instant::now(), faults));
        }
        thread::sleep(SAMPLE_EVERY);
    }
}

fn faults_now() -> Option<u64> {
    let mut stream = TcpStream::connect(STATUS_ADDRESS).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("lazyvm_faults_total "))
        .and_then(|count| count.trim().parse().ok())
}

fn number(report: &Value, name: &str) -> u64 {
    report.get(name).and_then(Value::as_u64).unwrap_or(0)
}
