//! `lazyvm bench fault`: how long a touch of an absent page waits.
//!
//! The touching thread stands for a vCPU and has a CPU to itself, locally and remotely alike (`cpus`). Over a link with a
//! delay there may be many such threads; each takes the CPU that it finds, ahead of all else: a vCPU with a CPU to itself
//! does not wait for one.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lazyvm_pager::{InstallMode, LazyMemory, Options, Percentiles};
use lazyvm_wire::control::Lane;
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageRange};
use serde::Serialize;

use crate::bare::{Client, Flavour};
use crate::cpus::Split;
use crate::error::BenchError;
use crate::image::{self, Content, next_random};
use crate::link::Link;
use crate::source::Source;
use crate::way::Way;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct FaultConfig {
    /// Memory, in bytes.
    pub bytes: u64,
    /// Touches of absent pages that are timed.
    pub faults: u64,
    /// Threads that touch, each a page at a time.
    pub threads: u32,
    /// The link between source and destination.
    pub link: Link,
    /// Whether the push runs at full speed meanwhile.
    pub push: bool,
}

/// What was measured. Times are in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct FaultReport {
    /// The same memory, pager and touches, with the pages in local memory.
    pub local_fault_us: Percentiles,
    /// From the touch until the touching thread goes on.
    pub remote_fault_us: Percentiles,
    /// A 16-byte request and a page back over bare QUIC, on a stream that is kept, over the same link.
    pub wire_rtt_us: Percentiles,
    /// Touches that were timed.
    pub faults: u64,
    /// What the push brought meanwhile, in megabits a second; 0 without.
    pub push_mbit_s: f64,
    /// Packets that the link lost by chance and that its full queue dropped, where there is a link and the run is
    /// root's.
    pub lost_packets: Option<[u64; 2]>,
}

/// Local and remote in turn, so often: machines drift.
const ROUNDS: u64 = 5;

/// The same over a link with a delay, where what drifts matters less and a move takes long.
const ROUNDS_FAR: u64 = 2;

/// Round trips of a link that the push has to itself before anything is touched. A real move's push has had the time of
/// its warm-up.
const AHEAD_ROUND_TRIPS: u32 = 20;

pub(crate) fn histogram() -> Histogram<u64> {
    #[expect(
        clippy::expect_used,
        reason = "the library takes bounds and digits such as these"
    )]
    Histogram::new_with_bounds(1, 3_600_000_000, 3).expect("valid bounds")
}

/// Runs it.
///
/// # Errors
/// [`BenchError`].
pub fn run(config: FaultConfig) -> Result<FaultReport, BenchError> {
    let way = Way::of(config.link)?;
    let cpus = if way.is_near() {
        Split::of_this_process()?
    } else {
        Split::undivided()?
    };
    cpus.enter_host()?;
    let address = way.source_address()?;
    let mut source = way.at_source(|| Source::start(address))?;
    source.image(config.bytes, Content::Random)?;
    let mut wire = histogram();
    let mut local = histogram();
    let mut remote = histogram();
    let mut pushed = Pushed::default();
    let rounds = if way.is_near() { ROUNDS } else { ROUNDS_FAR };
    for round in 1..=rounds {
        let until = config.faults * round / rounds;
        wire_round_trips(&mut source, config, &way, &mut wire)?;
        local_faults(config, &cpus, until - local.len(), &mut local)?;
        // A push at full speed soon has brought everything, so there are as many moves as it takes.
        while remote.len() < until {
            let before = remote.len();
            let run = Run {
                config,
                way: &way,
                cpus: &cpus,
            };
            run.remote_faults(&mut source, until, &mut remote, &mut pushed)?;
            if remote.len() == before {
                return Err(BenchError::SourceSays(
                    "no page was absent when it was touched".to_owned(),
                ));
            }
        }
    }
    Ok(FaultReport {
        local_fault_us: Percentiles::of(&local),
        remote_fault_us: Percentiles::of(&remote),
        wire_rtt_us: Percentiles::of(&wire),
        faults: remote.len(),
        push_mbit_s: pushed.mbit_s(),
        lost_packets: way.lost_packets(),
    })
}

fn wire_round_trips(
    source: &mut Source,
    config: FaultConfig,
    way: &Way,
    times: &mut Histogram<u64>,
) -> Result<(), BenchError> {
    let (address, fingerprint) = source.bare(Flavour::Tuned, Lane::Fault)?;
    let (address, _relay) = way.to(address)?;
    let (uncounted, count) = if config.link.rtt > Duration::from_millis(5) {
        (2, 20)
    } else {
        (100, 400)
    };
    way.at_destination(|| {
        let client = Client::connect(address, fingerprint, Lane::Fault, Flavour::Tuned)?;
        client.round_trips(uncounted, count, times)
    })
}

/// Every page of the image, each once, in an order without a pattern; the same one each time.
fn touches(pages: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    let mut random = 0x1234_5678_9abc_def1;
    for number in (1..order.len()).rev() {
        order.swap(
            number,
            (next_random(&mut random) % (number as u64 + 1)) as usize,
        );
    }
    order
}

/// Touches these pages, which no other thread does, and adds what each took. `next` gives the page; `None` is the end.
fn touch_all(
    memory: &LazyMemory,
    cpus: &Split,
    threads: u32,
    next: impl Fn() -> Option<u64> + Sync,
    times: &mut Histogram<u64>,
) -> Result<(), BenchError> {
    let all = Mutex::new(times);
    let one = || {
        cpus.enter_guest()?;
        let mut times = histogram();
        let mut byte = [0];
        while let Some(page) = next() {
            let start = Instant::now();
            memory.read_at(page * PAGE_SIZE as u64, &mut byte)?;
            times.saturating_record(start.elapsed().as_micros() as u64);
        }
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        // Both take the same values.
        let _ = all.add(&times);
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads.max(1)).map(|_| scope.spawn(one)).collect();
        threads.into_iter().try_for_each(|thread| {
            let panicked = |_| Err(std::io::Error::other("a touching thread panicked").into());
            thread.join().unwrap_or_else(panicked)
        })
    })
}

fn local_faults(
    config: FaultConfig,
    cpus: &Split,
    faults: u64,
    times: &mut Histogram<u64>,
) -> Result<(), BenchError> {
    let layout = layout(config.bytes)?;
    let memory = Arc::new(LazyMemory::shared(&layout, InstallMode::Minor)?);
    // As large as the source's, so that its pages are as far from the processor's cache.
    let image = image::make(config.bytes, Content::Random)?;
    let read =
        move |range: PageRange, out: &mut [u8]| image.read_exact_at(out, range.first.byte_offset());
    lazyvm_pager::fill_locally(&layout, memory.clone(), Box::new(read))?;
    let order = touches(layout.pages());
    let at = AtomicU64::new(0);
    let next = || {
        let at = at.fetch_add(1, Ordering::Relaxed);
        order.get(at as usize).copied().filter(|_| at < faults)
    };
    touch_all(&memory, cpus, config.threads, next, times)
}

fn layout(bytes: u64) -> Result<Layout, BenchError> {
    Layout::flat(bytes / PAGE_SIZE as u64)
        .map_err(|error| BenchError::SourceSays(error.to_string()))
}

#[derive(Default)]
struct Pushed {
    bytes: u64,
    time: Duration,
}

impl Pushed {
    fn mbit_s(&self) -> f64 {
        if self.time.is_zero() {
            0.0
        } else {
            self.bytes as f64 * 8.0 / 1e6 / self.time.as_secs_f64()
        }
    }
}

/// Pages from the image's end that are touched while the push goes on: it comes to them last, so that a touch finds
/// its page absent for nearly as long as the push takes.
const LAST_PART: u64 = 4;

/// What does not change from move to move.
struct Run<'a> {
    config: FaultConfig,
    way: &'a Way,
    cpus: &'a Split,
}

impl Run<'_> {
    /// One move, in which pages are touched until there are `until` times.
    fn remote_faults(
        &self,
        source: &mut Source,
        until: u64,
        times: &mut Histogram<u64>,
        pushed: &mut Pushed,
    ) -> Result<(), BenchError> {
        let config = self.config;
        let mut ticket = source.session(config.push)?;
        let mut relay = None;
        if let Some(&address) = ticket.addresses.first() {
            let (address, started) = self.way.to(address)?;
            ticket.addresses = vec![address];
            relay = started;
        }
        let (filling, memory) = self.way.at_destination(|| {
            let offer = lazyvm_pager::connect(&ticket, Options::default())?;
            let memory = Arc::new(LazyMemory::shared(offer.layout(), InstallMode::Minor)?);
            Ok((offer.fill(memory.clone())?, memory))
        })?;
        let pages = layout(config.bytes)?.pages();
        let start = Instant::now();
        if config.push && !self.way.is_near() {
            std::thread::sleep(config.link.rtt * AHEAD_ROUND_TRIPS);
        }
        let order = touches(pages);
        let last_part = pages - pages / LAST_PART;
        let (at, left) = (AtomicU64::new(0), until - times.len());
        let taken = AtomicU64::new(0);
        let next = || {
            loop {
                let page = *order.get(at.fetch_add(1, Ordering::Relaxed) as usize)?;
                if config.push && filling.progress().pages_here == pages {
                    return None;
                }
                let in_part = !config.push || page >= last_part;
                if in_part && !filling.is_here(PageIndex(page)) {
                    let more = taken.fetch_add(1, Ordering::Relaxed) < left;
                    return more.then_some(page);
                }
            }
        };
        touch_all(&memory, self.cpus, config.threads, next, times)?;
        if config.push {
            pushed.bytes += filling.progress().pages_pushed * PAGE_SIZE as u64;
            pushed.time += start.elapsed();
            filling.wait()?;
        }
        drop(relay);
        // Without a push the rest never comes. The lanes wait on, asleep, until the run ends.
        Ok(())
    }
}
