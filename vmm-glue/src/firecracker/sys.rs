//! What the compiler can't check of descriptors that Firecracker sends.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use lazyvm_pager::uffd::Uffd;
use nix::errno::Errno;
use nix::libc;

/// `UFFD_FEATURE_EVENT_REMOVE` of `linux/userfaultfd.h`.
const EVENT_REMOVE: u64 = 1 << 3;

/// A descriptor that has just come with a message.
pub(super) fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel made it for this process when the message was received, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Firecracker's userfaultfd. Removals are reckoned with, since before 1.12 only a machine with a balloon asks for them
/// and nothing tells whether it has one.
pub(super) fn uffd(descriptor: OwnedFd) -> io::Result<Uffd> {
    // SAFETY: `receive` has looked that it is a userfaultfd, Firecracker sends it after its handshake, and its memory is
    // Firecracker's: no Rust reference of this process can point into it.
    unsafe { Uffd::from_owned_fd(descriptor, EVENT_REMOVE) }
}

/// A descriptor for a process, which no later process of the same number can be mistaken for.
pub(super) fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes two integers and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = RawFd::try_from(fd).map_err(|_| Errno::EBADF)?;
    Ok(own(fd))
}

/// Sends a signal to the process of a descriptor.
pub(super) fn pidfd_signal(pidfd: RawFd, signal: i32) -> Result<(), Errno> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: without a siginfo the system call touches no memory of ours.
    Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd, signal, no_info, 0) })
        .map(drop)
}

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

/// `PAGE_IS_PRESENT` and `PAGE_IS_SWAPPED` of `linux/fs.h`.
const PAGE_IS_THERE: u64 = 1 << 3 | 1 << 4;

/// `PAGE_IS_PFNZERO`.
const PAGE_IS_ZERO: u64 = 1 << 5;

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArguments);

/// Calls `each` with every run of pages that are there and not the kernel's page of zeros, from `start` to `end` in the
/// process whose `/proc/PID/pagemap` this is (`Documentation/admin-guide/mm/pagemap.rst`, from Linux 6.7 on).
pub(super) fn scan_present(
    pagemap: &File,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(u64, u64),
) -> Result<(), Errno> {
    let mut regions = [PageRegion::default(); 512];
    let mut at = start;
    while at < end {
        let mut arguments = ScanArguments {
            size: size_of::<ScanArguments>() as u64,
            start: at,
            end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_inverted: PAGE_IS_ZERO,
            category_mask: PAGE_IS_ZERO,
            category_anyof_mask: PAGE_IS_THERE,
            return_mask: PAGE_IS_THERE,
            ..ScanArguments::default()
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
