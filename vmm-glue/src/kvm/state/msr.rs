//! Model-specific registers: the ones this kernel lists, read and written past those it refuses.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use super::TransferError;

/// The time stamp counter. Loaded apart, so that all vCPUs keep their distance from each other.
pub(super) const TSC: u32 = 0x10;

/// The time at which the local APIC's timer fires. Loaded last: it means nothing before the TSC and the timer's mode
/// are there.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// The base of GS that `swapgs` brings: the kernel's while a user program runs.
pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Reads `indices`, leaving out what this vCPU does not have.
///
/// KVM stops at the first register that it refuses and tells how many it read; the list is of the kernel, and a
/// vCPU without the matching CPUID bit refuses some of it.
pub(super) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, errno::Error> {
    let mut entries = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut msrs = to_kvm(batch.iter().map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        }))?;
        let count = vcpu.get_msrs(&mut msrs)?.min(batch.len());
        entries.extend_from_slice(&msrs.as_slice()[..count]);
        if count < batch.len() {
            tracing::debug!(
                msr = format_args!("{:#x}", batch[count]),
                "not there on this vCPU"
            );
        }
        // Past the refused one as well, if any.
        rest = &rest[(count + 1).min(batch.len())..];
    }
    Ok(entries)
}

/// Writes `entries` in their order.
///
/// A refusal is forgiven when the register holds that value already (read-only identification), or when the value
/// is 0, which stands for a feature that was not in use.
pub(super) fn write(
    vcpu: &VcpuFd,
    cpu: u32,
    entries: &[kvm_msr_entry],
) -> Result<(), TransferError> {
    let failed = |source| TransferError::Vcpu {
        verb: "take",
        part: "MSRs",
        cpu,
        source,
    };
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let msrs = to_kvm(batch.iter().copied()).map_err(failed)?;
        let count = vcpu.set_msrs(&msrs).map_err(failed)?.min(batch.len());
        if let Some(refused) = batch.get(count) {
            let (index, value) = (refused.index, refused.data);
            let held = read(vcpu, &[index])
                .map_err(failed)?
                .first()
                .map(|entry| entry.data);
            if value != 0 && held != Some(value) {
                return Err(TransferError::Msr { cpu, index, value });
            }
            tracing::debug!(
                msr = format_args!("{index:#x}"),
                cpu,
                "refused, and needless"
            );
        }
        rest = &rest[(count + 1).min(batch.len())..];
    }
    Ok(())
}

/// One register, or `None` where the vCPU has none of that number.
pub(super) fn read_one(vcpu: &VcpuFd, index: u32) -> Result<Option<u64>, errno::Error> {
    Ok(read(vcpu, &[index])?.first().map(|entry| entry.data))
}

fn to_kvm(entries: impl Iterator<Item = kvm_msr_entry>) -> Result<Msrs, errno::Error> {
    let entries: Vec<_> = entries.collect();
    Msrs::from_entries(&entries).map_err(|_| errno::Error::new(nix::libc::E2BIG))
}
