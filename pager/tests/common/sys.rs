//! The calls of the tests that the compiler can't check.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;

use lazyvm_pager::memory::LazyMemory;
use lazyvm_pager::uffd::Uffd;
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

/// A descriptor that came with a message.
pub fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel made it for this process when the message was received, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// A userfaultfd that another process opened without any feature that matters here.
pub fn uffd_of_other_process(descriptor: OwnedFd) -> Uffd {
    // SAFETY: the caller got it from a process that it started for this.
    unsafe { Uffd::from_owned_fd(descriptor, 0) }.expect("a userfaultfd")
}
