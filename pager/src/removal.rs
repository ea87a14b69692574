//! Memory that the guest gives back while pages are still on their way to it.
//!
//! A process that gives memory back (`MADV_DONTNEED`, `MADV_REMOVE`) waits in the kernel until its event was read, and
//! only then do the pages go. So a removal takes effect where the event is read: from there on the pages are
//! [`Removed`](crate::table::PageState::Removed), and nobody can claim them for data any more. What must not happen is
//! that an install that was claimed *before* reaches the kernel *after* that: it would bring back the old data. So
//! events are read alone, and installs hold the guard from their claim to their end.
//!
//! While an event is unread, the kernel answers `EAGAIN` to all installs. One that held on to the guard then would wait
//! for ever for who needs the guard to read that event; so it gives up its claim and its guard, reads the events by
//! itself, and claims again, as far as there still is something to claim.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::{Duration, Instant};

/// Keeps installs and the reading of events apart; costs nothing where removals are off.
pub(crate) struct RemovalGuard(Option<RwLock<()>>);

impl RemovalGuard {
    pub(crate) fn new(removals: bool) -> Self {
        Self(removals.then(RwLock::default))
    }

    pub(crate) fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Held by an install from claim to finish.
    pub(crate) fn install(&self) -> Option<RwLockReadGuard<'_, ()>> {
        // The lock holds no data that a panic could have left half-changed.
        Some(
            self.0
                .as_ref()?
                .read()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// Held while events are read and removals take effect.
    pub(crate) fn events(&self) -> Option<RwLockWriteGuard<'_, ()>> {
        Some(
            self.0
                .as_ref()?
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }
}

/// Waiting between tries, for as long as the kernel may need to go on, but not for ever.
pub(crate) struct Patience {
    since: Instant,
    tries: u32,
}

/// The kernel answers `EAGAIN` for as long as a memory map changes, which takes a thread some wake-ups.
const PATIENCE: Duration = Duration::from_secs(30);
const SPINS: u32 = 16;
/// Some milliseconds, for what others hold for the length of a copy.
const BRIEF_TRIES: u32 = 64;
const PAUSE: Duration = Duration::from_micros(50);

impl Patience {
    pub(crate) fn new() -> Self {
        Self {
            since: Instant::now(),
            tries: 0,
        }
    }

    /// Like [`Self::wait`], for milliseconds only.
    pub(crate) fn wait_briefly(&mut self) -> bool {
        self.tries < BRIEF_TRIES && self.wait()
    }

    /// Waits a little; `false` when it has been too long.
    pub(crate) fn wait(&mut self) -> bool {
        self.tries = self.tries.saturating_add(1);
        if self.tries <= SPINS {
            thread::yield_now();
        } else {
            thread::sleep(PAUSE);
        }
        self.since.elapsed() < PATIENCE
    }
}
