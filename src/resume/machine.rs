//! The machine that is taken over, with a way back for as long as there is one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lazyvm_pager::LazyMemory;
use lazyvm_pager::port::{DestinationMachine, HandedOver, LateMachine, MachineError};
use lazyvm_wire::{Layout, MachineOffer};

use crate::exit::{self, Exit, Problem};

/// Asks a hand-over to stop.
#[derive(Clone, Default)]
pub struct Cancel(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// The source may be about to hand over, so that it has to be told.
    begun: bool,
    cancelled: bool,
}

impl Cancel {
    /// Stops the hand-over at its next step; whether there is one to be stopped.
    pub fn cancel(&self) -> bool {
        let mut state = self.state();
        state.cancelled = true;
        state.begun
    }

    fn begin(&self) -> Result<(), MachineError> {
        self.state().begun = true;
        self.check()
    }

    fn check(&self) -> Result<(), MachineError> {
        if self.state().cancelled {
            return Err(Problem::new(Exit::NotMoved, "a signal ended it").into());
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses the machine at the next step once that is asked for, and keeps the exit code of a failure.
pub struct Cancellable<M> {
    machine: M,
    cancel: Cancel,
    exit: Option<Exit>,
}

impl<M> Cancellable<M> {
    /// Around `machine`.
    pub fn new(machine: M, cancel: Cancel) -> Self {
        Self {
            machine,
            cancel,
            exit: None,
        }
    }

    /// The code of what failed, if anything did.
    pub fn exit(&self) -> Option<Exit> {
        self.exit
    }

    fn note<T>(&mut self, result: Result<T, MachineError>) -> Result<T, MachineError> {
        result.inspect_err(|error| {
            // What has no code of its own is a refusal.
            let exit = exit::of(error.as_ref());
            self.exit = Some(if exit == Exit::Failed {
                Exit::Refused
            } else {
                exit
            });
        })
    }
}

impl<M: DestinationMachine> DestinationMachine for Cancellable<M> {
    fn prepare(
        &mut self,
        layout: &Layout,
        offer: &MachineOffer,
    ) -> Result<LazyMemory, MachineError> {
        let result = self
            .cancel
            .begin()
            .and_then(|()| self.machine.prepare(layout, offer))
            .and_then(|memory| self.cancel.check().map(|()| memory));
        self.note(result)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        let result = self.cancel.check().and_then(|()| self.machine.load(state));
        self.note(result)
    }

    fn start(&mut self) -> Result<(), MachineError> {
        let result = self.cancel.check().and_then(|()| self.machine.start());
        self.note(result)
    }
}

impl<M: LateMachine> LateMachine for Cancellable<M> {
    fn prepare(&mut self, layout: &Layout, offer: &MachineOffer) -> Result<(), MachineError> {
        let result = self
            .cancel
            .begin()
            .and_then(|()| self.machine.prepare(layout, offer))
            .and_then(|()| self.cancel.check());
        self.note(result)
    }

    fn begin_load(&mut self, state: &[u8]) -> Result<HandedOver, MachineError> {
        let result = self
            .cancel
            .check()
            .and_then(|()| self.machine.begin_load(state));
        self.note(result)
    }

    fn finish_load(&mut self) -> Result<(), MachineError> {
        let result = self.machine.finish_load();
        self.note(result)
    }

    fn check_alive(&mut self) -> Result<(), MachineError> {
        let result = self
            .cancel
            .check()
            .and_then(|()| self.machine.check_alive());
        self.note(result)
    }

    fn start(&mut self) -> Result<(), MachineError> {
        let result = self.cancel.check().and_then(|()| self.machine.start());
        self.note(result)
    }
}
