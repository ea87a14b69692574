//! The handshake of a userfaultfd that another process has opened.

#![allow(unsafe_code)]

use std::os::fd::{AsFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::errno::Errno;
use userfaultfd::Uffd;

use crate::dirty::agree_on;

/// `UFFD_FEATURE_MINOR_SHMEM` of `linux/userfaultfd.h`.
const MINOR_SHMEM: u64 = 1 << 10;

/// Agrees on minor faults of shared memory; `EINVAL` before Linux 5.14.
pub(super) fn agree(fd: OwnedFd) -> Result<Uffd, Errno> {
    agree_on(fd.as_fd(), MINOR_SHMEM)?;
    // SAFETY: `fd` is owned, and ownership passes on.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}
