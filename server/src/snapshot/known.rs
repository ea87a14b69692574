//! Which pages a snapshot in the making holds anything of.
//!
//! A tracker may report pages that hold nothing, each time anew ([`DirtyTracker::collect`](crate::port::DirtyTracker::collect)):
//! most of a sparse memory. One that was never written to the snapshot, and holds nothing now, is left alone.

use std::io;

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::{PageIndex, PageMap, PageRange};

use crate::port::SourceMemory;

/// Pages that are read sooner than it is found out which of them hold anything.
const FEW_PAGES: u64 = 1024;

/// See the module.
pub(super) struct Known(BitVec<u64, Lsb0>);

impl Known {
    /// Nothing of an image of so many pages is written yet.
    pub fn new(pages: u64) -> Self {
        Self(BitVec::repeat(false, pages as usize))
    }

    /// These pages, of the image, are written.
    pub fn wrote(&mut self, range: PageRange) {
        self.0[range.first.as_usize()..range.end().as_usize()].fill(true);
    }

    /// Those of the reported pages that the snapshot may hold otherwise than the memory does.
    ///
    /// # Errors
    /// The memory's.
    pub fn changed(
        &self,
        reported: Vec<PageRange>,
        memory: &dyn SourceMemory,
    ) -> io::Result<Vec<PageRange>> {
        let image = PageRange::new(PageIndex(0), self.0.len() as u64);
        let reported: Vec<_> = reported
            .into_iter()
            .map(|range| range.intersect(image))
            .filter(|range| !range.is_empty())
            .collect();
        let bits = |range: &PageRange| range.first.as_usize()..range.end().as_usize();
        let new = |range| self.0[bits(range)].count_zeros() as u64;
        if reported.iter().map(new).sum::<u64>() <= FEW_PAGES {
            return Ok(reported);
        }
        let mut data = PageMap::zeroed(image.count);
        memory.data_runs(&mut |range| data.set_data(range))?;
        let matters = data.bits().to_bitvec() | &self.0;
        let mut changed = Vec::new();
        for range in reported {
            let end = range.end().as_usize();
            let mut at = range.first.as_usize();
            while let Some(skip) = matters[at..end].first_one() {
                let first = at + skip;
                at = first + matters[first..end].leading_ones();
                changed.push(PageRange::new(PageIndex(first as u64), (at - first) as u64));
            }
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its second thousand of pages holds data.
    struct Memory;

    impl SourceMemory for Memory {
        fn read(&self, _: PageRange, _: &mut [u8]) -> io::Result<()> {
            unreachable!("nothing is read to find out what holds data")
        }

        fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
            data(PageRange::new(PageIndex(1000), 1000));
            Ok(())
        }
    }

    #[test]
    fn what_holds_nothing_and_was_never_written_is_left_alone() {
        let mut known = Known::new(10_000);
        known.wrote(PageRange::new(PageIndex(5000), 10));
        let all = vec![PageRange::new(PageIndex(0), 20_000)];
        let changed = known.changed(all, &Memory).unwrap();
        // The one was data, and may be a hole by now.
        let expected = [(1000, 1000), (5000, 10)];
        let expected = expected.map(|(first, count)| PageRange::new(PageIndex(first), count));
        assert_eq!(changed, expected);
    }

    #[test]
    fn a_few_pages_are_all_taken_as_changed() {
        let few = vec![PageRange::new(PageIndex(7), 100)];
        let changed = Known::new(10_000).changed(few.clone(), &Memory).unwrap();
        assert_eq!(changed, few);
    }
}
