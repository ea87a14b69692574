//! `PAGEMAP_SCAN`, which the compiler can't check.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArguments>() == 96 && size_of::<PageRegion>() == 24);

/// `PAGE_IS_PRESENT` of `linux/fs.h`.
const PAGE_IS_PRESENT: u64 = 1 << 3;

/// The same or `PAGE_IS_SWAPPED`, which a mark of write protection looks like too.
const PAGE_IS_THERE: u64 = PAGE_IS_PRESENT | 1 << 4;

/// `PAGE_IS_PFNZERO`.
const PAGE_IS_ZERO: u64 = 1 << 5;

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArguments);

/// `PAGE_IS_WRITTEN`: not write-protected by a userfaultfd.
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`.
const PROTECT_AGAIN: u64 = 1 | 1 << 1;

/// Pages of a process that are looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// There, and not the kernel's page of zeros.
    Data,
    /// Mapped: neither a mark of write protection counts nor what is swapped out. That of shared memory is not seen.
    Mapped,
    /// Written since they were write-protected; they are protected again, in one step for each page. `EPERM` where the
    /// memory is not registered with a userfaultfd that lets writes through by itself. Pages without an entry are left
    /// out, since the kernel would make a page table full of marks for each hole: [`Pages::WithEntry`] tells which have
    /// one.
    Written,
    /// With an entry in the page tables, a mark of write protection included.
    WithEntry,
}

impl Pages {
    fn query(self) -> ScanArguments {
        let any = ScanArguments::default();
        match self {
            Self::Data => ScanArguments {
                category_inverted: PAGE_IS_ZERO,
                category_mask: PAGE_IS_ZERO,
                category_anyof_mask: PAGE_IS_THERE,
                return_mask: PAGE_IS_THERE,
                ..any
            },
            Self::Mapped => ScanArguments {
                category_inverted: PAGE_IS_ZERO,
                category_mask: PAGE_IS_ZERO | PAGE_IS_PRESENT,
                return_mask: PAGE_IS_PRESENT,
                ..any
            },
            Self::Written => ScanArguments {
                flags: PROTECT_AGAIN,
                category_mask: PAGE_IS_WRITTEN,
                category_anyof_mask: PAGE_IS_THERE,
                return_mask: PAGE_IS_WRITTEN,
                ..any
            },
            Self::WithEntry => ScanArguments {
                category_anyof_mask: PAGE_IS_THERE,
                return_mask: PAGE_IS_THERE,
                ..any
            },
        }
    }
}

/// Calls `each` with every run of such pages, from `start` to `end` in the process whose `/proc/PID/pagemap` this is
/// (`Documentation/admin-guide/mm/pagemap.rst`, from Linux 6.7 on).
pub(crate) fn scan(
    pagemap: &File,
    pages: Pages,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(u64, u64),
) -> Result<(), Errno> {
    let query = pages.query();
    let mut regions = [PageRegion::default(); 512];
    let mut at = start;
    while at < end {
        let mut arguments = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            ..query
        };
        // SAFETY: `arguments` is a whole struct of this type whose `size` says so, and the kernel writes at most
        // `vec_len` regions to `vec`, which is an array of so many that lives on until the call is over.
        let found = unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut arguments) }?;
        let found = usize::try_from(found).map_err(|_| Errno::EIO)?;
        for region in regions.get(..found).ok_or(Errno::EIO)? {
            each(region.start, region.end);
        }
        if arguments.walk_end <= at {
            return Err(Errno::EIO);
        }
        at = arguments.walk_end;
    }
    Ok(())
}
