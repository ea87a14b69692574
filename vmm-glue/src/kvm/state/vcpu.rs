//! One vCPU's state, and the order in which its parts are taken and loaded. Its CPUID is no part of it: that is the
//! machine's (`hardware`), and set before anything else, since KVM checks the other parts against it.
//!
//! The orders follow Firecracker (`src/vmm/src/arch/x86_64/vcpu.rs`, `save_state` and `restore_state`) and QEMU
//! (`target/i386/kvm/kvm.c`, `kvm_arch_put_registers`), for the reasons beside each step.

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::super::sys::Vcpu;
use super::{TransferError, msr};

/// See the module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::kvm) struct VcpuState {
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) debug_regs: kvm_debugregs,
    pub(super) xcrs: kvm_xcrs,
    /// The extended state in 32-bit words, as long as KVM gives it.
    pub(super) xsave: Vec<u32>,
    pub(super) lapic: kvm_lapic_state,
    /// All but the two kept apart below.
    pub(super) msrs: Vec<kvm_msr_entry>,
    /// The guest's TSC when it was taken.
    pub(super) tsc: u64,
    /// How far this vCPU's TSC is ahead of vCPU 0's (modulo 2^64); `None` where the kernel does not tell.
    pub(super) tsc_ahead: Option<u64>,
    /// When the local APIC's timer fires, by the guest's TSC; `None` without such a timer.
    pub(super) tsc_deadline: Option<u64>,
    pub(super) events: kvm_vcpu_events,
}

/// Takes every vCPU's state. None of them may be running.
pub(super) fn take_all(
    vcpus: &[&Vcpu],
    msr_indices: &[u32],
) -> Result<Vec<VcpuState>, TransferError> {
    let indices: Vec<u32> = msr_indices
        .iter()
        .copied()
        .filter(|index| ![msr::TSC, msr::TSC_DEADLINE].contains(index))
        .collect();
    let first_offset = vcpus.first().and_then(|vcpu| vcpu.tsc_offset());
    (0_u32..)
        .zip(vcpus)
        .map(|(cpu, vcpu)| {
            let tsc_ahead = vcpu
                .tsc_offset()
                .zip(first_offset)
                .map(|(own, first)| own.wrapping_sub(first));
            take(vcpu, &indices, tsc_ahead).map_err(|(part, source)| TransferError::Vcpu {
                verb: "give",
                part,
                cpu,
                source,
            })
        })
        .collect()
}

/// Loads every vCPU's state. None of them may have run.
pub(super) fn load_all(
    vcpus: &[&Vcpu],
    states: &[VcpuState],
    tsc_khz: u32,
) -> Result<(), TransferError> {
    for (cpu, (vcpu, state)) in (0_u32..).zip(vcpus.iter().zip(states)) {
        load(vcpu, cpu, state)?;
    }
    load_tsc(vcpus, states)?;
    for (cpu, (vcpu, state)) in (0_u32..).zip(vcpus.iter().zip(states)) {
        load_deadline(vcpu, cpu, state, tsc_khz)?;
        // Tells the guest's watchdogs that the time gone is not theirs to complain of. `EINVAL` from a guest that
        // has no such clock.
        let _ = vcpu.fd.kvmclock_ctrl();
    }
    Ok(())
}

type Failed = (&'static str, errno::Error);

fn part(part: &'static str) -> impl FnOnce(errno::Error) -> Failed {
    move |source| (part, source)
}

fn take(vcpu: &Vcpu, msr_indices: &[u32], tsc_ahead: Option<u64>) -> Result<VcpuState, Failed> {
    let fd = &vcpu.fd;
    // First: asking makes KVM work off pending INIT and SIPI, which changes what is asked for after it.
    let mp_state = fd.get_mp_state().map_err(part("multi-processor state"))?;
    let regs = fd.get_regs().map_err(part("registers"))?;
    let sregs = fd.get_sregs().map_err(part("system registers"))?;
    let debug_regs = fd.get_debug_regs().map_err(part("debug registers"))?;
    let xcrs = fd.get_xcrs().map_err(part("extended control registers"))?;
    let xsave = vcpu.xsave().map_err(part("extended state"))?;
    let lapic = fd.get_lapic().map_err(part("local APIC"))?;
    let msrs = msr::read(fd, msr_indices).map_err(part("MSRs"))?;
    let tsc_deadline = msr::read_one(fd, msr::TSC_DEADLINE).map_err(part("MSRs"))?;
    let tsc = msr::read_one(fd, msr::TSC)
        .map_err(part("TSC"))?
        .unwrap_or(0);
    // Last: the others may raise events.
    let events = fd.get_vcpu_events().map_err(part("events"))?;
    Ok(VcpuState {
        mp_state,
        regs,
        sregs,
        debug_regs,
        xcrs,
        xsave,
        lapic,
        msrs,
        tsc,
        tsc_ahead,
        tsc_deadline,
        events,
    })
}

fn load(vcpu: &Vcpu, cpu: u32, state: &VcpuState) -> Result<(), TransferError> {
    load_parts(vcpu, state).map_err(|(part, source)| TransferError::Vcpu {
        verb: "take",
        part,
        cpu,
        source,
    })?;
    msr::write(&vcpu.fd, cpu, &state.msrs)?;
    // After the registers, which drop a pending exception.
    vcpu.fd
        .set_vcpu_events(&state.events)
        .map_err(|source| TransferError::Vcpu {
            verb: "take",
            part: "events",
            cpu,
            source,
        })
}

fn load_parts(vcpu: &Vcpu, state: &VcpuState) -> Result<(), Failed> {
    let fd = &vcpu.fd;
    fd.set_mp_state(state.mp_state)
        .map_err(part("multi-processor state"))?;
    fd.set_regs(&state.regs).map_err(part("registers"))?;
    fd.set_sregs(&state.sregs)
        .map_err(part("system registers"))?;
    vcpu.set_xsave(&state.xsave)
        .map_err(part("extended state"))?;
    fd.set_xcrs(&state.xcrs)
        .map_err(part("extended control registers"))?;
    fd.set_debug_regs(&state.debug_regs)
        .map_err(part("debug registers"))?;
    // After the system registers, which hold the APIC's base and may reset it; before the MSRs of its timer.
    fd.set_lapic(&state.lapic).map_err(part("local APIC"))
}

/// Lets the guest's TSC go on from where it was taken, with the same distances between vCPUs.
///
/// Written one by one, the counters would be apart by the time that takes, or brought together by KVM's guess that
/// writes within a second of each other are meant to be equal. So one is placed, and the others relative to it.
fn load_tsc(vcpus: &[&Vcpu], states: &[VcpuState]) -> Result<(), TransferError> {
    let (Some(first), Some(first_state)) = (vcpus.first(), states.first()) else {
        return Ok(());
    };
    let mut placed = None;
    for (cpu, (vcpu, state)) in (0_u32..).zip(vcpus.iter().zip(states)) {
        let failed = |source| TransferError::Vcpu {
            verb: "take",
            part: "TSC",
            cpu,
            source,
        };
        let (Some(ahead), Some(offset)) = (state.tsc_ahead, first.tsc_offset()) else {
            let entry = kvm_msr_entry {
                index: msr::TSC,
                data: state.tsc,
                ..Default::default()
            };
            msr::write(&vcpu.fd, cpu, &[entry])?;
            continue;
        };
        let base = match placed {
            Some(base) => base,
            None => {
                let now = msr::read_one(&first.fd, msr::TSC)
                    .map_err(failed)?
                    .unwrap_or(0);
                let base = offset.wrapping_add(first_state.tsc).wrapping_sub(now);
                placed = Some(base);
                base
            }
        };
        vcpu.set_tsc_offset(base.wrapping_add(ahead))
            .map_err(failed)?;
    }
    Ok(())
}

/// Arms the local APIC's deadline timer.
///
/// A timer that fired between the vCPU's last exit and the taking of its state reads as "not armed", and its
/// interrupt is in no part of the state. It is made to fire at once; one interrupt too many does a guest no harm,
/// one too few may leave it asleep for ever. (Firecracker does the same, `fix_zero_tsc_deadline_msr`. In the other
/// timer modes KVM fires by itself when a count of 0 is loaded.)
fn load_deadline(
    vcpu: &Vcpu,
    cpu: u32,
    state: &VcpuState,
    tsc_khz: u32,
) -> Result<(), TransferError> {
    let Some(deadline) = state.tsc_deadline else {
        return Ok(());
    };
    let failed = |source| TransferError::Vcpu {
        verb: "take",
        part: "TSC",
        cpu,
        source,
    };
    let now = msr::read_one(&vcpu.fd, msr::TSC)
        .map_err(failed)?
        .unwrap_or(0);
    let data = match deadline {
        0 if awaits_deadline(&state.lapic) => now,
        0 => 0,
        deadline => place_deadline(deadline, state.tsc, now, tsc_khz),
    };
    let entry = kvm_msr_entry {
        index: msr::TSC_DEADLINE,
        data,
        ..Default::default()
    };
    msr::write(&vcpu.fd, cpu, &[entry])
}

/// A deadline by the guest's TSC as it is `now`, from one by the TSC that read `taken` when the state was taken.
///
/// Nearly always the same: the TSC goes on. Some of KVM's back ends let the guest see the host's TSC and cannot move
/// it (they say yes and do nothing); there the deadline keeps its distance.
pub(super) fn place_deadline(deadline: u64, taken: u64, now: u64, tsc_khz: u32) -> u64 {
    let second = u64::from(tsc_khz) * 1000;
    let apart = now.wrapping_sub(taken);
    if apart.min(apart.wrapping_neg()) < second {
        return deadline;
    }
    now.wrapping_add(deadline.saturating_sub(taken)).max(1)
}

/// Whether the local APIC's timer is in deadline mode and not masked.
pub(super) fn awaits_deadline(lapic: &kvm_lapic_state) -> bool {
    const TIMER_ENTRY: usize = 0x320;
    const MASKED: u32 = 1 << 16;
    const MODE: u32 = 3 << 17;
    const MODE_DEADLINE: u32 = 2 << 17;
    let mut entry = [0; 4];
    for (byte, &register) in entry.iter_mut().zip(&lapic.regs[TIMER_ENTRY..]) {
        *byte = register as u8;
    }
    let entry = u32::from_le_bytes(entry);
    entry & MASKED == 0 && entry & MODE == MODE_DEADLINE
}
