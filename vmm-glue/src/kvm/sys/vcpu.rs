//! A vCPU, kept together with the machine it belongs to.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave, kvm_device_attr, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd};
use vmm_sys_util::errno;

use super::GuestVm;

/// What `KVM_EXIT_INTERNAL_ERROR` tells.
#[derive(Clone, Debug)]
pub(in crate::kvm) struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`.
    pub(in crate::kvm) suberror: u32,
    /// What KVM adds; for a failed emulation, flags and the instruction's bytes.
    pub(in crate::kvm) data: Vec<u64>,
}

/// A vCPU. It keeps its machine, and so the guest memory, alive.
#[derive(Debug)]
pub(in crate::kvm) struct Vcpu {
    // Declared first, so closed first.
    pub(in crate::kvm) fd: VcpuFd,
    vm: Arc<GuestVm>,
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, vm: Arc<GuestVm>) -> Self {
        Self { fd, vm }
    }

    /// The extended state in 32-bit words, as many as KVM says it has.
    pub(in crate::kvm) fn xsave(&self) -> Result<Vec<u32>, errno::Error> {
        let mut xsave = self.empty_xsave()?;
        if self.xsave2_bytes() > 0 {
            // SAFETY: `empty_xsave` made it as large as `KVM_CAP_XSAVE2` says, and no XSTATE feature is enabled
            // while the machine exists (nothing in this process calls `arch_prctl`).
            unsafe { self.fd.get_xsave2(&mut xsave)? };
        } else {
            let fixed = self.fd.get_xsave()?;
            // SAFETY: only the length of the array behind the struct must not change, and it is no part of this.
            unsafe { xsave.as_mut_fam_struct().xsave = fixed };
        }
        let mut words = xsave.as_fam_struct_ref().xsave.region.to_vec();
        words.extend_from_slice(xsave.as_slice());
        Ok(words)
    }

    /// Loads what [`Vcpu::xsave`] gave; `EINVAL` when it is not as long as this machine's.
    pub(in crate::kvm) fn set_xsave(&self, words: &[u32]) -> Result<(), errno::Error> {
        let mut xsave = self.empty_xsave()?;
        let fixed = xsave.as_fam_struct_ref().xsave.region.len();
        if words.len() != fixed + xsave.as_slice().len() {
            return Err(errno::Error::new(nix::libc::EINVAL));
        }
        let (region, extra) = words.split_at(fixed);
        // SAFETY: only the length of the array behind the struct must not change, and it is no part of this.
        unsafe {
            xsave
                .as_mut_fam_struct()
                .xsave
                .region
                .copy_from_slice(region)
        };
        xsave.as_mut_slice().copy_from_slice(extra);
        // SAFETY: `empty_xsave` made it as large as what KVM reads.
        unsafe { self.fd.set_xsave2(&xsave) }
    }

    fn empty_xsave(&self) -> Result<Xsave, errno::Error> {
        let extra = self.xsave2_bytes().saturating_sub(size_of::<kvm_xsave>());
        Xsave::new(extra.div_ceil(size_of::<u32>()))
            .map_err(|_| errno::Error::new(nix::libc::ENOMEM))
    }

    /// 0 where the kernel is older than the capability (5.17).
    fn xsave2_bytes(&self) -> usize {
        self.vm.fd().check_extension_int(Cap::Xsave2).max(0) as usize
    }

    /// The guest's TSC minus the (scaled) host's, or `None` where the kernel does not tell (before 5.16).
    pub(in crate::kvm) fn tsc_offset(&self) -> Option<u64> {
        let mut offset = 0_u64;
        self.tsc_offset_attribute(KVM_GET_DEVICE_ATTR, &mut offset)
            .ok()?;
        Some(offset)
    }

    /// Sets what [`Vcpu::tsc_offset`] gives.
    pub(in crate::kvm) fn set_tsc_offset(&self, mut offset: u64) -> Result<(), errno::Error> {
        self.tsc_offset_attribute(KVM_SET_DEVICE_ATTR, &mut offset)
    }

    fn tsc_offset_attribute(&self, request: u64, offset: &mut u64) -> Result<(), errno::Error> {
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_VCPU_TSC_CTRL,
            attr: u64::from(KVM_VCPU_TSC_OFFSET),
            addr: std::ptr::from_mut(offset) as u64,
        };
        // SAFETY: both requests take a `kvm_device_attr`, and this attribute is a u64 at `addr` that the kernel
        // reads or writes during the call only (`Documentation/virt/kvm/devices/vcpu.rst`, 4.1).
        let result =
            unsafe { nix::libc::ioctl(self.fd.as_raw_fd(), request, &raw const attribute) };
        if result == 0 {
            Ok(())
        } else {
            Err(errno::Error::last())
        }
    }

    /// What KVM says of an internal error. Only after such an exit.
    pub(in crate::kvm) fn internal_error(&mut self) -> InternalError {
        let run = self.fd.get_kvm_run();
        // SAFETY: every field of the union is plain integers, for which any bytes are valid.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        InternalError {
            suberror: internal.suberror,
            data: internal.data[..count].to_vec(),
        }
    }
}

const KVM_SET_DEVICE_ATTR: u64 =
    nix::request_code_write!(KVMIO, 0xe1, size_of::<kvm_device_attr>());
const KVM_GET_DEVICE_ATTR: u64 =
    nix::request_code_write!(KVMIO, 0xe2, size_of::<kvm_device_attr>());

// As in the kernel's `include/uapi/linux/kvm.h`.
const _: () = assert!(KVM_SET_DEVICE_ATTR == 0x4018_aee1 && KVM_GET_DEVICE_ATTR == 0x4018_aee2);
