//! Watching a userfaultfd for events.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::core::Core;

/// A move's userfaultfd, kept open for as long as it is watched.
pub(crate) struct Watched(Arc<Core>);

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.0.installer.uffd().as_raw_fd()
    }
}

/// Watches the userfaultfd for readability, on the current runtime.
pub(crate) fn watch(core: Arc<Core>) -> io::Result<AsyncFd<Watched>> {
    // SAFETY: the descriptor is the userfaultfd that the core's installer owns and never replaces; `Watched` holds the
    // core, so it stays open and the same for as long as the `AsyncFd` lives.
    let watched = unsafe { AsyncFd::register_with_interest(Watched(core), Interest::READABLE) };
    watched.map_err(io::Error::from)
}
