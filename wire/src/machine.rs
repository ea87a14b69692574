//! What a source says about its machine before it is paused, so that a destination can refuse in time.

use serde::{Deserialize, Serialize};

/// Longest [`MachineOffer::compatibility`], in bytes.
pub const COMPATIBILITY_MAX: usize = 256 * 1024;

/// Largest machine state, in bytes.
pub const STATE_MAX: usize = 64 * 1024 * 1024;

/// The kind of a machine and its state format, checked by the destination before the pause.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineOffer {
    /// Which monitor's state it is: `kvm` (built in), `qemu`, `firecracker`, `memory` (none at all).
    pub kind: String,
    /// Version of the state's format, in that monitor's own count.
    pub state_version: u32,
    /// What that monitor compares before it accepts a state (for `kvm`: CPUID, vCPU count), in its own form.
    pub compatibility: Vec<u8>,
}
