//! Getting a vCPU out of the guest, from another thread, without losing the request.

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The `immediate_exit` byte of a vCPU's `kvm_run`, in a mapping of its own.
///
/// While it is set, `KVM_RUN` completes what a previous exit left to be completed and then returns `EINTR`
/// without running the guest (kernel, `Documentation/virt/kvm/api.rst`, "immediate_exit"). Set before the signal
/// that interrupts a running guest, it closes the gap between the vCPU thread's last look at its orders and its
/// entry into the kernel.
#[derive(Debug)]
pub(in crate::kvm) struct ImmediateExit {
    run: NonNull<kvm_run>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and all access to it is atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    pub(in crate::kvm) fn new(vcpu: &VcpuFd) -> nix::Result<Self> {
        let length = const { std::num::NonZeroUsize::new(size_of::<kvm_run>()).unwrap() };
        // SAFETY: wrapping a descriptor that outlives the borrow.
        let fd =
            unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(vcpu)) };
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no other memory.
        let run = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd.as_fd(),
                0,
            )?
        };
        Ok(Self { run: run.cast() })
    }

    /// Whether `KVM_RUN` is to return at once, from now on.
    pub(in crate::kvm) fn set(&self, exit: bool) {
        // SAFETY: the pointer is to a live mapping of a `kvm_run` until `drop`; the kernel reads the byte and never
        // writes it, and this process writes it only here.
        let byte = unsafe { AtomicU8::from_ptr(&raw mut (*self.run.as_ptr()).immediate_exit) };
        byte.store(u8::from(exit), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length and nothing borrows from it. A failure leaks it.
        let _ = unsafe { munmap(self.run.cast(), size_of::<kvm_run>()) };
    }
}
