//! What the compiler can't check of descriptors that Firecracker sends.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

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
