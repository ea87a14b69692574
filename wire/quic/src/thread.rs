//! Threads with a runtime of their own.

use std::io;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use crate::sys::{self, Schedule};

/// What a lane's thread gives way to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody waits for what it does: it runs as soon as there is something to do.
    Fault,
    /// It has always something to do, and gives way to the others.
    Bulk,
}

impl Urgency {
    /// Tells the kernel. Real-time priority where it is allowed: what a fault lane does at a time takes microseconds,
    /// and the kernel keeps a twentieth of the time for others in any case. A higher fair share makes the worst waits
    /// under a push three times longer, as measured. Without any permission a short time slice has to do: of two
    /// threads that want to run, the one whose slice would end first goes first (EEVDF).
    fn apply(self) {
        const SLICE_NS: u64 = 100_000;
        let fair = |nice| {
            sys::schedule_this_thread(&Schedule::Fair {
                nice,
                slice_ns: SLICE_NS,
            })
        };
        let result = match self {
            Self::Fault => sys::schedule_this_thread(&Schedule::RealTime)
                .or_else(|_| fair(-15))
                .or_else(|_| fair(0)),
            Self::Bulk => Ok(()),
        };
        if let Err(error) = result {
            tracing::debug!(%error, "the thread keeps its priority");
        }
    }
}

/// A thread that runs a single-threaded tokio runtime until it is dropped.
///
/// What is spawned here never hops to another thread between an event and its answer; a hop costs as much as half a
/// local fault.
#[derive(Debug)]
pub struct LaneThread {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl LaneThread {
    /// Starts the thread, `name` being what tools show of it.
    ///
    /// # Errors
    /// When the system gives no thread or no event queue.
    pub fn start(name: &str, urgency: Urgency) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                urgency.apply();
                // An error is the sender's end: time to stop as well.
                let _ = runtime.block_on(stopped);
                // A machine's call that blocks for ever must not keep the thread.
                runtime.shutdown_background();
            })?;
        Ok(Self {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// To spawn on it, or to wait for it from another thread.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for LaneThread {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
