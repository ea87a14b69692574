//! What a tracker's user has: a copy of all memory, and over it whatever is reported.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lazyvm_server::port::{DirtyTracker, SourceMachine, SourceMemory};
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

/// A reader's copy of the memory.
pub struct Copy {
    memory: Arc<dyn SourceMemory>,
    pub bytes: Vec<u8>,
}

impl Copy {
    pub fn of(source: &dyn SourceMachine) -> Self {
        let layout = source.layout();
        let mut copy = Self {
            memory: source.memory(),
            bytes: vec![0; layout.bytes() as usize],
        };
        copy.read(PageRange::new(PageIndex(0), layout.pages()));
        copy
    }

    fn read(&mut self, range: PageRange) {
        let start = range.first.byte_offset() as usize;
        let part = &mut self.bytes[start..start + range.bytes() as usize];
        self.memory.read(range, part).unwrap();
    }

    /// Copies what is reported; gives how many pages with content that was.
    pub fn collect(&mut self, tracker: &mut dyn DirtyTracker) -> u64 {
        let mut ranges = Vec::new();
        tracker.collect(&mut |range| ranges.push(range)).unwrap();
        for &range in &ranges {
            self.read(range);
        }
        // Pages that hold nothing may be reported each time, and more than once.
        let pages: BTreeSet<_> = ranges.iter().flat_map(|range| range.pages()).collect();
        let holds = |page: &&PageIndex| {
            let start = page.byte_offset() as usize;
            self.bytes[start..start + PAGE_SIZE]
                .iter()
                .any(|&byte| byte != 0)
        };
        pages.iter().filter(holds).count() as u64
    }

    /// That it is what this file holds, which is the memory itself.
    pub fn assert_is(&self, file: &File) {
        let mut now = vec![0; self.bytes.len()];
        file.read_exact_at(&mut now, 0).unwrap();
        assert_same(&now, &self.bytes);
    }
}

/// That memory and its copy have the same bytes.
pub fn assert_same(memory: &[u8], copy: &[u8]) {
    assert_eq!(memory.len(), copy.len());
    let pages = memory.chunks(PAGE_SIZE).zip(copy.chunks(PAGE_SIZE));
    let differ: Vec<_> = pages
        .enumerate()
        .filter(|(_, (now, copied))| now != copied)
        .map(|(page, _)| page)
        .collect();
    assert!(differ.is_empty(), "pages {differ:?} were written unseen");
}
