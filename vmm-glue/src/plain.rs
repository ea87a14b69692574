//! Memory that is no machine's: a file's bytes, served as they are. For libraries, benchmarks and tests; and the way
//! in which any machine's memory in a shared file is read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lazyvm_server::port::{MachineError, SourceMachine, SourceMemory};
use lazyvm_wire::{Layout, LayoutError, MachineOffer, PAGE_SIZE, PageIndex, PageRange};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

/// The kind in the [`MachineOffer`] of plain memory.
pub const KIND: &str = "memory";

/// An image in a file: its pages one after the other from the file's start. Reads take no mapping, so they cost neither
/// page tables nor resident memory.
#[derive(Clone, Debug)]
pub struct FileMemory {
    file: Arc<File>,
    pages: u64,
}

impl FileMemory {
    /// The first `pages` pages of `file`: a memfd, or a file on tmpfs or hugetlbfs or on a disk.
    pub fn new(file: Arc<File>, pages: u64) -> Self {
        Self { file, pages }
    }
}

impl SourceMemory for FileMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, range.first.byte_offset())
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        let end = (self.pages * PAGE_SIZE as u64) as i64;
        let mut at = 0;
        while at < end {
            let start = match lseek(&self.file, at, Whence::SeekData) {
                Ok(start) if start < end => start,
                // No data behind `at`.
                Ok(_) | Err(Errno::ENXIO) => return Ok(()),
                // A file system that knows no holes: all of it may be data.
                Err(Errno::EINVAL) => at,
                Err(errno) => return Err(errno.into()),
            };
            let hole = match lseek(&self.file, start, Whence::SeekHole) {
                Ok(hole) => hole.min(end),
                Err(Errno::EINVAL) => end,
                Err(errno) => return Err(errno.into()),
            };
            let first = PageIndex::of_byte(start as u64);
            let behind = (hole as u64).div_ceil(PAGE_SIZE as u64);
            data(PageRange::new(first, behind - first.0));
            at = hole;
        }
        Ok(())
    }
}

/// Plain memory with the port of a machine. It has no state, and never runs.
#[derive(Debug)]
pub struct PlainMachine {
    layout: Layout,
    memory: Arc<FileMemory>,
}

impl PlainMachine {
    /// Serves a file's bytes, its length rounded down to whole pages. Who changes it meanwhile changes what arrives.
    ///
    /// # Errors
    /// The file's length can't be read, or it holds no page.
    pub fn new(file: File) -> io::Result<Self> {
        let pages = file.metadata()?.len() / PAGE_SIZE as u64;
        let layout = Layout::flat(pages)
            .map_err(|error: LayoutError| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        Ok(Self {
            layout,
            memory: Arc::new(FileMemory::new(Arc::new(file), pages)),
        })
    }
}

impl SourceMachine for PlainMachine {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn offer(&self) -> MachineOffer {
        MachineOffer {
            kind: KIND.to_owned(),
            state_version: 1,
            compatibility: Vec::new(),
        }
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        self.memory.clone()
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        Ok(Vec::new())
    }

    fn resume(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn release(&self) -> Result<(), MachineError> {
        Ok(())
    }
}
