//! SIGINT and SIGTERM as events.

use std::io;

use nix::sys::signal::{SigSet, Signal};

/// The right to hear them. Made before any other thread, since threads take over what their parent does not hear.
pub struct Signals(SigSet);

impl Signals {
    /// Keeps both signals from ending this process; they wait until [`Signals::tell`].
    pub fn hold() -> io::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block()?;
        Ok(Self(signals))
    }

    /// Calls `heard` for each one from now on, on a thread of its own.
    pub fn tell(self, mut heard: impl FnMut(Signal) + Send + 'static) -> io::Result<()> {
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                // Fails only for a set that is not valid.
                while let Ok(signal) = self.0.wait() {
                    heard(signal);
                }
            })?;
        Ok(())
    }
}
