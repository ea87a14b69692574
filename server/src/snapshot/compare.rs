//! What changed, where nothing tells: each page's digest is kept as it was written, and all are compared at the pause.

use std::io;
use std::thread;

use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange, is_zero};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::format::{self, CHUNK_PAGES, SnapshotId};
use crate::port::SourceMemory;

/// Pages that are compared in a step, by all threads together.
pub(super) const STEP_PAGES: u64 = 16 * 1024;

/// Most threads that compare.
const THREADS_MAX: usize = 4;

/// Each page's digest as it was written, 0 for zeros.
pub(super) struct Compared {
    /// That a guest can't know, so that it can't make pages whose digests agree.
    seed: u64,
    digests: Vec<u128>,
}

/// Pages that differ, ascending, and their bytes.
pub(super) type Different = (Vec<PageRange>, Vec<u8>);

impl Compared {
    /// Of an image of zeros, with so many pages.
    pub fn new(id: SnapshotId, pages: u64) -> Self {
        Self {
            seed: id
                .0
                .iter()
                .fold(0, |seed, &byte| seed << 8 ^ seed >> 56 ^ u64::from(byte)),
            digests: vec![0; pages as usize],
        }
    }

    /// These pages were written.
    pub fn note(&mut self, range: PageRange, bytes: &[u8]) {
        for (page, bytes) in range.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
            self.digests[page.as_usize()] = self.digest(bytes);
        }
    }

    fn digest(&self, page: &[u8]) -> u128 {
        if is_zero(page) {
            return 0;
        }
        xxh3_128_with_seed(page, self.seed).max(1)
    }

    /// Those of `step` that differ from what was written; `data` is what of it is no hole.
    pub fn differing(
        &self,
        memory: &dyn SourceMemory,
        step: PageRange,
        data: &[PageRange],
    ) -> io::Result<Vec<Different>> {
        let threads = thread::available_parallelism().map_or(1, |cores| cores.get());
        let part = step.count.div_ceil(threads.min(THREADS_MAX) as u64).max(1);
        thread::scope(|scope| {
            let parts: Vec<_> = (0..step.count.div_ceil(part))
                .map(|number| {
                    PageRange::new(PageIndex(step.first.0 + number * part), part).intersect(step)
                })
                .map(|part| scope.spawn(move || self.differing_part(memory, part, data)))
                .collect();
            parts
                .into_iter()
                .map(|part| {
                    part.join().unwrap_or_else(|_| {
                        Err(io::Error::other("a thread that read it has ended"))
                    })
                })
                .collect()
        })
    }

    fn differing_part(
        &self,
        memory: &dyn SourceMemory,
        part: PageRange,
        data: &[PageRange],
    ) -> io::Result<Different> {
        let (mut ranges, mut found) = (Vec::<PageRange>::new(), Vec::new());
        let mut buffer = vec![0; format::CHUNK_BYTES];
        let mut first = part.first;
        while first < part.end() {
            let some = PageRange::new(first, CHUNK_PAGES).intersect(part);
            let bytes = &mut buffer[..some.bytes() as usize];
            // Holes read as zeros too; not to read them is quicker.
            if data.iter().any(|run| !run.intersect(some).is_empty()) {
                memory.read(some, bytes)?;
            } else {
                bytes.fill(0);
            }
            for (page, bytes) in some.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
                if self.digest(bytes) != self.digests[page.as_usize()] {
                    match ranges.last_mut() {
                        Some(last) if last.end() == page => last.count += 1,
                        _ => ranges.push(PageRange::one(page)),
                    }
                    found.extend_from_slice(bytes);
                }
            }
            first = some.end();
        }
        Ok((ranges, found))
    }
}
