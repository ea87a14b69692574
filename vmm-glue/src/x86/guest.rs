//! Guest-physical memory, by address.

use std::fmt;
use std::sync::Arc;

use lazyvm_server::port::SourceMemory;
use lazyvm_wire::{Gpa, Layout, PAGE_SIZE, PageIndex, PageRange};

/// Entries in a table.
pub const ENTRIES: usize = 512;

/// A page as the processor sees a table of it.
pub type Table = [u64; ENTRIES];

/// A machine's memory, read by guest-physical address. What lies outside of it is not there, and harms nobody.
#[derive(Clone)]
pub struct GuestMemory {
    layout: Layout,
    memory: Arc<dyn SourceMemory>,
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory")
            .field("layout", &self.layout)
            .finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// That memory with this layout.
    pub fn new(layout: Layout, memory: Arc<dyn SourceMemory>) -> Self {
        Self { layout, memory }
    }

    /// How it lies.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memory itself.
    pub fn memory(&self) -> &dyn SourceMemory {
        self.memory.as_ref()
    }

    /// The page that holds an address, if it is memory.
    pub fn page(&self, gpa: u64) -> Option<PageIndex> {
        self.layout.page_of(Gpa(gpa))
    }

    /// The pages of `bytes` from an address on, those that are memory.
    pub fn pages(&self, gpa: u64, bytes: u64) -> impl Iterator<Item = PageIndex> + '_ {
        let first = gpa & !(PAGE_SIZE as u64 - 1);
        let end = gpa.saturating_add(bytes);
        (first..end)
            .step_by(PAGE_SIZE)
            .filter_map(|gpa| self.page(gpa))
    }

    /// The whole page that holds an address, as bytes.
    pub fn bytes(&self, gpa: u64) -> Option<[u8; PAGE_SIZE]> {
        self.page_bytes(self.page(gpa)?)
    }

    /// A page's bytes, if they can be read.
    pub fn page_bytes(&self, page: PageIndex) -> Option<[u8; PAGE_SIZE]> {
        let mut out = [0; PAGE_SIZE];
        self.memory.read(PageRange::one(page), &mut out).ok()?;
        Some(out)
    }

    /// The same as a table.
    pub fn table(&self, gpa: u64) -> Option<Table> {
        self.words(self.page(gpa)?)
    }

    /// A page's words, if they can be read.
    pub fn words(&self, page: PageIndex) -> Option<Table> {
        Some(table_of(&self.page_bytes(page)?))
    }
}

/// A page's bytes as a table; what is missing of a page is 0.
pub(super) fn table_of(bytes: &[u8]) -> Table {
    let mut table = [0; ENTRIES];
    for (entry, bytes) in table.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *entry = u64::from_le_bytes(*bytes);
    }
    table
}

#[cfg(test)]
pub(super) mod testing {
    use std::io;
    use std::sync::Mutex;

    use super::*;

    /// Memory that is these pages.
    pub struct Pages(pub Mutex<Vec<Table>>);

    impl Pages {
        /// A guest's.
        pub fn guest(pages: Vec<Table>) -> GuestMemory {
            let layout = Layout::flat(pages.len() as u64).unwrap();
            GuestMemory::new(layout, Arc::new(Self(Mutex::new(pages))))
        }
    }

    impl SourceMemory for Pages {
        fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
            let pages = self.0.lock().unwrap();
            for (page, out) in range.pages().zip(out.chunks_exact_mut(PAGE_SIZE)) {
                let words = pages[page.as_usize()].iter().zip(out.chunks_exact_mut(8));
                words.for_each(|(word, out)| out.copy_from_slice(&word.to_le_bytes()));
            }
            Ok(())
        }

        fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
            data(PageRange::new(
                PageIndex(0),
                self.0.lock().unwrap().len() as u64,
            ));
            Ok(())
        }
    }
}
