//! The thread that runs a vCPU.

use std::sync::Mutex;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::VcpuExit;
use vmm_sys_util::errno;

use super::devices::Devices;
use super::exit::ExitReason;
use super::gate::{Gate, Order};
use super::glance::Glance;
use super::lock;
use super::sys::{ImmediateExit, Vcpu};

/// `EFLAGS.IF`.
const INTERRUPTS_ON: u64 = 1 << 9;

/// A vCPU between its thread, which holds it while it runs, and whoever reads its state while it doesn't.
pub(super) struct Slot {
    pub(super) cpu: u32,
    pub(super) vcpu: Mutex<Vcpu>,
    pub(super) immediate_exit: ImmediateExit,
    /// Who wants to know its registers while it runs.
    pub(super) glance: Glance,
}

impl Slot {
    pub(super) fn new(cpu: u32, vcpu: Vcpu) -> nix::Result<Self> {
        let immediate_exit = ImmediateExit::new(&vcpu.fd)?;
        Ok(Self {
            cpu,
            vcpu: Mutex::new(vcpu),
            immediate_exit,
            glance: Glance::default(),
        })
    }

    /// The thread: runs the guest whenever the gate lets it, until the machine stops. Gives why it stopped here, if
    /// it was this vCPU that made it stop.
    pub(super) fn run(&self, gate: &Gate, devices: &Devices) -> Option<ExitReason> {
        let clear = || self.immediate_exit.set(false);
        while gate.enter(clear) {
            let mut vcpu = lock(&self.vcpu);
            let end = self.run_until_called(&mut vcpu, gate, devices);
            // Before leaving: whoever waits for that takes the lock next.
            drop(vcpu);
            gate.leave();
            if end.is_some() {
                return end;
            }
        }
        None
    }

    fn run_until_called(
        &self,
        vcpu: &mut Vcpu,
        gate: &Gate,
        devices: &Devices,
    ) -> Option<ExitReason> {
        // A call before the entry was for this.
        self.glance.tell(vcpu);
        loop {
            match run_once(vcpu, self.cpu, devices) {
                Step::GoOn => {}
                Step::End(reason) => return Some(reason),
                Step::Interrupted => {
                    match gate.interrupted(self.cpu, || self.immediate_exit.set(false)) {
                        Order::Leave => return None,
                        Order::GoOn => {}
                        Order::Probe if gate.answer(self.cpu, sleeps_for_ever(vcpu)) => {
                            return Some(ExitReason::HaltedForEver);
                        }
                        Order::Probe => {}
                    }
                    // After `interrupted`, which takes back the call that this may be about.
                    self.glance.tell(vcpu);
                }
            }
        }
    }
}

enum Step {
    GoOn,
    Interrupted,
    End(ExitReason),
}

/// Runs the guest to its next exit and handles that.
fn run_once(vcpu: &mut Vcpu, cpu: u32, devices: &Devices) -> Step {
    let failed = |cause: String| Step::End(ExitReason::Failed { cpu, cause });
    match vcpu.fd.run() {
        Ok(VcpuExit::IoOut(port, data)) => {
            devices.port_out(port, data).map_or(Step::GoOn, Step::End)
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            devices.port_in(port, data);
            Step::GoOn
        }
        Ok(VcpuExit::MmioRead(_, data)) => {
            // An empty bus.
            data.fill(0xff);
            Step::GoOn
        }
        Ok(VcpuExit::MmioWrite(..)) => Step::GoOn,
        Ok(VcpuExit::Intr) => Step::Interrupted,
        Ok(VcpuExit::Shutdown) => Step::End(ExitReason::TripleFault { cpu }),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Step::End(ExitReason::PowerOff),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Step::End(ExitReason::Reset),
        Ok(VcpuExit::InternalError) => failed(describe_internal_error(vcpu)),
        Ok(VcpuExit::FailEntry(reason, _)) => failed(format!(
            "the CPU refuses to enter the guest (reason {reason:#x})"
        )),
        Ok(exit) => failed(format!(
            "KVM reports {exit:?}, which no machine of this kind causes"
        )),
        Err(error) => match error.errno() {
            nix::libc::EINTR => Step::Interrupted,
            nix::libc::EAGAIN => Step::GoOn,
            nix::libc::EFAULT => {
                failed("the guest touched memory that the host could not give".to_owned())
            }
            _ => failed(format!("KVM_RUN: {error}")),
        },
    }
}

fn describe_internal_error(vcpu: &mut Vcpu) -> String {
    /// `KVM_INTERNAL_ERROR_EMULATION`.
    const EMULATION: u32 = 1;
    let error = vcpu.internal_error();
    let what = match error.suberror {
        EMULATION => "KVM cannot emulate an instruction".to_owned(),
        other => format!("KVM internal error {other}"),
    };
    let place = vcpu
        .fd
        .get_regs()
        .map_or_else(|_| String::new(), |regs| format!(" at {:#x}", regs.rip));
    format!("{what}{place} ({:x?})", error.data)
}

/// Whether no interrupt can wake it: halted with interrupts off, or never started by another vCPU.
fn sleeps_for_ever(vcpu: &Vcpu) -> bool {
    let state = || -> Result<_, errno::Error> {
        Ok((vcpu.fd.get_mp_state()?.mp_state, vcpu.fd.get_regs()?.rflags))
    };
    match state() {
        Ok((KVM_MP_STATE_RUNNABLE, _)) | Err(_) => false,
        Ok((KVM_MP_STATE_HALTED, flags)) => flags & INTERRUPTS_ON == 0,
        Ok(_) => true,
    }
}
