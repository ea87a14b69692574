//! The complete state of a machine but its memory, and the form in which it travels.
//!
//! ```text
//! magic "lazyVMkv" | version u32 | body length u64 | xxh3-64 of the body u64 | body (postcard)
//! ```
//!
//! Numbers are little-endian. Another version, another length or another checksum is refused before the body is
//! read. The body is postcard of [`MachineState`]; any change to it is a new [`STATE_VERSION`].

mod msr;
#[cfg(test)]
mod tests;
mod vcpu;
mod vm;

use lazyvm_wire::{Layout, STATE_MAX};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;
use xxhash_rust::xxh3::xxh3_64;

pub(super) use vcpu::VcpuState;
pub(super) use vm::VmState;

use super::compatibility::Compatibility;
use super::serial::ConsoleState;
use super::sys::{GuestVm, Vcpu};

/// The base of GS that `swapgs` brings; `None` where the vCPU has none.
pub(super) fn kernel_gs_base(vcpu: &Vcpu) -> Result<Option<u64>, errno::Error> {
    msr::read_one(&vcpu.fd, msr::KERNEL_GS_BASE)
}

/// The format that this version writes and reads.
pub const STATE_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"lazyVMkv";
const HEADER_BYTES: usize = 8 + 4 + 8 + 8;

/// A machine's state without its memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    pub(super) shape: Shape,
    /// With its CPUID, which is the same for each vCPU but for its number.
    pub(super) needs: Compatibility,
    pub(super) vm: VmState,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) console: ConsoleState,
}

/// What the machine is, for people and for whoever makes one like it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) layout: Layout,
    /// What runs in it, for people.
    pub(super) payload: String,
}

/// Bytes that are no state of this version.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than a header.
    #[error("the machine state is cut short: {0} bytes")]
    CutShort(usize),
    /// Longer than any state is.
    #[error("the machine state is {0} bytes long, more than the {STATE_MAX} allowed")]
    TooLong(usize),
    /// Of something else.
    #[error("this is no state of a built-in lazyvm machine")]
    Foreign,
    /// Of another version.
    #[error(
        "the machine state has format version {found}, and this lazyvm reads version {STATE_VERSION}"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// The body is not as long as the header says.
    #[error("the machine state is {found} bytes long where {told} are announced")]
    Length {
        /// What is there.
        found: u64,
        /// What the header says.
        told: u64,
    },
    /// Changed on its way.
    #[error("the machine state is damaged: its checksum does not fit")]
    Checksum,
    /// Does not make sense.
    #[error("the machine state does not make sense")]
    Body(#[from] BodyError),
}

/// A body that is no state, although its checksum fits.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// Not this structure.
    #[error("it cannot be read")]
    Structure(#[source] postcard::Error),
    /// Bytes left over.
    #[error("{0} bytes are left over")]
    Trailing(usize),
    /// Contradicts itself.
    #[error("it announces {cpus} vCPUs and holds {found}")]
    Cpus {
        /// In the shape.
        cpus: u32,
        /// In the list.
        found: usize,
    },
}

/// KVM refused to give or take a part of the state.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// One of the machine's own parts.
    #[error("KVM cannot {verb} the {part}")]
    Machine {
        /// `give` or `take`.
        verb: &'static str,
        /// Which part.
        part: &'static str,
        /// What it said.
        #[source]
        source: errno::Error,
    },
    /// A part of one vCPU.
    #[error("KVM cannot {verb} the {part} of vCPU {cpu}")]
    Vcpu {
        /// `give` or `take`.
        verb: &'static str,
        /// Which part.
        part: &'static str,
        /// Which vCPU.
        cpu: u32,
        /// What it said.
        #[source]
        source: errno::Error,
    },
    /// A value that this kernel or CPU does not take.
    #[error("KVM refuses the value {value:#x} for MSR {index:#x} of vCPU {cpu}")]
    Msr {
        /// Which vCPU.
        cpu: u32,
        /// Which register.
        index: u32,
        /// The value.
        value: u64,
    },
}

impl MachineState {
    /// As it travels.
    ///
    /// # Errors
    /// None in practice: postcard's own, for a structure that cannot be written.
    pub fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        let body = postcard::to_allocvec(self)?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&STATE_VERSION.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&xxh3_64(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        Ok(bytes)
    }

    /// Whether nothing in it contradicts the rest.
    fn check(self) -> Result<Self, BodyError> {
        let cpus = self.needs.cpus;
        if cpus as usize != self.vcpus.len() || self.vcpus.is_empty() {
            return Err(BodyError::Cpus {
                cpus,
                found: self.vcpus.len(),
            });
        }
        Ok(self)
    }
}

/// Reads a state, whatever `bytes` are.
///
/// # Errors
/// [`DecodeError`] says what is wrong. Nothing larger than `bytes` itself is allocated before the checksum fits.
pub fn decode(bytes: &[u8]) -> Result<MachineState, DecodeError> {
    if bytes.len() > STATE_MAX {
        return Err(DecodeError::TooLong(bytes.len()));
    }
    let short = || DecodeError::CutShort(bytes.len());
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(short)?;
    if *magic != MAGIC {
        return Err(DecodeError::Foreign);
    }
    let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let version = u32::from_le_bytes(*version);
    if version != STATE_VERSION {
        return Err(DecodeError::Version { found: version });
    }
    let (told, rest) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (checksum, body) = rest.split_first_chunk::<8>().ok_or_else(short)?;
    let (told, found) = (u64::from_le_bytes(*told), body.len() as u64);
    if told != found {
        return Err(DecodeError::Length { found, told });
    }
    if u64::from_le_bytes(*checksum) != xxh3_64(body) {
        return Err(DecodeError::Checksum);
    }
    Ok(decode_body(body)?)
}

/// Reads what follows the header. By itself only for fuzzing, which would not get past the checksum.
///
/// # Errors
/// [`BodyError`] says what is wrong.
pub fn decode_body(body: &[u8]) -> Result<MachineState, BodyError> {
    let (state, rest) =
        postcard::take_from_bytes::<MachineState>(body).map_err(BodyError::Structure)?;
    if !rest.is_empty() {
        return Err(BodyError::Trailing(rest.len()));
    }
    state.check()
}

/// Takes the state of a machine none of whose vCPUs runs.
pub(super) fn take(
    vm: &GuestVm,
    vcpus: &[&Vcpu],
    msr_indices: &[u32],
    shape: Shape,
    needs: Compatibility,
    console: ConsoleState,
) -> Result<MachineState, TransferError> {
    Ok(MachineState {
        shape,
        needs,
        vcpus: vcpu::take_all(vcpus, msr_indices)?,
        vm: VmState::take(vm.fd())?,
        console,
    })
}

/// Loads a state into a machine that never ran.
///
/// The vCPUs come first: a local APIC has to be there before the IOAPIC sends it what is pending.
pub(super) fn load(
    vm: &GuestVm,
    vcpus: &[&Vcpu],
    state: &MachineState,
) -> Result<(), TransferError> {
    vcpu::load_all(vcpus, &state.vcpus, state.needs.tsc_khz)?;
    state.vm.load(vm.fd())
}
