//! The memory that is filled: where it lies, what backs it, and how its pages are installed.
//!
//! [`LazyMemory::anonymous`] and [`LazyMemory::shared`] make memory of this process's own; [`LazyMemory::from_regions`]
//! takes what a hypervisor mapped; [`LazyMemory::in_other_process`] stands for memory that is filled through a
//! userfaultfd that another process handed over.

mod error;

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError};

use lazyvm_wire::{Backing, Layout, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange};
use nix::errno::Errno;

pub(crate) use self::error::Size;
pub use self::error::{AccessError, MemoryError};
use crate::install::Registration;
use crate::sys::{self, Mapping};
use crate::uffd::{Place, Uffd};

/// How pages are put into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstallMode {
    /// `UFFDIO_COPY` and `UFFDIO_ZEROPAGE`, for any memory; the only way for private memory.
    Missing,
    /// For shared memory. A page that is a hole in the file is installed as above; over one that the file holds
    /// already, and that is not mapped (it went stale after a pre-copy), the data is written through the file before
    /// `UFFDIO_CONTINUE` maps it.
    Minor,
}

/// One region of the memory, in the order of the layout.
#[derive(Clone, Debug)]
pub struct LazyRegion {
    /// Its first byte's address in the process that the userfaultfd belongs to.
    pub host: u64,
    /// Its length in 4 KiB pages.
    pub pages: u64,
    /// What backs it here.
    pub backing: Backing,
    /// The shared file behind it and the offset of its first byte; `None` for private memory.
    pub file: Option<(Arc<File>, u64)>,
}

impl LazyRegion {
    /// Its length in bytes.
    pub const fn bytes(&self) -> u64 {
        self.pages << PAGE_SHIFT
    }
}

/// Memory that is to be filled.
pub struct LazyMemory {
    pub(crate) regions: Vec<LazyRegion>,
    pub(crate) mode: InstallMode,
    pub(crate) place: Place,
    /// The image page at which each region starts; as long as `regions`.
    starts: Vec<u64>,
    /// Region numbers by ascending host address.
    by_address: Vec<usize>,
    /// Keeps the mappings alive for as long as the pager runs.
    _owner: Arc<dyn Any + Send + Sync>,
    /// What the other process handed over, until the pager takes it.
    userfaultfd: Mutex<Option<(Uffd, Registration)>>,
}

impl fmt::Debug for LazyMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyMemory")
            .field("regions", &self.regions)
            .field("mode", &self.mode)
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl LazyMemory {
    /// Private memory for this layout, to be filled in [`InstallMode::Missing`].
    ///
    /// # Errors
    /// [`MemoryError`] when there is no address space, or not enough huge pages.
    pub fn anonymous(layout: &Layout) -> Result<Self, MemoryError> {
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        for region in layout.regions() {
            let bytes = region.pages << PAGE_SHIFT;
            let mapping = Mapping::anonymous(bytes, region.backing)
                .map_err(|source| no_memory(&region.name, bytes, region.backing, source))?;
            regions.push(LazyRegion {
                host: mapping.address() as u64,
                pages: region.pages,
                backing: region.backing,
                file: None,
            });
            mappings.push(mapping);
        }
        Self::build(
            regions,
            InstallMode::Missing,
            Arc::new(mappings),
            Place::Here,
        )
    }

    /// Shared memory for this layout, in memory files: one for all regions of small pages, one for all of huge pages,
    /// each with its regions end to end.
    ///
    /// # Errors
    /// [`MemoryError`] when there is no memory, or not enough huge pages.
    pub fn shared(layout: &Layout, mode: InstallMode) -> Result<Self, MemoryError> {
        let small = memory_file(layout, Backing::Small)?;
        let huge = memory_file(layout, Backing::Huge2M)?;
        let mut next = [0_u64; 2];
        let mut mappings = Vec::new();
        let mut regions = Vec::new();
        for region in layout.regions() {
            let (file, next) = match region.backing {
                Backing::Small => (&small, &mut next[0]),
                Backing::Huge2M => (&huge, &mut next[1]),
            };
            let bytes = region.pages << PAGE_SHIFT;
            let mapping = file
                .as_ref()
                .ok_or(Errno::EBADF)
                .and_then(|file| Mapping::shared(file, *next, bytes))
                .map_err(|source| no_memory(&region.name, bytes, region.backing, source))?;
            regions.push(LazyRegion {
                host: mapping.address() as u64,
                pages: region.pages,
                backing: region.backing,
                file: file.clone().map(|file| (file, *next)),
            });
            mappings.push(mapping);
            *next += bytes;
        }
        Self::build(regions, mode, Arc::new(mappings), Place::Here)
    }

    /// Memory of another process, which handed over a userfaultfd for it. Addresses are that process's.
    ///
    /// # Errors
    /// The regions overlap, are not aligned to their pages, or lack the file that the mode needs.
    pub fn in_other_process(
        regions: Vec<LazyRegion>,
        mode: InstallMode,
    ) -> Result<Self, MemoryError> {
        Self::build(regions, mode, Arc::new(()), Place::OtherProcess)
    }

    pub(crate) fn build(
        regions: Vec<LazyRegion>,
        mode: InstallMode,
        owner: Arc<dyn Any + Send + Sync>,
        place: Place,
    ) -> Result<Self, MemoryError> {
        let mut starts = Vec::with_capacity(regions.len());
        let mut start = 0_u64;
        for (number, region) in regions.iter().enumerate() {
            check_region(number, region, mode)?;
            starts.push(start);
            start = start.saturating_add(region.pages);
        }
        let mut by_address: Vec<usize> = (0..regions.len()).collect();
        by_address.sort_unstable_by_key(|&number| regions[number].host);
        for pair in by_address.windows(2) {
            let (low, high) = (&regions[pair[0]], &regions[pair[1]]);
            if low.host + low.bytes() > high.host {
                return Err(MemoryError::Overlap(pair[0], pair[1]));
            }
        }
        Ok(Self {
            regions,
            mode,
            place,
            starts,
            by_address,
            _owner: owner,
            userfaultfd: Mutex::new(None),
        })
    }

    /// The memory with the userfaultfd that is to fill it: of another process there is no other way. The pager takes it
    /// from here where it would open one of its own otherwise.
    #[must_use]
    pub fn with_userfaultfd(self, uffd: Uffd, registration: Registration) -> Self {
        Self {
            userfaultfd: Mutex::new(Some((uffd, registration))),
            ..self
        }
    }

    pub(crate) fn take_userfaultfd(&self) -> Option<(Uffd, Registration)> {
        self.userfaultfd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Checks that this is memory for `layout`: as many regions, each of its size and of its page size.
    ///
    /// # Errors
    /// [`MemoryError`] names the region that differs, and how.
    pub fn check_against(&self, layout: &Layout) -> Result<(), MemoryError> {
        if layout.regions().len() != self.regions.len() {
            return Err(MemoryError::RegionCount {
                expected: layout.regions().len(),
                got: self.regions.len(),
            });
        }
        for (theirs, ours) in layout.regions().iter().zip(&self.regions) {
            if theirs.pages != ours.pages {
                return Err(MemoryError::RegionSize {
                    region: theirs.name.clone(),
                    expected: theirs.pages << PAGE_SHIFT,
                    got: ours.bytes(),
                });
            }
            if theirs.backing != ours.backing {
                return Err(MemoryError::RegionBacking {
                    region: theirs.name.clone(),
                    expected: theirs.backing,
                    got: ours.backing,
                });
            }
        }
        Ok(())
    }

    /// The regions, in the order of the layout.
    pub fn regions(&self) -> &[LazyRegion] {
        &self.regions
    }

    /// How pages are installed.
    pub fn mode(&self) -> InstallMode {
        self.mode
    }

    /// Bytes in the image.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(LazyRegion::bytes).sum()
    }

    /// The file that backs the whole image, end to end from its first byte, where there is one: to hand on to a
    /// process that maps it.
    pub fn file(&self) -> Option<&Arc<File>> {
        let (first, _) = self.regions.first()?.file.as_ref()?;
        let whole = self
            .regions
            .iter()
            .zip(&self.starts)
            .all(|(region, start)| {
                region.file.as_ref().is_some_and(|(file, offset)| {
                    Arc::ptr_eq(file, first) && *offset == start << PAGE_SHIFT
                })
            });
        whole.then_some(first)
    }

    /// Reads bytes of the image, from `offset` on. A page that is not here yet is fetched first, so this blocks: it is
    /// for the user's threads, and never to be called from where the pager runs.
    ///
    /// Others may write meanwhile; what is read is then a mixture of old and new words.
    ///
    /// # Errors
    /// The bytes are not all in the image, or are in another process. Nothing was read.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), AccessError> {
        self.check_access(offset, out.len())?;
        let mut done = 0;
        for (region, from, length) in self.pieces(offset, out.len()) {
            let span = self
                .span(region, from, length)
                .ok_or(AccessError::OtherProcess)?;
            sys::copy_out(span, &mut out[done..done + length]);
            done += length;
        }
        Ok(())
    }

    /// Writes bytes of the image, from `offset` on; blocks as [`Self::read_at`] does.
    ///
    /// # Errors
    /// The bytes are not all in the image, or are in another process. Nothing was written.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        self.check_access(offset, data.len())?;
        let mut done = 0;
        for (region, from, length) in self.pieces(offset, data.len()) {
            let span = self
                .span(region, from, length)
                .ok_or(AccessError::OtherProcess)?;
            sys::copy_in(span, &data[done..done + length]);
            done += length;
        }
        Ok(())
    }

    /// The host address of a page's first byte; `None` past the image.
    pub fn address_of(&self, page: PageIndex) -> Option<u64> {
        let (region, offset) = self.locate(page)?;
        Some(self.regions[region].host + (offset << PAGE_SHIFT))
    }

    /// The page that holds a host address; `None` where that is no memory of the image.
    pub fn page_at(&self, address: u64) -> Option<PageIndex> {
        let above = self
            .by_address
            .partition_point(|&number| self.regions[number].host <= address);
        let number = self.by_address[above.checked_sub(1)?];
        let page = (address - self.regions[number].host) >> PAGE_SHIFT;
        (page < self.regions[number].pages).then(|| PageIndex(self.starts[number] + page))
    }

    /// The pages that lie wholly in the host addresses from `start` up to `end`, a range a region.
    pub fn pages_between(&self, start: u64, end: u64) -> impl Iterator<Item = PageRange> {
        self.by_address.iter().filter_map(move |&number| {
            let region = &self.regions[number];
            let low = start.max(region.host).next_multiple_of(PAGE_SIZE as u64);
            let high = end.min(region.host + region.bytes());
            let count = high.checked_sub(low)? >> PAGE_SHIFT;
            let first = self.starts[number] + ((low - region.host) >> PAGE_SHIFT);
            (count > 0).then(|| PageRange::new(PageIndex(first), count))
        })
    }

    /// The region of a page, and the page's number in it.
    pub(crate) fn locate(&self, page: PageIndex) -> Option<(usize, u64)> {
        let region = self
            .starts
            .partition_point(|&start| start <= page.0)
            .checked_sub(1)?;
        let offset = page.0 - self.starts[region];
        (offset < self.regions[region].pages).then_some((region, offset))
    }

    fn check_access(&self, offset: u64, length: usize) -> Result<(), AccessError> {
        let image = self.bytes();
        if offset
            .checked_add(length as u64)
            .is_none_or(|end| end > image)
        {
            return Err(AccessError::OutOfImage {
                offset,
                length,
                image,
            });
        }
        match self.place {
            Place::Here => Ok(()),
            Place::OtherProcess => Err(AccessError::OtherProcess),
        }
    }

    /// Cuts bytes of the image where regions end: region, offset in it, length.
    fn pieces(&self, offset: u64, length: usize) -> impl Iterator<Item = (usize, u64, usize)> {
        let mut at = offset;
        let end = offset + length as u64;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let (region, page) = self.locate(PageIndex::of_byte(at))?;
            let from = (page << PAGE_SHIFT) + at % PAGE_SIZE as u64;
            let piece = (end - at).min(self.regions[region].bytes() - from);
            at += piece;
            Some((region, from, piece as usize))
        })
    }
}

fn memory_file(layout: &Layout, backing: Backing) -> Result<Option<Arc<File>>, MemoryError> {
    let of_kind = || {
        layout
            .regions()
            .iter()
            .filter(|region| region.backing == backing)
    };
    let Some(first) = of_kind().next() else {
        return Ok(None);
    };
    let bytes = of_kind().map(|region| region.pages << PAGE_SHIFT).sum();
    sys::memfd("lazyvm-memory", bytes, backing)
        .map(|file| Some(Arc::new(file)))
        .map_err(|source| no_memory(&first.name, bytes, backing, source))
}

fn no_memory(region: &str, bytes: u64, backing: Backing, source: Errno) -> MemoryError {
    let region = region.to_owned();
    match backing {
        Backing::Small => MemoryError::Map {
            region,
            bytes,
            source,
        },
        Backing::Huge2M => MemoryError::HugePages {
            region,
            bytes,
            source,
        },
    }
}

fn check_region(number: usize, region: &LazyRegion, mode: InstallMode) -> Result<(), MemoryError> {
    let unit = region.backing.bytes();
    let offset = region.file.as_ref().map_or(0, |(_, offset)| *offset);
    let aligned = region.pages != 0
        && region.pages.is_multiple_of(region.backing.pages())
        && region.host.is_multiple_of(unit)
        && offset.is_multiple_of(unit);
    let bytes = region.pages.checked_mul(PAGE_SIZE as u64);
    let fits = bytes.is_some_and(|bytes| {
        region.host.checked_add(bytes).is_some() && offset.checked_add(bytes).is_some()
    });
    if !aligned || !fits {
        return Err(MemoryError::Unaligned {
            region: number,
            host: region.host,
            bytes: bytes.unwrap_or(u64::MAX),
        });
    }
    if mode == InstallMode::Minor && region.file.is_none() {
        return Err(MemoryError::NoFile(number));
    }
    Ok(())
}
