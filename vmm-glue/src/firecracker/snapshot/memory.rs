//! A snapshot's memory file, as it is and as long as it stays so.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use lazyvm_server::port::SourceMemory;
use lazyvm_wire::{PAGE_SHIFT, PageRange};

use super::SnapshotError;
use crate::firecracker::marks;
use crate::plain::FileMemory;

/// What tells whether a file was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Print {
    bytes: u64,
    modified: (i64, i64),
}

impl Print {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
        })
    }
}

/// A snapshot's memory file, which must stay as it is: a destination that got some of its pages from before a change
/// and some from after it would have memory that never was. So nothing is read from a file that has changed.
#[derive(Debug)]
pub(super) struct SnapshotMemory {
    file: Arc<File>,
    memory: FileMemory,
    print: Print,
}

impl SnapshotMemory {
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let open = || -> io::Result<Self> {
            let file = Arc::new(File::open(path)?);
            let found = file.metadata()?;
            if !found.is_file() {
                return Err(io::Error::other("it is no regular file"));
            }
            let print = Print::of(&file)?;
            Ok(Self {
                memory: FileMemory::new(Arc::clone(&file), print.bytes >> PAGE_SHIFT),
                file,
                print,
            })
        };
        open().map_err(|source| SnapshotError::File {
            path: path.to_owned(),
            source,
        })
    }

    pub fn bytes(&self) -> u64 {
        self.print.bytes
    }

    /// Refuses a file that may be a diff snapshot.
    pub fn check_whole(&self, path: &Path) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::File {
            path: path.to_owned(),
            source,
        };
        let holes = self.holes().map_err(failed)?;
        if holes > 0 {
            return Err(SnapshotError::Holes {
                path: path.to_owned(),
                mib: holes.div_ceil(1 << 20),
            });
        }
        let has_mark = marks::are_in(|offset, found| self.file.read_exact_at(found, offset));
        if !has_mark {
            return Err(SnapshotError::NoMark {
                path: path.to_owned(),
            });
        }
        Ok(())
    }

    /// Bytes that are not in the file. Some file systems tell no holes, but how much room the file takes.
    fn holes(&self) -> io::Result<u64> {
        let room = self.file.metadata()?.blocks().saturating_mul(512);
        let mut data = 0;
        self.memory.data_runs(&mut |range| data += range.bytes())?;
        Ok(self.print.bytes.saturating_sub(room.min(data)))
    }

    fn check(&self) -> io::Result<()> {
        if Print::of(&self.file)? != self.print {
            return Err(io::Error::other(
                "the snapshot's memory file was changed while it was served",
            ));
        }
        Ok(())
    }
}

impl SourceMemory for SnapshotMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        self.memory.read(range, out)?;
        self.check()
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        self.check()?;
        self.memory.data_runs(data)
    }
}
