//! What the page server needs of a virtual machine.

use std::error::Error;
use std::io;
use std::sync::Arc;

use lazyvm_wire::{Layout, MachineOffer, PageRange};

/// A failure of the machine's own, told in its own words.
pub type MachineError = Box<dyn Error + Send + Sync>;

/// A machine's memory, as its source reads it. Reads never block on the network and may run on any thread.
pub trait SourceMemory: Send + Sync {
    /// Reads whole pages into `out`, which is `range.bytes()` long.
    ///
    /// # Errors
    /// Any the backing gives. The pages are then not sent; nothing is made up for them.
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()>;

    /// Calls `data` with each run of pages, ascending, that may hold anything but zeros. What it does not name
    /// reads as zero (holes of a sparse file). Must be quick: it runs while the machine stands still.
    ///
    /// # Errors
    /// Any the backing gives.
    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()>;
}

/// A machine at the source. The server calls from one thread at a time, off its fault lane; calls may block.
pub trait SourceMachine: Send + Sync {
    /// The memory's region table. Does not change while the machine is served.
    fn layout(&self) -> &Layout;

    /// What a destination checks before the pause.
    fn offer(&self) -> MachineOffer;

    /// The memory, valid until [`SourceMachine::release`].
    fn memory(&self) -> Arc<dyn SourceMemory>;

    /// Everything that a pause needs and that can be done while the machine runs: [`SourceMachine::pause`] follows at
    /// once. On failure the machine runs on.
    ///
    /// # Errors
    /// The machine's own.
    fn prepare_pause(&self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Stops every vCPU and gives the complete state but memory. On failure the machine runs on.
    ///
    /// # Errors
    /// The machine's own.
    fn pause(&self) -> Result<Vec<u8>, MachineError>;

    /// Lets a paused machine run on here: the move failed or was refused.
    ///
    /// # Errors
    /// The machine's own.
    fn resume(&self) -> Result<(), MachineError>;

    /// The destination has everything: frees the machine's memory and ends it.
    ///
    /// # Errors
    /// The machine's own. The move has succeeded all the same.
    fn release(&self) -> Result<(), MachineError>;
}
