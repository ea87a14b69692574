//! Which of a kernel's code is used next, as far as its data tells.
//!
//! Page tables tell which code was ever used, and not even that where a kernel is mapped in large pages. A processor that is
//! emulated reads code once, when it translates it, so its accesses tell nothing either. But return addresses on stacks, and
//! the handlers of interrupts, timers and work, point to what runs next. So each page of code has a score:
//!
//! - for each such pointer to it or near it, the more the sooner its data is used and the nearer it is;
//! - for each call out of a page with such a score, the page's score, shared among all calls out of it.
//!
//! Measured with Linux 6.1, whose code has 3,590 pages: of the first 75 that a clone touched, half were among the first 76 by
//! this score and nine tenths among the first 283; by the nearness of pointers alone, 94 and 706.

use std::collections::HashMap;

use lazyvm_wire::{PAGE_SHIFT, PageIndex};

use super::guest::GuestMemory;
use super::walk::Mapping;

/// Most pages of code that are told apart: 256 MiB.
const CODE_MAX: usize = 64 << 10;

/// Most pages of data that are searched for pointers, and pages of code for calls: 8 and 4 MiB, which take some
/// milliseconds each.
const DATA_MAX: usize = 2048;
const CALLERS_MAX: usize = 1024;

/// So many pages that were pointed to before one make its pointers count half.
const HALF_LATER: f64 = 50.0;

/// So many pages from a pointer it counts half, and no farther than that at all.
const HALF_WAY: f64 = 2.0;
const FAR: u64 = 8;

/// `call` and `jmp` with a relative address of 32 bits (AMD64 Architecture Programmer's Manual, volume 3).
const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;

/// Pages of code, by virtual address.
#[derive(Debug, Default)]
pub(super) struct CodeMap {
    /// Numbers of virtual pages, and what is there.
    pages: Vec<(u64, PageIndex)>,
}

impl CodeMap {
    /// Adds the page at `offset` bytes of a mapping.
    pub fn add(&mut self, mapping: &Mapping, offset: u64, page: PageIndex) {
        if self.pages.len() < CODE_MAX {
            let virt = mapping.virt.saturating_add(offset);
            self.pages.push((virt >> PAGE_SHIFT, page));
        }
    }

    /// The pages with a score, the highest first. `data` is what the kernel uses of its data, the first used first.
    pub fn used_next(
        mut self,
        memory: &GuestMemory,
        data: impl Iterator<Item = PageIndex>,
    ) -> Vec<PageIndex> {
        self.pages.sort_unstable_by_key(|&(virt, _)| virt);
        let near = self.near(&self.pointed_to(memory, data));
        let mut scores = near.clone();
        for (at, score) in by_score(&near).into_iter().take(CALLERS_MAX) {
            let called = self.called(memory, at);
            let all: u32 = called.values().sum();
            for (target, calls) in called {
                scores[target] += score * f64::from(calls) / f64::from(all);
            }
        }
        let pages = by_score(&scores).into_iter();
        pages.map(|(at, _)| self.pages[at].1).collect()
    }

    /// Places of pages that words of `data` point to, each once, in the order of these.
    fn pointed_to(
        &self,
        memory: &GuestMemory,
        data: impl Iterator<Item = PageIndex>,
    ) -> Vec<usize> {
        let mut is_in = vec![false; self.pages.len()];
        let mut order = Vec::new();
        for page in data.take(DATA_MAX) {
            for word in memory.words(page).iter().flatten() {
                if let Some(at) = self.place(word >> PAGE_SHIFT)
                    && !std::mem::replace(&mut is_in[at], true)
                {
                    order.push(at);
                }
            }
        }
        order
    }

    /// What each page has of the pointers to it and near it.
    fn near(&self, pointed: &[usize]) -> Vec<f64> {
        let mut scores = vec![0.0; self.pages.len()];
        for (rank, &at) in pointed.iter().enumerate() {
            let weight = HALF_LATER / (HALF_LATER + rank as f64);
            let virt = self.pages[at].0;
            let first = self.pages.partition_point(|&(other, _)| other + FAR < virt);
            let around = (first..).zip(&self.pages[first..]);
            for (beside, &(other, _)) in around.take_while(|(_, (other, _))| *other <= virt + FAR) {
                let distance = other.abs_diff(virt) as f64;
                scores[beside] += weight * 0.5_f64.powf(distance / HALF_WAY);
            }
        }
        scores
    }

    /// Places of other pages that instructions of this one call, and how often. Bytes that only look like a call lead
    /// anywhere, so hardly ever to code.
    fn called(&self, memory: &GuestMemory, at: usize) -> HashMap<usize, u32> {
        let (virt, page) = self.pages[at];
        let mut called = HashMap::new();
        let Some(bytes) = memory.page_bytes(page) else {
            return called;
        };
        for (offset, five) in bytes.windows(5).enumerate() {
            let &[CALL | JUMP, a, b, c, d] = five else {
                continue;
            };
            let behind = (virt << PAGE_SHIFT).wrapping_add(offset as u64 + 5);
            let target = behind.wrapping_add_signed(i32::from_le_bytes([a, b, c, d]).into());
            match self.place(target >> PAGE_SHIFT) {
                Some(target) if target != at => *called.entry(target).or_insert(0) += 1,
                _ => {}
            }
        }
        called
    }

    fn place(&self, virt: u64) -> Option<usize> {
        let (first, last) = (self.pages.first()?.0, self.pages.last()?.0);
        if !(first..=last).contains(&virt) {
            return None;
        }
        self.pages
            .binary_search_by_key(&virt, |&(virt, _)| virt)
            .ok()
    }
}

/// Places with a score, and the score: the highest first, those with the same in their order.
fn by_score(scores: &[f64]) -> Vec<(usize, f64)> {
    let scored = scores.iter().copied().enumerate();
    let mut scored: Vec<_> = scored.filter(|&(_, score)| score > 0.0).collect();
    scored.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    scored
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::PAGE_SIZE;
    use proptest::prelude::*;

    use super::super::guest::ENTRIES;
    use super::super::guest::testing::Pages;
    use super::*;

    const TEXT: u64 = 0xffff_ffff_8100_0000;

    /// Data with these words, a page each, and code without any calls but this: from the page of code at `call.0` to the
    /// one at `call.1`.
    fn memory(words: &[u64], call: Option<(u64, u64)>) -> GuestMemory {
        let mut pages = vec![[0; ENTRIES]; 130];
        for (page, word) in pages.iter_mut().zip(words) {
            page[2] = *word;
        }
        if let Some((from, to)) = call {
            let distance = (to as i32 - from as i32) * PAGE_SIZE as i32;
            let [a, b, c, d] = distance.to_le_bytes();
            pages[page_of(from) as usize][2] = u64::from_le_bytes([CALL, a, b, c, d, 0, 0, 0]);
        }
        Pages::guest(pages)
    }

    /// Where the page of code is that lies so many pages from its begin.
    fn page_of(at: u64) -> u64 {
        if at < 10 { 120 + at } else { 100 + at - 11 }
    }

    /// Code in two pieces, with a hole of one page between them, which lie the other way round in memory.
    fn code() -> CodeMap {
        let mut map = CodeMap::default();
        for (virt, first) in [(TEXT, 120), (TEXT + (11 << PAGE_SHIFT), 100)] {
            let mapping = Mapping {
                virt,
                gpa: first << PAGE_SHIFT,
                bytes: 10 << PAGE_SHIFT,
                user: false,
                writable: false,
                executable: true,
                accessed: true,
                dirty: false,
            };
            for page in 0..10 {
                map.add(&mapping, page << PAGE_SHIFT, PageIndex(first + page));
            }
        }
        map
    }

    fn used_next(words: &[u64], call: Option<(u64, u64)>) -> Vec<u64> {
        let data = (0..words.len() as u64).map(PageIndex);
        let pages = code().used_next(&memory(words, call), data);
        pages.into_iter().map(|page| page.0).collect()
    }

    fn at(page: u64) -> u64 {
        TEXT + (page << PAGE_SHIFT) + 0x123
    }

    #[test]
    fn what_is_pointed_to_comes_first_then_what_is_near() {
        let found = used_next(&[0, at(18), 0x1234, at(10), at(2), at(18)], None);
        assert_eq!(found[..2], [page_of(18), page_of(2)]);
        let rank = |page: u64| found.iter().position(|&other| other == page_of(page));
        assert!(rank(19) < rank(20) && rank(3) < rank(5));
        assert_eq!(found.len(), 20);
        let far = used_next(&[at(0)], None);
        assert_eq!(far.len(), 9, "{far:?}");
    }

    #[test]
    fn what_is_called_from_there_comes_right_behind() {
        let found = used_next(&[at(2)], Some((2, 20)));
        assert_eq!(found[..2], [page_of(2), page_of(20)]);
        // Nobody points to who calls.
        let found = used_next(&[at(2)], Some((19, 20)));
        assert!(!found.contains(&page_of(20)));
    }

    proptest! {
        #[test]
        fn any_words_give_code_and_each_page_of_it_once(
            words in prop::collection::vec(prop_oneof![any::<u64>(), TEXT - 9000..TEXT + 90_000], 1..40),
        ) {
            let found = used_next(&words, None);
            let all: Vec<u64> = (100..110).chain(120..130).collect();
            prop_assert!(found.iter().all(|page| all.contains(page)));
            let distinct: std::collections::HashSet<_> = found.iter().collect();
            prop_assert_eq!(distinct.len(), found.len());
            let pages = words.iter().map(|word| word >> PAGE_SHIFT);
            let text = TEXT >> PAGE_SHIFT;
            let is_pointed = pages.clone().any(|page| (text..text + 10).contains(&page) || (text + 11..text + 21).contains(&page));
            prop_assert_eq!(is_pointed, !found.is_empty());
        }
    }
}
