//! Guest memory: one memfd, mapped shared, so that another process can be handed it and read it without mapping.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use lazyvm_wire::{Backing, Gpa, Layout, LayoutError, PAGE_SIZE, Region};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

/// Where the window for devices begins: local APIC, IOAPIC, TSS and identity map lie above it.
pub const MMIO_GAP_START: u64 = 3 << 30;

/// Where memory goes on above that window.
pub const MMIO_GAP_END: u64 = 4 << 30;

/// The least memory a machine has: the first MiB with its tables, and room for a payload above it.
pub const MEMORY_MIN: u64 = 4 << 20;

/// Guest memory that can't be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Less than [`MEMORY_MIN`].
    #[error("a memory of {bytes} bytes is too small; the least is {MEMORY_MIN} bytes")]
    TooSmall {
        /// What was asked for.
        bytes: u64,
    },
    /// Not a whole number of pages.
    #[error("a memory of {bytes} bytes is no whole number of pages of {page} bytes")]
    NotWhole {
        /// What was asked for.
        bytes: u64,
        /// The page size of its backing.
        page: u64,
    },
    /// More than an image holds, or a layout that can't be.
    #[error("a memory of {bytes} bytes has no layout")]
    Layout {
        /// What was asked for.
        bytes: u64,
        /// Why.
        #[source]
        source: LayoutError,
    },
    /// A layout that this monitor's machines don't have.
    #[error("the layout is not one of this monitor's: {0}")]
    Foreign(String),
    /// The memfd can't be made or sized.
    #[error("cannot make a memfd of {bytes} bytes")]
    Create {
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The memfd can't be mapped.
    #[error(
        "cannot map {bytes} bytes of {backing:?} pages{}",
        if *backing == Backing::Huge2M { " (are there enough free huge pages in /proc/sys/vm/nr_hugepages?)" } else { "" }
    )]
    Map {
        /// Its size.
        bytes: u64,
        /// What backs it.
        backing: Backing,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A machine's memory.
///
/// The image (see [`Layout`]) and the memfd are the same thing: byte `n` of the image is byte `n` of the file.
#[derive(Debug)]
pub struct GuestRam {
    file: Arc<File>,
    mapping: GuestMemoryMmap,
    layout: Layout,
}

impl GuestRam {
    /// Makes `bytes` of empty memory. It is sparse: a page takes room only once it is written.
    ///
    /// # Errors
    /// [`MemoryError`] says which bound was missed, or what the kernel refused.
    pub fn new(bytes: u64, backing: Backing) -> Result<Self, MemoryError> {
        Self::with_layout(layout_of(bytes, backing)?)
    }

    /// Makes empty memory of the same shape as another machine's.
    ///
    /// # Errors
    /// [`MemoryError::Foreign`] for a layout that [`GuestRam::new`] does not give; else as there.
    pub fn like(layout: &Layout) -> Result<Self, MemoryError> {
        let Some(first) = layout.regions().first() else {
            return Err(MemoryError::Foreign("it has no region".to_owned()));
        };
        let expected = layout_of(layout.bytes(), first.backing)?;
        if expected != *layout {
            return Err(MemoryError::Foreign(format!(
                "{} bytes of it would lie as {:?}, and are said to lie as {:?}",
                layout.bytes(),
                expected.regions(),
                layout.regions(),
            )));
        }
        Self::with_layout(expected)
    }

    fn with_layout(layout: Layout) -> Result<Self, MemoryError> {
        let backing = layout.regions()[0].backing;
        let bytes = layout.bytes();
        let file =
            create_file(bytes, backing).map_err(|source| MemoryError::Create { bytes, source })?;
        let file = Arc::new(file);
        let mut offset = 0;
        let mut regions = Vec::with_capacity(layout.regions().len());
        for region in layout.regions() {
            regions.push(map_region(&file, offset, region)?);
            offset += region.pages * PAGE_SIZE as u64;
        }
        let mapping = GuestMemoryMmap::from_regions(regions).map_err(|error| MemoryError::Map {
            bytes,
            backing,
            source: Box::new(error),
        })?;
        Ok(Self {
            file,
            mapping,
            layout,
        })
    }

    /// The region table.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The memfd.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// The mapping in this process, by guest-physical address.
    pub fn mapping(&self) -> &GuestMemoryMmap {
        &self.mapping
    }

    /// The memfd once more, opened for reading only.
    ///
    /// # Errors
    /// Any that opening it through `/proc/self/fd` gives.
    pub fn open_read_only(&self) -> io::Result<File> {
        File::open(PathBuf::from(format!(
            "/proc/self/fd/{}",
            self.file.as_raw_fd()
        )))
    }

    /// The host address at which each region of the layout begins.
    pub fn host_addresses(&self) -> Vec<u64> {
        self.mapping
            .iter()
            .map(|region| region.as_ptr() as u64)
            .collect()
    }

    /// Writes `data` from byte `offset` of the image on, through the mapping.
    ///
    /// # Errors
    /// `InvalidInput` when it does not fit.
    pub fn write_image(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let (gpa, room) = self.place(at).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidInput, "past the end of guest memory")
            })?;
            let count = room.min((data.len() - done) as u64) as usize;
            self.mapping
                .write_slice(&data[done..done + count], gpa)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            done += count;
        }
        Ok(())
    }

    /// Where byte `offset` of the image lies, and how many follow it without a gap.
    fn place(&self, offset: u64) -> Option<(GuestAddress, u64)> {
        let mut start = 0;
        for region in self.mapping.iter() {
            let within = offset - start;
            if within < region.len() {
                return Some((
                    GuestAddress(region.start_addr().0 + within),
                    region.len() - within,
                ));
            }
            start += region.len();
        }
        None
    }
}

/// The layout of `bytes` of memory: one region, and a second above the device window where it reaches that far.
fn layout_of(bytes: u64, backing: Backing) -> Result<Layout, MemoryError> {
    if bytes < MEMORY_MIN {
        return Err(MemoryError::TooSmall { bytes });
    }
    if !bytes.is_multiple_of(backing.bytes()) {
        return Err(MemoryError::NotWhole {
            bytes,
            page: backing.bytes(),
        });
    }
    let low = bytes.min(MMIO_GAP_START);
    let mut regions = vec![Region {
        name: "ram".to_owned(),
        gpa: Some(Gpa(0)),
        pages: low / PAGE_SIZE as u64,
        backing,
    }];
    if bytes > low {
        regions.push(Region {
            name: "ram-high".to_owned(),
            gpa: Some(Gpa(MMIO_GAP_END)),
            pages: (bytes - low) / PAGE_SIZE as u64,
            backing,
        });
    }
    Layout::new(regions).map_err(|source| MemoryError::Layout { bytes, source })
}

fn create_file(bytes: u64, backing: Backing) -> io::Result<File> {
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if backing == Backing::Huge2M {
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    }
    let file = File::from(memfd_create(c"lazyvm-guest", flags)?);
    file.set_len(bytes)?;
    // Whoever is handed the file cannot take the ground from under the mapping.
    fcntl(
        &file,
        FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
    )?;
    Ok(file)
}

fn map_region(
    file: &Arc<File>,
    offset: u64,
    region: &Region,
) -> Result<GuestRegionMmap, MemoryError> {
    let bytes = region.pages * PAGE_SIZE as u64;
    let failed = |source| MemoryError::Map {
        bytes,
        backing: region.backing,
        source,
    };
    // Small pages are not reserved, so that a sparse machine may be larger than the host. Huge pages are: without
    // a reservation a touch in want of one would end the process with SIGBUS.
    let flags = match region.backing {
        Backing::Small => nix::libc::MAP_SHARED | nix::libc::MAP_NORESERVE,
        Backing::Huge2M => nix::libc::MAP_SHARED,
    };
    let mapping = MmapRegionBuilder::new(bytes as usize)
        .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
        .with_mmap_flags(flags)
        .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
        .with_hugetlbfs(region.backing == Backing::Huge2M)
        .build()
        .map_err(|error| failed(Box::new(error)))?;
    let gpa = region.gpa.map_or(0, |gpa| gpa.0);
    GuestRegionMmap::new(mapping, GuestAddress(gpa))
        .ok_or_else(|| failed("the region ends past the address space".into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn memory_past_three_gib_goes_on_at_four() {
        let ram = GuestRam::new(5 << 30, Backing::Small).unwrap();
        let regions = ram.layout().regions();
        assert_eq!(regions.len(), 2);
        assert_eq!(regions[0].gpa, Some(Gpa(0)));
        assert_eq!(regions[0].pages, (3 << 30) / 4096);
        assert_eq!(regions[1].gpa, Some(Gpa(4 << 30)));
        assert_eq!(regions[1].pages, (2 << 30) / 4096);
    }

    #[test]
    fn the_image_and_the_file_are_the_same_bytes_across_the_gap() {
        let ram = GuestRam::new(4 << 30, Backing::Small).unwrap();
        let data: Vec<u8> = (0..8192_u32).map(|n| n as u8).collect();
        let offset = (3 << 30) - 4096;
        ram.write_image(offset, &data).unwrap();

        let mut seen = vec![0; data.len()];
        ram.file().read_exact_at(&mut seen, offset).unwrap();
        assert_eq!(seen, data);
        let mut high = vec![0; 4096];
        ram.mapping()
            .read_slice(&mut high, GuestAddress(4 << 30))
            .unwrap();
        assert_eq!(high, data[4096..]);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert!(matches!(
            GuestRam::new(4096, Backing::Small),
            Err(MemoryError::TooSmall { bytes: 4096 })
        ));
        assert!(matches!(
            GuestRam::new((8 << 20) + 1, Backing::Small),
            Err(MemoryError::NotWhole { .. })
        ));
        assert!(matches!(
            GuestRam::new(32 << 40, Backing::Small),
            Err(MemoryError::Layout { .. })
        ));
    }

    #[test]
    fn a_layout_of_another_shape_is_refused() {
        let flat = Layout::flat((5 << 30) / 4096).unwrap();
        assert!(matches!(
            GuestRam::like(&flat),
            Err(MemoryError::Foreign(_))
        ));
        let own = layout_of(5 << 30, Backing::Small).unwrap();
        assert_eq!(GuestRam::like(&own).unwrap().layout(), &own);
    }

    #[test]
    fn the_file_cannot_be_cut_and_its_reader_cannot_write() {
        let ram = GuestRam::new(8 << 20, Backing::Small).unwrap();
        assert!(ram.file().set_len(4096).is_err());
        let reader = ram.open_read_only().unwrap();
        assert!(reader.write_at(b"x", 0).is_err());
        assert_eq!(reader.read_at(&mut [0; 16], 0).unwrap(), 16);
    }
}
