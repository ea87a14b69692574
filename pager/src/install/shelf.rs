//! Where pages wait that come before their memory is there, or for memory without a file of its own: in a file of the
//! whole image. It has holes where nothing came, and what was put in place is taken out of it, so that memory and shelf
//! together take little more than the machine has.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lazyvm_wire::{Backing, PageRange};

use super::early::{Early, Taken};
use crate::hole::punch_hole;
use crate::sys;

/// See the module. Shared by whoever brings pages and, once there is memory, its
/// [`Installer`](super::Installer::with_shelf).
#[derive(Debug)]
pub struct Shelf {
    file: File,
    pages: u64,
    pub(super) early: Arc<Early>,
}

impl Shelf {
    /// For an image of so many pages, in memory.
    ///
    /// # Errors
    /// The system's.
    pub fn new(pages: u64) -> io::Result<Self> {
        let bytes = PageRange::new(lazyvm_wire::PageIndex(0), pages).bytes();
        Ok(Self {
            file: sys::memfd("lazyvm-early", bytes, Backing::Small)?,
            pages,
            early: Arc::default(),
        })
    }

    /// Takes in pages as the machine had them in a round before it was handed over; `false` where it has been since, so
    /// that [`Installer::keep`](super::Installer::keep) is to be asked.
    ///
    /// # Errors
    /// The file's: there may be no memory left. The pages count as not here.
    pub fn keep(&self, range: PageRange, round: u8, data: &[u8]) -> io::Result<bool> {
        if range.end().0 > self.pages || data.len() as u64 != range.bytes() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let write = |run: PageRange, bytes: &[u8]| self.write(run, bytes);
        let taken = self.early.take_in(self.pages, range, round, data, write)?;
        Ok(matches!(taken, Taken::Kept))
    }

    pub(crate) fn write(&self, run: PageRange, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, run.first.byte_offset())
    }

    pub(crate) fn read(&self, run: PageRange, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, run.first.byte_offset())
    }

    /// Frees the room of pages that are in place.
    pub(crate) fn clear(&self, run: PageRange) -> io::Result<()> {
        punch_hole(&self.file, run.first.byte_offset(), run.bytes())
    }
}
