//! One guest against one policy over one link.
//!
//! The guest touches pages in the order of the trace. Between two touches it computes for as long as it did when it was
//! recorded, less what a fault cost there. A page that has not arrived stalls it, and its request goes to the source, which
//! answers ahead of the push. One vCPU. Loading the state takes no time. Pages are not compressed.

use std::sync::Arc;

use bitvec::prelude::BitVec;
use lazyvm_server::scheduler::{PushScheduler, VirtualOrder};
use lazyvm_server::trace::Trace;
use lazyvm_wire::{Layout, LayoutError, PageMap, PageRange};
use serde::Serialize;

use super::{Link, Policy};

/// Pages that the source takes from the scheduler at a time, as the server's push does.
const BATCH_PAGES: u64 = 32;

/// Computing time between two signs of life.
const TICK_NS: u64 = 10_000_000;

/// The guest is as before once it makes 80% of its way in each window of this length.
const SPEED_WINDOW_NS: u64 = 100_000_000;

/// A page that never arrives by itself.
const NEVER: u64 = u64::MAX;

/// A trace made ready to be replayed.
pub struct Replay {
    trace: Trace,
    layout: Layout,
    order: Arc<VirtualOrder>,
    /// Computing time before each touch, in nanoseconds.
    computing: Vec<u64>,
    fault_cost_us: u64,
}

/// What came of a replay. Times in milliseconds from the pause.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy.
    pub policy: &'static str,
    /// The longest time between two signs of life, a sign being 10 ms of computing; the pause counts as one.
    pub freeze_ms: f64,
    /// The first sign of life.
    pub first_sign_ms: f64,
    /// From when on the guest makes at least 80% of its way in each 100 ms.
    pub recovered_ms: f64,
    /// When the last page of the push arrived.
    pub total_ms: f64,
    /// Touches of pages that were not there.
    pub stalls: u64,
    /// Of these, those that waited for a full round trip.
    pub full_stalls: u64,
    /// Distinct data pages that the guest touched until the push was complete.
    pub touched: u64,
    /// Pages that were pushed.
    pub pushed: u64,
    /// Pages that were sent in answer to a request and had been pushed already.
    pub sent_twice: u64,
    /// No policy can be earlier: one way, the state, and the pages that the first 100 ms of computing need and that the
    /// policy has not sent before the pause, at the link's rate.
    pub limit_ms: f64,
}

impl Outcome {
    /// Share of the touched pages that waited for a full round trip.
    pub fn full_share(&self) -> f64 {
        self.full_stalls as f64 / self.touched.max(1) as f64
    }
}

struct Source {
    link: Link,
    scheduler: PushScheduler,
    free_at: u64,
    /// When each page arrives.
    arrival: Vec<u64>,
    last_arrival: u64,
    pushed: u64,
    deliveries: Vec<PageRange>,
}

impl Source {
    /// Pushes until that time at the source.
    fn push_until(&mut self, until: u64) {
        while self.free_at < until {
            let Some(batch) = self.scheduler.next(BATCH_PAGES) else {
                return;
            };
            for page in batch.range.pages() {
                self.free_at += self.link.page_ns();
                self.arrive(page.as_usize());
            }
            self.pushed += batch.range.count;
            self.deliveries.push(batch.range);
        }
    }

    fn arrive(&mut self, page: usize) {
        let at = self.free_at + self.link.one_way_ns();
        self.arrival[page] = self.arrival[page].min(at);
        self.last_arrival = at;
    }

    /// A request that is made at that time.
    fn request(&mut self, range: PageRange, at: u64) -> bool {
        let heard = at + self.link.one_way_ns();
        self.push_until(heard);
        let twice = self.arrival[range.first.as_usize()] != NEVER;
        self.free_at = self.free_at.max(heard) + self.link.page_ns();
        self.arrive(range.first.as_usize());
        self.scheduler.fault(range);
        twice
    }
}

impl Replay {
    /// Makes a trace ready.
    ///
    /// # Errors
    /// Its image can't be laid out.
    pub fn new(trace: Trace) -> Result<Self, LayoutError> {
        let order = Arc::new(VirtualOrder::new(&trace.hints.virtual_order));
        let mut before = trace.touches.first().map_or(0, |touch| touch.at_us);
        let gaps: Vec<u64> = trace
            .touches
            .iter()
            .map(|touch| touch.at_us - std::mem::replace(&mut before, touch.at_us))
            .collect();
        let mut sorted = gaps.clone();
        sorted.sort_unstable();
        let cost = mode(&sorted);
        Ok(Self {
            layout: Layout::flat(trace.pages)?,
            computing: gaps
                .iter()
                .map(|gap| gap.saturating_sub(cost) * 1000)
                .collect(),
            fault_cost_us: cost,
            trace,
            order,
        })
    }

    /// What a fault is taken to have cost when the trace was recorded, in microseconds: not counted as computing.
    pub fn fault_cost_us(&self) -> u64 {
        self.fault_cost_us
    }

    /// Runs it.
    pub fn run(&self, policy: Policy, link: Link) -> Outcome {
        self.run_and_list(policy, link).0
    }

    /// The same, with what was pushed, in order.
    pub fn run_and_list(&self, policy: Policy, link: Link) -> (Outcome, Vec<PageRange>) {
        let state_ns = link.time_of(self.trace.state_bytes);
        let start = state_ns + link.one_way_ns();
        let mut source = self.source(policy, link, state_ns);
        let mut guest = Guest::new(start);
        let mut outcome = self.outcome(policy, link, start);
        let mut seen = BitVec::<u64>::repeat(false, self.trace.pages as usize);
        for (touch, &computing) in self.trace.touches.iter().zip(&self.computing) {
            guest.compute(computing);
            let page = touch.page.as_usize();
            if seen.replace(page, true) {
                continue;
            }
            let now = guest.now;
            source.push_until(now.saturating_sub(link.one_way_ns()) + 1);
            let complete = source.scheduler.remaining() == 0 && now >= source.last_arrival;
            outcome.touched += u64::from(!complete);
            if source.arrival[page] <= now {
                continue;
            }
            outcome.sent_twice += u64::from(source.request(PageRange::one(touch.page), now));
            let until = source.arrival[page];
            outcome.stalls += 1;
            outcome.full_stalls += u64::from(until - now >= link.rtt_ns);
            guest.stall(until);
        }
        source.push_until(NEVER);
        outcome.pushed = source.pushed;
        outcome.total_ms = ms(source.last_arrival);
        guest.judge(&mut outcome);
        (outcome, source.deliveries)
    }

    fn source(&self, policy: Policy, link: Link, state_ns: u64) -> Source {
        let mut map = PageMap::zeroed(self.trace.pages);
        self.trace
            .data
            .iter()
            .for_each(|&range| map.set_data(range));
        let mut missing = map.bits().to_bitvec();
        let mut arrival = vec![NEVER; self.trace.pages as usize];
        for page in self.held(policy).iter_ones() {
            missing.set(page, false);
            arrival[page] = 0;
        }
        let mut scheduler = PushScheduler::new(&PageMap::from_bits(missing), self.layout.clone());
        scheduler.lead_with(Policy::lead(&policy.keep(self.trace.hints.clone()), &[]));
        scheduler.order_by(self.order.clone());
        scheduler.choose(policy.neighbours);
        Source {
            link,
            scheduler,
            free_at: state_ns,
            arrival,
            last_arrival: 0,
            pushed: 0,
            deliveries: Vec::new(),
        }
    }

    /// What is at the destination already: what had gone before the pause and held at it, but for those pages that only
    /// parts which the policy leaves out would have named.
    fn held(&self, policy: Policy) -> BitVec<u64> {
        let mut held = BitVec::repeat(false, self.trace.pages as usize);
        let mut set = |ranges: &[PageRange], value: bool| {
            for page in ranges.iter().flat_map(|range| range.pages()) {
                held.set(page.as_usize(), value);
            }
        };
        if policy.early {
            let everything = Policy::default().keep(self.trace.hints.clone());
            set(&self.trace.held, true);
            set(&Policy::lead(&everything, &[]), false);
            set(&Policy::lead(&policy.keep(everything), &[]), true);
        }
        let mut sent = BitVec::repeat(false, self.trace.pages as usize);
        for page in self.trace.held.iter().flat_map(|range| range.pages()) {
            sent.set(page.as_usize(), true);
        }
        held & sent
    }

    fn outcome(&self, policy: Policy, link: Link, start: u64) -> Outcome {
        let held = self.held(policy);
        let mut computed = 0;
        let first = self.trace.touches.iter().zip(&self.computing);
        let needed = first
            .take_while(|(_, computing)| {
                computed += **computing;
                computed <= SPEED_WINDOW_NS
            })
            .filter(|(touch, _)| !held[touch.page.as_usize()])
            .count() as u64;
        Outcome {
            policy: policy.name,
            freeze_ms: 0.0,
            first_sign_ms: 0.0,
            recovered_ms: 0.0,
            total_ms: 0.0,
            stalls: 0,
            full_stalls: 0,
            touched: 0,
            pushed: 0,
            sent_twice: 0,
            limit_ms: ms(start + needed * link.page_ns()),
        }
    }
}

/// Where these values, ascending, are densest: the shorter half of the shorter half and so on (the half-sample mode:
/// Robertson, Cryer: An Iterative Procedure for Estimating the Mode, 1974). Of the times between touches that is what a
/// fault costs: most of them have little else in them, and what computing they have is of any length.
fn mode(mut sorted: &[u64]) -> u64 {
    while sorted.len() > 2 {
        let half = sorted.len().div_ceil(2);
        let shortest = sorted
            .windows(half)
            .min_by_key(|half| half[half.len() - 1] - half[0]);
        match shortest {
            Some(shortest) => sorted = shortest,
            None => break,
        }
    }
    let sum: u64 = sorted.iter().sum();
    sum / sorted.len().max(1) as u64
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// The guest's way: when it computed and when it stood.
struct Guest {
    start: u64,
    now: u64,
    /// Computed since the last sign of life.
    since_sign: u64,
    signs: Vec<u64>,
    /// From and to.
    stalls: Vec<(u64, u64)>,
}

impl Guest {
    fn new(start: u64) -> Self {
        Self {
            start,
            now: start,
            since_sign: 0,
            signs: Vec::new(),
            stalls: Vec::new(),
        }
    }

    fn compute(&mut self, mut time: u64) {
        while self.since_sign + time >= TICK_NS {
            let part = TICK_NS - self.since_sign;
            self.now += part;
            time -= part;
            self.since_sign = 0;
            self.signs.push(self.now);
        }
        self.now += time;
        self.since_sign += time;
    }

    fn stall(&mut self, until: u64) {
        self.stalls.push((self.now, until));
        self.now = until;
    }

    fn judge(&self, outcome: &mut Outcome) {
        let mut before = 0;
        for &sign in &self.signs {
            outcome.freeze_ms = outcome.freeze_ms.max(ms(sign - before));
            before = sign;
        }
        outcome.first_sign_ms = ms(self.signs.first().copied().unwrap_or(self.now));
        outcome.freeze_ms = outcome
            .freeze_ms
            .max(ms(self.now.saturating_sub(before)).min(outcome.first_sign_ms));
        outcome.recovered_ms = ms(self.recovered());
    }

    /// The end of the last window in which it stood for more than a fifth.
    fn recovered(&self) -> u64 {
        let mut stood = vec![0_u64; ((self.now - self.start) / SPEED_WINDOW_NS + 1) as usize];
        for &(from, to) in &self.stalls {
            let mut at = from;
            while at < to {
                let window = (at - self.start) / SPEED_WINDOW_NS;
                let end = to.min(self.start + (window + 1) * SPEED_WINDOW_NS);
                stood[window as usize] += end - at;
                at = end;
            }
        }
        let slow = stood.iter().rposition(|&stood| stood > SPEED_WINDOW_NS / 5);
        self.start + slow.map_or(0, |window| (window as u64 + 1) * SPEED_WINDOW_NS)
    }
}

#[cfg(test)]
mod tests;
