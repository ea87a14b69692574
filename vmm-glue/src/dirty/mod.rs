//! Which pages another process writes, found out from outside.
//!
//! A userfaultfd of that process protects its memory from writes in the mode `WP_ASYNC`: the kernel lifts the protection of
//! a page when it is written, and nobody waits. `PAGEMAP_SCAN` tells whose protection is gone and sets it again in one step.
//! A page-table entry that is dropped (`MADV_DONTNEED`) may take the news of a write along, so
//! whatever has no entry counts as written: every page that is clean has one, if only a mark.
//!
//! Writes that do not go by page tables are not seen: those of a device into pages that were pinned before. Neither is a
//! hole that is punched into the file where pages are clean: Linux keeps their marks, and they read as zeros from then on.

mod sys;
pub(crate) mod unseen;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use crate::attach::{AttachError, Process};
use crate::pagemap::{scan_entries, scan_written};

/// Why writes can't be noted.
#[derive(Debug, thiserror::Error)]
pub enum DirtyError {
    /// The process.
    #[error(transparent)]
    Process(#[from] AttachError),
    /// An old kernel.
    #[error("this kernel can't note writes (userfaultfd WP_ASYNC); Linux 6.7 or newer can")]
    Kernel(#[source] Errno),
    /// Registered by someone else, or of a kind that can't be.
    #[error(
        "the memory at {start:#x} can't be watched for writes; another userfaultfd may have it, as after a move to here"
    )]
    Register {
        /// Where, in the process.
        start: u64,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// The protection.
    #[error("can't protect the memory at {start:#x} from writes")]
    Protect {
        /// Where.
        start: u64,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// `/proc/PID/pagemap`.
    #[error("can't open the page map of process {pid}")]
    Open {
        /// Whose.
        pid: i32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The scan.
    #[error("can't find out which pages at {start:#x} were written")]
    Scan {
        /// Where.
        start: u64,
        /// The system's answer.
        #[source]
        source: Errno,
    },
}

/// Notes the writes to some memory of another process. Dropping it ends that.
#[derive(Debug)]
pub struct WriteWatch {
    uffd: OwnedFd,
    pagemap: File,
    /// Host address and length in bytes, in whole pages of the memory.
    ranges: Vec<(u64, u64)>,
}

impl WriteWatch {
    /// Begins with `ranges` (host address, bytes) of its memory; all pages are clean.
    ///
    /// # Errors
    /// [`DirtyError`]. The process goes on, and nothing is noted.
    pub fn start(process: &Process, ranges: Vec<(u64, u64)>) -> Result<Self, DirtyError> {
        let pid = process.pid();
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))
            .map_err(|source| DirtyError::Open { pid, source })?;
        let uffd = process.take_userfaultfd()?;
        sys::agree(uffd.as_fd()).map_err(DirtyError::Kernel)?;
        for &(start, bytes) in &ranges {
            sys::register(uffd.as_fd(), start, bytes)
                .map_err(|source| DirtyError::Register { start, source })?;
            sys::protect(uffd.as_fd(), start, bytes)
                .map_err(|source| DirtyError::Protect { start, source })?;
        }
        Ok(Self {
            uffd,
            pagemap,
            ranges,
        })
    }

    /// Calls `dirty` with first byte and end of each run that was written or lost its entries since it was last reported;
    /// from then on it is clean.
    ///
    /// # Errors
    /// [`DirtyError`]. Any page may then have been written.
    pub fn collect(&mut self, dirty: &mut dyn FnMut(u64, u64)) -> Result<(), DirtyError> {
        for &(start, bytes) in &self.ranges {
            let end = start + bytes;
            let scan = |source| DirtyError::Scan { start, source };
            scan_written(&self.pagemap, start, end, dirty).map_err(scan)?;
            let mut gaps = Vec::new();
            let mut covered = start;
            scan_entries(&self.pagemap, start, end, &mut |from, to| {
                if from > covered {
                    gaps.push((covered, from));
                }
                covered = covered.max(to);
            })
            .map_err(scan)?;
            if covered < end {
                gaps.push((covered, end));
            }
            for (from, to) in gaps {
                sys::protect(self.uffd.as_fd(), from, to - from).map_err(|source| {
                    DirtyError::Protect {
                        start: from,
                        source,
                    }
                })?;
                dirty(from, to);
            }
        }
        Ok(())
    }
}

impl Drop for WriteWatch {
    fn drop(&mut self) {
        for &(start, bytes) in &self.ranges {
            // A process that has ended has nothing left to lift.
            let _ = sys::unregister(self.uffd.as_fd(), start, bytes);
        }
    }
}
