//! The calls of the tests that the compiler can't check.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::NonNull;

use lazyvm_pager::memory::LazyMemory;
use lazyvm_wire::PageRange;
use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};

/// Gives the pages of a range in one region back, in a way that the advice says.
pub fn advise(memory: &LazyMemory, range: PageRange, advice: MmapAdvise) -> Result<(), Errno> {
    let host = memory.address_of(range.first).expect("a page of the image");
    let address = NonNull::new(host as *mut c_void).expect("an address");
    // SAFETY: lazy memory is not referred to by any Rust reference, and is touched atomically only; that its content
    // goes away is what the caller wants.
    unsafe { madvise(address, range.bytes() as usize, advice) }
}
