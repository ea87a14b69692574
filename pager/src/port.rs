//! What the pager needs of the virtual machine that it brings to life.

use std::error::Error;

use lazyvm_wire::{Layout, MachineOffer};

use crate::memory::LazyMemory;

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
