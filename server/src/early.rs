//! Pages that are sent before the pause, and which of them still hold at it.
//!
//! There are two ways to know what holds. Where writes are tracked ([`crate::port::DirtyTracker`]), a page that was written
//! since it went does not hold, and goes again in a later round. Where they are not, each page goes once, and at the pause
//! its digest is compared with the memory's.
//!
//! A page is marked as sent *before* it is read. So a write that its copy may lack is reported after that, and takes the mark
//! away: a page is never taken for one that holds and does not. One that was found zero is marked too, and needs no copy.
//!
//! All of this goes by units: a huge page goes as a whole, since a destination can put no part of one in place, and a write to
//! any part of it makes all of it stale. So its pages always have the same mark.

mod held;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::held::HeldRun;
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageMap, PageRange};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::port::SourceMemory;
use held::first_marked;

/// Most pages that go early where digests tell what holds: 256 MiB, for which they take some megabytes.
const DIGESTS_MAX: usize = 64 * 1024;

/// Small pages that are read at a time.
const READ_PAGES: u64 = 32;

/// The mark of a page that did not go, or was written since.
const NONE: u8 = 0;

/// The mark of a page that was found zero, where writes are reported.
const ZERO: u8 = u8::MAX;

/// The last round.
const ROUND_MAX: u8 = ZERO - 1;

/// How what holds is known.
#[derive(Debug)]
enum Check {
    /// Of each page that went; `seed` is one that a guest can't know, so that it can't make pages whose digests agree.
    Digests {
        sent: HashMap<PageIndex, u128>,
        seed: u64,
    },
    /// Writes are reported.
    Writes,
}

/// Pages that are to go now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub range: PageRange,
    pub round: u8,
    /// They are one huge page, which goes in one frame.
    pub whole: bool,
}

/// What is to go early, and what has gone.
#[derive(Debug)]
pub(crate) struct Early {
    layout: Layout,
    check: Check,
    /// What is to go, and pages that are not to go any more.
    queue: VecDeque<PageRange>,
    /// A bit for each page that is to go.
    queued: BitVec<u64, Lsb0>,
    /// Pages that are to go.
    waiting: u64,
    /// A bit for each page that was ever to go.
    known: BitVec<u64, Lsb0>,
    /// Each page's mark: in which round it went, or [`NONE`] or [`ZERO`]. Empty until something is queued.
    marks: Vec<u8>,
    /// How often each page was found written after it had gone.
    heat: Vec<u8>,
    round: u8,
    /// Pages that were taken to go, and nobody has told yet what is in them.
    open: PageRange,
    /// Bytes that are under way.
    unacked: u64,
    /// A connection that carried such pages was lost: nobody knows what arrived.
    void: bool,
}

impl Early {
    pub fn new(layout: &Layout, seed: u64) -> Self {
        Self {
            check: Check::Digests {
                sent: HashMap::new(),
                seed,
            },
            queue: VecDeque::new(),
            queued: BitVec::repeat(false, layout.pages() as usize),
            waiting: 0,
            known: BitVec::repeat(false, layout.pages() as usize),
            marks: Vec::new(),
            heat: Vec::new(),
            round: 1,
            layout: layout.clone(),
            open: PageRange::new(PageIndex(0), 0),
            unacked: 0,
            void: false,
        }
    }

    /// Writes are reported from now on, to [`Self::written`]. Nothing was queued yet.
    pub fn writes_are_tracked(&mut self) {
        debug_assert!(self.marks.is_empty());
        self.check = Check::Writes;
    }

    /// The units of these pages are to go, as far as they are not here or under way already.
    pub fn queue(&mut self, ranges: impl IntoIterator<Item = PageRange>) {
        if self.void {
            return;
        }
        if self.marks.is_empty() {
            self.marks = vec![NONE; self.layout.pages() as usize];
            self.heat = vec![0; self.layout.pages() as usize];
        }
        for range in ranges {
            let mut page = range.first;
            while page < range.end()
                && let Some(unit) = self.layout.unit_of(page)
            {
                self.queue_unit(unit);
                page = unit.end();
            }
        }
    }

    fn queue_unit(&mut self, unit: PageRange) {
        let first = unit.first.as_usize();
        if self.marks[first] != NONE || self.queued[first] || self.is_full() {
            return;
        }
        self.queued[first..unit.end().as_usize()].fill(true);
        self.known[first..unit.end().as_usize()].fill(true);
        match self.queue.back_mut() {
            Some(last) if last.end() == unit.first && last.count + unit.count <= READ_PAGES => {
                last.count += unit.count;
            }
            _ => self.queue.push_back(unit),
        }
        self.waiting += unit.count;
    }

    fn is_full(&self) -> bool {
        match &self.check {
            Check::Digests { sent, .. } => sent.len() + self.waiting as usize >= DIGESTS_MAX,
            Check::Writes => false,
        }
    }

    /// The next pages that are to go. From now on they count as sent. What is in them is to be told, run by run, before the
    /// next ones are taken.
    pub fn next(&mut self) -> Option<Outgoing> {
        let range = loop {
            let range = self.queue.pop_front()?;
            let (gone, going) = self.first_queued(range);
            let behind = range.count - gone - going.count;
            if behind > 0 {
                self.queue.push_front(PageRange::new(going.end(), behind));
            }
            if !going.is_empty() {
                break going;
            }
        };
        let bits = range.first.as_usize()..range.end().as_usize();
        self.queued[bits.clone()].fill(false);
        self.marks[bits].fill(self.round);
        self.waiting -= range.count;
        self.open = range;
        Some(Outgoing {
            range,
            round: self.round,
            whole: range.count > READ_PAGES,
        })
    }

    /// How many pages at the start of `range` are not to go any more, and the run of those behind them that are.
    fn first_queued(&self, range: PageRange) -> (u64, PageRange) {
        let bits = &self.queued[range.first.as_usize()..range.end().as_usize()];
        let gone = bits.leading_zeros();
        let count = bits[gone..].leading_ones();
        let first = PageIndex(range.first.0 + gone as u64);
        (gone as u64, PageRange::new(first, count as u64))
    }

    /// Nothing is to go any more.
    pub fn unqueue(&mut self) {
        self.queue.clear();
        self.queued.fill(false);
        self.waiting = 0;
    }

    /// These pages go with these bytes.
    pub fn sent(&mut self, range: PageRange, bytes: &[u8]) {
        self.is_told(range);
        if let Check::Digests { sent, seed } = &mut self.check {
            for (page, bytes) in range.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
                sent.insert(page, xxh3_128_with_seed(bytes, *seed));
            }
        }
    }

    /// These pages were taken to go, and are zero. They are marked as such, as far as no write was reported meanwhile.
    pub fn found_zero(&mut self, range: PageRange) {
        let mark = match self.check {
            Check::Digests { .. } => NONE,
            Check::Writes => ZERO,
        };
        self.mark_unwritten(range, mark);
    }

    /// These pages were taken to go, and can't be read.
    pub fn not_sent(&mut self, range: PageRange) {
        self.mark_unwritten(range, NONE);
    }

    fn is_told(&mut self, range: PageRange) {
        let open = self.open;
        self.open = PageRange::new(range.end(), open.end().0.saturating_sub(range.end().0));
    }

    fn mark_unwritten(&mut self, range: PageRange, mark: u8) {
        self.is_told(range);
        // None are left after a connection was lost.
        let marks = self
            .marks
            .get_mut(range.first.as_usize()..range.end().as_usize());
        for known in marks.into_iter().flatten().filter(|known| **known != NONE) {
            *known = mark;
        }
    }

    /// So many bytes more are under way.
    pub fn under_way(&mut self, bytes: u64) {
        self.unacked += bytes;
    }

    /// So many bytes have arrived.
    pub fn arrived(&mut self, bytes: u64) {
        self.unacked = self.unacked.saturating_sub(bytes);
    }

    /// Pages that are to go still.
    pub fn waiting(&self) -> u64 {
        self.waiting
    }

    /// Bytes that are under way.
    pub fn unacked(&self) -> u64 {
        self.unacked
    }

    /// These pages were written. Those that do not hold any more, as all of a huge page does not, are passed on; and so are
    /// those that are to go, which they are not then: who is written once is likely to be written again, and would go twice.
    /// Gives how many of them were ever to go: a tracker may tell pages that hold nothing too.
    ///
    /// A page that was found zero is passed on once: memory that is given back again and again, or that a tracker reports
    /// for want of knowledge, would go in every round.
    pub fn written(&mut self, range: PageRange, mut stale: impl FnMut(PageIndex)) -> u64 {
        let Some(first) = self.layout.unit_of(range.first) else {
            return 0;
        };
        let last = PageIndex(range.end().0.min(self.layout.pages()).saturating_sub(1));
        let end = self.layout.unit_of(last).map_or(last, |unit| unit.end());
        let bits = first.first.as_usize()..end.as_usize();
        if self.waiting > 0 {
            let queued = &mut self.queued[bits.clone()];
            for offset in queued.iter_ones() {
                stale(PageIndex(first.first.0 + offset as u64));
            }
            self.waiting -= queued.count_ones() as u64;
            queued.fill(false);
        }
        let mut at = first.first;
        // Most of what is reported at a time holds nothing, and never went.
        while let Some(marked) = first_marked(&self.marks, at.as_usize()..end.as_usize())
            && let Some(unit) = self.layout.unit_of(PageIndex(marked as u64))
        {
            for page in unit.pages() {
                let mark = std::mem::replace(&mut self.marks[page.as_usize()], NONE);
                let heat = &mut self.heat[page.as_usize()];
                if mark != ZERO || *heat == 0 {
                    stale(page);
                }
                *heat = heat.saturating_add(1);
            }
            at = unit.end();
        }
        self.known[bits].count_ones() as u64
    }

    /// What goes from now on is newer than all that went so far; `false` when there can be no more rounds.
    pub fn next_round(&mut self) -> bool {
        self.round = self.round.saturating_add(1).min(ROUND_MAX);
        self.round < ROUND_MAX
    }

    /// How often a page was found written after it had gone.
    pub fn heat(&self, page: PageIndex) -> u8 {
        self.heat.get(page.as_usize()).copied().unwrap_or(0)
    }

    /// Nothing that went counts: a connection was lost that may have carried it, or writes may have been missed.
    pub fn give_up(&mut self) {
        self.void |= !self.marks.is_empty();
        self.unqueue();
        self.unacked = 0;
        self.marks = Vec::new();
        if let Check::Digests { sent, .. } = &mut self.check {
            sent.clear();
        }
    }

    /// Whether nobody knows what arrived.
    pub fn is_void(&self) -> bool {
        self.void
    }

    /// The pages that went and are the same now that the machine is paused and the last writes were reported, as far as the
    /// map, of whole units, calls them data. What can't be read is not. Those that were found zero, and are so still, the map
    /// calls zero from then on. What is being read to go does not hold: it may turn out not to go.
    pub fn held(&mut self, memory: &dyn SourceMemory, map: &mut PageMap) -> Vec<HeldRun> {
        self.mark_unwritten(self.open, NONE);
        match &self.check {
            Check::Digests { sent, seed } => {
                let pages = held::by_digest(sent, *seed, memory, map);
                held::whole_units(&self.layout, &pages)
            }
            Check::Writes => held::by_round(&self.marks, map),
        }
    }
}
