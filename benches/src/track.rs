//! What it costs a guest that its writes are tracked: its own speed with a tracker that is asked at intervals, and without
//! one, in turns, so that what changes on the host meanwhile counts for both alike.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_server::port::{MachineError, SourceMachine};
use lazyvm_vmm_glue::kvm::RemoteMachine;
use lazyvm_vmm_glue::qemu;
use serde::Serialize;

use crate::wan::WanError;
use crate::wan::console::Console;
use crate::wan::guest::{self, Guest, Images, Workload};

/// How long a guest may take to boot and to fill its memory.
const BOOT_WITHIN: Duration = Duration::from_secs(180);

/// How long a guest works before its speed is measured, and after anything was changed.
const SETTLE: Duration = Duration::from_millis(500);

/// Further words of the Linux guest's command line: it keeps to no pace, which would hide what it loses.
const AT_FULL_SPEED: &str = " tick_us=0 tick_touches=10000";

/// Where a QEMU's memory is: shared memory, as a QEMU to be served has it.
const RAM_FOLDER: &str = "/dev/shm";

/// What is measured.
#[derive(Clone, Debug)]
pub struct TrackConfig {
    /// The program whose monitor runs the payload.
    pub lazyvm: PathBuf,
    /// What is tracked.
    pub guest: Guest,
    /// Its memory.
    pub memory_bytes: u64,
    /// What it does.
    pub workload: Workload,
    /// Its kernel; `None` is the one that the build has fetched.
    pub kernel: Option<PathBuf>,
    /// How often the tracker is asked.
    pub every: Duration,
    /// How long each turn is.
    pub turn: Duration,
    /// Turns with the tracker, each beside one without.
    pub turns: u32,
}

/// What it costs.
#[derive(Clone, Debug, Serialize)]
pub struct TrackReport {
    /// What was tracked.
    pub guest: Guest,
    /// Its memory.
    pub memory_bytes: u64,
    /// Memory that it touches nearly always.
    pub hot_bytes: u64,
    /// How often the tracker was asked, in milliseconds.
    pub every_ms: f64,
    /// Signs of life a second without a tracker: the median of all turns.
    pub untracked_hz: f64,
    /// The same with one.
    pub tracked_hz: f64,
    /// By how much the guest is slower, in percent: the median of the pairs of turns.
    pub slower_percent: f64,
    /// The least and the most of all pairs.
    pub slower_percent_range: [f64; 2],
    /// Pages that the tracker told of at a time: the median.
    pub pages_a_round: u64,
    /// How long the tracker took for that, in microseconds: the median.
    pub collect_us: u64,
    /// Wrong contents that the guest found in its memory.
    pub errors: u64,
}

/// A benchmark that could not be run.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// As on the rig.
    #[error(transparent)]
    Rig(#[from] WanError),
    /// The monitor.
    #[error("can't talk to the guest's monitor")]
    Machine(#[source] MachineError),
    /// It has no tracker.
    #[error("nothing tracks what this guest writes")]
    NoTracker,
    /// The tracker.
    #[error("the guest's writes can't be tracked")]
    Track(#[source] MachineError),
}

impl From<std::io::Error> for TrackError {
    fn from(error: std::io::Error) -> Self {
        Self::Rig(error.into())
    }
}

/// Runs it.
///
/// # Errors
/// [`TrackError`].
pub fn run(config: &TrackConfig) -> Result<TrackReport, TrackError> {
    if let Some(text) = config.workload.refusal(config.memory_bytes) {
        return Err(WanError::Asked(text).into());
    }
    if config.turns == 0 {
        return Err(WanError::Asked("at least one turn".to_owned()).into());
    }
    let running = Running::start(config)?;
    let machine = running.machine(config.guest)?;
    let mut measured = Measured::default();
    for _ in 0..config.turns {
        let untracked_hz = running.speed(config.turn, || Ok(()), config.every)?;
        let mut tracker = machine.tracker().ok_or(TrackError::NoTracker)?;
        tracker.start().map_err(TrackError::Track)?;
        let mut collect = || {
            let (before, mut pages) = (Instant::now(), 0);
            tracker
                .collect(&mut |range| pages += range.count)
                .map_err(TrackError::Track)?;
            measured.collects.push((pages, before.elapsed()));
            Ok(())
        };
        // All pages are clean at the start, which is so in the first round only.
        collect()?;
        let tracked_hz = running.speed(config.turn, collect, config.every)?;
        tracker.stop().map_err(TrackError::Track)?;
        measured.turns.push((untracked_hz, tracked_hz));
    }
    let errors = running.console.ticks().last().map_or(0, |tick| tick.errors);
    Ok(measured.report(config, errors))
}

#[derive(Default)]
struct Measured {
    /// Signs of life a second without and with a tracker.
    turns: Vec<(f64, f64)>,
    /// Pages, and how long it took to hear of them.
    collects: Vec<(u64, Duration)>,
}

impl Measured {
    fn report(&self, config: &TrackConfig, errors: u64) -> TrackReport {
        let slower = |(untracked, tracked): &(f64, f64)| (1.0 - tracked / untracked) * 100.0;
        let slower: Vec<f64> = self.turns.iter().map(slower).collect();
        let pages: Vec<f64> = self.collects.iter().map(|(p, _)| *p as f64).collect();
        let times = self.collects.iter().map(|(_, time)| time.as_secs_f64());
        TrackReport {
            guest: config.guest,
            memory_bytes: config.memory_bytes,
            hot_bytes: config.workload.hot_bytes,
            every_ms: config.every.as_secs_f64() * 1e3,
            untracked_hz: median(self.turns.iter().map(|turn| turn.0)),
            tracked_hz: median(self.turns.iter().map(|turn| turn.1)),
            slower_percent: median(slower.iter().copied()),
            slower_percent_range: [
                slower.iter().copied().fold(f64::INFINITY, f64::min),
                slower.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            ],
            pages_a_round: median(pages.into_iter()) as u64,
            collect_us: (median(times) * 1e6) as u64,
            errors,
        }
    }
}

fn median(of: impl Iterator<Item = f64>) -> f64 {
    let mut of: Vec<f64> = of.collect();
    of.sort_by(f64::total_cmp);
    match of.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => of[length / 2],
        length => (of[length / 2 - 1] + of[length / 2]) / 2.0,
    }
}

/// A guest that works. It ends when this is dropped.
struct Running {
    child: Child,
    console: Console,
    control: PathBuf,
    _ram: tempfile::TempDir,
    _folder: tempfile::TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(config: &TrackConfig) -> Result<Self, TrackError> {
        let folder = tempfile::tempdir()?;
        let ram = tempfile::tempdir_in(RAM_FOLDER)?;
        let console = Console::open(folder.path())?;
        let control = folder.path().join("control");
        let command = command(config, folder.path(), ram.path(), &control, &console)?;
        let log = folder.path().join("log");
        let child = start(command, &log)?;
        let mut running = Self {
            child,
            console,
            control,
            _ram: ram,
            _folder: folder,
        };
        let start = Instant::now();
        while running.console.ticks().is_empty() {
            let ended = running.child.try_wait()?;
            if ended.is_some() || start.elapsed() > BOOT_WITHIN {
                let log = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(WanError::TooLate {
                    what: "the guest's first tick",
                    seconds: start.elapsed().as_secs(),
                    log: format!("{log}{}", running.console.others()),
                }
                .into());
            }
            thread::sleep(SETTLE);
        }
        thread::sleep(SETTLE);
        Ok(running)
    }

    fn machine(&self, guest: Guest) -> Result<Box<dyn SourceMachine>, TrackError> {
        let failed = |error: MachineError| TrackError::Machine(error);
        Ok(match guest {
            Guest::Payload => Box::new(
                RemoteMachine::connect(&self.control).map_err(|error| failed(error.into()))?,
            ),
            Guest::Qemu => Box::new(
                qemu::Source::connect(&self.control).map_err(|error| failed(error.into()))?,
            ),
        })
    }

    /// Signs of life a second, for so long; `each` is called at these intervals.
    fn speed(
        &self,
        time: Duration,
        mut each: impl FnMut() -> Result<(), TrackError>,
        every: Duration,
    ) -> Result<f64, TrackError> {
        thread::sleep(SETTLE);
        let from = Instant::now();
        let until = from + time;
        let mut next = from + every;
        while next <= until {
            thread::sleep(next.saturating_duration_since(Instant::now()));
            each()?;
            next += every;
        }
        thread::sleep(until.saturating_duration_since(Instant::now()));
        let ticks = self.console.ticks();
        let mut in_time = ticks.iter().filter(|tick| tick.at >= from);
        match (in_time.next(), ticks.last()) {
            (Some(first), Some(last)) if last.number > first.number => {
                let seconds = last.at.duration_since(first.at).as_secs_f64();
                Ok((last.number - first.number) as f64 / seconds)
            }
            _ => Err(WanError::TooLate {
                what: "a second tick of the guest",
                seconds: time.as_secs(),
                log: self.console.others(),
            }
            .into()),
        }
    }
}

fn command(
    config: &TrackConfig,
    folder: &Path,
    ram: &Path,
    control: &Path,
    console: &Console,
) -> Result<Command, TrackError> {
    Ok(match config.guest {
        Guest::Payload => guest::payload_command(
            &config.lazyvm,
            config.memory_bytes,
            &config.workload,
            control,
            &console.source,
        ),
        Guest::Qemu => {
            let images = Images::make(folder, config.kernel.as_deref())?;
            let mut words = guest::qemu_words(
                &images,
                config.memory_bytes,
                &config.workload,
                &ram.join("ram"),
                control,
                &console.source,
            );
            if let Some(append) = words.last_mut() {
                append.push_str(AT_FULL_SPEED);
            }
            crate::wan::command(&words)
        }
    })
}

fn start(mut command: Command, log: &Path) -> Result<Child, TrackError> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(log)?)
        .spawn();
    child.map_err(|source| {
        WanError::Start {
            name: "the guest".to_owned(),
            source,
        }
        .into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_an_even_number_the_median_is_between_the_two_in_the_middle() {
        assert_eq!(median([4.0, 1.0, 3.0, 2.0].into_iter()), 2.5);
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert!(median(std::iter::empty()).is_nan());
    }
}
