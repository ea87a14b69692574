//! Dropping the entries of this process's page tables for guest memory, so that those that come back show what is used.

use std::ffi::c_void;
use std::ptr::NonNull;

use lazyvm_wire::{Backing, PAGE_SIZE};
use nix::sys::mman::{MmapAdvise, madvise};

use super::super::memory::GuestRam;

/// Drops them. The contents stay in the memory's file, since its mappings are shared. Huge pages are left alone: which
/// part of one is used would not show.
pub(in crate::kvm) fn drop_entries(ram: &GuestRam) -> nix::Result<()> {
    for (region, host) in ram.layout().regions().iter().zip(ram.host_addresses()) {
        let bytes = (region.pages * PAGE_SIZE as u64) as usize;
        let Some(start) = NonNull::new(host as *mut c_void) else {
            continue;
        };
        if region.backing == Backing::Small {
            // SAFETY: the range is one whole mapping of `ram`, which lives during the call. It is `MAP_SHARED` and of a
            // memfd (`GuestRam` has no others), so whoever reads or writes it, now or later, finds the same bytes in the
            // file's pages; KVM hears of it by its MMU notifier.
            unsafe { madvise(start, bytes, MmapAdvise::MADV_DONTNEED) }?;
        }
    }
    Ok(())
}
