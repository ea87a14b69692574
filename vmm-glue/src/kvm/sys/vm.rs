//! A KVM virtual machine together with the memory it runs in.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
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
        let vm = Self {
            fd: kvm.create_vm()?,
            ram,
        };
        vm.set_slots(0)?;
        Ok(vm)
    }

    fn set_slots(&self, flags: u32) -> Result<(), errno::Error> {
        for (slot, region) in self.ram.mapping().iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is one mapping of `ram`, which neither moves nor shrinks (its file is sealed) and
            // is kept by this value and by every vCPU made from it; regions of a `GuestRam` never overlap.
            unsafe { self.fd.set_user_memory_region(slot)? };
        }
        Ok(())
    }

    /// Has KVM note writes from now on, all pages being clean, or no longer. After an error it may note those to a part.
    ///
    /// KVM write-protects a slot's pages before the change of its flag returns; `EINVAL` before Linux 5.5, which can't do
    /// [`GuestVm::take_written`] page by page.
    pub(in crate::kvm) fn note_writes(&self, on: bool) -> Result<(), errno::Error> {
        // What an earlier log still holds goes with it.
        self.set_slots(0)?;
        if on {
            self.fd.enable_cap(&kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [MANUAL_PROTECT_ENABLE, 0, 0, 0],
                ..kvm_enable_cap::default()
            })?;
            self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)?;
        }
        Ok(())
    }

    /// Which pages were written since they were last taken, a bit each, for every region in the layout's order; they are
    /// clean from now on. What is written between the two steps is written before this returns, to a page that is told.
    pub(in crate::kvm) fn take_written(&self) -> Result<Vec<Vec<u64>>, errno::Error> {
        let mut all = Vec::new();
        for (slot, region) in self.ram.mapping().iter().enumerate() {
            let slot = slot as u32;
            let mut bitmap = self.fd.get_dirty_log(slot, region.len() as usize)?;
            let pages = region.len() / lazyvm_wire::PAGE_SIZE as u64;
            let clear = kvm_clear_dirty_log {
                slot,
                num_pages: u32::try_from(pages).map_err(|_| errno::Error::new(nix::libc::E2BIG))?,
                first_page: 0,
                __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                    dirty_bitmap: bitmap.as_mut_ptr().cast(),
                },
            };
            // SAFETY: the kernel reads one struct of this type and a bit for each of `num_pages`, all during the call.
            let result = unsafe {
                nix::libc::ioctl(self.fd.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw const clear)
            };
            if result != 0 {
                return Err(errno::Error::last());
            }
            all.push(bitmap);
        }
        Ok(all)
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

/// `KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE` of `linux/kvm.h`: reading the log and clearing it are two requests.
const MANUAL_PROTECT_ENABLE: u64 = 1;

const KVM_CLEAR_DIRTY_LOG: u64 =
    nix::request_code_readwrite!(KVMIO, 0xc0, size_of::<kvm_clear_dirty_log>());

// As in the kernel's `include/uapi/linux/kvm.h`.
const _: () = assert!(KVM_CLEAR_DIRTY_LOG == 0xc018_aec0);
