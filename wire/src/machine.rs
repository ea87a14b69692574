//! What a source says about its machine before it is paused, so that a destination can refuse in time.

use std::fmt;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::bounded;
use crate::text::is_printable;

/// Longest [`MachineOffer::kind`], in bytes.
pub const KIND_MAX: usize = 32;

/// Longest [`MachineOffer::compatibility`], in bytes.
pub const COMPATIBILITY_MAX: usize = 256 * 1024;

/// Largest machine state, in bytes.
pub const STATE_MAX: usize = 64 * 1024 * 1024;

/// The kind of a machine and its state format, checked by the destination before the pause.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineOffer {
    /// Which monitor's state it is: `kvm` (built in), `qemu`, `firecracker`, `memory` (none at all). Printable, and
    /// [`KIND_MAX`] bytes at most.
    #[serde(deserialize_with = "kind")]
    pub kind: String,
    /// Version of the state's format, in that monitor's own count.
    pub state_version: u32,
    /// What that monitor compares before it accepts a state (for `kvm`: CPUID, vCPU count), in its own form;
    /// [`COMPATIBILITY_MAX`] bytes at most.
    #[serde(
        serialize_with = "bounded::serialize_bytes",
        deserialize_with = "bounded::bytes::<_, COMPATIBILITY_MAX>"
    )]
    pub compatibility: Vec<u8>,
}

fn kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let kind = bounded::string::<D, KIND_MAX>(deserializer)?;
    if !is_printable(&kind) {
        return Err(D::Error::custom("a machine's kind that is not printable"));
    }
    Ok(kind)
}

impl fmt::Debug for MachineOffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineOffer")
            .field("kind", &self.kind)
            .field("state_version", &self.state_version)
            .field("compatibility_len", &self.compatibility.len())
            .finish()
    }
}
