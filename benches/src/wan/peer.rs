//! QEMU's own migration over the same path, in the ways that are lazyvm's modes: the commands are those of QEMU's
//! `qapi/migration.json`.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use lazyvm_server::Mode;
use lazyvm_vmm_glue::qemu::Qmp;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::{Value, json};

use super::emulator::DESTINATION;
use super::guest::Images;
use super::process::{Process, pause, wait_for};
use super::trial::{End, Order, Record, Told, Trial, command};
use super::{Setup, WanError};

/// Nobody else is in the namespace.
const PORT: u16 = 4444;

/// How often the source is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a QEMU may take until it listens.
const START_WITHIN: Duration = Duration::from_secs(20);

/// More than any path: QEMU limits itself to 128 MiB a second otherwise.
const UNLIMITED_BYTES_S: u64 = 1 << 40;

/// What QEMU may stand still for at the end of a pre-copy: its default.
const DOWNTIME_LIMIT_MS: u64 = 300;

/// A pre-copy has this many times the time that the path takes for the memory: if its rounds shrink at all, each to less
/// than nine tenths of the one before, that is enough.
const PRECOPY_COPIES: u32 = 10;

/// And this much at least.
const PRECOPY_AT_LEAST: Duration = Duration::from_secs(30);

/// How QEMU moves its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// With the capability `postcopy-ram`, started at once.
    Postcopy,
    /// And with `postcopy-preempt`: pages that are waited for have a channel of their own.
    PostcopyPreempt,
    /// The same behind one pass of pre-copy.
    PrecopyPostcopy,
    /// Pre-copy alone.
    Precopy,
    /// The guest is stopped, moved and continued.
    Stop,
}

/// How a move by QEMU ended.
pub enum Fate {
    /// The guest works at the destination.
    Arrived(Box<Record>),
    /// It does not, and why.
    Lost(Loss),
}

/// What became of a guest that did not arrive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// In two or three words.
    pub outcome: &'static str,
    /// All that is known of it.
    pub why: String,
}

impl Variant {
    /// What does as lazyvm does in this mode.
    pub fn of(mode: Mode) -> &'static [Self] {
        match mode {
            Mode::Postcopy => &[Self::Postcopy, Self::PostcopyPreempt],
            Mode::Hybrid => &[Self::Postcopy, Self::PostcopyPreempt, Self::PrecopyPostcopy],
            Mode::Precopy => &[Self::Precopy],
            Mode::Stop => &[Self::Stop],
        }
    }

    /// Its name: QEMU's own where it has one.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postcopy => "postcopy",
            Self::PostcopyPreempt => "postcopy-preempt",
            Self::PrecopyPostcopy => "precopy-postcopy",
            Self::Precopy => "precopy",
            Self::Stop => "stop",
        }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Postcopy => &["postcopy-ram"],
            Self::PostcopyPreempt | Self::PrecopyPostcopy => &["postcopy-ram", "postcopy-preempt"],
            Self::Precopy | Self::Stop => &[],
        }
    }

    /// How long a move of so much memory may take, of which `most` is what any may.
    fn within(self, rate_bit_s: u64, memory_bytes: u64, most: Duration) -> Duration {
        match (self, rate_bit_s) {
            (Self::Precopy, 0) => PRECOPY_AT_LEAST,
            (Self::Precopy, rate) => {
                let copy = Duration::from_secs_f64(memory_bytes as f64 * 8.0 / rate as f64);
                PRECOPY_AT_LEAST.max(copy * PRECOPY_COPIES)
            }
            _ => most,
        }
        .min(most)
    }
}

/// Moves a guest. Gives QEMU's version as well.
///
/// # Errors
/// [`WanError`], where it is not QEMU's migration that fails.
pub fn run(setup: &Setup, images: &Images, variant: Variant) -> Result<(Fate, String), WanError> {
    let trial = Trial::new(setup, Some(images))?;
    let _guest = trial.start_guest()?;
    let mut incoming = start_incoming(&trial)?;
    let mut destination = Qmp::connect(&trial.socket(End::Destination))?;
    let mut source = Qmp::connect(&trial.socket(End::Source))?;
    let version = source.version().to_owned();
    let on = |name: &&str| json!({ "capability": name, "state": true });
    let capabilities: Vec<Value> = variant.capabilities().iter().map(on).collect();
    for qemu in [&mut destination, &mut source] {
        let list = json!({ "capabilities": capabilities });
        qemu.run("migrate-set-capabilities", list)?;
    }
    let uri = json!({ "uri": format!("tcp:{DESTINATION}:{PORT}") });
    destination.run("migrate-incoming", uri.clone())?;
    let limits = json!({ "max-bandwidth": UNLIMITED_BYTES_S, "downtime-limit": DOWNTIME_LIMIT_MS });
    source.run("migrate-set-parameters", limits)?;
    let order = trial.order()?;
    let stopped_at = Instant::now();
    if variant == Variant::Stop {
        source.run("stop", json!({}))?;
    }
    source.run("migrate", uri)?;
    let within = variant.within(setup.path.rate_bit_s, setup.memory_bytes, setup.within);
    let mut told = match follow(&mut source, variant, within) {
        Ok(told) => told,
        Err(error) => return Ok((Fate::Lost(loss_of_move(variant, error)?), version)),
    };
    if variant == Variant::Stop {
        // Earlier, it would be forgotten: the destination ends as the source was, stopped.
        wait_for("the destination", START_WITHIN, || {
            let loads = destination.status()? == "inmigrate";
            Ok((!loads).then_some(()))
        })?;
        destination.run("cont", json!({}))?;
        // QEMU tells none: it did not stop the guest.
        told.downtime_us = stopped_at.elapsed().as_micros() as u64;
        told.complete_at = Instant::now();
    }
    Ok((arrival(&trial, &mut incoming, &order, &told)?, version))
}

fn start_incoming(trial: &Trial<'_>) -> Result<Process, WanError> {
    let mut words = trial.qemu_words(End::Destination);
    words.extend(["-incoming", "defer"].map(str::to_owned));
    let mut incoming = trial.start(End::Destination, "incoming", command(&words))?;
    let socket = trial.socket(End::Destination);
    incoming.wait_for("the destination's monitor", START_WITHIN, || {
        Ok(UnixStream::connect(&socket).is_ok().then_some(()))
    })?;
    Ok(incoming)
}

/// Waits for the end of the migration, and starts post-copy when it is time for it.
fn follow(source: &mut Qmp, variant: Variant, within: Duration) -> Result<Told, WanError> {
    let mut postcopy_due = variant.capabilities().contains(&"postcopy-ram");
    let mut faults_over_time = Vec::new();
    let mut faults = 0;
    let mut progress = String::new();
    let ended = wait_for("the end of QEMU's migration", within, || {
        if postcopy_due && variant != Variant::PrecopyPostcopy {
            source.run("migrate-start-postcopy", json!({}))?;
            postcopy_due = false;
        }
        let answer = source.run("query-migrate", json!({}))?;
        let now = Instant::now();
        let ram = &answer["ram"];
        if let Some(count) = ram["postcopy-requests"].as_u64() {
            faults = count;
            faults_over_time.push((now, count));
        }
        // The first pass begins behind the first look for dirty pages and ends with the second.
        let looks = ram["dirty-sync-count"].as_u64().unwrap_or(0);
        progress = format!(
            "{} passes begun, {} bytes left",
            looks,
            ram["remaining"].as_u64().unwrap_or(0)
        );
        match answer["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(Some(answer)),
            status @ ("failed" | "cancelled" | "postcopy-paused") => {
                return Err(WanError::PeerFailed {
                    status: status.to_owned(),
                    text: answer["error-desc"].as_str().unwrap_or_default().to_owned(),
                });
            }
            "active" if postcopy_due && looks > 1 => {
                source.run("migrate-start-postcopy", json!({}))?;
                postcopy_due = false;
            }
            _ => {}
        }
        pause(LOOK_EVERY).map(|()| None)
    });
    let answer = ended.map_err(|error| match error {
        WanError::TooLate { what, seconds, .. } => WanError::TooLate {
            what,
            seconds,
            log: progress,
        },
        other => other,
    })?;
    Ok(Told {
        complete_at: Instant::now(),
        downtime_us: answer["downtime"].as_u64().unwrap_or(0) * 1000,
        faults,
        fault_us: None,
        faults_over_time,
    })
}

/// What a migration that does not end well means for its guest.
fn loss_of_move(variant: Variant, error: WanError) -> Result<Loss, WanError> {
    let outcome = match (&error, variant) {
        (WanError::TooLate { .. }, Variant::Precopy) => "did not converge",
        (WanError::TooLate { .. }, _) => "did not end",
        (WanError::PeerFailed { .. } | WanError::Qmp(_), _) => "failed",
        _ => return Err(error),
    };
    Ok(Loss {
        outcome,
        why: error.to_string(),
    })
}

/// What became of a guest whose migration QEMU takes for completed.
fn arrival(
    trial: &Trial<'_>,
    incoming: &mut Process,
    order: &Order,
    told: &Told,
) -> Result<Fate, WanError> {
    let died = |why: String| {
        Ok(Fate::Lost(Loss {
            outcome: "guest died",
            why,
        }))
    };
    match trial.watch(order, told, "QEMU") {
        Ok(record) if record.figures.speed_after_hz == 0.0 => {
            let words = trial.console_lines();
            died(format!("it fell silent at the destination; {words}"))
        }
        Ok(record) => match incoming.check() {
            Ok(()) => Ok(Fate::Arrived(Box::new(record))),
            Err(ended) => died(ended.to_string()),
        },
        Err(error @ (WanError::WrongMemory(..) | WanError::TooLate { .. })) => {
            match incoming.check() {
                Ok(()) => died(error.to_string()),
                Err(ended) => died(format!("{error}; {ended}")),
            }
        }
        Err(other) => Err(other),
    }
}

/// Kills whoever listens at a socket of this run's own folder.
pub fn kill_listener(socket: &Path) {
    let Ok(stream) = UnixStream::connect(socket) else {
        return;
    };
    // Its pid is that of listen(2)'s caller.
    if let Ok(peer) = getsockopt(&stream, PeerCredentials)
        && peer.pid() > 0
        && peer.pid() as u32 != std::process::id()
    {
        let _ = kill(Pid::from_raw(peer.pid()), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn too_late() -> WanError {
        WanError::TooLate {
            what: "the end of QEMU's migration",
            seconds: 30,
            log: "7 passes begun, 100 bytes left".to_owned(),
        }
    }

    #[test]
    fn a_pre_copy_without_an_end_did_not_converge() {
        let loss = loss_of_move(Variant::Precopy, too_late()).unwrap();
        assert_eq!(loss.outcome, "did not converge");
        assert!(loss.why.contains("7 passes"), "{}", loss.why);
        let loss = loss_of_move(Variant::Postcopy, too_late()).unwrap();
        assert_eq!(loss.outcome, "did not end");
        let signal = loss_of_move(Variant::Precopy, WanError::Interrupted);
        assert!(matches!(signal, Err(WanError::Interrupted)));
    }

    #[test]
    fn a_pre_copy_has_ten_times_what_the_path_takes() {
        let within = |variant: Variant, rate: u64, most_s: u64| {
            let most = Duration::from_secs(most_s);
            variant.within(rate, 125_000_000, most).as_secs()
        };
        assert_eq!(within(Variant::Precopy, 100_000_000, 600), 100);
        assert_eq!(within(Variant::Precopy, 100_000_000, 50), 50);
        assert_eq!(within(Variant::Precopy, 1_000_000_000, 600), 30);
        assert_eq!(within(Variant::Precopy, 0, 600), 30);
        assert_eq!(within(Variant::Stop, 1_000_000_000, 600), 600);
    }
}
