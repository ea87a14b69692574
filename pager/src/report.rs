//! What a move cost, each figure defined where it stands.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lazyvm_wire::{PageIndex, PageRange};
use serde::Serialize;

/// Longest wait that the histogram tells apart, in microseconds: an hour.
const WAIT_MAX_US: u64 = 3_600_000_000;

/// Waits of faults, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    /// Half of them waited no longer.
    pub p50: u64,
    /// Nine of ten.
    pub p90: u64,
    /// 99 of 100.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl Percentiles {
    /// Of these values.
    pub fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            p50: histogram.value_at_quantile(0.5),
            p90: histogram.value_at_quantile(0.9),
            p99: histogram.value_at_quantile(0.99),
            max: histogram.max(),
        }
    }
}

/// A move, as the destination saw it. Times are in microseconds, pages are of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The session's ID.
    pub session: String,
    /// How the machine was moved: `postcopy`.
    pub mode: String,
    /// Bytes of the image.
    pub memory_bytes: u64,
    /// Pages of the image.
    pub pages_total: u64,
    /// Pages that came without their bytes: named by the page map, or found to be zero.
    pub pages_zero: u64,
    /// Pages that came while the machine ran at the source.
    pub pages_precopied: u64,
    /// Pages that came in answer to a fault.
    pub pages_demand: u64,
    /// Pages that the push brought.
    pub pages_pushed: u64,
    /// UDP payload bytes of all connections, both ways.
    pub bytes_wire: u64,
    /// From the pause at the source until it heard of the start here, less half a round trip.
    pub downtime_us: u64,
    /// State and page map, in bytes.
    pub switchover_bytes: u64,
    /// Pages that a touch had to wait for, whether the answer or the push brought them; zero pages not counted.
    pub faults: u64,
    /// From the moment a fault was read until the page was there.
    pub fault_us: Percentiles,
    /// The sum of the above. Faults of several vCPUs count side by side.
    pub blocktime_us_total: u64,
    /// From the start of the move until the vCPUs ran here.
    pub resumed_at_us: u64,
    /// From the start of the move until the last page was here and the source had let go.
    pub complete_at_us: u64,
    /// How many times the connection was lost and made anew.
    pub reconnects: u64,
    /// Whether the digest of every page was the source's; `None` when not asked.
    pub verified: Option<bool>,
}

/// Counts what happens, from any thread.
pub(crate) struct Statistics {
    pub started_at: Instant,
    pub pages_demand: AtomicU64,
    pub pages_pushed: AtomicU64,
    /// Pages that came before the pause and had not changed.
    pub pages_precopied: AtomicU64,
    pub switchover_bytes: AtomicU64,
    pub downtime_us: AtomicU64,
    pub resumed_at_us: AtomicU64,
    pub complete_at_us: AtomicU64,
    pub reconnects: AtomicU64,
    /// Pages that the source could not read. Who waits for one waits on.
    pub unreadable: AtomicU64,
    waits: Mutex<Waits>,
}

struct Waits {
    since: HashMap<PageIndex, Instant>,
    histogram: Histogram<u64>,
    total: Duration,
}

impl Statistics {
    pub fn new(started_at: Instant) -> Self {
        #[expect(
            clippy::expect_used,
            reason = "the library takes bounds and digits such as these"
        )]
        let histogram = Histogram::new_with_bounds(1, WAIT_MAX_US, 3).expect("valid bounds");
        Self {
            started_at,
            pages_demand: AtomicU64::new(0),
            pages_pushed: AtomicU64::new(0),
            pages_precopied: AtomicU64::new(0),
            switchover_bytes: AtomicU64::new(0),
            downtime_us: AtomicU64::new(0),
            resumed_at_us: AtomicU64::new(0),
            complete_at_us: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            unreadable: AtomicU64::new(0),
            waits: Mutex::new(Waits {
                since: HashMap::new(),
                histogram,
                total: Duration::ZERO,
            }),
        }
    }

    /// A fault on this unit was read.
    pub fn fault(&self, unit: PageIndex, now: Instant) {
        self.waits().since.entry(unit).or_insert(now);
    }

    /// These pages are there.
    pub fn served(&self, range: PageRange, now: Instant) {
        let mut waits = self.waits();
        // Few pages are waited for at a time, and a push brings many: the shorter list leads.
        let found: Vec<PageIndex> = if (waits.since.len() as u64) < range.count {
            waits
                .since
                .keys()
                .copied()
                .filter(|&page| range.contains(page))
                .collect()
        } else {
            range
                .pages()
                .filter(|page| waits.since.contains_key(page))
                .collect()
        };
        for since in found
            .iter()
            .filter_map(|page| waits.since.remove(page))
            .collect::<Vec<_>>()
        {
            let wait = now.saturating_duration_since(since);
            waits.total += wait;
            waits
                .histogram
                .saturating_record((wait.as_micros() as u64).min(WAIT_MAX_US));
        }
    }

    pub fn faults(&self) -> u64 {
        self.waits().histogram.len()
    }

    pub fn fault_us(&self) -> Percentiles {
        Percentiles::of(&self.waits().histogram)
    }

    pub fn blocktime_us(&self) -> u64 {
        self.waits().total.as_micros() as u64
    }

    pub fn since_start_us(&self) -> u64 {
        self.started_at.elapsed().as_micros() as u64
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}
