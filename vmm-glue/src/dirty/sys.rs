//! The requests of a userfaultfd that protects memory of another process from writes.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    range: Range,
    mode: u64,
}

nix::ioctl_readwrite!(uffdio_api, 0xaa, 0x3f, Api);
nix::ioctl_readwrite!(uffdio_register, 0xaa, 0x00, Register);
nix::ioctl_read!(uffdio_unregister, 0xaa, 0x01, Range);
nix::ioctl_readwrite!(uffdio_writeprotect, 0xaa, 0x06, WriteProtect);

/// `UFFD_API`.
const UFFD_API: u64 = 0xaa;
/// `UFFD_FEATURE_PAGEFAULT_FLAG_WP`, `_WP_HUGETLBFS_SHMEM`, `_WP_UNPOPULATED`, `_WP_ASYNC`.
const FEATURES: u64 = 1 | 1 << 12 | 1 << 13 | 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`.
const REGISTER_WP: u64 = 1 << 1;
/// `UFFDIO_WRITEPROTECT_MODE_WP`.
const PROTECT: u64 = 1;

/// Agrees on protection that the kernel lifts by itself when a page is written; `EINVAL` before Linux 6.7.
pub(super) fn agree(uffd: BorrowedFd<'_>) -> Result<(), Errno> {
    agree_on(uffd, FEATURES)
}

/// Agrees on these features, which is done once; `EINVAL` where the kernel lacks one.
pub(crate) fn agree_on(uffd: BorrowedFd<'_>, features: u64) -> Result<(), Errno> {
    let mut api = Api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes one struct of this type.
    unsafe { uffdio_api(uffd.as_raw_fd(), &raw mut api) }.map(drop)
}

/// Registers a range for write protection, which changes no contents.
pub(super) fn register(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut register = Register {
        range: Range { start, len },
        mode: REGISTER_WP,
        ioctls: 0,
    };
    // SAFETY: as above; a write to the range is let through by the kernel, so nobody waits for anybody.
    unsafe { uffdio_register(uffd.as_raw_fd(), &raw mut register) }.map(drop)
}

/// Lifts all protection of a range and forgets it.
pub(super) fn unregister(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    let mut range = Range { start, len };
    // SAFETY: as above.
    unsafe { uffdio_unregister(uffd.as_raw_fd(), &raw mut range) }.map(drop)
}

/// Protects every page of a registered range, those that are not there included.
pub(super) fn protect(uffd: BorrowedFd<'_>, start: u64, len: u64) -> Result<(), Errno> {
    loop {
        let mut protect = WriteProtect {
            range: Range { start, len },
            mode: PROTECT,
        };
        // SAFETY: as above.
        match unsafe { uffdio_writeprotect(uffd.as_raw_fd(), &raw mut protect) } {
            // The memory map changes at this moment.
            Err(Errno::EAGAIN) => std::thread::yield_now(),
            result => return result.map(drop),
        }
    }
}
