//! Memory that somebody else mapped.

use std::any::Any;
use std::sync::Arc;

use super::copy::LocalSpan;
use crate::memory::{InstallMode, LazyMemory, LazyRegion, MemoryError};
use crate::uffd::Place;

impl LazyMemory {
    /// Memory of this process that the caller mapped: a hypervisor's guest memory.
    ///
    /// # Errors
    /// The regions overlap, are not aligned to their pages, or lack the file that the mode needs.
    ///
    /// # Safety
    /// For as long as `owner` lives:
    /// - each region is mapped, readable and writable, at [`LazyRegion::host`], all of it in memory that userfaultfd
    ///   takes (private anonymous, shmem, hugetlb), backed as it says;
    /// - no Rust reference points into it: it is touched by the guest, through raw pointers (volatile or atomic), or
    ///   by the kernel on behalf of a system call;
    /// - where a file is given, the mapping is shared, of this file from this offset, and the file stays as long;
    /// - nothing is in it when the pager starts, and nobody but the pager fills it or the file until it is complete.
    pub unsafe fn from_regions(
        regions: Vec<LazyRegion>,
        mode: InstallMode,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self, MemoryError> {
        Self::build(regions, mode, owner, Place::Here)
    }

    /// The bytes of region number `region` from `offset`, as many as lie in it up to `length`. `None` where there are
    /// none, or where they are in another process.
    pub(crate) fn span(&self, region: usize, offset: u64, length: usize) -> Option<LocalSpan<'_>> {
        let found = self.regions.get(region)?;
        if self.place != Place::Here || offset >= found.bytes() {
            return None;
        }
        let length = length.min((found.bytes() - offset) as usize);
        // SAFETY: `Place::Here` is memory that a constructor of this type mapped, or `from_regions`, whose contract is
        // this one. It stays mapped while `self.owner` lives, and so while `self` is borrowed.
        Some(unsafe { LocalSpan::new((found.host + offset) as usize, length) })
    }
}
