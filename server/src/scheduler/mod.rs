//! The push scheduler: which pages go next. Pure logic; the caller brings faults in and takes runs out.
//!
//! Order: the windows around recent faults ([`windows`]), in guest-physical neighbourhood and, where the order of virtual
//! addresses is known, in guest-virtual neighbourhood; then the pages that are known to be needed soon, then the rest of
//! the image from front to back. Pages that a vCPU waits for do not queue here at all: the fault lane answers them at once
//! and tells the scheduler afterwards, so that they are not pushed again.

mod order;
pub mod policy;
pub mod windows;

use std::collections::VecDeque;
use std::sync::Arc;

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::{Layout, PageIndex, PageMap, PageRange};

pub use order::{ORDER_PAGES_MAX, VirtualOrder};
pub use policy::Policy;
use windows::{Axis, Piece, Windows};

/// Which neighbours of a fault go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours {
    /// Those in guest-physical memory.
    pub physical: bool,
    /// Those in guest-virtual memory.
    pub virtual_: bool,
}

impl Default for Neighbours {
    fn default() -> Self {
        Self {
            physical: true,
            virtual_: true,
        }
    }
}

/// Why a run of pages goes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// No reason of its own; the rest.
    Rest,
    /// It is needed soon, as far as was known at the pause.
    Lead,
    /// It lies around a fault.
    Window,
}

/// What to send next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The pages, none of which has been given out before.
    pub range: PageRange,
    /// Why.
    pub urgency: Urgency,
    /// It is one huge page, which goes in one frame.
    pub whole: bool,
}

/// A lead that is trusted has this many pages for each of a window.
const LEAD_SHARE: u64 = 4;

/// Keeps which pages have not been sent, and in which order they go. Takes one bit a page, and 8 bytes for
/// each page of the virtual order.
#[derive(Debug)]
pub struct PushScheduler {
    layout: Layout,
    unsent: BitVec<u64, Lsb0>,
    remaining: u64,
    windows: Windows,
    neighbours: Neighbours,
    order: Arc<VirtualOrder>,
    /// What goes ahead of the rest, the first first.
    lead: VecDeque<PageRange>,
    /// That is what is needed, in the order in which it is needed.
    is_exact: bool,
    /// Pages of the lead that are behind us, whatever way they went.
    lead_passed: u64,
    /// Pages of the lead and of windows that were given out.
    lead_pages: u64,
    window_pages: u64,
    /// No page ahead of it is unsent.
    cursor: usize,
}

impl PushScheduler {
    /// Everything that the page map calls data is to be sent; of a huge page, all or nothing.
    ///
    /// The map is one of this layout's image: its length is the layout's.
    pub fn new(map: &PageMap, layout: Layout) -> Self {
        let mut map = map.clone();
        map.round_to_units(&layout);
        Self {
            unsent: map.bits().to_bitvec(),
            layout,
            remaining: map.data_pages(),
            windows: Windows::default(),
            neighbours: Neighbours::default(),
            order: Arc::default(),
            lead: VecDeque::new(),
            is_exact: false,
            lead_passed: 0,
            lead_pages: 0,
            window_pages: 0,
            cursor: 0,
        }
    }

    /// These go ahead of the rest, in this order. What is not to be sent among them is left out.
    pub fn lead_with(&mut self, ranges: impl IntoIterator<Item = PageRange>) {
        let image = self.image();
        self.lead
            .extend(ranges.into_iter().map(|range| range.intersect(image)));
    }

    /// The lead was recorded: what it names is needed in that order. Windows then do not go before it, but beside it, with a
    /// small share: else each page that it brings late brings a window along, which makes the next ones late too.
    pub fn trust_lead(&mut self) {
        self.is_exact = true;
    }

    /// Tells which pages stand together in virtual memory, for the windows of faults that come from now on.
    pub fn order_by(&mut self, order: Arc<VirtualOrder>) {
        // Windows hold places of the order that was.
        self.windows = Windows::default();
        self.order = order;
    }

    /// What [`order_by`](Self::order_by) was told last.
    pub fn order(&self) -> &Arc<VirtualOrder> {
        &self.order
    }

    /// Leaves out some windows, for comparisons.
    pub fn choose(&mut self, neighbours: Neighbours) {
        self.neighbours = neighbours;
    }

    /// The fault lane has answered `range`: it need not be pushed, and what lies around it goes first. A page that a trusted
    /// lead had named in time, and that is only late, says nothing about those around it; while there is such a lead, a page that has
    /// gone is taken for one.
    pub fn fault(&mut self, range: PageRange) {
        let range = range.intersect(self.image());
        if range.count == 0 {
            return;
        }
        let unsent = self.take(range);
        if self.is_exact && !self.lead.is_empty() && unsent == 0 {
            return;
        }
        self.windows.fault();
        if self.neighbours.physical {
            let at = range.first.0..range.end().0;
            self.windows.pivot(Axis::Physical, at, self.image().count);
        }
        if self.neighbours.virtual_
            && let Some(place) = self.order.place(range.first)
        {
            let at = place..place + 1;
            self.windows.pivot(Axis::Virtual, at, self.order.len());
        }
    }

    /// The next run, of at most `pages_max` pages or one huge page; `None` when all has been given out. Newest windows
    /// first, in turns.
    pub fn next(&mut self, pages_max: u64) -> Option<Batch> {
        let is_leads_turn = self.is_exact && self.window_pages * LEAD_SHARE >= self.lead_pages;
        if is_leads_turn && let Some(batch) = self.next_of_lead(pages_max) {
            return Some(batch);
        }
        self.next_of_windows(pages_max)
            .or_else(|| self.next_of_lead(pages_max))
            .or_else(|| self.next_of_rest(pages_max))
    }

    fn next_of_windows(&mut self, pages_max: u64) -> Option<Batch> {
        while let Some(piece) = self.windows.piece() {
            match self.run_of(&piece) {
                Some(run) => {
                    self.windows.had_its_turn();
                    let batch = self.batch(run.first, run.end(), pages_max, Urgency::Window);
                    self.window_pages += batch.range.count;
                    return Some(batch);
                }
                None => self.windows.exhausted(&piece),
            }
        }
        None
    }

    fn next_of_lead(&mut self, pages_max: u64) -> Option<Batch> {
        while let Some(ahead) = self.lead.pop_front() {
            let Some(first) = self.first_unsent(ahead) else {
                self.lead_passed += ahead.count;
                continue;
            };
            let batch = self.batch(first, ahead.end(), pages_max, Urgency::Lead);
            self.lead_pages += batch.range.count;
            // A huge page is given out whole, and the lead may name a part of it.
            let end = batch.range.end().min(ahead.end());
            self.lead_passed += end.0 - ahead.first.0;
            if end < ahead.end() {
                self.lead
                    .push_front(PageRange::new(end, ahead.end().0 - end.0));
            }
            return Some(batch);
        }
        None
    }

    fn next_of_rest(&mut self, pages_max: u64) -> Option<Batch> {
        let rest = PageRange::new(
            PageIndex(self.cursor as u64),
            self.image().count - self.cursor as u64,
        );
        let Some(first) = self.first_unsent(rest) else {
            self.cursor = self.unsent.len();
            return None;
        };
        let batch = self.batch(first, self.image().end(), pages_max, Urgency::Rest);
        self.cursor = batch.range.end().as_usize();
        Some(batch)
    }

    /// How many pages of the lead have gone, whatever way they went; `None` when no more of them are to come.
    pub fn lead_gone(&self) -> Option<u64> {
        (!self.lead.is_empty()).then_some(self.lead_passed)
    }

    /// Pages that have not been given out.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The first pages of a window's piece that are to be sent, in one row.
    fn run_of(&self, piece: &Piece) -> Option<PageRange> {
        let places = piece.places.clone();
        if piece.axis == Axis::Physical {
            let span = PageRange::new(PageIndex(places.start), places.end - places.start);
            let span = span.intersect(self.image());
            let first = self.first_unsent(span)?;
            return Some(PageRange::new(first, span.end().0 - first.0));
        }
        let mut run: Option<PageRange> = None;
        for page in places.filter_map(|place| self.order.page(place)) {
            let unsent = self.unsent.get(page.as_usize()).is_some_and(|bit| *bit);
            match &mut run {
                None if unsent => run = Some(PageRange::one(page)),
                Some(run) if unsent && run.end() == page => run.count += 1,
                Some(_) => break,
                None => {}
            }
        }
        run
    }

    fn image(&self) -> PageRange {
        PageRange::new(PageIndex(0), self.unsent.len() as u64)
    }

    fn first_unsent(&self, within: PageRange) -> Option<PageIndex> {
        let bits = self
            .unsent
            .get(within.first.as_usize()..within.end().as_usize())?;
        bits.first_one()
            .map(|offset| PageIndex(within.first.0 + offset as u64))
    }

    /// Takes the unsent run from `first`, which is unsent, up to `end` or its region's end.
    fn batch(
        &mut self,
        first: PageIndex,
        end: PageIndex,
        pages_max: u64,
        urgency: Urgency,
    ) -> Batch {
        let unit = self.layout.unit_of(first).unwrap_or(PageRange::one(first));
        let whole = unit.count > 1;
        let range = if whole {
            unit
        } else {
            let region = self
                .layout
                .locate(first)
                .and_then(|(region, _)| self.layout.region_range(region));
            let end = region.map_or(end, |region| region.end().min(end));
            let end = end.0.min(first.0.saturating_add(pages_max.max(1)));
            let bits = &self.unsent[first.as_usize()..end as usize];
            PageRange::new(first, bits.leading_ones() as u64)
        };
        self.take(range);
        Batch {
            range,
            urgency,
            whole,
        }
    }

    /// Notes that these are given out; tells how many were not.
    fn take(&mut self, range: PageRange) -> u64 {
        let range = range.intersect(self.image());
        let bits = &mut self.unsent[range.first.as_usize()..range.end().as_usize()];
        let taken = bits.count_ones() as u64;
        self.remaining -= taken;
        bits.fill(false);
        taken
    }
}

#[cfg(test)]
mod tests;
