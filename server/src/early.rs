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
            self.sent.insert(page, xxh3_128_with_seed(bytes, self.seed));
        }
    }

    /// A connection was lost that may have carried such pages.
    pub fn give_up(&mut self) {
        self.void |= !self.sent.is_empty();
        self.pending = false;
        self.queue.clear();
        self.sent.clear();
    }

    /// The pages that went and are the same now that the machine is paused. What can't be read is not.
    pub fn held(&self, memory: &dyn SourceMemory, map: &PageMap) -> PageMap {
        let mut held = PageMap::zeroed(map.bits().len() as u64);
        let mut pages: Vec<_> = self.sent.keys().copied().collect();
        pages.sort_unstable();
        let mut buffer = vec![0; COMPARE_PAGES as usize * PAGE_SIZE];
        let mut rest = &pages[..];
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
            for (page, bytes) in range.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
                let same = self.sent.get(&page) == Some(&xxh3_128_with_seed(bytes, self.seed));
                if same && map.bits()[page.as_usize()] {
                    held.set_data(PageRange::one(page));
                }
            }
        }
        held
    }
}
