//! The Firecracker process behind an API socket: who it is, and whether it still lives.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::sys;

/// A process at the other end of a Unix socket.
#[derive(Clone)]
pub struct PeerProcess {
    pid: i32,
    uid: u32,
    gid: u32,
    /// Readable when it has ended; `None` where it can't be watched.
    alive: Option<std::sync::Arc<OwnedFd>>,
}

impl fmt::Debug for PeerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerProcess")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl PeerProcess {
    /// Who is at the other end of this socket (`SO_PEERCRED`). Of a listening peer that is who called `listen`.
    ///
    /// # Errors
    /// The socket's.
    pub fn of(socket: &UnixStream) -> io::Result<Self> {
        let credentials = getsockopt(socket, PeerCredentials)?;
        let pid = credentials.pid();
        // 0 is a process of another pid namespace.
        let alive = (pid > 0)
            .then(|| sys::pidfd_open(pid))
            .and_then(|opened: Result<OwnedFd, Errno>| {
                opened
                    .inspect_err(
                        |errno| tracing::debug!(pid, %errno, "the process can't be watched"),
                    )
                    .ok()
            })
            .map(std::sync::Arc::new);
        Ok(Self {
            pid,
            uid: credentials.uid(),
            gid: credentials.gid(),
            alive,
        })
    }

    /// Its number here; 0 where it has none.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whose it is: user and group.
    pub fn owner(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// Whether it has ended, as far as that can be told. Firecracker before 1.12 closes the page-fault socket at once,
    /// so the socket's end would not tell.
    pub fn has_ended(&self) -> bool {
        let Some(alive) = &self.alive else {
            return false;
        };
        let mut watched = [PollFd::new(alive.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut watched, PollTimeout::ZERO), Ok(1..))
    }

    /// Its root directory, to reach files as it sees them.
    pub fn root(&self) -> Option<PathBuf> {
        (self.pid > 0).then(|| PathBuf::from(format!("/proc/{}/root", self.pid)))
    }

    /// Asks it to end (`SIGTERM`), or ends it.
    pub fn signal(&self, by_force: bool) -> Result<(), Errno> {
        let signal = if by_force {
            libc::SIGKILL
        } else {
            libc::SIGTERM
        };
        match &self.alive {
            Some(alive) => sys::pidfd_signal(alive.as_raw_fd(), signal),
            None => Err(Errno::ESRCH),
        }
    }
}
