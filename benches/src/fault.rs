//! `lazyvm bench fault`: how long a touch of an absent page waits.
//!
//! The touching thread stands for a vCPU and has a CPU to itself, locally and remotely alike (`cpus`).

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lazyvm_pager::{Filling, InstallMode, LazyMemory, Options, Percentiles};
use lazyvm_wire::control::Lane;
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageRange};
use serde::Serialize;

use crate::bare::{Client, Flavour};
use crate::cpus::Split;
use crate::error::BenchError;
use crate::image::{self, Content, next_random};
use crate::link::{Link, Relay};
use crate::source::Source;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct FaultConfig {
    /// Memory, in bytes.
    pub bytes: u64,
    /// Touches of absent pages that are timed.
    pub faults: u64,
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
}

/// Local and remote in turn, so often: machines drift.
const ROUNDS: u64 = 5;

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
    let cpus = Split::of_this_process()?;
    cpus.enter_host()?;
    let mut source = Source::start()?;
    source.image(config.bytes, Content::Random)?;
    let mut wire = histogram();
    let mut local = histogram();
    let mut remote = histogram();
    let mut pushed = Pushed::default();
    for round in 1..=ROUNDS {
        let until = config.faults * round / ROUNDS;
        wire_round_trips(&mut source, config, &mut wire)?;
        local_faults(config, &cpus, until - local.len(), &mut local)?;
        // A push at full speed soon has brought everything, so there are as many moves as it takes.
        while remote.len() < until {
            let before = remote.len();
            remote_faults(&mut source, config, &cpus, until, &mut remote, &mut pushed)?;
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
    })
}

fn wire_round_trips(
    source: &mut Source,
    config: FaultConfig,
    times: &mut Histogram<u64>,
) -> Result<(), BenchError> {
    let (address, fingerprint) = source.bare(Flavour::Tuned, Lane::Fault)?;
    let relay = relay(address, config.link)?;
    let address = relay.as_ref().map_or(address, Relay::address);
    let count = if config.link.rtt > Duration::from_millis(5) {
        20
    } else {
        400
    };
    Client::connect(address, fingerprint, Lane::Fault, Flavour::Tuned)?.round_trips(count, times)
}

fn relay(server: std::net::SocketAddr, link: Link) -> Result<Option<Relay>, BenchError> {
    Ok(if link.is_plain() {
        None
    } else {
        Some(Relay::start(server, link)?)
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

fn touch(memory: &LazyMemory, page: u64, times: &mut Histogram<u64>) -> Result<(), BenchError> {
    let mut byte = [0];
    let start = Instant::now();
    memory.read_at(page * PAGE_SIZE as u64, &mut byte)?;
    times.saturating_record(start.elapsed().as_micros() as u64);
    Ok(())
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
    cpus.enter_guest()?;
    for page in touches(layout.pages()).into_iter().take(faults as usize) {
        touch(&memory, page, times)?;
    }
    cpus.enter_host()?;
    Ok(())
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

fn remote_faults(
    source: &mut Source,
    config: FaultConfig,
    cpus: &Split,
    until: u64,
    times: &mut Histogram<u64>,
    pushed: &mut Pushed,
) -> Result<(), BenchError> {
    let mut ticket = source.session(config.push)?;
    let relay = match ticket.addresses.first() {
        Some(&address) => relay(address, config.link)?,
        None => None,
    };
    if let Some(relay) = &relay {
        ticket.addresses = vec![relay.address()];
    }
    let offer = lazyvm_pager::connect(&ticket, Options::default())?;
    let pages = offer.layout().pages();
    let memory = Arc::new(LazyMemory::shared(offer.layout(), InstallMode::Minor)?);
    let filling = offer.fill(memory.clone())?;
    let start = Instant::now();
    cpus.enter_guest()?;
    let last_part = pages - pages / LAST_PART;
    for page in touches(pages) {
        let done = times.len() >= until || (config.push && filling.progress().pages_here == pages);
        if done {
            break;
        }
        let in_part = !config.push || page >= last_part;
        if in_part && !filling.is_here(PageIndex(page)) {
            touch(&memory, page, times)?;
        }
    }
    cpus.enter_host()?;
    if config.push {
        pushed.bytes += filling.progress().pages_pushed * PAGE_SIZE as u64;
        pushed.time += start.elapsed();
        finish(filling)?;
    }
    // Without a push the rest never comes. The lanes wait on, asleep, until the run ends.
    Ok(())
}

fn finish(filling: Filling) -> Result<(), BenchError> {
    filling.wait()?;
    Ok(())
}
