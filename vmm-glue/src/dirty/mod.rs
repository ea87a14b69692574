//! Which pages another process writes, found out from outside.
//!
//! A userfaultfd of that process protects its memory from writes in the mode `WP_ASYNC`: the kernel lifts the protection of
//! a page when it is written, and nobody waits. `PAGEMAP_SCAN` tells whose protection is gone and sets it again in one step.
//! A page-table entry that is dropped (`MADV_DONTNEED`) may take the news of a write along, so
//! whatever has no entry counts as written: every page that is clean has one, if only a mark. A mark takes an entry of a page
//! table, and every look goes through all of them; so pages that hold nothing get none, and count as written all the time.
//! A page of a file may get its first content and lose its entry between two looks; then only the file tells that it holds
//! something ([`WriteWatch::collect_holding`]).
//!
//! Writes that do not go by page tables are not seen: those of a device into pages that were pinned before. Neither is a
//! hole that is punched into the file where pages are clean: Linux keeps their marks, and they read as zeros from then on. It
//! keeps the marks of clean huge pages from the pool when they are dropped, too, private ones included, and of those nothing
//! tells the holes. So [`WriteWatch::reporting_absent`] has all that is not mapped count as written.
//!
//! What is noted is noted of whole huge pages, where the memory is made of them.

mod sys;
pub(crate) mod unseen;

use std::fs::File;
use std::io;
use std::num::NonZero;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::{PAGE_SHIFT, PAGE_SIZE};
use nix::errno::Errno;

pub(crate) use sys::agree_on;

use crate::attach::{AttachError, Process};
use crate::pagemap::{Pages, scan};

/// Memory that is scanned by a thread of its own, at least, and most threads.
const PART_BYTES: u64 = 512 << 20;
const PARTS_MAX: u64 = 4;

/// Parts begin at whole huge pages.
const PART_ALIGN: u64 = 2 << 20;

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
    /// The file that the memory is in.
    #[error("can't find out which pages at {start:#x} hold data")]
    Data {
        /// Where.
        start: u64,
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

/// Most pages without content between two parts that are marked as one: a system call costs as much.
const JOINED_BYTES: u64 = 16 * PAGE_SIZE as u64;

/// Tells which runs between two addresses hold data.
pub type Holding<'a> = dyn FnMut(u64, u64, &mut dyn FnMut(u64, u64)) -> io::Result<()> + 'a;

/// Notes the writes to some memory of another process. Dropping it ends that.
#[derive(Debug)]
pub struct WriteWatch {
    uffd: OwnedFd,
    pagemap: File,
    ranges: Vec<Watched>,
}

/// A range that is registered.
#[derive(Debug)]
struct Watched {
    start: u64,
    end: u64,
    /// A bit for each page that was marked at any time.
    marked: BitVec<u64, Lsb0>,
    /// Whatever is not mapped is reported, each time.
    reports_absent: bool,
}

impl Watched {
    fn bits(&self, from: u64, to: u64) -> Range<usize> {
        let page = |address: u64| ((address - self.start) >> PAGE_SHIFT) as usize;
        page(from)..page(to)
    }

    /// Protects the pages of a part and marks those that are not there.
    fn mark(&mut self, uffd: BorrowedFd<'_>, from: u64, to: u64) -> Result<(), DirtyError> {
        sys::protect(uffd, from, to - from).map_err(|source| DirtyError::Protect {
            start: from,
            source,
        })?;
        let bits = self.bits(from, to);
        self.marked[bits].fill(true);
        Ok(())
    }

    /// Marks what was marked before in a part whose entries are gone.
    fn mark_again(&mut self, uffd: BorrowedFd<'_>, from: u64, to: u64) -> Result<(), DirtyError> {
        let bits = self.bits(from, to);
        let mut at = bits.start;
        while let Some(skip) = self.marked[at..bits.end].first_one() {
            let first = at + skip;
            at = first + self.marked[first..bits.end].leading_ones();
            let address = |page: usize| self.start + ((page as u64) << PAGE_SHIFT);
            let (from, to) = (address(first), address(at));
            self.mark(uffd, from, to)?;
        }
        Ok(())
    }
}

impl WriteWatch {
    /// Begins with `ranges` of its memory (host address, bytes), in whole pages of it. In the parts `clean` (the same, ascending) all
    /// pages are clean; elsewhere a page is reported each time until it is written.
    ///
    /// # Errors
    /// [`DirtyError`]. The process goes on, and nothing is noted.
    pub fn start(
        process: &Process,
        ranges: &[(u64, u64)],
        clean: &[(u64, u64)],
    ) -> Result<Self, DirtyError> {
        let pid = process.pid();
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))
            .map_err(|source| DirtyError::Open { pid, source })?;
        let uffd = process.take_userfaultfd()?;
        sys::agree(uffd.as_fd()).map_err(DirtyError::Kernel)?;
        let mut watch = Self {
            uffd,
            pagemap,
            ranges: Vec::with_capacity(ranges.len()),
        };
        for &(start, bytes) in ranges {
            sys::register(watch.uffd.as_fd(), start, bytes)
                .map_err(|source| DirtyError::Register { start, source })?;
            watch.ranges.push(Watched {
                start,
                end: start + bytes,
                marked: BitVec::repeat(false, (bytes >> PAGE_SHIFT) as usize),
                reports_absent: false,
            });
        }
        for range in &mut watch.ranges {
            let parts = clean
                .iter()
                .map(|&(from, bytes)| (from.max(range.start), (from + bytes).min(range.end)));
            for (from, to) in joined(parts.filter(|(from, to)| from < to)) {
                range.mark(watch.uffd.as_fd(), from, to)?;
            }
        }
        Ok(watch)
    }

    /// Reports whatever is not mapped, each time, in the ranges of memory that have a byte in these ones (host address, bytes).
    /// For huge pages that their owner may give back.
    #[must_use]
    pub fn reporting_absent(mut self, ranges: &[(u64, u64)]) -> Self {
        for watched in &mut self.ranges {
            watched.reports_absent |= ranges
                .iter()
                .any(|&(start, bytes)| start < watched.end && start + bytes > watched.start);
        }
        self
    }

    /// Calls `dirty` with first byte and end of each run that was written or lost its entries since it was last reported, some
    /// more than once; from then on it is clean.
    ///
    /// # Errors
    /// [`DirtyError`]. Any page may then have been written.
    pub fn collect(&mut self, dirty: &mut dyn FnMut(u64, u64)) -> Result<(), DirtyError> {
        self.collect_holding(&mut |_, _, _| Ok(()), dirty)
    }

    /// The same, where a part without entries may hold data all the same: `holding` is asked with first byte and end of such a
    /// part, and calls its last argument with each run in it that does. That run is clean from then on, too.
    ///
    /// # Errors
    /// [`DirtyError`], and what `holding` gives. Any page may then have been written.
    pub fn collect_holding(
        &mut self,
        holding: &mut Holding<'_>,
        dirty: &mut dyn FnMut(u64, u64),
    ) -> Result<(), DirtyError> {
        for range in &mut self.ranges {
            let found = scan_in_parts(&self.pagemap, range).map_err(|source| DirtyError::Scan {
                start: range.start,
                source,
            })?;
            for part in found {
                for (from, to) in part.written {
                    let bits = range.bits(from, to);
                    range.marked[bits].fill(true);
                    dirty(from, to);
                }
                for (from, to) in part.unmarked {
                    let mut note = |from, to| {
                        let bits = range.bits(from, to);
                        range.marked[bits].fill(true);
                    };
                    holding(from, to, &mut note).map_err(|source| DirtyError::Data {
                        start: from,
                        source,
                    })?;
                    range.mark_again(self.uffd.as_fd(), from, to)?;
                    dirty(from, to);
                }
                for (from, to) in part.absent {
                    dirty(from, to);
                }
            }
        }
        Ok(())
    }
}

/// What a scan of a part found.
#[derive(Debug, Default)]
struct Scanned {
    /// Runs that were written, and are marked again.
    written: Vec<(u64, u64)>,
    /// Runs without an entry, which may have been written and have lost their marks.
    unmarked: Vec<(u64, u64)>,
    /// Runs that are not mapped, where those were asked for.
    absent: Vec<(u64, u64)>,
}

/// Scans a range with as many threads as pay: the last scan of a move is made while its machine stands still.
fn scan_in_parts(pagemap: &File, range: &Watched) -> Result<Vec<Scanned>, Errno> {
    let (start, end, absent) = (range.start, range.end, range.reports_absent);
    let cores = thread::available_parallelism().map_or(1, NonZero::get) as u64;
    let count = ((end - start) / PART_BYTES).clamp(1, cores.min(PARTS_MAX));
    if count == 1 {
        return Ok(vec![scan_part(pagemap, start, end, absent)?]);
    }
    let bytes = ((end - start) / count).next_multiple_of(PART_ALIGN);
    let parts = (0..count).map(|number| {
        let from = start + number * bytes;
        (from.min(end), (from + bytes).min(end))
    });
    thread::scope(|scope| {
        let threads: Vec<_> = parts
            .map(|(from, to)| scope.spawn(move || scan_part(pagemap, from, to, absent)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err(Errno::EIO)))
            .collect()
    })
}

/// Scans a part. What has no entry is looked for after what was written: a page that loses its entry in between, and its mark
/// with it, is found there.
fn scan_part(pagemap: &File, start: u64, end: u64, absent: bool) -> Result<Scanned, Errno> {
    let mut found = Scanned::default();
    scan(pagemap, Pages::Written, start, end, &mut |from, to| {
        found.written.push((from, to));
    })?;
    found.unmarked = gaps(start, end, |each| {
        scan(pagemap, Pages::WithEntry, start, end, each)
    })?;
    if absent {
        found.absent = gaps(start, end, |each| {
            scan(pagemap, Pages::Mapped, start, end, each)
        })?;
    }
    Ok(found)
}

/// What is between the runs that `scan` tells, ascending.
fn gaps(
    start: u64,
    end: u64,
    scan: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<(), Errno>,
) -> Result<Vec<(u64, u64)>, Errno> {
    let mut gaps = Vec::new();
    let mut covered = start;
    scan(&mut |from, to| {
        if from > covered {
            gaps.push((covered, from));
        }
        covered = covered.max(to);
    })?;
    if covered < end {
        gaps.push((covered, end));
    }
    Ok(gaps)
}

/// Parts, ascending, those with little between them as one.
fn joined(parts: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (from, to) in parts {
        match joined.last_mut() {
            Some(last) if from <= last.1 + JOINED_BYTES => last.1 = last.1.max(to),
            _ => joined.push((from, to)),
        }
    }
    joined
}

impl Drop for WriteWatch {
    fn drop(&mut self) {
        for range in &self.ranges {
            // A process that has ended has nothing left to lift.
            let _ = sys::unregister(self.uffd.as_fd(), range.start, range.end - range.start);
        }
    }
}
