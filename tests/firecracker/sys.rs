//! The calls of the tests that the compiler can't check.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use lazyvm_pager::LazyMemory;
use lazyvm_wire::{PageIndex, PageRange};
use nix::libc;
use nix::sys::mman::{MmapAdvise, madvise};

/// Gives pages of one region back, as Firecracker's balloon does.
pub fn give_back(memory: &LazyMemory, range: PageRange) {
    let host = memory.address_of(range.first).unwrap();
    let address = NonNull::new(host as *mut c_void).unwrap();
    // SAFETY: lazy memory is not referred to by any Rust reference, and is touched atomically only; that its content
    // goes away is what the test wants.
    unsafe { madvise(address, range.bytes() as usize, MmapAdvise::MADV_DONTNEED) }.unwrap();
}

/// Maps new memory over pages of one region, as the balloon of Firecracker before 1.11 does.
pub fn map_over(memory: &LazyMemory, range: PageRange) {
    let host = memory.address_of(range.first).unwrap() as *mut c_void;
    let flags = libc::MAP_FIXED | libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the pages are mapped, and belong to lazy memory, which is not referred to by any Rust reference and is
    // touched atomically only; that its content goes away is what the test wants.
    let mapped = unsafe { libc::mmap(host, range.bytes() as usize, protection, flags, -1, 0) };
    assert_eq!(mapped, host);
}

/// Has the kernel write a file's first bytes into a page, as it does with a packet that a TAP device gets.
pub fn receive(memory: &LazyMemory, page: PageIndex, packet: &File) {
    let host = memory.address_of(page).unwrap() as *mut c_void;
    // SAFETY: the kernel writes eight bytes within the page, which no Rust reference refers to.
    let read = unsafe { libc::read(packet.as_raw_fd(), host, 8) };
    assert_eq!(read, 8);
}
