//! What the pager needs of the virtual machine that it brings to life.

use std::error::Error;

use lazyvm_wire::{Layout, MachineOffer};

use crate::memory::LazyMemory;
use crate::uffd::Uffd;

/// A failure of the machine's own, told in its own words.
pub type MachineError = Box<dyn Error + Send + Sync>;

/// A machine at the destination, from nothing to running. Calls come in the order of the methods, from one
/// thread, off the fault lane; they may block, on faults of their own too.
pub trait DestinationMachine: Send {
    /// Checks that this machine can be run here and makes its memory, empty. The source still runs, so this is
    /// the place for everything that can fail.
    ///
    /// # Errors
    /// Refused, in words that tell the user what to change. The machine runs on at the source.
    fn prepare(
        &mut self,
        layout: &Layout,
        offer: &MachineOffer,
    ) -> Result<LazyMemory, MachineError>;

    /// Loads the state. The memory is registered by now; a touch of it is served.
    ///
    /// # Errors
    /// Refused. The source resumes the machine.
    fn load(&mut self, state: &[u8]) -> Result<(), MachineError>;

    /// Starts the vCPUs, once.
    ///
    /// # Errors
    /// Refused. The source resumes the machine.
    fn start(&mut self) -> Result<(), MachineError>;
}

/// Memory that a monitor made by itself, in its own process, registered with a userfaultfd of its own, and handed over.
#[derive(Debug)]
pub struct HandedOver {
    /// The memory's own region table. It may cut the image otherwise than the source does, but has as many pages, and
    /// of the same kind.
    pub layout: Layout,
    /// Where the memory is.
    pub memory: LazyMemory,
    /// What it is registered with.
    pub uffd: Uffd,
}

/// A machine at the destination whose monitor makes the memory only when it is given the state, and touches it while it
/// loads (an unmodified Firecracker). So the source has paused before there is memory: what [`Self::prepare`] can look
/// at beforehand is all that can fail without a pause. A refusal after it still lets the machine run on at the source.
///
/// Calls come in the order of the methods, from one thread, off the fault lane; they may block.
pub trait LateMachine: Send {
    /// Checks all that can be checked before there is a state. The source still runs.
    ///
    /// # Errors
    /// Refused, in words that tell the user what to change. The machine runs on at the source.
    fn prepare(&mut self, layout: &Layout, offer: &MachineOffer) -> Result<(), MachineError>;

    /// Gives the state to the monitor and returns as soon as it has handed its memory over. The monitor goes on with
    /// the state meanwhile; once this has returned, its touches are served.
    ///
    /// # Errors
    /// Refused. The source resumes the machine.
    fn begin_load(&mut self, state: &[u8]) -> Result<HandedOver, MachineError>;

    /// Waits until the monitor is done with the state.
    ///
    /// # Errors
    /// Refused. The source resumes the machine.
    fn finish_load(&mut self) -> Result<(), MachineError>;

    /// Whether the monitor still lives; asked while it waits for its pages before the start.
    ///
    /// # Errors
    /// It does not. The source resumes the machine.
    fn check_alive(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Starts the vCPUs, once.
    ///
    /// # Errors
    /// Refused. The source resumes the machine.
    fn start(&mut self) -> Result<(), MachineError>;
}
