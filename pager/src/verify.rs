//! Comparing every page with the source's digest of it, taken at the pause.

use std::sync::{Mutex, MutexGuard, PoisonError};

use lazyvm_wire::{PAGE_SIZE, PageRange, page_digest, zero_digest};

use crate::table::after;

/// Most pages that are taken in at once.
const PIECE_PAGES: u64 = 4096;

/// Most differing pages that are named in the log.
const NAMED_MAX: u64 = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Known {
    Nothing,
    Installed,
    Expected,
    Both,
}

struct Pages {
    digests: Vec<u64>,
    known: Vec<Known>,
    open: u64,
    differing: u64,
}

/// Digests of what was installed and of what was to be, whichever comes first. Takes nine bytes a page.
pub(crate) struct Verifier(Mutex<Pages>);

impl Verifier {
    pub fn new(pages: u64) -> Self {
        Self(Mutex::new(Pages {
            digests: vec![0; pages as usize],
            known: vec![Known::Nothing; pages as usize],
            open: pages,
            differing: 0,
        }))
    }

    /// These bytes were put into these pages.
    pub fn installed(&self, range: PageRange, data: &[u8]) {
        let digests: Vec<u64> = data.chunks_exact(PAGE_SIZE).map(page_digest).collect();
        self.lock().take(range, digests, Known::Installed);
    }

    /// These pages are zero here.
    pub fn zero(&self, range: PageRange) {
        let mut rest = range;
        while !rest.is_empty() {
            // Piece by piece: faults wait for the lock as well.
            let piece = PageRange::new(rest.first, rest.count.min(PIECE_PAGES));
            self.lock().take(
                piece,
                std::iter::repeat_n(zero_digest(), piece.count as usize),
                Known::Installed,
            );
            rest = after(rest, piece);
        }
    }

    /// The guest gave these pages back: there may never be anything to compare.
    pub fn given_back(&self, range: PageRange) {
        let mut pages = self.lock();
        for page in range.pages() {
            let Some(known) = pages.known.get_mut(page.as_usize()) else {
                return;
            };
            if std::mem::replace(known, Known::Both) != Known::Both {
                pages.open -= 1;
            }
        }
    }

    /// The source says that these were the pages' digests.
    pub fn expected(&self, range: PageRange, digests: impl IntoIterator<Item = u64>) {
        self.lock().take(range, digests, Known::Expected);
    }

    /// The source says that these pages were zero.
    pub fn expected_zero(&self, range: PageRange) {
        self.lock().take(
            range,
            std::iter::repeat_n(zero_digest(), range.count as usize),
            Known::Expected,
        );
    }

    /// Pages that are not compared yet.
    pub fn open(&self) -> u64 {
        self.lock().open
    }

    /// Pages that differ.
    pub fn differing(&self) -> u64 {
        self.lock().differing
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pages {
    fn take(&mut self, range: PageRange, digests: impl IntoIterator<Item = u64>, side: Known) {
        for (page, digest) in range.pages().zip(digests) {
            let at = page.as_usize();
            let Some(known) = self.known.get_mut(at) else {
                return;
            };
            match *known {
                Known::Nothing => {
                    self.digests[at] = digest;
                    *known = side;
                }
                // A digest that is sent again after a reconnect says nothing new.
                same if same == side || same == Known::Both => {}
                _ => {
                    *known = Known::Both;
                    self.open -= 1;
                    if self.digests[at] != digest {
                        self.differing += 1;
                        if self.differing <= NAMED_MAX {
                            tracing::error!(%page, "differs from the source's");
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::PageIndex;

    use super::*;

    #[test]
    fn each_page_is_compared_once_whichever_side_comes_first() {
        let verifier = Verifier::new(3);
        let page = |number| PageRange::one(PageIndex(number));
        let data = [7; PAGE_SIZE];
        verifier.installed(page(0), &data);
        verifier.expected(page(0), [page_digest(&data)]);
        verifier.expected_zero(page(1));
        verifier.zero(page(1));
        verifier.expected_zero(page(1));
        assert_eq!((verifier.open(), verifier.differing()), (1, 0));
        verifier.installed(page(2), &data);
        verifier.expected_zero(page(2));
        assert_eq!((verifier.open(), verifier.differing()), (0, 1));
    }
}
