//! A virtual machine's hardware as KVM makes it, before anything runs on it.

use std::path::Path;
use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::errno;

use super::compatibility::{Compatibility, Host};
use super::cpuid;
use super::memory::GuestRam;
use super::sys::{GuestVm, Vcpu};

/// Three pages for the TSS that Intel CPUs want in real mode, and one for the identity map below them: in the device
/// window, as QEMU and Firecracker place them.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Local APIC numbers are bytes, and 255 is everybody.
const CPUS_MAX: u32 = 254;

/// The hypervisor's device.
const KVM_PATH: &str = "/dev/kvm";

/// A machine's hardware that can't be made.
#[derive(Debug, thiserror::Error)]
pub enum HardwareError {
    /// No KVM here.
    #[error(
        "there is no {KVM_PATH}: this host has no KVM (is virtualisation switched on in the firmware, and the \
         module kvm-intel or kvm-amd loaded?)"
    )]
    NoKvm,
    /// KVM is there, but not for this user.
    #[error("no permission to open {KVM_PATH}; its owner's group (mostly `kvm`) may")]
    Permission,
    /// Any other failure to open it.
    #[error("cannot open {KVM_PATH}")]
    Open(#[source] errno::Error),
    /// Too old.
    #[error("this kernel's KVM has no {0}")]
    Lacks(&'static str),
    /// None, or more than KVM gives.
    #[error("a machine of {cpus} vCPUs cannot be; between 1 and {most} can")]
    Cpus {
        /// What was asked for.
        cpus: u32,
        /// The most here.
        most: u32,
    },
    /// KVM refused a step.
    #[error("KVM cannot {step}")]
    Kvm {
        /// What was to be done.
        step: &'static str,
        /// What it said.
        #[source]
        source: errno::Error,
    },
}

/// Gives a failed step its name.
fn step(step: &'static str) -> impl FnOnce(errno::Error) -> HardwareError {
    move |source| HardwareError::Kvm { step, source }
}

/// This host's KVM.
#[derive(Debug)]
pub(super) struct Hypervisor {
    kvm: Kvm,
}

impl Hypervisor {
    /// Opens it and checks that it has what a move needs.
    pub(super) fn open() -> Result<Self, HardwareError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            nix::libc::ENOENT | nix::libc::ENODEV | nix::libc::ENXIO
                if !Path::new(KVM_PATH).exists() =>
            {
                HardwareError::NoKvm
            }
            nix::libc::EACCES | nix::libc::EPERM => HardwareError::Permission,
            _ => HardwareError::Open(error),
        })?;
        for (capability, name) in [
            (Cap::ImmediateExit, "immediate exit (Linux 4.12)"),
            (Cap::Irqchip, "interrupt controllers"),
            (Cap::PitState2, "timer state"),
            (Cap::AdjustClock, "clock state"),
            (Cap::VcpuEvents, "vCPU events"),
            (Cap::MpState, "multi-processor state"),
            (Cap::Debugregs, "debug register state"),
            (Cap::Xsave, "extended state"),
            (Cap::Xcrs, "extended control registers"),
        ] {
            if !kvm.check_extension(capability) {
                return Err(HardwareError::Lacks(name));
            }
        }
        Ok(Self { kvm })
    }

    /// The most vCPUs of a machine.
    fn cpus_max(&self) -> u32 {
        (self.kvm.get_max_vcpus() as u32).min(CPUS_MAX)
    }

    /// What a machine of `cpus` vCPUs finds here.
    pub(super) fn host(&self, cpus: u32) -> Result<Host, HardwareError> {
        let cpus_max = self.cpus_max();
        if cpus == 0 || cpus > cpus_max {
            return Err(HardwareError::Cpus {
                cpus,
                most: cpus_max,
            });
        }
        // The clock rate and the extended state's length are told of machines only.
        let vm = self
            .kvm
            .create_vm()
            .map_err(step("make a virtual machine"))?;
        let vcpu = vm.create_vcpu(0).map_err(step("make a vCPU"))?;
        Ok(Host {
            has: Compatibility {
                cpus,
                tsc_khz: vcpu
                    .get_tsc_khz()
                    .map_err(step("tell the rate of the TSC"))?,
                xsave_bytes: vm.check_extension_int(Cap::Xsave2).max(4096) as u32,
                cpuid: cpuid::for_machine(&self.kvm, cpus).map_err(step("tell the CPUID"))?,
            },
            scales_tsc: self.kvm.check_extension(Cap::TscControl),
            cpus_max,
        })
    }

    /// The MSRs that make up a vCPU's state on this kernel.
    pub(super) fn msr_indices(&self) -> Result<Vec<u32>, HardwareError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(step("list its MSRs"))?;
        Ok(list.as_slice().to_vec())
    }

    /// Makes a machine: memory, interrupt controllers, timer, vCPUs. No register is set.
    pub(super) fn build(
        &self,
        ram: Arc<GuestRam>,
        needs: Compatibility,
    ) -> Result<Hardware, HardwareError> {
        let msr_indices = self.msr_indices()?;
        let vm = GuestVm::new(&self.kvm, ram).map_err(step("make a virtual machine"))?;
        let vm = Arc::new(vm);
        vm.fd()
            .set_tss_address(TSS_ADDRESS)
            .map_err(step("place the TSS"))?;
        vm.fd()
            .set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(step("place the identity map"))?;
        vm.fd()
            .create_irq_chip()
            .map_err(step("make the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.fd().create_pit2(pit).map_err(step("make the timer"))?;
        let vcpus = (0..needs.cpus)
            .map(|id| build_vcpu(&vm, id, &needs))
            .collect::<Result<_, _>>()?;
        Ok(Hardware {
            vm,
            vcpus,
            needs,
            msr_indices,
        })
    }
}

/// Makes a vCPU and tells it what it is.
///
/// The machine keeps the CPUID that it was made with, rather than ask KVM for it later: the answer then has bits of
/// the vCPU's control registers in it, and with some of KVM's back ends bits of the host's.
fn build_vcpu(vm: &Arc<GuestVm>, id: u32, needs: &Compatibility) -> Result<Vcpu, HardwareError> {
    let vcpu = vm.create_vcpu(id).map_err(step("make a vCPU"))?;
    let cpuid = cpuid::to_kvm(&cpuid::for_vcpu(&needs.cpuid, id))
        .ok_or_else(|| step("take so long a CPUID")(errno::Error::new(nix::libc::E2BIG)))?;
    vcpu.fd.set_cpuid2(&cpuid).map_err(step("set the CPUID"))?;
    if vcpu
        .fd
        .get_tsc_khz()
        .map_err(step("tell the rate of the TSC"))?
        != needs.tsc_khz
    {
        vcpu.fd
            .set_tsc_khz(needs.tsc_khz)
            .map_err(step("set the rate of the TSC"))?;
    }
    Ok(vcpu)
}

/// A machine's hardware.
#[derive(Debug)]
pub(super) struct Hardware {
    pub(super) vm: Arc<GuestVm>,
    /// In the order of their local APIC numbers, from 0.
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) needs: Compatibility,
    pub(super) msr_indices: Vec<u32>,
}
