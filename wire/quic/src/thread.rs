//! Threads with a runtime of their own.

use std::io;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

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
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
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
