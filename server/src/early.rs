//! Pages that are sent before the pause, and which of them still hold at it.
//!
//! What the machine needs first is sent while it still runs here. At the pause each of these pages is compared with what
//! was sent, by digest; those that are the same need not go again. A page is sent once at most, so that no older copy
//! can come after a newer one.

use std::collections::{HashMap, VecDeque};

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::{Backing, Layout, PAGE_SIZE, PageIndex, PageMap, PageRange};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::port::SourceMemory;

/// Most pages that go early: 256 MiB, for which digests take some megabytes.
const PAGES_MAX: usize = 64 * 1024;

/// Most threads that compare.
const THREADS_MAX: usize = 4;

/// Pages that are compared at a time.
const COMPARE_PAGES: u64 = 32;

/// What is to go early, and what has gone.
#[derive(Debug, Default)]
pub(crate) struct Early {
    queue: VecDeque<PageRange>,
    /// A bit for each page that was queued at some time.
    queued: BitVec<u64, Lsb0>,
    /// Pages that were queued.
    pages: usize,
    sent: HashMap<PageIndex, u128>,
    /// A seed that a guest can't know, so that it can't make pages whose digests agree.
    seed: u64,
    /// A connection that carried such pages was lost: nobody knows what arrived.
    void: bool,
    /// Something was queued that may not have arrived.
    pending: bool,
}

impl Early {
    pub fn new(layout: &Layout, seed: u64) -> Self {
        Self {
            queued: BitVec::repeat(false, layout.pages() as usize),
            seed,
            ..Self::default()
        }
    }

    /// These pages are to go, as far as they have not before. Huge pages go at the pause only.
    pub fn queue(&mut self, layout: &Layout, ranges: impl IntoIterator<Item = PageRange>) {
        for range in ranges {
            for page in range.pages() {
                let small = layout
                    .locate(page)
                    .and_then(|(region, _)| layout.regions().get(region))
                    .is_some_and(|region| region.backing == Backing::Small);
                let full = self.pages >= PAGES_MAX;
                if self.void || full || !small {
                    continue;
                }
                let at = page.as_usize();
                if at < self.queued.len() && !self.queued.replace(at, true) {
                    self.push(page);
                }
            }
        }
    }

    fn push(&mut self, page: PageIndex) {
        match self.queue.back_mut() {
            Some(last) if last.end() == page && last.count < COMPARE_PAGES => last.count += 1,
            _ => self.queue.push_back(PageRange::one(page)),
        }
        self.pages += 1;
        self.pending = true;
    }

    /// The next pages that are to go.
    pub fn next(&mut self) -> Option<PageRange> {
        self.queue.pop_front()
    }

    /// All that went has arrived.
    pub fn arrived(&mut self) {
        self.pending = !self.queue.is_empty();
    }

    /// Whether something is to go, or under way.
    pub fn is_pending(&self) -> bool {
        self.pending
    }

    /// These pages went, with these bytes.
    pub fn sent(&mut self, range: PageRange, bytes: &[u8]) {
        for (page, bytes) in range.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
            self.sent.insert(page, self.digest(bytes));
        }
    }

    /// A connection was lost that may have carried such pages.
    pub fn give_up(&mut self) {
        self.void |= !self.sent.is_empty();
        self.pending = false;
        self.queue.clear();
        self.sent.clear();
    }

    /// Whether nobody knows what arrived.
    pub fn is_void(&self) -> bool {
        self.void
    }

    /// The pages that went and are the same now that the machine is paused. What can't be read is not. The machine
    /// stands still meanwhile, so several threads look.
    pub fn held(&self, memory: &dyn SourceMemory, map: &PageMap) -> PageMap {
        let mut held = PageMap::zeroed(map.bits().len() as u64);
        let mut pages: Vec<_> = self.sent.keys().copied().collect();
        pages.sort_unstable();
        pages.retain(|page| map.bits()[page.as_usize()]);
        let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let part = pages.len().div_ceil(threads.min(THREADS_MAX)).max(1);
        let same = std::thread::scope(|scope| {
            let parts: Vec<_> = pages
                .chunks(part)
                .map(|pages| scope.spawn(|| self.same(memory, pages)))
                .collect();
            parts
                .into_iter()
                // A part whose thread has panicked is not held.
                .flat_map(|part| part.join().unwrap_or_default())
                .collect::<Vec<_>>()
        });
        for page in same {
            held.set_data(PageRange::one(page));
        }
        held
    }

    /// Those of these pages, ascending, that are what was sent.
    fn same(&self, memory: &dyn SourceMemory, pages: &[PageIndex]) -> Vec<PageIndex> {
        let mut same = Vec::with_capacity(pages.len());
        let mut buffer = vec![0; COMPARE_PAGES as usize * PAGE_SIZE];
        let mut rest = pages;
        while let Some(&first) = rest.first() {
            let count = rest
                .iter()
                .zip(first.0..first.0 + COMPARE_PAGES)
                .take_while(|(page, expected)| page.0 == *expected)
                .count();
            let range = PageRange::new(first, count as u64);
            rest = &rest[count..];
            let bytes = &mut buffer[..range.bytes() as usize];
            if memory.read(range, bytes).is_err() {
                continue;
            }
            let now = range.pages().zip(bytes.chunks_exact(PAGE_SIZE));
            same.extend(
                now.filter(|(page, bytes)| self.sent.get(page) == Some(&self.digest(bytes)))
                    .map(|(page, _)| page),
            );
        }
        same
    }

    fn digest(&self, bytes: &[u8]) -> u128 {
        xxh3_128_with_seed(bytes, self.seed)
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    /// A byte a page; page 13 can't be read.
    struct Memory(Mutex<Vec<u8>>);

    impl SourceMemory for Memory {
        fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
            if range.contains(PageIndex(13)) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let pages = self.0.lock().unwrap();
            for (page, bytes) in range.pages().zip(out.chunks_exact_mut(PAGE_SIZE)) {
                bytes.fill(pages[page.as_usize()]);
            }
            Ok(())
        }

        fn data_runs(&self, _: &mut dyn FnMut(PageRange)) -> io::Result<()> {
            Ok(())
        }
    }

    fn send_all(early: &mut Early, memory: &Memory) -> Vec<PageIndex> {
        let mut sent = Vec::new();
        while let Some(range) = early.next() {
            let mut bytes = vec![0; range.bytes() as usize];
            if memory.read(range, &mut bytes).is_ok() {
                early.sent(range, &bytes);
                sent.extend(range.pages());
            }
        }
        sent
    }

    proptest! {
        /// Exactly those pages are held that went, did not change, and are data; each goes once.
        #[test]
        fn what_changed_is_not_held(
            queued in proptest::collection::vec((0..300_u64, 1..40_u64), 0..12),
            changed in proptest::collection::btree_set(0..300_usize, 0..80),
            zero in proptest::collection::btree_set(0..300_usize, 0..20),
        ) {
            let layout = Layout::flat(300).unwrap();
            let memory = Memory(Mutex::new(vec![1; 300]));
            let mut early = Early::new(&layout, 7);
            let mut sent = Vec::new();
            for (first, count) in queued {
                early.queue(&layout, [PageRange::new(PageIndex(first), count)]);
                sent.extend(send_all(&mut early, &memory));
            }
            let once: std::collections::BTreeSet<_> = sent.iter().copied().collect();
            prop_assert_eq!(once.len(), sent.len());
            let mut map = PageMap::zeroed(300);
            for page in 0..300 {
                if !zero.contains(&page) {
                    map.set_data(PageRange::one(PageIndex(page as u64)));
                }
            }
            for &page in &changed {
                memory.0.lock().unwrap()[page] = 2;
            }
            let held = early.held(&memory, &map);
            // A run of pages next to one that can't be read is read with it, and is not held.
            for page in (0..300).filter(|page| !(13 - 32..13 + 32).contains(&(*page as i64))) {
                let expected = once.contains(&PageIndex(page as u64))
                    && !changed.contains(&page)
                    && !zero.contains(&page);
                prop_assert_eq!(held.bits()[page], expected, "page {}", page);
            }
            for page in 0..45 {
                prop_assert!(!held.bits()[page] || !changed.contains(&page));
            }
            early.give_up();
            prop_assert_eq!(early.held(&memory, &map).data_pages(), 0);
        }
    }
}
