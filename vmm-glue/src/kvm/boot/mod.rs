//! What a machine finds in its memory and registers when it starts here.

mod kernel;
mod long_mode;
mod mp_table;
mod zero_page;

use std::io;
use std::path::PathBuf;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_msr_entry, kvm_regs};
use vmm_sys_util::errno;

use super::cpuid;
use super::hardware::Hardware;
use super::memory::GuestRam;
use super::sys::Vcpu;
use super::touch::{self, TouchConfig, TouchError};

pub(super) use long_mode::{IMAGE_WINDOW, TABLES_2M_BYTES};

/// What runs in the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// The bundled bare-metal program (see [`crate::kvm::touch`]).
    Touch(TouchConfig),
    /// A kernel: an x86-64 ELF file (a `vmlinux`, or any bare-metal program) or a Linux bzImage.
    Kernel {
        /// The file.
        path: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The command line.
        cmdline: String,
    },
    /// Bytes that are loaded at 1 MiB and entered there in 64-bit mode, with 4 GiB mapped one to one.
    Flat(PathBuf),
}

impl Payload {
    /// A name for people.
    pub fn name(&self) -> String {
        match self {
            Self::Touch(_) => "touch".to_owned(),
            Self::Kernel { path, .. } | Self::Flat(path) => path.display().to_string(),
        }
    }
}

/// A payload that can't be started.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file can't be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither an ELF file nor a bzImage.
    #[error(
        "{} is no kernel: neither an x86-64 ELF file nor a bzImage of Linux{hint}",
        path.display()
    )]
    NotAKernel {
        /// Its path.
        path: PathBuf,
        /// What it looks like, with a space ahead.
        hint: &'static str,
    },
    /// An ELF file or bzImage that can't be loaded.
    #[error("cannot load the kernel {}", path.display())]
    Kernel {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// Something does not fit into the guest's memory.
    #[error("a memory of {memory} bytes is too small for {what}, which needs {needed} bytes")]
    MemoryTooSmall {
        /// The guest's memory.
        memory: u64,
        /// What does not fit.
        what: &'static str,
        /// How much memory would do.
        needed: u64,
    },
    /// The command line is too long or not text.
    #[error("the kernel command line is not of at most {max} printable ASCII characters")]
    CommandLine {
        /// The longest allowed.
        max: usize,
    },
    /// The bundled payload's parameters.
    #[error("the touch payload's parameters do not fit")]
    Touch(#[from] TouchError),
    /// Guest memory can't be written.
    #[error("cannot write {what} into guest memory")]
    Write {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// KVM refused a register.
    #[error("KVM cannot set the {part} of vCPU {cpu}")]
    Register {
        /// Which.
        part: &'static str,
        /// Of which vCPU.
        cpu: u32,
        /// What it said.
        #[source]
        source: errno::Error,
    },
}

/// Where a vCPU begins, in 64-bit mode.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    pub(super) rip: u64,
    pub(super) rsp: u64,
    /// First argument of a function, for the bundled payload.
    pub(super) rdi: u64,
    /// The zero page, for Linux.
    pub(super) rsi: u64,
}

/// Puts `payload` into the memory and sets every vCPU's first registers.
pub(super) fn load(hardware: &Hardware, payload: &Payload) -> Result<(), LoadError> {
    let ram = hardware.vm.ram();
    long_mode::write_tables(ram, cpuid::has_pages_1g(&hardware.needs.cpuid))?;
    // A vCPU without an entry waits for the first one to start it, as real ones do.
    let entries: Vec<Option<Entry>> = match payload {
        Payload::Touch(config) => {
            touch::load(ram, config, hardware.needs.cpus, hardware.needs.tsc_khz)?
                .into_iter()
                .map(Some)
                .collect()
        }
        Payload::Kernel {
            path,
            initrd,
            cmdline,
        } => {
            mp_table::write_table(ram, hardware.needs.cpus)?;
            first(
                hardware,
                kernel::load(ram, path, initrd.as_deref(), cmdline)?,
            )
        }
        Payload::Flat(path) => first(hardware, kernel::load_flat(ram, path)?),
    };
    for ((cpu, vcpu), entry) in (0_u32..).zip(&hardware.vcpus).zip(entries) {
        set_registers(vcpu, entry).map_err(|(part, source)| LoadError::Register {
            part,
            cpu,
            source,
        })?;
    }
    Ok(())
}

fn first(hardware: &Hardware, entry: Entry) -> Vec<Option<Entry>> {
    (0..hardware.needs.cpus)
        .map(|cpu| (cpu == 0).then_some(entry))
        .collect()
}

/// What firmware leaves behind.
fn set_registers(vcpu: &Vcpu, entry: Option<Entry>) -> Result<(), (&'static str, errno::Error)> {
    const MISC_ENABLE: kvm_msr_entry = kvm_msr_entry {
        index: 0x1a0,
        reserved: 0,
        data: 1, /* fast strings */
    };
    const MTRR_DEFAULT_TYPE: kvm_msr_entry = kvm_msr_entry {
        index: 0x2ff,
        reserved: 0,
        data: (1 << 11) | 6, /* on, write-back */
    };
    let fd = &vcpu.fd;
    let msrs = kvm_bindings::Msrs::from_entries(&[MISC_ENABLE, MTRR_DEFAULT_TYPE])
        .map_err(|_| ("MSRs", errno::Error::new(nix::libc::E2BIG)))?;
    fd.set_msrs(&msrs).map_err(|error| ("MSRs", error))?;
    long_mode::wire_local_apic(fd).map_err(|error| ("local APIC", error))?;
    let Some(entry) = entry else { return Ok(()) };

    let mut sregs = fd
        .get_sregs()
        .map_err(|error| ("system registers", error))?;
    long_mode::set(&mut sregs);
    fd.set_sregs(&sregs)
        .map_err(|error| ("system registers", error))?;
    let regs = kvm_regs {
        rip: entry.rip,
        rsp: entry.rsp,
        rdi: entry.rdi,
        rsi: entry.rsi,
        // The bit that is always set.
        rflags: 2,
        ..Default::default()
    };
    fd.set_regs(&regs).map_err(|error| ("registers", error))?;
    fd.set_mp_state(kvm_mp_state {
        mp_state: KVM_MP_STATE_RUNNABLE,
    })
    .map_err(|error| ("multi-processor state", error))
}

/// Writes what a payload starts from.
fn write(ram: &GuestRam, what: &'static str, gpa: u64, data: &[u8]) -> Result<(), LoadError> {
    use vm_memory::{Bytes, GuestAddress};
    ram.mapping()
        .write_slice(data, GuestAddress(gpa))
        .map_err(|error| LoadError::Write {
            what,
            source: Box::new(error),
        })
}
