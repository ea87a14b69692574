//! Faults, replies, pushes and removals in random orders, over a kernel and a network that are simulated: every fault is
//! served in the end, no page is installed twice, and no removed page gets old data.
//!
//! The order of everything comes from a seed, so a failure can be run again.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

use lazyvm_pager::table::{FaultAction, PageState, PageTable};
use lazyvm_wire::{Backing, Layout, PageIndex, PageRange, Region};
use proptest::prelude::*;

/// What the kernel has mapped for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mapped {
    Nothing,
    Data,
    Zero,
}

/// An install, between its claim and its end.
struct Install {
    run: PageRange,
    zero: bool,
}

struct World {
    random: u64,
    table: PageTable,
    mapped: Vec<Mapped>,
    /// Pages whose removal took effect at least once.
    removed: Vec<bool>,
    /// Page that each guest thread waits for.
    waiting: Vec<Option<u64>>,
    /// Faults that the kernel has queued.
    events: Vec<u64>,
    /// Replies and pushes under way, in any order.
    network: Vec<PageRange>,
    installs: Vec<Install>,
    push_next: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let region = |pages, backing| Region {
            name: "ram".to_owned(),
            gpa: None,
            pages,
            backing,
        };
        let layout = Layout::new(vec![
            region(90, Backing::Small),
            region(1024, Backing::Huge2M),
            region(30, Backing::Small),
        ])
        .expect("a layout");
        let world = Self {
            random: seed | 1,
            table: PageTable::new(&layout),
            mapped: vec![Mapped::Nothing; layout.pages() as usize],
            removed: vec![false; layout.pages() as usize],
            waiting: vec![None; 5],
            events: Vec::new(),
            network: Vec::new(),
            installs: Vec::new(),
            push_next: 0,
        };
        let map = (0..layout.pages()).map(|page| page % 11 > 3).collect();
        let map: bitvec::vec::BitVec<u64> = map;
        world
            .table
            .apply_map(&map, |run| panic!("nobody waits for {run} yet"))
            .expect("a map");
        world
    }

    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % end
    }

    /// A guest thread that waits for nothing touches a page.
    fn touch(&mut self) {
        let thread = self.below(self.waiting.len() as u64) as usize;
        if self.waiting[thread].is_none() {
            let page = self.below(self.table.pages());
            self.fault_natively(thread, page);
        }
    }

    /// What the kernel does on a touch: goes on, or queues an event.
    fn fault_natively(&mut self, thread: usize, page: u64) {
        if self.mapped[page as usize] == Mapped::Nothing {
            self.waiting[thread] = Some(page);
            self.events.push(page);
        } else {
            self.waiting[thread] = None;
        }
    }

    /// `UFFDIO_WAKE`: those who wait in the range touch again.
    fn wake(&mut self, range: PageRange) {
        for thread in 0..self.waiting.len() {
            if let Some(page) = self.waiting[thread]
                && range.contains(PageIndex(page))
            {
                self.fault_natively(thread, page);
            }
        }
    }

    /// The fault lane reads one event.
    fn handle_event(&mut self) {
        if self.events.is_empty() {
            return;
        }
        let which = self.below(self.events.len() as u64) as usize;
        let page = self.events.swap_remove(which);
        match self.table.fault(PageIndex(page)).expect("a page") {
            FaultAction::Request(unit) => self.ask(unit),
            FaultAction::AlreadyRequested => {}
            FaultAction::Wake => {
                let unit = self.table.unit_of(PageIndex(page)).expect("a page");
                // The installer's `settle`: what is not mapped any more, though it was, is zero.
                for page in unit.pages() {
                    if self.mapped[page.as_usize()] == Mapped::Nothing {
                        self.mapped[page.as_usize()] = Mapped::Zero;
                    }
                }
                self.wake(unit);
            }
            FaultAction::Map => unreachable!("nothing comes early here"),
            FaultAction::FillZero => {
                let unit = self.table.unit_of(PageIndex(page)).expect("a page");
                if let Some(run) = self.table.claim_zero_run(unit, u64::MAX) {
                    self.installs.push(Install { run, zero: true });
                }
            }
        }
    }

    /// Asks the source, which may answer twice.
    fn ask(&mut self, unit: PageRange) {
        for _ in 0..1 + self.below(2) {
            self.network.push(unit);
        }
    }

    /// The source pushes the next pages, whatever was asked for meanwhile.
    fn push(&mut self) {
        if self.push_next < self.table.pages() {
            let first = self
                .table
                .unit_of(PageIndex(self.push_next))
                .expect("a page");
            let count = first.count.max(1 + self.below(20));
            let run = PageRange::new(first.first, count);
            self.network.push(run);
            self.push_next = run.end().0;
        }
    }

    /// Something arrives: the installer claims what it can of it.
    fn receive(&mut self) {
        if self.network.is_empty() {
            return;
        }
        let which = self.below(self.network.len() as u64) as usize;
        let range = self.network.swap_remove(which);
        for run in self.table.claim(range) {
            self.installs.push(Install { run, zero: false });
        }
        self.wake(range);
    }

    /// The kernel does an install that was claimed, or fails.
    fn install(&mut self) {
        if self.installs.is_empty() {
            return;
        }
        let which = self.below(self.installs.len() as u64) as usize;
        let Install { run, zero } = self.installs.swap_remove(which);
        let done = if self.below(4) == 0 {
            // It stops half-way, at the end of a unit.
            let unit = self.table.unit_of(run.first).expect("a page").count;
            self.below(run.count / unit) * unit
        } else {
            run.count
        };
        let in_place = PageRange::new(run.first, done);
        for page in in_place.pages() {
            let now = &mut self.mapped[page.as_usize()];
            // A page that is mapped as one of the zeros may be found so again: `remove` came between, and the
            // kernel's own zeroing after it.
            assert!(
                *now == Mapped::Nothing || zero && *now == Mapped::Zero,
                "{page} is installed twice"
            );
            *now = if zero { Mapped::Zero } else { Mapped::Data };
        }
        self.wake(in_place);
        self.table.finish(in_place);
        let rest = PageRange::new(in_place.end(), run.count - done);
        self.table.release(rest);
        if zero {
            self.wake(rest);
        } else if !rest.is_empty() {
            // The data is still in the caller's hand: it tries again.
            self.network.push(rest);
        }
    }

    /// The guest gives pages back. No install is between its claim and its end then: the guard sees to it.
    fn remove(&mut self) {
        if !self.installs.is_empty() {
            return;
        }
        let page = PageIndex(self.below(self.table.pages()));
        let unit = self.table.unit_of(page).expect("a page");
        self.table.remove(unit);
        for page in unit.pages() {
            self.mapped[page.as_usize()] = Mapped::Nothing;
            self.removed[page.as_usize()] = true;
        }
        self.wake(unit);
    }

    /// The connection breaks: all that was under way is lost, and what is waited for is asked for again.
    fn reconnect(&mut self) {
        self.network.clear();
        self.push_next = 0;
        let again: Vec<_> = self.table.requested().collect();
        for run in again {
            let mut first = run.first;
            while first < run.end() {
                let unit = self.table.unit_of(first).expect("a page");
                self.ask(unit);
                first = unit.end();
            }
        }
    }

    fn step(&mut self) {
        match self.below(40) {
            0..=9 => self.touch(),
            10..=17 => self.handle_event(),
            18..=21 => self.push(),
            22..=29 => self.receive(),
            30..=37 => self.install(),
            38 => self.remove(),
            _ => {
                if self.below(20) == 0 {
                    self.reconnect();
                }
            }
        }
        for (page, mapped) in self.mapped.iter().enumerate() {
            assert!(
                *mapped != Mapped::Data || !self.removed[page],
                "page {page} was removed and has old data"
            );
        }
    }

    /// Everything under way comes to its end; nobody touches anything new.
    fn settle(&mut self) {
        while self.push_next < self.table.pages() {
            self.push();
        }
        for _ in 0..100_000 {
            if self.network.is_empty() && self.installs.is_empty() && self.events.is_empty() {
                break;
            }
            self.handle_event();
            self.receive();
            self.install();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn every_fault_is_served_once(seed in any::<u64>(), steps in 100..1500_u32) {
        let mut world = World::new(seed);
        for _ in 0..steps {
            world.step();
        }
        world.settle();
        prop_assert_eq!(&world.waiting, &vec![None; 5]);
        prop_assert!(world.table.is_complete());
        prop_assert_eq!(world.table.remaining(), 0);
        for page in 0..world.table.pages() {
            let state = world.table.state(PageIndex(page)).expect("a page");
            match world.mapped[page as usize] {
                Mapped::Data => prop_assert_eq!(state, PageState::Present),
                Mapped::Zero => prop_assert_eq!(state, PageState::Present),
                Mapped::Nothing => prop_assert!(matches!(state, PageState::Zero | PageState::Removed)),
            }
        }
    }
}
