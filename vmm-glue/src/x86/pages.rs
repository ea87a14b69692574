//! Sets of an image's pages.

use lazyvm_wire::{PageIndex, PageRange};

/// Which pages of an image, a bit each.
#[derive(Clone, Debug, Default)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// None of an image of so many pages.
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
        Self {
            words: vec![0; words],
            pages,
        }
    }

    /// Adds a page; whether it was missing. One past the image's end is not taken.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        let bit = 1 << (page.0 % 64);
        match self.words.get_mut((page.0 / 64) as usize) {
            Some(word) if page.0 < self.pages && *word & bit == 0 => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }

    /// Whether it is in.
    pub fn contains(&self, page: PageIndex) -> bool {
        let word = self.words.get((page.0 / 64) as usize);
        word.is_some_and(|word| word >> (page.0 % 64) & 1 != 0)
    }

    /// Those that are in, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        let words = (0..).zip(&self.words);
        words.flat_map(|(at, &word)| {
            let bits = (0..64_u64).filter(move |bit| word >> bit & 1 != 0);
            bits.map(move |bit| PageIndex(at * 64 + bit))
        })
    }

    /// How many are in.
    pub fn count(&self) -> u64 {
        let ones = self.words.iter().map(|word| u64::from(word.count_ones()));
        ones.sum()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }
}

/// Pages in an order, each once.
#[derive(Clone, Debug, Default)]
pub struct PageList {
    set: PageSet,
    ranges: Vec<PageRange>,
}

impl PageList {
    /// Empty, for an image of so many pages.
    pub fn new(pages: u64) -> Self {
        Self {
            set: PageSet::new(pages),
            ranges: Vec::new(),
        }
    }

    /// Puts a page behind the others, unless it is in already; whether it was not.
    pub fn push(&mut self, page: PageIndex) -> bool {
        if !self.set.insert(page) {
            return false;
        }
        match self.ranges.last_mut() {
            Some(last) if last.end() == page => last.count += 1,
            _ => self.ranges.push(PageRange::one(page)),
        }
        true
    }

    /// The same for each of these.
    pub fn extend(&mut self, pages: impl IntoIterator<Item = PageIndex>) {
        for page in pages {
            self.push(page);
        }
    }

    /// Whether it is in.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.set.contains(page)
    }

    /// The same pages without their order.
    pub fn set(&self) -> &PageSet {
        &self.set
    }

    /// Runs of pages, in the order in which they came.
    pub fn ranges(&self) -> &[PageRange] {
        &self.ranges
    }

    /// The same.
    pub fn into_ranges(self) -> Vec<PageRange> {
        self.ranges
    }

    /// Each page, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.ranges.iter().flat_map(|range| range.pages())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_list_holds_each_page_once_in_the_order_of_coming(pages in prop::collection::vec(0_u64..300, 0..600)) {
            let mut list = PageList::new(256);
            let mut expected: Vec<PageIndex> = Vec::new();
            for &page in &pages {
                let new = page < 256 && !expected.contains(&PageIndex(page));
                prop_assert_eq!(list.push(PageIndex(page)), new);
                if new {
                    expected.push(PageIndex(page));
                }
            }
            prop_assert_eq!(list.set.count(), expected.len() as u64);
            let mut ascending = expected.clone();
            ascending.sort_unstable();
            prop_assert_eq!(list.set.iter().collect::<Vec<_>>(), ascending);
            prop_assert_eq!(list.iter().collect::<Vec<_>>(), expected);
        }
    }
}
