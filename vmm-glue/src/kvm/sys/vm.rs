//! A KVM virtual machine together with the memory it runs in.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::errno;

use super::super::memory::GuestRam;
use super::Vcpu;

/// A virtual machine whose memory stays mapped for at least as long as it can run.
#[derive(Debug)]
pub(in crate::kvm) struct GuestVm {
    // Declared first, so closed first: the mapping goes after the machine.
    fd: VmFd,
    ram: Arc<GuestRam>,
}

impl GuestVm {
    /// Makes a machine of `kvm` and gives it all of `ram`, a slot for each region.
    pub(in crate::kvm) fn new(kvm: &Kvm, ram: Arc<GuestRam>) -> Result<Self, errno::Error> {
        let fd = kvm.create_vm()?;
        for (slot, region) in ram.mapping().iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one mapping of `ram`, which neither moves nor shrinks (its file is sealed) and
            // is kept by this value and by every vCPU made from it; regions of a `GuestRam` never overlap.
            unsafe { fd.set_user_memory_region(slot)? };
        }
        Ok(Self { fd, ram })
    }

    /// KVM's handle of the machine.
    pub(in crate::kvm) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The memory.
    pub(in crate::kvm) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Makes the vCPU with local APIC number `id`.
    pub(in crate::kvm) fn create_vcpu(self: &Arc<Self>, id: u32) -> Result<Vcpu, errno::Error> {
        Ok(Vcpu::new(
            self.fd.create_vcpu(u64::from(id))?,
            Arc::clone(self),
        ))
    }
}
