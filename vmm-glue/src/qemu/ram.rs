//! The RAM of a QEMU at the source, read through its files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lazyvm_pager::punch_hole;
use lazyvm_server::port::SourceMemory;
use lazyvm_wire::{Backing, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::memory::{MemoryError, RamRegion};

/// The RAM as its source reads it: through its files, without mapping them.
///
/// Which of its pages hold data is to be told while the machine stands still, and to look for them takes about 50 ns for
/// each. So [`SharedRam::look_ahead`] does that while the machine runs. A page that held data then is told as data,
/// whatever it holds now; what was a hole is looked at once more, which takes no time for one that still is.
#[derive(Debug)]
pub(super) struct SharedRam {
    /// Each with the image page that it starts at.
    regions: Vec<(u64, RamRegion)>,
    /// What was data a while ago: per region, runs of its file in ascending order.
    seen: Mutex<Vec<Vec<(u64, u64)>>>,
}

impl SharedRam {
    pub fn new(regions: &[RamRegion]) -> Self {
        let mut start = 0;
        let regions = regions
            .iter()
            .map(|region| {
                let placed = (start, region.clone());
                start += region.bytes >> PAGE_SHIFT;
                placed
            })
            .collect();
        Self {
            regions,
            seen: Mutex::default(),
        }
    }

    /// Looks for data, so that the next search while the machine stands still is a short one.
    ///
    /// # Errors
    /// The file system's.
    pub fn look_ahead(&self) -> io::Result<()> {
        let mut seen = Vec::with_capacity(self.regions.len());
        for (_, region) in &self.regions {
            let mut runs = Vec::new();
            let end = region.offset + region.bytes;
            data_between(&region.file, region.offset, end, &mut |from, to| {
                runs.push((from, to));
            })?;
            seen.push(runs);
        }
        *self.seen() = seen;
        Ok(())
    }

    /// Calls `hole` with each run of pages that are holes now, ascending.
    pub fn holes(&self, hole: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        for (start, region) in &self.regions {
            let pages = |from: u64, to: u64| {
                let first = (from - region.offset).div_ceil(PAGE_SIZE as u64);
                let behind = (to - region.offset) >> PAGE_SHIFT;
                PageRange::new(PageIndex(start + first), behind.saturating_sub(first))
            };
            let end = region.offset + region.bytes;
            let mut at = region.offset;
            data_between(&region.file, region.offset, end, &mut |from, to| {
                hole(pages(at, from));
                at = to;
            })?;
            hole(pages(at, end));
        }
        Ok(())
    }

    /// Calls `data` with each run of pages in a range that is not a hole now, ascending. Huge pages, whose file does not tell
    /// its holes, are not told.
    pub fn data_in(&self, range: PageRange, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        for (start, region) in &self.regions {
            let pages = PageRange::new(PageIndex(*start), region.bytes >> PAGE_SHIFT);
            let part = pages.intersect(range);
            if part.is_empty() || region.backing != Backing::Small {
                continue;
            }
            let place = |page: PageIndex| region.offset + ((page.0 - start) << PAGE_SHIFT);
            let (from, to) = (place(part.first), place(part.end()));
            data_between(&region.file, from, to, &mut |from, to| {
                data(pages_of(*start, region, from, to));
            })?;
        }
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, Vec<Vec<(u64, u64)>>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SourceMemory for SharedRam {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        let short = || io::Error::new(io::ErrorKind::InvalidInput, "not a range of the image");
        if out.len() as u64 != range.bytes() {
            return Err(short());
        }
        let mut rest = out;
        let mut page = range.first.0;
        while !rest.is_empty() {
            let at = self.regions.partition_point(|(start, _)| *start <= page);
            let (start, region) = at
                .checked_sub(1)
                .and_then(|at| self.regions.get(at))
                .ok_or_else(short)?;
            let from = (page - start) << PAGE_SHIFT;
            let left = region.bytes.checked_sub(from).filter(|&left| left > 0);
            let length = (rest.len() as u64).min(left.ok_or_else(short)?);
            let (piece, behind) = rest.split_at_mut(length as usize);
            region.file.read_exact_at(piece, region.offset + from)?;
            page += length >> PAGE_SHIFT;
            rest = behind;
        }
        Ok(())
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        let seen = self.seen();
        for (number, (start, region)) in self.regions.iter().enumerate() {
            let mut tell = |from: u64, to: u64| data(pages_of(*start, region, from, to));
            let mut at = region.offset;
            for &(from, to) in seen.get(number).into_iter().flatten() {
                data_between(&region.file, at, from, &mut tell)?;
                tell(from, to);
                at = to;
            }
            let end = region.offset + region.bytes;
            data_between(&region.file, at, end, &mut tell)?;
        }
        Ok(())
    }
}

/// The pages that a run of bytes of a region's file is in; `start` is the region's first.
fn pages_of(start: u64, region: &RamRegion, from: u64, to: u64) -> PageRange {
    let first = (from - region.offset) >> PAGE_SHIFT;
    let behind = (to - region.offset).div_ceil(PAGE_SIZE as u64);
    PageRange::new(PageIndex(start + first), behind - first)
}

/// Calls `found` with each run of bytes in a part of a file that is not a hole, ascending.
fn data_between(
    file: &File,
    start: u64,
    end: u64,
    found: &mut dyn FnMut(u64, u64),
) -> io::Result<()> {
    let mut at = start;
    while at < end {
        let (from, to) = next_data(file, at, end)?;
        if from < to {
            found(from, to);
        }
        at = to;
    }
    Ok(())
}

/// The next bytes from `at` up to `end` that are not a hole; nothing is left when they are empty.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<(u64, u64)> {
    let seek = |from: u64, whence| lseek(file, from as i64, whence).map(|found| found as u64);
    let from = match seek(at, Whence::SeekData) {
        Ok(from) => from.min(end),
        Err(Errno::ENXIO) => end,
        // A file system that knows no holes.
        Err(Errno::EINVAL) => return Ok((at, end)),
        Err(errno) => return Err(errno.into()),
    };
    if from == end {
        return Ok((end, end));
    }
    Ok((from, seek(from, Whence::SeekHole)?.clamp(from + 1, end)))
}

/// Makes a hole of a region's part of its file, which takes its pages out of every process that has them mapped.
///
/// # Errors
/// The file system can't, or something is left.
pub(super) fn empty(region: &RamRegion) -> Result<(), MemoryError> {
    let failed = |source| MemoryError::File {
        name: region.name.clone(),
        source,
    };
    punch_hole(&region.file, region.offset, region.bytes).map_err(failed)?;
    let end = region.offset + region.bytes;
    // hugetlbfs does not tell its holes, but makes them.
    if region.backing == Backing::Small {
        let (from, to) = next_data(&region.file, region.offset, end).map_err(failed)?;
        if from < to {
            return Err(failed(io::Error::other(
                "the file system makes no holes; put the RAM on tmpfs (/dev/shm) or hugetlbfs, or into a memfd",
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 64;

    fn ram(file: &File) -> SharedRam {
        let region = |first: u64, gpa| RamRegion {
            name: "ram0".to_owned(),
            gpa,
            bytes: PAGES / 2 * PAGE_SIZE as u64,
            host: 0,
            backing: Backing::Small,
            file: Arc::new(file.try_clone().unwrap()),
            offset: first * PAGE_SIZE as u64,
        };
        SharedRam::new(&[region(0, 0), region(PAGES / 2, 4 << 30)])
    }

    fn data_pages(ram: &SharedRam) -> Vec<u64> {
        let mut pages = Vec::new();
        ram.data_runs(&mut |range| pages.extend(range.pages().map(|page| page.0)))
            .unwrap();
        pages
    }

    fn write(file: &File, pages: &[u64]) {
        for &page in pages {
            file.write_all_at(&[1; 9], page * PAGE_SIZE as u64 + 7)
                .unwrap();
        }
    }

    proptest! {
        /// Whatever is written after the look ahead is told as data, each page once, in order.
        #[test]
        fn what_became_data_since_is_found(
            before in proptest::collection::vec(0..PAGES, 0..20),
            since in proptest::collection::vec(0..PAGES, 0..20),
        ) {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            file.set_len(PAGES * PAGE_SIZE as u64).unwrap();
            let ram = ram(&file);
            write(&file, &before);
            ram.look_ahead().unwrap();
            write(&file, &since);
            let mut expected = [before, since].concat();
            expected.sort_unstable();
            expected.dedup();
            prop_assert_eq!(data_pages(&ram), expected);
        }

        /// A part of the memory has the data that all of it has there.
        #[test]
        fn data_in_a_part_is_the_data_there(
            written in proptest::collection::vec(0..PAGES, 0..20),
            first in 0..PAGES,
            count in 1..PAGES,
        ) {
            let file = tempfile::tempfile_in("/dev/shm").unwrap();
            file.set_len(PAGES * PAGE_SIZE as u64).unwrap();
            let ram = ram(&file);
            write(&file, &written);
            let part = PageRange::new(PageIndex(first), count);
            let mut found = Vec::new();
            ram.data_in(part, &mut |range| found.extend(range.pages())).unwrap();
            let all = data_pages(&ram).into_iter().map(PageIndex);
            prop_assert_eq!(found, all.filter(|&page| part.contains(page)).collect::<Vec<_>>());
        }
    }
}
