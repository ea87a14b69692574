//! Pages that a clone needs first, read before one is there.
//!
//! They lie all over the memory, and reading one takes reading, decompressing and checking the whole chunk that it lies in.
//! A clone would wait for that at each of them.

use std::collections::HashMap;
use std::io;
use std::sync::Mutex;

use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

use crate::session::lock;

/// Most pages that are kept: 32 MiB, which a path of 1 Gbit/s carries in a quarter of a second.
const PAGES_MAX: usize = 8192;

type Pages = HashMap<PageIndex, Box<[u8]>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Ready(Mutex<Pages>);

impl Ready {
    /// Keeps the first of these pages, and no others any more. What can't be read is left out: who asks for it hears why.
    pub fn keep(&self, pages: &[PageIndex], read: impl Fn(PageRange, &mut [u8]) -> io::Result<()>) {
        let pages = &pages[..pages.len().min(PAGES_MAX)];
        // Sorted, so that each chunk is read once.
        let mut sorted = pages.to_vec();
        sorted.sort_unstable();
        let mut kept = Pages::with_capacity(sorted.len());
        for page in sorted {
            let mut bytes = vec![0; PAGE_SIZE];
            if read(PageRange::one(page), &mut bytes).is_ok() {
                kept.insert(page, bytes.into());
            }
        }
        *lock(&self.0) = kept;
    }

    /// Reads these pages into `out`, which is as long, if all of them are here.
    pub fn read(&self, range: PageRange, out: &mut [u8]) -> bool {
        let kept = lock(&self.0);
        let found: Option<Vec<_>> = range.pages().map(|page| kept.get(&page)).collect();
        let Some(found) = found else {
            return false;
        };
        for (bytes, out) in found.into_iter().zip(out.chunks_exact_mut(PAGE_SIZE)) {
            out.copy_from_slice(bytes);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(range: PageRange, out: &mut [u8]) -> io::Result<()> {
        if range.first == PageIndex(5) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        out.fill(range.first.0 as u8);
        Ok(())
    }

    #[test]
    fn pages_are_here_until_others_are_kept_and_a_damaged_one_never_is() {
        let ready = Ready::default();
        ready.keep(&[7, 3, 5, 4].map(PageIndex), read);
        let mut out = vec![0; 2 * PAGE_SIZE];
        assert!(ready.read(PageRange::new(PageIndex(3), 2), &mut out));
        assert_eq!([out[0], out[PAGE_SIZE]], [3, 4]);
        let mut other = vec![9; 2 * PAGE_SIZE];
        assert!(!ready.read(PageRange::new(PageIndex(4), 2), &mut other));
        assert_eq!(other[0], 9);
        ready.keep(&[PageIndex(9)], read);
        assert!(!ready.read(PageRange::one(PageIndex(3)), &mut out[..PAGE_SIZE]));
    }
}
