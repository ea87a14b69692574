//! A look at the registers of a vCPU that runs: whoever wants one asks, calls the vCPU out of the guest, and its own thread
//! tells, since KVM gives registers to nobody else meanwhile.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use kvm_bindings::kvm_segment;
use vmm_sys_util::errno;

use super::lock;
use super::state::kernel_gs_base;
use super::sys::Vcpu;
use crate::x86;

type Answer = Result<x86::Vcpu, errno::Error>;

#[derive(Debug, Default)]
struct State {
    wanted: bool,
    answer: Option<Answer>,
}

/// See the module. One asker at a time.
#[derive(Debug, Default)]
pub(super) struct Glance {
    state: Mutex<State>,
    told: Condvar,
}

impl Glance {
    /// From now on the vCPU's thread is to tell. Call the vCPU after this.
    pub(super) fn ask(&self) {
        *lock(&self.state) = State {
            wanted: true,
            answer: None,
        };
    }

    /// The vCPU's thread is here and can tell.
    pub(super) fn tell(&self, vcpu: &Vcpu) {
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.wanted) {
            state.answer = Some(registers_of(vcpu));
            self.told.notify_all();
        }
    }

    /// What it told; `None` if it did not come in time.
    pub(super) fn wait(&self, time: Duration) -> Option<Answer> {
        let state = lock(&self.state);
        let silent = |state: &mut State| state.answer.is_none();
        let (mut state, _) = self
            .told
            .wait_timeout_while(state, time, silent)
            .unwrap_or_else(PoisonError::into_inner);
        state.wanted = false;
        state.answer.take()
    }
}

/// Those that point at memory, of a vCPU that is not in the guest.
pub(super) fn registers_of(vcpu: &Vcpu) -> Answer {
    let regs = vcpu.fd.get_regs()?;
    let sregs = vcpu.fd.get_sregs()?;
    let table = |base, limit: u16| x86::Segment {
        base,
        limit: u64::from(limit),
    };
    let segment = |segment: &kvm_segment| x86::Segment {
        base: segment.base,
        limit: u64::from(segment.limit),
    };
    Ok(x86::Vcpu {
        rip: regs.rip,
        rsp: regs.rsp,
        // The stack segment's level is the processor's (Intel SDM, volume 3, 5.5).
        privilege: sregs.ss.dpl,
        fs_base: sregs.fs.base,
        gs_base: sregs.gs.base,
        kernel_gs_base: kernel_gs_base(vcpu)?,
        gdt: table(sregs.gdt.base, sregs.gdt.limit),
        idt: table(sregs.idt.base, sregs.idt.limit),
        task: segment(&sregs.tr),
        cr0: sregs.cr0,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: sregs.efer,
    })
}
