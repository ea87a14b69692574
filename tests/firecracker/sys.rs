//! The calls of the tests that the compiler can't check.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::NonNull;

use lazyvm_pager::LazyMemory;
use lazyvm_wire::PageRange;
use nix::sys::mman::{MmapAdvise, madvise};

/// Gives pages of one region back, as Firecracker's balloon does.
pub fn give_back(memory: &LazyMemory, range: PageRange) {
    let host = memory.address_of(range.first).unwrap();
    let address = NonNull::new(host as *mut c_void).unwrap();
    // SAFETY: lazy memory is not referred to by any Rust reference, and is touched atomically only; that its content
    // goes away is what the test wants.
    unsafe { madvise(address, range.bytes() as usize, MmapAdvise::MADV_DONTNEED) }.unwrap();
}
