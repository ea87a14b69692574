//! Pages that are sent before the pause, and which of them still hold at it.
//!
//! There are two ways to know what holds. Where writes are tracked ([`crate::port::DirtyTracker`]), a page that was written
//! since it went does not hold, and goes again in a later round. Where they are not, each page goes once, and at the pause
//! its digest is compared with the memory's.
//!
//! A page is marked as sent *before* it is read. So a write that its copy may lack is reported after that, and takes the mark
//! away: a page is never taken for one that holds and does not.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::held::HeldRun;
use lazyvm_wire::{Backing, Layout, PAGE_SIZE, PageIndex, PageMap, PageRange};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use crate::port::SourceMemory;

/// Most pages that go early where digests tell what holds: 256 MiB, for which they take some megabytes.
const DIGESTS_MAX: usize = 64 * 1024;

/// Most threads that compare.
const THREADS_MAX: usize = 4;

/// Pages that are read at a time.
const READ_PAGES: u64 = 32;

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

/// What is to go early, and what has gone.
#[derive(Debug)]
pub(crate) struct Early {
    check: Check,
    /// What is to go, and pages that are not to go any more.
    queue: VecDeque<PageRange>,
    /// A bit for each page that is to go.
    queued: BitVec<u64, Lsb0>,
    /// Pages that are to go.
    waiting: u64,
    /// A bit for each page that was ever to go.
    known: BitVec<u64, Lsb0>,
    /// In which round each page went; 0 for one that did not, or was written since. Empty until something is queued.
    rounds: Vec<u8>,
    /// How often each page was found written after it had gone.
    heat: Vec<u8>,
    round: u8,
    pages: u64,
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
            rounds: Vec::new(),
            heat: Vec::new(),
            round: 1,
            pages: layout.pages(),
            unacked: 0,
            void: false,
        }
    }

    /// Writes are reported from now on, to [`Self::written`]. Nothing was queued yet.
    pub fn writes_are_tracked(&mut self) {
        debug_assert!(self.rounds.is_empty());
        self.check = Check::Writes;
    }

    /// These pages are to go, as far as they are not here or under way already. Huge pages go at the pause only.
    pub fn queue(&mut self, layout: &Layout, ranges: impl IntoIterator<Item = PageRange>) {
        if self.void {
            return;
        }
        if self.rounds.is_empty() {
            self.rounds = vec![0; self.pages as usize];
            self.heat = vec![0; self.pages as usize];
        }
        for range in ranges {
            for page in range.pages() {
                let small = layout
                    .locate(page)
                    .and_then(|(region, _)| layout.regions().get(region))
                    .is_some_and(|region| region.backing == Backing::Small);
                let new = self.rounds.get(page.as_usize()) == Some(&0);
                if small && new && !self.is_full() && !self.queued.replace(page.as_usize(), true) {
                    self.known.set(page.as_usize(), true);
                    self.push(page);
                }
            }
        }
    }

    fn is_full(&self) -> bool {
        match &self.check {
            Check::Digests { sent, .. } => sent.len() + self.waiting as usize >= DIGESTS_MAX,
            Check::Writes => false,
        }
    }

    fn push(&mut self, page: PageIndex) {
        match self.queue.back_mut() {
            Some(last) if last.end() == page && last.count < READ_PAGES => last.count += 1,
            _ => self.queue.push_back(PageRange::one(page)),
        }
        self.waiting += 1;
    }

    /// The next pages that are to go, and their round. From now on they count as sent.
    pub fn next(&mut self) -> Option<(PageRange, u8)> {
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
        self.rounds[bits].fill(self.round);
        self.waiting -= range.count;
        Some((range, self.round))
    }

    /// Nothing waits to go any more.
    pub fn unqueue(&mut self) {
        self.queue.clear();
        self.queued.fill(false);
        self.waiting = 0;
    }

    /// How many pages at the start of `range` do not wait any more, and the run of those behind them that do.
    fn first_queued(&self, range: PageRange) -> (u64, PageRange) {
        let bits = &self.queued[range.first.as_usize()..range.end().as_usize()];
        let gone = bits.leading_zeros();
        let count = bits[gone..].leading_ones();
        let first = PageIndex(range.first.0 + gone as u64);
        (gone as u64, PageRange::new(first, count as u64))
    }

    /// These pages go with these bytes.
    pub fn sent(&mut self, range: PageRange, bytes: &[u8]) {
        if let Check::Digests { sent, seed } = &mut self.check {
            for (page, bytes) in range.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
                sent.insert(page, xxh3_128_with_seed(bytes, *seed));
            }
        }
    }

    /// These pages were taken to go, and don't: they are zero or can't be read.
    pub fn not_sent(&mut self, range: PageRange) {
        self.rounds[range.first.as_usize()..range.end().as_usize()].fill(0);
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

    /// These pages were written. Those that had gone, and do not hold any more, are passed on; and so are those that wait to
    /// go, which they do not then: who is written once is likely to be written again, and would go twice.
    ///
    /// Gives how many of them were ever to go: a tracker may tell pages that hold nothing too.
    pub fn written(&mut self, range: PageRange, mut stale: impl FnMut(PageIndex)) -> u64 {
        if self.rounds.is_empty() {
            return 0;
        }
        let end = range.end().0.min(self.pages) as usize;
        let mut at = range.first.as_usize();
        if self.waiting > 0 {
            let queued = &mut self.queued[at.min(end)..end];
            for offset in queued.iter_ones() {
                stale(PageIndex((at + offset) as u64));
            }
            self.waiting -= queued.count_ones() as u64;
            queued.fill(false);
        }
        // Most of what is reported at a time holds nothing, and never went.
        while let Some(sent) = first_sent(&self.rounds, at..end) {
            self.rounds[sent] = 0;
            self.heat[sent] = self.heat[sent].saturating_add(1);
            stale(PageIndex(sent as u64));
            at = sent + 1;
        }
        self.known[range.first.as_usize().min(end)..end].count_ones() as u64
    }

    /// What goes from now on is newer than all that went so far; `false` when there can be no more rounds.
    pub fn next_round(&mut self) -> bool {
        self.round = self.round.saturating_add(1);
        self.round < u8::MAX
    }

    /// How often a page was found written after it had gone.
    pub fn heat(&self, page: PageIndex) -> u8 {
        self.heat.get(page.as_usize()).copied().unwrap_or(0)
    }

    /// Nothing that went counts: a connection was lost that may have carried it, or writes may have been missed.
    pub fn give_up(&mut self) {
        self.void |= !self.rounds.is_empty();
        self.unqueue();
        self.unacked = 0;
        self.rounds = Vec::new();
        if let Check::Digests { sent, .. } = &mut self.check {
            sent.clear();
        }
    }

    /// Whether nobody knows what arrived.
    pub fn is_void(&self) -> bool {
        self.void
    }

    /// The pages that went and are the same now that the machine is paused and the last writes were reported. What can't be
    /// read is not.
    pub fn held(&self, memory: &dyn SourceMemory, map: &PageMap) -> Vec<HeldRun> {
        match &self.check {
            Check::Digests { sent, seed } => held_by_digest(sent, *seed, memory, map),
            Check::Writes => held_by_round(&self.rounds, map),
        }
    }
}

/// The first page of `pages` that went. Most did not, so that many are looked at in one step.
fn first_sent(rounds: &[u8], pages: Range<usize>) -> Option<usize> {
    const STEP: usize = 64;
    let mut at = pages.start;
    let part = rounds.get(pages)?;
    for step in part.chunks(STEP) {
        if step.iter().fold(0, |any, &round| any | round) != 0 {
            return Some(at + step.iter().position(|&round| round != 0)?);
        }
        at += STEP;
    }
    None
}

/// The runs of equal rounds among the pages that hold data.
fn held_by_round(rounds: &[u8], map: &PageMap) -> Vec<HeldRun> {
    let mut held: Vec<HeldRun> = Vec::new();
    let bits = map.bits();
    let mut at = 0;
    while at < rounds.len() {
        let Some(first) = first_sent(rounds, at..rounds.len()) else {
            break;
        };
        at = first;
        let round = rounds[at];
        let rest = &rounds[at..];
        let count = rest.iter().position(|&other| other != round);
        let end = at + count.unwrap_or(rest.len());
        while let Some(offset) = bits[at..end].first_one() {
            let first = at + offset;
            let count = bits[first..end].leading_ones();
            held.push(HeldRun {
                range: PageRange::new(PageIndex(first as u64), count as u64),
                round,
            });
            at = first + count;
        }
        at = end;
    }
    held
}

/// The machine stands still meanwhile, so several threads look.
fn held_by_digest(
    sent: &HashMap<PageIndex, u128>,
    seed: u64,
    memory: &dyn SourceMemory,
    map: &PageMap,
) -> Vec<HeldRun> {
    let mut pages: Vec<_> = sent.keys().copied().collect();
    pages.sort_unstable();
    pages.retain(|page| map.bits()[page.as_usize()]);
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let part = pages.len().div_ceil(threads.min(THREADS_MAX)).max(1);
    let same = std::thread::scope(|scope| {
        let parts: Vec<_> = pages
            .chunks(part)
            .map(|pages| scope.spawn(|| same(sent, seed, memory, pages)))
            .collect();
        parts
            .into_iter()
            // A part whose thread has panicked is not held.
            .flat_map(|part| part.join().unwrap_or_default())
            .collect::<Vec<_>>()
    });
    let mut held: Vec<HeldRun> = Vec::new();
    for page in same {
        match held.last_mut() {
            Some(last) if last.range.end() == page => last.range.count += 1,
            _ => held.push(HeldRun {
                range: PageRange::one(page),
                round: 1,
            }),
        }
    }
    held
}

/// Those of these pages, ascending, that are what was sent.
fn same(
    sent: &HashMap<PageIndex, u128>,
    seed: u64,
    memory: &dyn SourceMemory,
    pages: &[PageIndex],
) -> Vec<PageIndex> {
    let mut same = Vec::with_capacity(pages.len());
    let mut buffer = vec![0; READ_PAGES as usize * PAGE_SIZE];
    let mut rest = pages;
    while let Some(&first) = rest.first() {
        let count = rest
            .iter()
            .zip(first.0..first.0 + READ_PAGES)
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
            now.filter(|(page, bytes)| sent.get(page) == Some(&xxh3_128_with_seed(bytes, seed)))
                .map(|(page, _)| page),
        );
    }
    same
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

    fn bits(held: &[HeldRun]) -> Vec<bool> {
        let mut bits = vec![false; 300];
        for page in held.iter().flat_map(|run| run.range.pages()) {
            bits[page.as_usize()] = true;
        }
        bits
    }

    fn send_all(early: &mut Early, memory: &Memory) -> Vec<PageIndex> {
        let mut sent = Vec::new();
        while let Some((range, _)) = early.next() {
            let mut bytes = vec![0; range.bytes() as usize];
            if memory.read(range, &mut bytes).is_ok() {
                early.sent(range, &bytes);
                sent.extend(range.pages());
            } else {
                early.not_sent(range);
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
            let held = bits(&early.held(&memory, &map));
            // A run of pages next to one that can't be read is read with it, and is not held.
            for page in (0..300).filter(|page| !(13 - 32..13 + 32).contains(&(*page as i64))) {
                let expected = once.contains(&PageIndex(page as u64))
                    && !changed.contains(&page)
                    && !zero.contains(&page);
                prop_assert_eq!(held[page], expected, "page {}", page);
            }
            for (page, held) in held.iter().enumerate().take(45) {
                prop_assert!(!held || !changed.contains(&page));
            }
            early.give_up();
            prop_assert!(early.held(&memory, &map).is_empty());
        }

        /// A machine that writes between any two steps, and a tracker that reports it some time later: what holds at the
        /// pause is what the destination has, in the round that is told.
        #[test]
        fn what_holds_is_what_went_last(
            steps in proptest::collection::vec((0..7_u8, 0..100_u64, 1..30_u64), 0..120),
        ) {
            let layout = Layout::flat(100).unwrap();
            let mut memory = vec![1_u32; 100];
            let mut unreported = std::collections::BTreeSet::new();
            let mut there = vec![(0_u8, 0_u32); 100];
            let mut early = Early::new(&layout, 7);
            early.writes_are_tracked();
            early.queue(&layout, [PageRange::new(PageIndex(0), 100)]);
            for (step, first, count) in steps {
                let range = PageRange::new(PageIndex(first), count.min(100 - first));
                match step {
                    0..=2 => for page in range.pages() {
                        memory[page.as_usize()] += 1;
                        unreported.insert(page);
                    },
                    3 => if let Some((range, round)) = early.next() {
                        for page in range.pages() {
                            there[page.as_usize()] = (round, memory[page.as_usize()]);
                        }
                    },
                    4 => {
                        let mut stale = Vec::new();
                        for page in std::mem::take(&mut unreported) {
                            early.written(PageRange::one(page), |page| stale.push(PageRange::one(page)));
                        }
                        if early.next_round() {
                            early.queue(&layout, stale);
                        }
                    }
                    5 if count == 1 => early.unqueue(),
                    _ => early.queue(&layout, [range]),
                }
            }
            for page in unreported {
                early.written(PageRange::one(page), |_| ());
            }
            let mut map = PageMap::zeroed(100);
            map.set_data(PageRange::new(PageIndex(0), 100));
            for run in early.held(&Memory(Mutex::new(Vec::new())), &map) {
                for page in run.range.pages() {
                    prop_assert_eq!(there[page.as_usize()], (run.round, memory[page.as_usize()]));
                }
            }
        }
    }
}
