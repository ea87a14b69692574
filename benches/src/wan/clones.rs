//! Many clones of one snapshot at once, each resumed by a `lazyvm resume` of its own at the destination. Their memory is
//! checked by the guests themselves, and each has a console of its own.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde::Serialize;
use serde_json::Value;

use super::console::Console;
use super::process::{Process, pause, wait_for};
use super::trial::{End, SETTLE, Trial};
use super::{Setup, WanError};

/// Ticks of each clone, whose touches have found its memory whole, before it counts as one that runs.
const TICKS: usize = 20;

/// What clones that were started at once gave.
#[derive(Clone, Debug, Serialize)]
pub struct Clones {
    /// From the start of each one's `resume` to its first tick, ascending.
    pub first_sign_ms: Vec<f64>,
    /// From the start of the first `resume` until the last clone's memory was all there.
    pub all_complete_ms: f64,
    /// Bytes of IP that came out of the path from the source by then.
    pub bytes_wire: u64,
    /// Pages that the clones waited for, together.
    pub faults: u64,
}

impl Clones {
    /// The median of the first signs.
    pub fn median_ms(&self) -> f64 {
        let middle = self.first_sign_ms.len() / 2;
        self.first_sign_ms.get(middle).copied().unwrap_or(f64::NAN)
    }

    /// The last first sign.
    pub fn worst_ms(&self) -> f64 {
        self.first_sign_ms.last().copied().unwrap_or(f64::NAN)
    }
}

struct OneClone {
    resume: Process,
    console: Console,
    report: std::path::PathBuf,
    started_at: Instant,
}

impl OneClone {
    fn start(
        trial: &Trial<'_>,
        setup: &Setup,
        ticket: &Path,
        name: &str,
    ) -> Result<Self, WanError> {
        let folder = trial.file(name);
        fs::create_dir(&folder)?;
        let console = Console::open(&folder)?;
        let report = folder.join("report.json");
        let mut command = Command::new(&setup.lazyvm);
        command
            .arg("resume")
            .arg(format!("@{}", ticket.display()))
            .arg("--report")
            .arg(&report)
            .arg("--stay")
            .arg("--control")
            .arg(folder.join("socket"))
            .arg("--serial")
            .arg(&console.destination)
            .args(&setup.resume_flags);
        let started_at = Instant::now();
        Ok(Self {
            resume: trial.start(End::Destination, name, command)?,
            console,
            report,
            started_at,
        })
    }

    /// Waits until all its memory is there; gives how many pages it waited for.
    fn complete(&mut self, setup: &Setup) -> Result<u64, WanError> {
        let report = self.report.clone();
        let read = || {
            let Ok(bytes) = fs::read(&report) else {
                return Ok(None);
            };
            let report: Value = serde_json::from_slice(&bytes).map_err(WanError::Report)?;
            Ok(report["faults"].as_u64())
        };
        self.resume.wait_for("a clone's memory", setup.within, read)
    }

    /// Waits until it has run for a while; gives when it first showed.
    fn first_sign_ms(&mut self, setup: &Setup, name: &str) -> Result<f64, WanError> {
        let console = &self.console;
        wait_for("a clone's ticks", setup.within, || {
            Ok((console.ticks().len() >= TICKS).then_some(()))
        })?;
        self.resume.check()?;
        let ticks = console.ticks();
        let errors = ticks.last().map_or(0, |tick| tick.errors);
        if errors > 0 {
            return Err(WanError::WrongMemory(errors, name.to_owned()));
        }
        let first = ticks.first().map_or(self.started_at, |tick| tick.at);
        let since = first.saturating_duration_since(self.started_at);
        Ok(since.as_secs_f64() * 1e3)
    }
}

/// Resumes so many clones at once, and ends them.
///
/// # Errors
/// [`WanError`]; one that does not run or finds wrong contents fails all.
pub fn run(trial: &Trial<'_>, setup: &Setup, ticket: &Path) -> Result<Clones, WanError> {
    pause(SETTLE)?;
    let names: Vec<String> = (0..setup.clones).map(|at| format!("clone-{at}")).collect();
    let before = trial.emulator.traffic();
    let started_at = Instant::now();
    let mut clones = Vec::new();
    for name in &names {
        clones.push(OneClone::start(trial, setup, ticket, name)?);
    }
    let mut faults = 0;
    for clone in &mut clones {
        faults += clone.complete(setup)?;
    }
    let all_complete_ms = started_at.elapsed().as_secs_f64() * 1e3;
    let bytes_wire = trial.emulator.traffic().totals.since(before.totals);
    let mut first_sign_ms = Vec::new();
    for (clone, name) in clones.iter_mut().zip(&names) {
        first_sign_ms.push(clone.first_sign_ms(setup, name)?);
    }
    first_sign_ms.sort_by(f64::total_cmp);
    Ok(Clones {
        first_sign_ms,
        all_complete_ms,
        bytes_wire: bytes_wire.bytes_from_source,
        faults,
    })
}
