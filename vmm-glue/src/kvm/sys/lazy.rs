//! Guest memory in the pager's hands.

use std::sync::Arc;

use lazyvm_pager::{InstallMode, LazyMemory, LazyRegion};

use super::super::memory::GuestRam;

/// Guest memory that is to be filled lazily. Nothing of it may be read or written through its mapping by this process
/// from here on, other than by KVM on behalf of the guest.
pub(in crate::kvm) fn lazy_memory(
    ram: &Arc<GuestRam>,
    mode: InstallMode,
) -> Result<LazyMemory, lazyvm_pager::memory::MemoryError> {
    let mut offset = 0;
    let regions = ram.layout().regions().iter().zip(ram.host_addresses());
    let regions = regions
        .map(|(region, host)| {
            let lazy = LazyRegion {
                host,
                pages: region.pages,
                backing: region.backing,
                file: Some((Arc::clone(ram.file()), offset)),
            };
            offset += region.pages * lazyvm_wire::PAGE_SIZE as u64;
            lazy
        })
        .collect();
    let owner: Arc<GuestRam> = Arc::clone(ram);
    // SAFETY: each region is one mapping of `ram` over its whole length, shared, of the file and offset named with it;
    // `owner` keeps the mappings, which never move, and no reference into them exists.
    unsafe { LazyMemory::from_regions(regions, mode, owner) }
}
