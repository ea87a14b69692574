//! QEMU, unmodified: spoken to over QMP, its memory read and filled from outside.
//!
//! The device state travels as QEMU's own migration stream with the capability `x-ignore-shared`, which leaves shared
//! RAM out; that RAM is lazyvm's to move. What is known of QEMU's versions stands beside the code that needs it, with
//! the commands' names as in QEMU's `qapi/`; capabilities are asked for, never taken from the version.

mod destination;
pub mod line;
mod memory;
mod offer;
#[cfg(test)]
mod peer;
mod qmp;
mod ram;
mod recorder;
pub mod registers;
mod scout;
mod source;
mod tracker;
mod transfer;
pub mod tree;

pub use destination::{Ahead, Command, Destination, DestinationError, Running};
pub use memory::{MemoryError, RamRegion};
pub use offer::{KIND, Offer, OfferError};
pub use qmp::{Qmp, QmpError};
pub use source::{Source, SourceError};
pub use transfer::TransferError;
