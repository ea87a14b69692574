//! What every move has in common: a fresh path, a guest at the source that works for a while, an order to move, and somebody
//! who watches until it lives again.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use lazyvm_wire::PAGE_SIZE;
use nix::sys::statvfs::statvfs;
use serde_json::Value;

use super::console::Console;
use super::emulator::Emulator;
use super::figures::{self, BASELINE, Figures, Life, STEADY, Sign};
use super::guest::{self, Guest, Images, Touches};
use super::process::{Process, pause, wait_for};
use super::traffic::{BIN_MS, Traffic};
use super::{Setup, WanError};

/// Where guests' memory is: shared memory, as a QEMU to be served has it.
const RAM_FOLDER: &str = "/dev/shm";

/// How long a guest may take to boot and to fill its memory.
const BOOT_WITHIN: Duration = Duration::from_secs(180);

/// How long a guest works before anything is done to it.
pub const SETTLE: Duration = Duration::from_millis(1500);

/// How long a guest that has not recovered is watched once all its memory is there.
const RECOVERY_WITHIN: Duration = Duration::from_secs(10);

/// What counts of a guest's writes: those of this long before the order.
const DIRTIED_WITHIN: Duration = Duration::from_secs(1);

/// Bytes of a block in [`MetadataExt::blocks`].
const BLOCK_BYTES: u64 = 512;

/// What is watched of a guest that has recovered.
const WATCHED_ON: Duration = Duration::from_secs(1);

/// A move in the making. What it holds is in the order in which it is to end.
pub struct Trial<'a> {
    /// The path.
    pub emulator: Emulator,
    console: Console,
    setup: &'a Setup,
    images: Option<&'a Images>,
    ram: tempfile::TempDir,
    folder: tempfile::TempDir,
}

/// One end of the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Where the guest is.
    Source,
    /// Where it goes.
    Destination,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

/// What a mover says of its move.
pub struct Told {
    /// When all was there.
    pub complete_at: Instant,
    /// Its own figure, in microseconds.
    pub downtime_us: u64,
    /// Pages that were waited for.
    pub faults: u64,
    /// How long they took.
    pub fault_us: Option<Value>,
    /// How many there were by when.
    pub faults_over_time: Vec<(Instant, u64)>,
}

/// A move that is over.
pub struct Record {
    /// Its figures.
    pub figures: Figures,
    /// The guest's signs of life.
    pub signs: Vec<Sign>,
    /// When all was there, in microseconds from the order.
    pub complete_us: i64,
    /// Until when the guest was watched, likewise.
    pub end_us: i64,
    /// Bytes that arrived from the source by microseconds from the order, in bins of [`super::traffic::BIN_MS`].
    pub bytes: Vec<(i64, u64)>,
    /// Pages waited for by microseconds from the order.
    pub faults: Vec<(i64, u64)>,
}

/// The moment of the order.
pub struct Order {
    at: Instant,
    before: Traffic,
    /// Memory that the guest has written to, and what of it in a second; `None` for a clone.
    data_bytes: Option<u64>,
    dirty_bit_s: Option<f64>,
    /// A clone is resumed: the guest has gone on, and other clones may have been there.
    of_clone: bool,
}

impl<'a> Trial<'a> {
    /// A fresh path with nothing on it.
    pub fn new(setup: &'a Setup, images: Option<&'a Images>) -> Result<Self, WanError> {
        let ram = tempfile::Builder::new();
        let (mut ram, mut folder) = (ram, tempfile::Builder::new());
        let ram = ram.prefix("lazyvm-wan-").tempdir_in(RAM_FOLDER)?;
        let folder = folder.prefix("lazyvm-wan-").tempdir()?;
        let room = statvfs(ram.path()).map_err(std::io::Error::from)?;
        let free = room.blocks_available() * room.fragment_size();
        let needed = 2 * setup.memory_bytes;
        if free < needed {
            return Err(WanError::NoRoom {
                folder: RAM_FOLDER,
                free,
                needed,
            });
        }
        // Where the machine is a guest itself, its host would be measured.
        crate::sys::warm_free_memory(setup.memory_bytes)?;
        Ok(Self {
            emulator: Emulator::start(setup.path)?,
            console: Console::open(folder.path())?,
            setup,
            images,
            ram,
            folder,
        })
    }

    /// A file of this move.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where the guest's monitor listens: QEMU's QMP, the built-in monitor's control socket.
    pub fn socket(&self, end: End) -> PathBuf {
        self.file(&format!("{}.socket", end.name()))
    }

    /// Where the guest's console goes.
    pub fn console(&self, end: End) -> &Path {
        match end {
            End::Source => &self.console.source,
            End::Destination => &self.console.destination,
        }
    }

    /// Starts a process at one end.
    pub fn start(&self, end: End, name: &str, command: Command) -> Result<Process, WanError> {
        let namespace = match end {
            End::Source => &self.emulator.source,
            End::Destination => &self.emulator.destination,
        };
        Process::start(namespace, self.folder.path(), name, command)
    }

    /// The command of a QEMU at one end.
    pub fn qemu_words(&self, end: End) -> Vec<String> {
        let Some(images) = self.images else {
            return Vec::new();
        };
        let ram = self.ram.path().join(end.name());
        guest::qemu_words(
            images,
            self.setup.memory_bytes,
            &self.setup.workload,
            &ram,
            &self.socket(end),
            self.console(end),
        )
    }

    /// Starts the guest and waits until it works.
    pub fn start_guest(&self) -> Result<Process, WanError> {
        let command = match self.setup.guest {
            Guest::Payload => guest::payload_command(
                &self.setup.lazyvm,
                self.setup.memory_bytes,
                &self.setup.workload,
                &self.socket(End::Source),
                self.console(End::Source),
            ),
            Guest::Qemu => command(&self.qemu_words(End::Source)),
        };
        let mut guest = self.start(End::Source, "guest", command)?;
        let booted = guest.wait_for("the guest's first tick", BOOT_WITHIN, || {
            Ok((!self.console.ticks().is_empty()).then_some(()))
        });
        booted.inspect_err(|_| {
            tracing::error!(console = self.console.others(), "the guest's console");
        })?;
        pause(SETTLE)?;
        Ok(guest)
    }

    /// Measures the guest's speed; then the move is to be ordered at once.
    pub fn order(&self) -> Result<Order, WanError> {
        pause(BASELINE)?;
        Ok(self.order_now(false))
    }

    /// To resume a clone of the guest, now.
    pub fn order_of_clone(&self) -> Order {
        self.order_now(true)
    }

    fn order_now(&self, of_clone: bool) -> Order {
        let data_bytes = (!of_clone).then(|| self.data_bytes());
        let dirty_bit_s = (!of_clone).then(|| self.dirty_bit_s()).flatten();
        let at = Instant::now();
        if let Some((after, time)) = self.setup.blackout {
            self.emulator.black_out(at + after, time);
        }
        Order {
            at,
            before: self.emulator.traffic(),
            data_bytes,
            dirty_bit_s,
            of_clone,
        }
    }

    /// What the guest has written to by now. The payload has little but what it fills.
    fn data_bytes(&self) -> u64 {
        let ram = std::fs::metadata(self.ram.path().join(End::Source.name()));
        ram.map_or(self.setup.workload.fill_bytes, |file| {
            file.blocks() * BLOCK_BYTES
        })
    }

    fn dirty_bit_s(&self) -> Option<f64> {
        let now = Instant::now();
        let ticks = self.console.ticks();
        let since = ticks.iter().find(|tick| tick.at + DIRTIED_WITHIN >= now)?;
        let last = ticks.last()?;
        let seconds = last.at.duration_since(since.at).as_secs_f64();
        let (guest, workload) = (self.setup.guest, &self.setup.workload);
        let pages = guest::written_pages(guest, workload, since.touches, last.touches);
        (seconds > 0.0).then(|| pages * PAGE_SIZE as f64 * 8.0 / seconds)
    }

    /// What the guest's kernel complains of, or what the guest said last besides its ticks.
    pub fn console_lines(&self) -> String {
        let all = self.console.others();
        let complaints: Vec<&str> = all
            .lines()
            .filter(|line| line.contains("BUG:") || line.contains("Kernel panic"))
            .collect();
        match &complaints[..] {
            [] => format!("its console: {}", all.lines().last().unwrap_or_default()),
            _ => format!("its console: {}", complaints.join(", ")),
        }
    }

    /// Nobody goes on with the line that was begun last.
    pub fn cut_line(&self) {
        self.console.cut_line();
    }

    /// Removes the memory of a QEMU that has ended.
    pub fn forget(&self, end: End) -> Result<(), WanError> {
        match std::fs::remove_file(self.ram.path().join(end.name())) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Watches the guest until it has recovered, and puts the figures together.
    pub fn watch(&self, order: &Order, told: &Told, mover: &str) -> Result<Record, WanError> {
        let until_complete = self.emulator.traffic();
        let wait_until = told.complete_at + RECOVERY_WITHIN;
        wait_for("the guest's recovery", 2 * RECOVERY_WITHIN, || {
            let life = Life::of(&self.signs(order), order.us(Instant::now()));
            let recovered = life.is_some_and(|life| life.recovered_us.is_some());
            let enough = Instant::now() >= told.complete_at + STEADY;
            Ok(((recovered && enough) || Instant::now() >= wait_until).then_some(()))
        })?;
        pause(WATCHED_ON)?;
        let end_us = order.us(Instant::now());
        let signs = self.signs(order);
        let errors = self.console.ticks().last().map_or(0, |tick| tick.errors);
        if errors > 0 {
            return Err(WanError::WrongMemory(errors, mover.to_owned()));
        }
        let life = Life::of(&signs, end_us).ok_or(WanError::TooLate {
            what: "a tick at the destination",
            seconds: RECOVERY_WITHIN.as_secs(),
            log: self.console_lines(),
        })?;
        let zero_us = order.us(self.emulator.started_at);
        let bins = (0..).zip(self.emulator.traffic().bins);
        let bytes: Vec<(i64, u64)> = bins
            .map(|(bin, bytes)| (zero_us + bin * BIN_MS as i64 * 1000, bytes[0]))
            .collect();
        Ok(Record {
            figures: self.figures(order, told, &life, &until_complete, &bytes),
            complete_us: order.us(told.complete_at),
            end_us,
            bytes,
            faults: told
                .faults_over_time
                .iter()
                .map(|(at, count)| (order.us(*at), *count))
                .collect(),
            signs,
        })
    }

    fn figures(
        &self,
        order: &Order,
        told: &Told,
        life: &Life,
        until_complete: &Traffic,
        bytes: &[(i64, u64)],
    ) -> Figures {
        let complete_us = order.us(told.complete_at);
        let after_pause_us = complete_us - life.left_at_us;
        let path = until_complete.totals.since(order.before.totals);
        let carried = self.setup.path.rate_bit_s as f64 / 8.0 * after_pause_us as f64 / 1e6;
        let rate = self.setup.path.rate_bit_s;
        let by_rate = |bits: f64| (rate > 0).then(|| bits / rate as f64);
        let copy_s = order
            .data_bytes
            .and_then(|bytes| by_rate(bytes as f64 * 8.0));
        let after_pause: u64 = bytes
            .iter()
            .filter(|(at_us, _)| (life.left_at_us..complete_us).contains(at_us))
            .map(|(_, bytes)| bytes)
            .sum();
        let touched_pages = self.touched_pages(told.complete_at);
        let cpu_us = until_complete.relay_cpu_us - order.before.relay_cpu_us;
        Figures {
            first_sign_ms: ms(life.first_sign_us),
            freeze_ms: ms(life.freeze_us),
            recovered_ms: life.recovered_us.map(ms),
            total_ms: ms(complete_us),
            after_pause_ms: ms(after_pause_us),
            downtime_us: told.downtime_us,
            bytes_wire: path.bytes_from_source,
            data_bytes: order.data_bytes,
            copies: copy_s.map(|copy_s| complete_us as f64 / 1e6 / copy_s),
            dirty_bit_s: order.dirty_bit_s,
            dirty_share: order.dirty_bit_s.and_then(by_rate),
            faults: told.faults,
            touched_pages,
            fault_share: touched_pages.map(|pages| told.faults as f64 / pages.max(1) as f64),
            fault_us: told.fault_us.clone(),
            path_share: (carried > 0.0).then(|| after_pause as f64 / carried),
            speed_before_hz: life.speed_before_hz,
            speed_after_hz: life.speed_after_hz,
            ticks_out_of_order: life.out_of_order,
            path,
            emulator_cpu_share: cpu_us as f64 / complete_us.max(1) as f64,
        }
    }

    /// By the guest's own counts of touches, from its last tick at the source to its last tick until then.
    fn touched_pages(&self, until: Instant) -> Option<u64> {
        let ticks = self.console.ticks();
        let from = ticks.iter().rfind(|tick| !tick.moved)?.touches;
        let to = ticks.iter().rfind(|tick| tick.at <= until)?.touches;
        match self.setup.guest {
            Guest::Qemu => Some(guest::distinct_pages(
                &self.setup.workload,
                Touches::All,
                from,
                to,
            )),
            Guest::Payload => None,
        }
    }

    fn signs(&self, order: &Order) -> Vec<Sign> {
        let ticks = self.console.ticks();
        let sign = |tick: &super::console::Tick| Sign {
            at_us: order.us(tick.at),
            moved: tick.moved,
            number: tick.number,
        };
        let signs: Vec<Sign> = ticks.iter().map(sign).collect();
        if order.of_clone {
            figures::of_clone(&signs)
        } else {
            signs
        }
    }
}

impl Order {
    /// Microseconds from the order on; negative before.
    fn us(&self, at: Instant) -> i64 {
        match at.checked_duration_since(self.at) {
            Some(after) => after.as_micros() as i64,
            None => -(self.at.duration_since(at).as_micros() as i64),
        }
    }
}

/// A command of these words.
pub fn command(words: &[String]) -> Command {
    let mut words = words.iter();
    let mut command = Command::new(words.next().map_or("", String::as_str));
    command.args(words);
    command
}

fn ms(us: i64) -> f64 {
    us as f64 / 1000.0
}
