//! The bare ioctl that installing pages is compared with, and memory that the machine's own host has at hand.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::num::NonZeroUsize;

use lazyvm_pager::LazyMemory;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::sysinfo::sysinfo;
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

/// Memory registered with a userfaultfd of its own, and nothing around it.
pub struct BareUffd<'a> {
    uffd: Uffd,
    memory: &'a LazyMemory,
}

impl<'a> BareUffd<'a> {
    /// Registers all of `memory`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn register(memory: &'a LazyMemory) -> io::Result<Self> {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .require_features(FeatureFlags::empty())
            .create()
            .map_err(io::Error::other)?;
        for region in memory.regions() {
            uffd.register(region.host as *mut c_void, region.bytes() as usize)
                .map_err(io::Error::other)?;
        }
        Ok(Self { uffd, memory })
    }

    /// `UFFDIO_COPY` of `data` to the first region, `offset` bytes from its start.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::InvalidInput`] beyond the region's end.
    pub fn copy(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let region = self.memory.regions().first().filter(|region| {
            offset
                .checked_add(data.len() as u64)
                .is_some_and(|end| end <= region.bytes())
        });
        let region = region.ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the target lies in the region (just checked), which the borrowed `LazyMemory` keeps mapped and which
        // this userfaultfd has registered; `data` is readable for its length.
        let copied = unsafe {
            self.uffd.copy(
                data.as_ptr().cast::<c_void>(),
                (region.host + offset) as *mut c_void,
                data.len(),
                true,
            )
        };
        copied.map(drop).map_err(io::Error::other)
    }
}

/// Makes sure that the next `bytes` of memory that anybody takes from the system are at hand, by taking more and giving it
/// back.
///
/// The machine may be a guest whose free memory goes back to its host (free page reporting of virtio-balloon): a page of
/// it then costs several times what the kernel's own work on it costs, and what is measured would be the host. The kernel
/// hands out what was freed last first, but not strictly, hence more. Never takes more than half of what is free.
pub(crate) fn warm_free_memory(bytes: u64) -> io::Result<()> {
    let most = sysinfo()?.ram_unused() / 2;
    let Some(length) = NonZeroUsize::new((3 * bytes).min(most) as usize) else {
        return Ok(());
    };
    // SAFETY: a new mapping at a place that the kernel chooses; nothing refers to it, so that it may be filled and
    // unmapped here.
    unsafe {
        let address = mmap_anonymous(
            None,
            length,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
        )?;
        let filled = madvise(address, length.get(), MmapAdvise::MADV_POPULATE_WRITE);
        munmap(address, length.get())?;
        filled?;
    }
    Ok(())
}
