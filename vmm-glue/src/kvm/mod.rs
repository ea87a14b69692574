//! lazyvm's own small VM monitor on KVM: one or more vCPUs, interrupt controllers, timer, serial console, memory in
//! a memfd; pause on demand; complete state, taken and loaded; a control socket.
//!
//! | module | holds |
//! |---|---|
//! | [`machine`] | a machine from start to end |
//! | `hardware`, `memory`, `boot`, `touch` | what it is made of and what runs in it |
//! | `gate`, `vcpu`, `glance`, `devices`, `serial` | how it runs |
//! | `cpuid`, `compatibility`, [`state`] | what moves, and whether it may |
//! | [`control`] | the socket at which a machine is asked and told |
//! | [`source`], [`destination`] | the two ends of a move |
//! | `tracker`, `scout` | which pages a machine writes, and which it needs first |
//! | `sys` | what cannot be said to KVM in safe Rust |

mod boot;
mod compatibility;
pub mod control;
mod cpuid;
pub mod destination;
mod devices;
mod exit;
mod gate;
mod glance;
mod hardware;
pub mod machine;
mod memory;
mod scout;
mod serial;
pub mod source;
pub mod state;
mod sys;
#[cfg(test)]
mod testing;
pub mod touch;
mod tracker;
mod vcpu;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use boot::{LoadError, Payload};
pub use compatibility::{CompatibilityError, KIND};
pub use control::{ControlClient, ControlError, Status};
pub use destination::{ArrivingMachine, Destination, DestinationConfig};
pub use exit::ExitReason;
pub use hardware::HardwareError;
pub use machine::{BootError, Machine, MachineConfig, OperationError};
pub use memory::{MEMORY_MIN, MemoryError};
pub use serial::SerialTarget;
pub use source::RemoteMachine;
pub use touch::TouchConfig;

/// Locks, whatever happened to who held it before: all that is locked here stays consistent statement by statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
