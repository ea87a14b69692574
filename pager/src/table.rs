//! The page table of the pager: the state of every page, and who may install it.
//!
//! Pure logic: no I/O, no clock, no lock. One byte a *unit* (a 4 KiB page, or the huge page where huge pages back a
//! region): 256 MiB for a 1 TiB image of small pages, 0.024% of it.
//!
//! ```text
//!            fault                   claim                finish
//!   Absent ─────────> Requested ─┬──────────> Filling ─┬─────────> Present
//!     │                          │               │     │              │
//!     ├──────────────────────────┘ <─────────────┘     │              │ (fault: installed before, wake)
//!     │                              release           │              │
//!     │ mark_zero, apply_map               claim_zero  │              │
//!     ├─────────────> Zero ──────┬─────────────────────┤              │
//!     │ mark_held                │      claim_held     │              │
//!     └─────────────> Held ──────┼─────────────────────┘              │
//!                                │                                    │
//!          Removed ──────────────┘ <──────── remove (from any) ───────┘
//! ```
//!
//! The first claimant of a page wins, so no page is installed twice, whatever arrives twice. Completion is derived from
//! the states: [`PageTable::remaining`] counts the pages whose data is still to come, [`PageTable::is_complete`] scans.
//!
//! Ranges may come from outside: what lies past the image is left out of every operation. Where huge pages back a
//! region, an operation takes the huge pages that are wholly in its range.

use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicI64, Ordering};

use bitvec::field::BitField;
use bitvec::prelude::{BitSlice, BitVec, Lsb0};
use lazyvm_wire::{Layout, PageIndex, PageRange};

use crate::slots::{ABSENT, Delta, FILLING, HELD, PRESENT, REMOVED, REQUESTED, SlotMap, ZERO};

/// The state of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageState {
    /// Not here, and nobody asked for it.
    Absent,
    /// Not here; a touch waits for it.
    Requested,
    /// Being installed by whoever claimed it.
    Filling,
    /// Here.
    Present,
    /// Zero at the source; not installed before it is touched.
    Zero,
    /// Given back by the guest; zero from then on, not installed before it is touched.
    Removed,
    /// In the memory's file since before the machine was handed over; not mapped before it is touched.
    Held,
}

impl PageState {
    const fn of(state: u8) -> Self {
        match state {
            ABSENT => Self::Absent,
            REQUESTED => Self::Requested,
            ZERO => Self::Zero,
            REMOVED => Self::Removed,
            PRESENT => Self::Present,
            HELD => Self::Held,
            _ => Self::Filling,
        }
    }

    /// Whether its data must still come from the source.
    pub const fn is_missing(self) -> bool {
        matches!(self, Self::Absent | Self::Requested | Self::Filling)
    }
}

/// What a touch of a page asks of the fault lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultAction {
    /// Ask the source for this unit; nobody has.
    Request(PageRange),
    /// Somebody asked, or is installing it now: its install wakes this touch too.
    AlreadyRequested,
    /// It is here already: wake the touch (see [`crate::install::Installer::fault`] for what else that takes).
    Wake,
    /// Its content is zero: fill it with zeros.
    FillZero,
    /// Its content is in the memory's file: map it.
    Map,
}

/// A page map of the wrong length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the page map has {got} pages, the image has {expected}")]
pub struct MapLengthError {
    /// Pages in the map.
    pub got: u64,
    /// Pages in the image.
    pub expected: u64,
}

/// One region: its pages, and a slot for each of its units.
struct Segment {
    first: u64,
    pages: u64,
    /// Log2 of the pages in a unit.
    shift: u32,
    slots: SlotMap,
}

impl Segment {
    /// The slots of the units that lie wholly in `range`.
    fn slots_in(&self, range: PageRange) -> Range<u64> {
        let part = range.intersect(PageRange::new(PageIndex(self.first), self.pages));
        if part.is_empty() {
            return 0..0;
        }
        let unit = 1 << self.shift;
        let start = (part.first.0 - self.first).next_multiple_of(unit) >> self.shift;
        let end = (part.end().0 - self.first) >> self.shift;
        start..end.max(start)
    }

    fn pages_of(&self, slots: &Range<u64>) -> PageRange {
        PageRange::new(
            PageIndex(self.first + (slots.start << self.shift)),
            (slots.end - slots.start) << self.shift,
        )
    }
}

/// The state of every page of an image, shared by all threads of the pager.
pub struct PageTable {
    segments: Box<[Segment]>,
    pages: u64,
    remaining: AtomicI64,
}

impl PageTable {
    /// A table for this layout, with every page [`PageState::Absent`].
    pub fn new(layout: &Layout) -> Self {
        let mut first = 0;
        let mut segments = Vec::with_capacity(layout.regions().len());
        for region in layout.regions() {
            let shift = region.backing.pages().ilog2();
            segments.push(Segment {
                first,
                pages: region.pages,
                shift,
                slots: SlotMap::new(region.pages >> shift),
            });
            first += region.pages;
        }
        Self {
            segments: segments.into(),
            pages: first,
            remaining: AtomicI64::new(first as i64),
        }
    }

    /// Pages in the image.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The state of a page; `None` past the image.
    pub fn state(&self, page: PageIndex) -> Option<PageState> {
        let (segment, slot) = self.locate(page)?;
        segment.slots.get(slot).map(PageState::of)
    }

    /// The unit in which `page` is asked for and installed; `None` past the image.
    pub fn unit_of(&self, page: PageIndex) -> Option<PageRange> {
        let (segment, slot) = self.locate(page)?;
        Some(segment.pages_of(&(slot..slot + 1)))
    }

    /// Whether `range` is in the image and made of whole units: what an install takes.
    pub fn is_whole_units(&self, range: PageRange) -> bool {
        let Some(last) = range
            .count
            .checked_sub(1)
            .and_then(|more| range.first.0.checked_add(more))
        else {
            return false;
        };
        self.unit_of(range.first)
            .is_some_and(|unit| unit.first == range.first)
            && self
                .unit_of(PageIndex(last))
                .is_some_and(|unit| unit.end() == range.end())
    }

    /// A touch of `page` was reported: marks it requested, and says what is to be done. `None` past the image.
    ///
    /// A page that is being installed is marked requested under the claim, so that a failed install leaves it so.
    pub fn fault(&self, page: PageIndex) -> Option<FaultAction> {
        let (segment, slot) = self.locate(page)?;
        let was = segment.slots.change_one(slot, |state| {
            if state & !FILLING == ABSENT {
                REQUESTED | state & FILLING
            } else {
                state
            }
        })?;
        Some(match was {
            ABSENT => FaultAction::Request(segment.pages_of(&(slot..slot + 1))),
            PRESENT => FaultAction::Wake,
            ZERO | REMOVED => FaultAction::FillZero,
            HELD => FaultAction::Map,
            _ => FaultAction::AlreadyRequested,
        })
    }

    /// Claims the first run of pages in `range` that wait for data (Absent or Requested), at most `pages_max` pages
    /// but at least a unit. Until [`Self::finish`] or [`Self::release`], only the caller may install them. A run lies
    /// in one region. `None` where nothing in `range` is to be had.
    pub fn claim_run(&self, range: PageRange, pages_max: u64) -> Option<PageRange> {
        self.take_run(range, pages_max, |state| {
            (state <= REQUESTED).then_some(state | FILLING)
        })
    }

    /// Like [`Self::claim_run`], for pages that are to be filled with zeros (Zero or Removed).
    pub fn claim_zero_run(&self, range: PageRange, pages_max: u64) -> Option<PageRange> {
        self.take_run(range, pages_max, |state| {
            matches!(state, ZERO | REMOVED).then_some(state | FILLING)
        })
    }

    /// Like [`Self::claim_run`], for pages that are to be mapped (Held).
    pub fn claim_held_run(&self, range: PageRange, pages_max: u64) -> Option<PageRange> {
        self.take_run(range, pages_max, |state| {
            (state == HELD).then_some(state | FILLING)
        })
    }

    /// Claims all runs of `range` that wait for data, each as the iterator comes to it.
    pub fn claim(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        runs(range, move |rest| self.claim_run(rest, u64::MAX))
    }

    /// The caller installed these pages, which it had claimed: they are Present.
    pub fn finish(&self, range: PageRange) {
        self.change_all(
            range,
            |state| {
                if state & FILLING == 0 { state } else { PRESENT }
            },
        );
    }

    /// The caller gives up its claim: the pages go back to what they were, requested where somebody waits.
    pub fn release(&self, range: PageRange) {
        self.change_all(range, |state| state & !FILLING);
    }

    /// The caller had claimed these pages, and what their file should hold is not there: the caller asks
    /// the source for them.
    pub fn lose(&self, range: PageRange) {
        self.change_all(range, |state| {
            if state == HELD | FILLING {
                REQUESTED
            } else {
                state
            }
        });
    }

    /// The guest gave these pages back: they are zero from then on, whatever is still on its way.
    ///
    /// Nothing in `range` may be claimed meanwhile (the installer holds its guard); a claimed page stays claimed.
    pub fn remove(&self, range: PageRange) {
        self.change_all(
            range,
            |state| {
                if state & FILLING == 0 { REMOVED } else { state }
            },
        );
    }

    /// These pages, which were waiting for data, are zero at the source. Those that nobody waits for become Zero. Each
    /// run that somebody waits for is claimed as the iterator comes to it, and has to be filled with zeros.
    pub fn mark_zero(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        let waited_for = Cell::new(false);
        self.change_all(range, |state| {
            if state & !FILLING == REQUESTED {
                waited_for.set(true);
            }
            if state == ABSENT { ZERO } else { state }
        });
        // Mostly nobody waits, and one look at each page is enough: who comes now finds it Zero.
        let waited_for = if waited_for.get() {
            range
        } else {
            PageRange::new(range.first, 0)
        };
        runs(waited_for, move |rest| {
            self.take_run(rest, u64::MAX, |state| {
                (state == REQUESTED).then_some(ZERO | FILLING)
            })
        })
    }

    /// These pages were put here by somebody else (an earlier pager, a pre-copy): those that wait for data are Present.
    pub fn mark_present(&self, range: PageRange) {
        self.change_all(
            range,
            |state| if state <= REQUESTED { PRESENT } else { state },
        );
    }

    /// These pages, which were waiting for data, are in the memory's file already. Those that nobody waits for become
    /// Held. Each run that somebody waits for is claimed as the iterator comes to it, and has to be mapped.
    pub fn mark_held(&self, range: PageRange) -> impl Iterator<Item = PageRange> {
        self.change_all(range, |state| if state == ABSENT { HELD } else { state });
        runs(range, move |rest| {
            self.take_run(rest, u64::MAX, |state| {
                (state == REQUESTED).then_some(HELD | FILLING)
            })
        })
    }

    /// Takes in the source's page map, a bit for each page that is not zero: [`Self::mark_zero`] for the others. A
    /// huge page is zero where all of its pages are. The runs that somebody waits for are claimed and passed to
    /// `fill`, which has to fill them with zeros.
    ///
    /// # Errors
    /// The map is of another image. Nothing has changed.
    pub fn apply_map(
        &self,
        present: &BitSlice<u64, Lsb0>,
        mut fill: impl FnMut(PageRange),
    ) -> Result<(), MapLengthError> {
        if present.len() as u64 != self.pages {
            return Err(MapLengthError {
                got: present.len() as u64,
                expected: self.pages,
            });
        }
        self.zeros_of(present, |run| self.mark_zero(run).for_each(&mut fill));
        Ok(())
    }

    /// Calls `each` with the runs of pages that this map, of an image of this size, makes zero.
    pub(crate) fn zeros_of(&self, present: &BitSlice<u64, Lsb0>, mut each: impl FnMut(PageRange)) {
        for segment in &self.segments {
            let bits = &present[segment.first as usize..(segment.first + segment.pages) as usize];
            let mut zeros = Runs::default();
            let mut mark = |slots: Range<u64>| each(segment.pages_of(&slots));
            if segment.shift == 0 {
                for (number, word) in bits.chunks(64).enumerate() {
                    let valid = u64::MAX >> (64 - word.len());
                    zeros.add_bits(
                        number as u64 * 64,
                        !word.load_le::<u64>() & valid,
                        &mut mark,
                    );
                }
            } else {
                for (unit, pages) in bits.chunks(1 << segment.shift).enumerate() {
                    zeros.add_bits(unit as u64, u64::from(pages.not_any()), &mut mark);
                }
            }
            zeros.end(&mut mark);
        }
    }

    /// Pages whose data is still to come: Absent, Requested, or being filled with data.
    pub fn remaining(&self) -> u64 {
        // Threads add up their changes in any order, so it may be off for a moment, but never in the end.
        self.remaining.load(Ordering::Acquire).max(0) as u64
    }

    /// Whether no page is Absent, Requested or Filling, found by looking at all of them.
    pub fn is_complete(&self) -> bool {
        self.runs(PageState::is_missing).next().is_none()
    }

    /// The runs of pages that somebody waits for, to ask for them again after a connection was lost.
    pub fn requested(&self) -> impl Iterator<Item = PageRange> {
        self.runs(|state| state == PageState::Requested)
    }

    /// The runs of pages whose data must still come, to tell the source after a connection was lost.
    pub fn missing(&self) -> impl Iterator<Item = PageRange> {
        self.runs(PageState::is_missing)
    }

    /// The runs of pages whose state `wanted` accepts, in order. Each is as it was when the iterator came to it.
    pub fn runs(
        &self,
        wanted: impl Fn(PageState) -> bool + Copy,
    ) -> impl Iterator<Item = PageRange> {
        runs(PageRange::new(PageIndex(0), self.pages), move |rest| {
            self.find_run(rest, wanted)
        })
    }

    /// A bit for each page that needs nothing more from the source.
    pub fn settled_bits(&self) -> BitVec<u64, Lsb0> {
        let mut bits = BitVec::repeat(true, self.pages as usize);
        for run in self.missing() {
            bits[run.first.as_usize()..run.end().as_usize()].fill(false);
        }
        bits
    }

    pub(crate) fn find_run(
        &self,
        range: PageRange,
        wanted: impl Fn(PageState) -> bool,
    ) -> Option<PageRange> {
        self.segments_of(range).find_map(|segment| {
            let found = segment.slots.find_run(segment.slots_in(range), |state| {
                wanted(PageState::of(state))
            })?;
            Some(segment.pages_of(&found))
        })
    }

    fn take_run(
        &self,
        range: PageRange,
        pages_max: u64,
        take: impl Fn(u8) -> Option<u8>,
    ) -> Option<PageRange> {
        self.segments_of(range).find_map(|segment| {
            let units_max = (pages_max >> segment.shift).max(1);
            let mut slots = segment.slots_in(range);
            // Another claimant may be faster on the slots that were found: the next ones, then.
            while let Some(start) = segment
                .slots
                .find(slots.clone(), |state| take(state).is_some())
            {
                let end = slots.end.min(start.saturating_add(units_max));
                if let Some((taken, delta)) = segment.slots.take_run(start..end, &take) {
                    self.account(segment, delta);
                    return Some(segment.pages_of(&taken));
                }
                slots.start = end;
            }
            None
        })
    }

    fn change_all(&self, range: PageRange, change: impl Fn(u8) -> u8) {
        for segment in self.segments_of(range) {
            let delta = segment.slots.change_all(segment.slots_in(range), &change);
            self.account(segment, delta);
        }
    }

    fn account(&self, segment: &Segment, delta: Delta) {
        if delta.0 != 0 {
            self.remaining
                .fetch_add(delta.0 << segment.shift, Ordering::AcqRel);
        }
    }

    fn locate(&self, page: PageIndex) -> Option<(&Segment, u64)> {
        let segment = self.segments_of(PageRange::one(page)).next()?;
        Some((segment, (page.0 - segment.first) >> segment.shift))
    }

    /// The segments that a range has a part in, in order.
    fn segments_of(&self, range: PageRange) -> impl Iterator<Item = &Segment> {
        let from = self
            .segments
            .partition_point(|segment| segment.first + segment.pages <= range.first.0);
        self.segments[from..]
            .iter()
            .take_while(move |segment| segment.first < range.end().0)
    }
}

/// Drives `next` over `range`: from its first run on, each time from the end of the one before.
fn runs(
    range: PageRange,
    mut next: impl FnMut(PageRange) -> Option<PageRange>,
) -> impl Iterator<Item = PageRange> {
    let mut rest = range;
    std::iter::from_fn(move || {
        let run = next(rest)?;
        rest = after(rest, run);
        Some(run)
    })
}

/// What is left of `range` behind `run`.
pub(crate) fn after(range: PageRange, run: PageRange) -> PageRange {
    PageRange::new(run.end(), range.end().0.saturating_sub(run.end().0))
}

/// Joins set bits to runs.
#[derive(Default)]
struct Runs(Option<Range<u64>>);

impl Runs {
    fn add_bits(&mut self, first: u64, mut bits: u64, run: &mut impl FnMut(Range<u64>)) {
        while bits != 0 {
            let skip = bits.trailing_zeros();
            let length = (bits >> skip).trailing_ones();
            let start = first + u64::from(skip);
            let end = start + u64::from(length);
            match self.0.as_mut() {
                Some(open) if open.end == start => open.end = end,
                _ => {
                    self.end(run);
                    self.0 = Some(start..end);
                }
            }
            if skip + length == u64::BITS {
                break;
            }
            bits &= u64::MAX << (skip + length);
        }
    }

    fn end(&mut self, run: &mut impl FnMut(Range<u64>)) {
        if let Some(open) = self.0.take() {
            run(open);
        }
    }
}
