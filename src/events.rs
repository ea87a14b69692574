//! What a command with a machine waits for, in one queue.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use lazyvm_vmm_glue::kvm::{ExitReason, Machine};
use nix::sys::signal::Signal;

use crate::exit::{Exit, Problem};
use crate::signals::Signals;

/// One of them; `T` is the command's own.
pub enum Event<T> {
    /// A signal came.
    Signal(Signal),
    /// The machine has ended.
    Ended(ExitReason),
    /// What else the command waits for.
    Own(T),
}

/// The queue.
pub struct Events<T> {
    sender: Sender<Event<T>>,
    receiver: Receiver<Event<T>>,
}

impl<T: Send + 'static> Events<T> {
    /// A queue that signals go into from now on.
    pub fn of(signals: Signals) -> anyhow::Result<Self> {
        let (sender, receiver) = channel();
        let to_queue = sender.clone();
        signals
            .tell(move |signal| drop(to_queue.send(Event::Signal(signal))))
            .context("can't handle signals")?;
        Ok(Self { sender, receiver })
    }

    /// Another way in.
    pub fn sender(&self) -> Sender<Event<T>> {
        self.sender.clone()
    }

    /// The next one.
    pub fn next(&self) -> anyhow::Result<Event<T>> {
        self.receiver.recv().context("nothing is left to wait for")
    }

    /// The next one, if it comes in time.
    pub fn next_within(&self, time: Duration) -> Option<Event<T>> {
        self.receiver.recv_timeout(time).ok()
    }

    /// Waits until the machine ends, here or because it was moved away. A signal ends it.
    pub fn until_end_of(&self, machine: &Machine) -> anyhow::Result<Exit> {
        let sender = self.sender();
        let reason = thread::scope(|scope| {
            scope.spawn(move || drop(sender.send(Event::Ended(machine.wait()))));
            loop {
                match self.next()? {
                    Event::Ended(reason) => return anyhow::Ok(reason),
                    Event::Signal(signal) => {
                        tracing::info!(%signal, "ending the VM");
                        machine.quit();
                    }
                    Event::Own(_) => {}
                }
            }
        })?;
        if !reason.is_orderly() {
            return Err(Problem::new(Exit::Failed, format!("the VM ended: {reason}")).into());
        }
        Ok(Exit::Done)
    }
}
