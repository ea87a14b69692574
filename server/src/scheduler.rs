//! The push scheduler: which pages go next. Pure logic; the caller brings faults in and takes runs out.
//!
//! Order: the window around each recent fault, then the pages that are known to be needed soon, then the rest of the
//! image from front to back. Pages that a vCPU waits
//! for do not queue here at all: the fault lane answers them at once and tells the scheduler afterwards, so that they
//! are not pushed again.

use std::collections::VecDeque;

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::{Backing, Layout, PageIndex, PageMap, PageRange};

/// Pages of the window around a fault, the fault's own page among them.
pub const WINDOW_PAGES: u64 = 16;

/// Most windows that wait; the oldest is dropped for a newer one, and its pages go with the rest.
pub const WINDOWS_MAX: usize = 1024;

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

/// Keeps which pages have not been sent, and in which order they go. Takes one bit a page.
#[derive(Debug)]
pub struct PushScheduler {
    layout: Layout,
    unsent: BitVec<u64, Lsb0>,
    remaining: u64,
    windows: VecDeque<PageRange>,
    /// What goes ahead of the rest, the first first.
    lead: VecDeque<PageRange>,
    /// No page ahead of it is unsent.
    cursor: usize,
}

impl PushScheduler {
    /// Everything that the page map calls data is to be sent; of a huge page, all or nothing.
    ///
    /// The map is one of this layout's image: its length is the layout's.
    pub fn new(map: &PageMap, layout: Layout) -> Self {
        let mut scheduler = Self {
            unsent: map.bits().to_bitvec(),
            layout,
            remaining: 0,
            windows: VecDeque::new(),
            lead: VecDeque::new(),
            cursor: 0,
        };
        scheduler.round_to_units();
        scheduler.remaining = scheduler.unsent.count_ones() as u64;
        scheduler
    }

    fn round_to_units(&mut self) {
        for (number, region) in self.layout.regions().iter().enumerate() {
            let Some(range) = self.layout.region_range(number) else {
                continue;
            };
            if region.backing != Backing::Small {
                let bits = &mut self.unsent[range.first.as_usize()..range.end().as_usize()];
                for unit in bits.chunks_mut(region.backing.pages() as usize) {
                    let any = unit.any();
                    unit.fill(any);
                }
            }
        }
    }

    /// These go ahead of the rest, in this order. What is not to be sent among them is left out.
    pub fn lead_with(&mut self, ranges: impl IntoIterator<Item = PageRange>) {
        let image = self.image();
        self.lead
            .extend(ranges.into_iter().map(|range| range.intersect(image)));
    }

    /// The fault lane has answered `range`: it need not be pushed, and what lies around it goes first.
    pub fn fault(&mut self, range: PageRange) {
        self.take(range);
        let before = (WINDOW_PAGES.saturating_sub(range.count)) / 2;
        let start = range.first.0.saturating_sub(before);
        let window =
            PageRange::new(PageIndex(start), WINDOW_PAGES.max(range.count)).intersect(self.image());
        if self.first_unsent(window).is_none() {
            return;
        }
        if self.windows.len() == WINDOWS_MAX {
            self.windows.pop_front();
        }
        self.windows.push_back(window);
    }

    /// The next run, of at most `pages_max` pages or one huge page; `None` when all has been given out. Newest windows
    /// first.
    pub fn next(&mut self, pages_max: u64) -> Option<Batch> {
        while let Some(&window) = self.windows.back() {
            match self.first_unsent(window) {
                Some(first) => {
                    return Some(self.batch(first, window.end(), pages_max, Urgency::Window));
                }
                None => self.windows.pop_back(),
            };
        }
        while let Some(&ahead) = self.lead.front() {
            match self.first_unsent(ahead) {
                Some(first) => {
                    return Some(self.batch(first, ahead.end(), pages_max, Urgency::Lead));
                }
                None => self.lead.pop_front(),
            };
        }
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

    /// Pages that have not been given out.
    pub fn remaining(&self) -> u64 {
        self.remaining
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

    fn take(&mut self, range: PageRange) {
        let range = range.intersect(self.image());
        let bits = &mut self.unsent[range.first.as_usize()..range.end().as_usize()];
        self.remaining -= bits.count_ones() as u64;
        bits.fill(false);
    }
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::Region;
    use proptest::prelude::*;

    use super::*;

    fn map(pages: u64, data: &[(u64, u64)]) -> PageMap {
        let mut map = PageMap::zeroed(pages);
        for &(first, count) in data {
            map.set_data(PageRange::new(PageIndex(first), count));
        }
        map
    }

    fn scheduler(map: &PageMap) -> PushScheduler {
        PushScheduler::new(map, Layout::flat(map.bits().len() as u64).unwrap())
    }

    #[test]
    fn the_rest_goes_from_front_to_back_without_zero_pages() {
        let mut scheduler = scheduler(&map(100, &[(3, 5), (50, 2)]));
        let ranges: Vec<_> = std::iter::from_fn(|| scheduler.next(4))
            .map(|b| b.range)
            .collect();
        let run = |first, count| PageRange::new(PageIndex(first), count);
        assert_eq!(ranges, [run(3, 4), run(7, 1), run(50, 2)]);
    }

    #[test]
    fn what_lies_around_a_fault_goes_first_and_the_newest_fault_leads() {
        let mut scheduler = scheduler(&map(1000, &[(0, 1000)]));
        scheduler.fault(PageRange::one(PageIndex(500)));
        scheduler.fault(PageRange::one(PageIndex(800)));
        let first = scheduler.next(64).unwrap();
        assert_eq!(first.urgency, Urgency::Window);
        assert_eq!(first.range, PageRange::new(PageIndex(793), 7));
        assert_eq!(
            scheduler.next(64).unwrap().range,
            PageRange::new(PageIndex(801), 8)
        );
        assert_eq!(
            scheduler.next(64).unwrap().range,
            PageRange::new(PageIndex(493), 7)
        );
        assert_eq!(
            scheduler.next(64).unwrap().range,
            PageRange::new(PageIndex(501), 8)
        );
        assert_eq!(scheduler.next(64).unwrap().urgency, Urgency::Rest);
    }

    #[test]
    fn a_fault_at_either_end_keeps_its_window_inside_the_image() {
        let mut scheduler = scheduler(&map(20, &[(0, 20)]));
        scheduler.fault(PageRange::one(PageIndex(0)));
        scheduler.fault(PageRange::one(PageIndex(19)));
        let mut sent = 2;
        while let Some(batch) = scheduler.next(3) {
            sent += batch.range.count;
        }
        assert_eq!(sent, 20);
    }

    #[test]
    fn a_huge_page_goes_whole_and_not_together_with_small_ones() {
        let region = |name: &str, pages, backing| Region {
            name: name.to_owned(),
            gpa: None,
            pages,
            backing,
        };
        let layout = Layout::new(vec![
            region("low", 100, Backing::Small),
            region("huge", 1024, Backing::Huge2M),
        ])
        .unwrap();
        let mut scheduler = PushScheduler::new(&map(1124, &[(90, 20), (1000, 1)]), layout);
        scheduler.fault(PageRange::one(PageIndex(99)));
        let batches: Vec<_> = std::iter::from_fn(|| scheduler.next(64)).collect();
        let shape: Vec<_> = batches
            .iter()
            .map(|b| (b.range.first.0, b.range.count, b.whole))
            .collect();
        assert_eq!(
            shape,
            [
                (92, 7, false),
                (100, 512, true),
                (90, 2, false),
                (612, 512, true)
            ]
        );
    }

    #[derive(Clone, Debug)]
    enum Step {
        Fault(u64, u64),
        Next(u64),
    }

    fn steps(pages: u64) -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (0..pages, 1..600_u64).prop_map(|(first, count)| Step::Fault(first, count)),
            (1..64_u64).prop_map(Step::Next),
        ];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        /// Against a plain array: every data page goes out exactly once, no other page ever.
        #[test]
        fn each_data_page_goes_once(
            data in proptest::collection::vec((0..700_u64, 1..90_u64), 0..12),
            steps in steps(700),
        ) {
            let pages = 700;
            let map = map(pages, &data);
            let mut scheduler = scheduler(&map);
            let mut model: Vec<bool> = map.bits().iter().by_vals().collect();
            let clip = |first: u64, count: u64| first as usize..(first + count).min(pages) as usize;
            for step in steps {
                match step {
                    Step::Fault(first, count) => {
                        scheduler.fault(PageRange::new(PageIndex(first), count));
                        model[clip(first, count)].fill(false);
                    }
                    Step::Next(pages_max) => match scheduler.next(pages_max) {
                        Some(batch) => {
                            prop_assert!(batch.range.count >= 1 && batch.range.count <= pages_max);
                            for page in batch.range.pages() {
                                prop_assert!(std::mem::take(&mut model[page.as_usize()]));
                            }
                        }
                        None => prop_assert!(model.iter().all(|unsent| !unsent)),
                    },
                }
                prop_assert_eq!(scheduler.remaining(), model.iter().filter(|unsent| **unsent).count() as u64);
            }
            while let Some(batch) = scheduler.next(64) {
                for page in batch.range.pages() {
                    prop_assert!(std::mem::take(&mut model[page.as_usize()]));
                }
            }
            prop_assert!(model.iter().all(|unsent| !unsent));
        }
    }
}
