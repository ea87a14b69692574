//! One fault lane, 64 threads: whether it serves them all alike when they fault at once.
//!
//! A server and a pager of the real kind over loopback QUIC, without push, so that every page is asked for. What is timed
//! is a touch of an absent page: from just before it until its thread goes on. The goal is a p99 of at most 4 × the p50.
//!
//! Two ways to fault at once. In *rounds*, all threads touch a page each, and none goes on before all have; the first of
//! a round is served 64 times as fast as the last by any lane, so this has a p99 of about 2 × the p50 even where the
//! order is fair. In a *stream*, each thread touches its next page as soon as it has the one before, so that 64 faults
//! are always open: here a fair lane has nearly the same wait for all, and an unfair one shows. The same with the pages
//! at hand tells what the threads' own wake-ups cost; a thread alone tells what one fault costs. Beside the threads' view
//! stands the lane's own, from reading a fault until its page was there: what is in the first and not in the second is
//! waiting for a processor, before the lane reads the fault or after it woke the thread.
//!
//! Percentiles of single touches are no business of Criterion's, so this is a program of its own that prints a table:
//! of several runs the one whose ratio is the median of theirs, as others on the machine can spoil any of them, and beside
//! it the lowest and highest ratio of all. With `--test` it runs once and shortly, as Criterion's benches do.

#[allow(dead_code, reason = "each bench uses its part")]
mod random;

use std::error::Error;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lazyvm_pager::{Filling, InstallMode, LazyMemory, Options, Percentiles};
use lazyvm_server::{Server, SessionConfig};
use lazyvm_vmm_glue::plain::PlainMachine;
use lazyvm_wire::trust::Identity;
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageRange};
use nix::sys::memfd::{MFdFlags, memfd_create};

use random::Random;

const THREADS: usize = 64;

/// Touches of each thread that are not counted: streams are opened, memory gets warm.
const WARM_UP: usize = 8;

/// Touches of each thread that are counted; one that is alone makes more.
const TOUCHES: usize = 250;

/// An odd number, so that one is the median.
const RUNS: usize = 7;

/// Where the pages come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Supply {
    /// Memory of this process.
    Local,
    /// A server.
    Remote,
}

/// When a thread touches its next page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// When all threads have the page before.
    Rounds,
    /// When it has the page before.
    Stream,
}

#[derive(Clone, Copy)]
struct Scenario {
    name: &'static str,
    threads: usize,
    supply: Supply,
    pace: Pace,
}

const SCENARIOS: [Scenario; 6] = [
    Scenario {
        name: "1 thread, pages at hand",
        threads: 1,
        supply: Supply::Local,
        pace: Pace::Stream,
    },
    Scenario {
        name: "1 thread, remote",
        threads: 1,
        supply: Supply::Remote,
        pace: Pace::Stream,
    },
    Scenario {
        name: "64 threads in rounds, pages at hand",
        threads: THREADS,
        supply: Supply::Local,
        pace: Pace::Rounds,
    },
    Scenario {
        name: "64 threads in rounds, remote",
        threads: THREADS,
        supply: Supply::Remote,
        pace: Pace::Rounds,
    },
    Scenario {
        name: "64 threads in a stream, pages at hand",
        threads: THREADS,
        supply: Supply::Local,
        pace: Pace::Stream,
    },
    Scenario {
        name: "64 threads in a stream, remote",
        threads: THREADS,
        supply: Supply::Remote,
        pace: Pace::Stream,
    },
];

fn main() -> Result<(), Box<dyn Error>> {
    // As Criterion tells a run to measure from one that only shows that the bench works.
    let measure =
        std::env::args().any(|arg| arg == "--bench") && std::env::args().all(|arg| arg != "--test");
    let (touches, runs) = if measure { (TOUCHES, RUNS) } else { (2, 1) };
    println!(
        "{:38} {:>6} {:>6} {:>6} {:>6} {:>9} {:>11} {:>12} {:>10} {:>13}",
        "µs that a touch waits",
        "p50",
        "p90",
        "p99",
        "max",
        "p99/p50",
        "of all runs",
        "threads' p50",
        "touches/s",
        "lane p50, p99"
    );
    for scenario in SCENARIOS {
        let touches = touches * if scenario.threads == 1 { 8 } else { 1 };
        let mut outcomes = (0..runs)
            .map(|_| run(scenario, touches))
            .collect::<Result<Vec<_>, _>>()?;
        outcomes.sort_by(|one, other| one.ratio().total_cmp(&other.ratio()));
        print(scenario.name, &outcomes);
    }
    Ok(())
}

/// Prints the outcome in the middle of these, which are sorted by their ratio.
fn print(name: &str, outcomes: &[Outcome]) {
    let [lowest, .., highest] = outcomes else {
        // A single run, which only shows that all this works.
        return println!("{name:38} works");
    };
    let median = &outcomes[outcomes.len() / 2];
    let Percentiles { p50, p90, p99, max } = Percentiles::of(&median.all);
    let [p50, p90, p99, max] = [p50, p90, p99, max].map(|ns| ns / 1000);
    let ratio = median.ratio();
    let ratios = format!("{:.1}-{:.1}", lowest.ratio(), highest.ratio());
    let threads = format!("{}-{}", median.medians.0 / 1000, median.medians.1 / 1000);
    let rate = median.all.len() as f64 / median.time.as_secs_f64();
    let lane = median
        .lane
        .map_or_else(String::new, |lane| format!("{}, {}", lane.p50, lane.p99));
    println!(
        "{name:38} {p50:6} {p90:6} {p99:6} {max:6} {ratio:9.2} {ratios:>11} {threads:>12} {rate:10.0} {lane:>13}"
    );
}

/// What the threads of a scenario saw.
struct Outcome {
    /// Waits of all touches, in nanoseconds.
    all: Histogram<u64>,
    /// The lowest and the highest of the threads' own medians, in nanoseconds: apart where a thread is starved.
    medians: (u64, u64),
    /// From the first counted touch to the last.
    time: Duration,
    /// What the lane itself took, in microseconds, from reading a fault until its page was there.
    lane: Option<Percentiles>,
}

impl Outcome {
    /// The p99 over the p50.
    fn ratio(&self) -> f64 {
        let Percentiles { p50, p99, .. } = Percentiles::of(&self.all);
        p99 as f64 / p50.max(1) as f64
    }
}

fn run(scenario: Scenario, touches: usize) -> Result<Outcome, Box<dyn Error>> {
    let pages = (scenario.threads * (WARM_UP + touches)) as u64;
    let layout = Layout::flat(pages)?;
    let content = Random::new(1).bytes(layout.bytes() as usize);
    let memory = Arc::new(LazyMemory::shared(&layout, InstallMode::Minor)?);
    let filling = match scenario.supply {
        Supply::Local => {
            let read = move |range: PageRange, out: &mut [u8]| {
                let start = range.first.byte_offset() as usize;
                out.copy_from_slice(&content[start..start + out.len()]);
                Ok(())
            };
            lazyvm_pager::fill_locally(&layout, memory.clone(), Box::new(read))?;
            None
        }
        Supply::Remote => Some(Remote::start(&content, memory.clone())?),
    };
    let mut outcome = touch_all(scenario, touches, &memory)?;
    if let Some(remote) = filling {
        // Every page was touched, so the move is at its end.
        let report = remote.filling.wait()?;
        assert_eq!(report.pages_demand, pages, "all pages came by a fault");
        outcome.lane = Some(report.fault_us);
    }
    Ok(outcome)
}

/// A move over loopback.
struct Remote {
    filling: Filling,
    _server: Server,
}

impl Remote {
    fn start(content: &[u8], memory: Arc<LazyMemory>) -> Result<Self, Box<dyn Error>> {
        let image = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC)?);
        image.write_all_at(content, 0)?;
        let identity = Identity::generate()?;
        let server = Server::bind((Ipv4Addr::LOCALHOST, 0).into(), &identity)?;
        let session = server.add_session(SessionConfig {
            push: false,
            ..SessionConfig::new(Arc::new(PlainMachine::new(image)?))
        })?;
        let ticket = server.ticket(&session, vec![server.local_addr()?]);
        let filling = lazyvm_pager::connect(&ticket, Options::default())?.fill(memory)?;
        Ok(Self {
            filling,
            _server: server,
        })
    }
}

fn touch_all(
    scenario: Scenario,
    touches: usize,
    memory: &LazyMemory,
) -> Result<Outcome, Box<dyn Error>> {
    let per_thread = WARM_UP + touches;
    let order = Random::new(2).order((scenario.threads * per_thread) as u64);
    let together = Barrier::new(scenario.threads);
    let threads: Vec<(Instant, Vec<u64>, Instant)> = std::thread::scope(|scope| {
        let started: Vec<_> = order
            .chunks(per_thread)
            .map(|pages| scope.spawn(|| touch_in_turn(scenario.pace, pages, memory, &together)))
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().map_err(|_| "a thread panicked"))
            .collect::<Result<_, _>>()
    })?;
    let mut all = histogram()?;
    let mut medians = (u64::MAX, 0);
    for (_, waits, _) in &threads {
        let mut own = histogram()?;
        waits.iter().for_each(|&wait| own.saturating_record(wait));
        all.add(&own)?;
        let median = own.value_at_quantile(0.5);
        medians = (medians.0.min(median), medians.1.max(median));
    }
    let first = threads.iter().map(|thread| thread.0).min();
    let last = threads.iter().map(|thread| thread.2).max();
    let time = first
        .zip(last)
        .map_or(Duration::ZERO, |(first, last)| last - first);
    Ok(Outcome {
        all,
        medians,
        time,
        lane: None,
    })
}

/// Touches a thread's pages; gives when it began to count, the waits in nanoseconds, and when it was done.
fn touch_in_turn(
    pace: Pace,
    pages: &[u64],
    memory: &LazyMemory,
    together: &Barrier,
) -> (Instant, Vec<u64>, Instant) {
    let mut waits = Vec::with_capacity(pages.len());
    let mut counted_from = Instant::now();
    for (number, &page) in pages.iter().enumerate() {
        if pace == Pace::Rounds || number == 0 || number == WARM_UP {
            together.wait();
        }
        let before = Instant::now();
        if number == WARM_UP {
            counted_from = before;
        }
        touch(memory, PageIndex(page));
        if number >= WARM_UP {
            waits.push(before.elapsed().as_nanos() as u64);
        }
    }
    (counted_from, waits, Instant::now())
}

fn touch(memory: &LazyMemory, page: PageIndex) {
    let mut word = [0; 8];
    let read = memory.read_at(page.byte_offset() + PAGE_SIZE as u64 / 2, &mut word);
    assert!(read.is_ok() && word != [0; 8], "{page} is there");
}

fn histogram() -> Result<Histogram<u64>, Box<dyn Error>> {
    // From a nanosecond to a minute, to three digits.
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}
