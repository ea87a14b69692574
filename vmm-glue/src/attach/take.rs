//! A userfaultfd of another process that this process alone holds.

use std::os::fd::OwnedFd;

use nix::libc;

use super::inject::Until;
use super::process::{AttachError, Process};

impl Process {
    /// A userfaultfd of its memory, on which no `UFFDIO_API` has been done. The process keeps no descriptor of it: what is
    /// registered ends with the one that is given.
    ///
    /// # Errors
    /// [`AttachError`] names the setting that is in the way. The process goes on in any case.
    pub fn take_userfaultfd(&self) -> Result<OwnedFd, AttachError> {
        let (theirs, fd, stopped) = self.open_userfaultfd()?;
        tracing::debug!(
            pid = self.pid(),
            stopped_us = stopped.as_micros() as u64,
            "took a userfaultfd"
        );
        let number = u64::try_from(theirs).unwrap_or(u64::MAX);
        self.inject(&[[libc::SYS_close as u64, number, 0, 0]], Until::Failure)?;
        Ok(fd)
    }
}
