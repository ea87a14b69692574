//! What a machine's threads have in common, and what is done to it through that.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use lazyvm_wire::{Layout, MachineOffer};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::super::compatibility::{self, Compatibility};
use super::super::control::{RunState, Status};
use super::super::destination::LoadStateError;
use super::super::devices::Devices;
use super::super::exit::ExitReason;
use super::super::gate::{Gate, Phase};
use super::super::hardware::Hardware;
use super::super::lock;
use super::super::memory::GuestRam;
use super::super::serial::{self, Console, SerialTarget};
use super::super::state::{self, MachineState, Shape};
use super::super::sys::{GuestVm, Vcpu};
use super::super::vcpu::Slot;
use super::writes::Writes;
use super::{AssembleError, OperationError};

/// How often held-back console output is written out.
const HOUSEKEEPING: Duration = Duration::from_millis(100);

/// Every so many of those, the vCPUs are asked whether anything can wake them.
const PROBE_EVERY: u32 = 10;

/// What the machine's threads have in common.
pub(in crate::kvm) struct Shared {
    /// Tells this machine, in this process, from any other.
    id: String,
    payload: Mutex<String>,
    offer: MachineOffer,
    pub(super) vm: Arc<GuestVm>,
    needs: Compatibility,
    msr_indices: Vec<u32>,
    pub(super) slots: Vec<Slot>,
    pub(super) gate: Gate,
    devices: Devices,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Held while the machine is started, paused, resumed or its state taken: one at a time.
    pub(super) operation: Mutex<()>,
    memory_complete: AtomicBool,
    /// Its state was given away, and it has not been resumed since.
    handed_out: AtomicBool,
    pub(super) writes: Mutex<Writes>,
}

impl Shared {
    /// Puts what a machine needs around its hardware.
    pub(in crate::kvm) fn new(
        hardware: Hardware,
        payload: String,
        serial: &SerialTarget,
    ) -> Result<Self, AssembleError> {
        let step = |step| move |source| AssembleError::Step { step, source };
        let kvm_step = |step| {
            move |error: errno::Error| AssembleError::Step {
                step,
                source: error.into(),
            }
        };
        register_signal_handler(SIGRTMIN(), ignore_signal)
            .map_err(kvm_step("register the signal that calls vCPUs"))?;
        let Hardware {
            vm,
            vcpus,
            needs,
            msr_indices,
        } = hardware;
        let irq = EventFd::new(nix::libc::EFD_NONBLOCK | nix::libc::EFD_CLOEXEC)
            .map_err(step("make the serial console's interrupt"))?;
        vm.fd()
            .register_irqfd(&irq, serial::IRQ)
            .map_err(kvm_step("register the serial console's interrupt"))?;
        let console = Console::new(serial, irq).map_err(|source| AssembleError::Console {
            target: serial.clone(),
            source,
        })?;
        let slots = (0_u32..)
            .zip(vcpus)
            .map(|(cpu, vcpu)| Slot::new(cpu, vcpu))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|errno| AssembleError::Step {
                step: "map a vCPU",
                source: errno.into(),
            })?;
        Ok(Self {
            id: machine_id(),
            payload: Mutex::new(payload),
            offer: needs.offer()?,
            vm,
            gate: Gate::new(needs.cpus, Phase::Incoming),
            needs,
            msr_indices,
            slots,
            devices: Devices::new(console),
            threads: Mutex::new(Vec::new()),
            operation: Mutex::new(()),
            memory_complete: AtomicBool::new(false),
            handed_out: AtomicBool::new(false),
            writes: Mutex::default(),
        })
    }

    /// Starts the vCPUs' threads. Once.
    pub(in crate::kvm) fn start(self: &Arc<Self>) -> Result<(), OperationError> {
        let _operation = lock(&self.operation);
        match self.gate.phase() {
            Phase::Incoming => {}
            Phase::Stopped(reason) => return Err(OperationError::Stopped(reason)),
            Phase::Running | Phase::Paused => return Err(OperationError::Started),
        }
        let mut threads = Vec::with_capacity(self.slots.len());
        for cpu in 0..self.slots.len() {
            let shared = Arc::clone(self);
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{cpu}"))
                .spawn(move || shared.run_vcpu(cpu))
                .map_err(OperationError::Thread);
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    // Those that are there wait at the gate, and go home.
                    lock(&self.threads).append(&mut threads);
                    self.stop(ExitReason::Quit);
                    return Err(error);
                }
            }
        }
        lock(&self.threads).append(&mut threads);
        self.gate
            .change(Phase::Running, |phase| *phase == Phase::Incoming, || {});
        Ok(())
    }

    /// Waits until the machine has stopped and no vCPU is in the guest.
    pub(in crate::kvm) fn wait(&self) -> ExitReason {
        let reason = self.gate.wait_stopped();
        self.devices.console().flush();
        reason
    }

    /// Waits for the vCPUs' threads of a machine that has stopped.
    pub(in crate::kvm) fn join(&self) {
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            if thread.join().is_err() {
                tracing::error!("a vCPU's thread panicked");
            }
        }
        self.devices.console().flush();
    }

    pub(in crate::kvm) fn set_memory_complete(&self) {
        self.memory_complete.store(true, Ordering::Release);
    }

    fn run_vcpu(&self, cpu: usize) {
        let slot = &self.slots[cpu];
        if let Some(reason) = slot.run(&self.gate, &self.devices) {
            self.stop(reason);
        }
    }

    /// Gets every vCPU out of the guest. Under the gate's lock; see there.
    pub(super) fn call_vcpus(&self) {
        for slot in &self.slots {
            slot.immediate_exit.set(true);
        }
        for thread in &*lock(&self.threads) {
            // A thread that ended needs no call.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Ends the machine; the first reason given stays.
    pub(in crate::kvm) fn stop(&self, reason: ExitReason) {
        let running = |phase: &Phase| !matches!(phase, Phase::Stopped(_));
        let told = reason.to_string();
        let before = self
            .gate
            .change(Phase::Stopped(reason), running, || self.call_vcpus());
        if running(&before) {
            tracing::info!(reason = told, "the machine ended");
        }
    }

    pub(in crate::kvm) fn pause(&self) -> Result<(), OperationError> {
        let _operation = lock(&self.operation);
        self.pause_now().map(|_| ())
    }

    /// Gives whether the machine ran.
    fn pause_now(&self) -> Result<bool, OperationError> {
        let running = |phase: &Phase| *phase == Phase::Running;
        let before = self
            .gate
            .change(Phase::Paused, running, || self.call_vcpus());
        match before {
            Phase::Incoming => return Err(OperationError::Incoming),
            Phase::Stopped(reason) => return Err(OperationError::Stopped(reason)),
            Phase::Running | Phase::Paused => {}
        }
        self.gate.wait_empty();
        self.devices.console().flush();
        // The guest may have ended itself meanwhile.
        match self.gate.phase() {
            Phase::Stopped(reason) => Err(OperationError::Stopped(reason)),
            _ => Ok(before == Phase::Running),
        }
    }

    pub(in crate::kvm) fn resume(&self, force: bool) -> Result<(), OperationError> {
        let _operation = lock(&self.operation);
        if self.gate.phase() == Phase::Paused && self.handed_out.load(Ordering::Acquire) && !force {
            return Err(OperationError::HandedOut);
        }
        self.resume_now()
    }

    fn resume_now(&self) -> Result<(), OperationError> {
        if self.gate.phase() == Phase::Paused {
            for slot in &self.slots {
                // Keeps the guest's watchdogs quiet about the time gone; `EINVAL` from a guest without such a clock.
                let _ = lock(&slot.vcpu).fd.kvmclock_ctrl();
            }
        }
        match self
            .gate
            .change(Phase::Running, |phase| *phase == Phase::Paused, || {})
        {
            Phase::Incoming => Err(OperationError::Incoming),
            Phase::Stopped(reason) => Err(OperationError::Stopped(reason)),
            Phase::Running => Ok(()),
            Phase::Paused => {
                self.handed_out.store(false, Ordering::Release);
                Ok(())
            }
        }
    }

    pub(in crate::kvm) fn take_state(&self) -> Result<Vec<u8>, OperationError> {
        let _operation = lock(&self.operation);
        self.check_movable()?;
        let ran = self.pause_now()?;
        let taken = self.read_state().and_then(|state| Ok(state.encode()?));
        match &taken {
            Ok(_) => self.handed_out.store(true, Ordering::Release),
            Err(_) if ran => self.resume_now()?,
            Err(_) => {}
        }
        taken
    }

    /// The state of a machine none of whose vCPUs runs.
    pub(in crate::kvm) fn read_state(&self) -> Result<MachineState, OperationError> {
        let vcpus: Vec<_> = self.slots.iter().map(|slot| lock(&slot.vcpu)).collect();
        let vcpus: Vec<&Vcpu> = vcpus.iter().map(|vcpu| &**vcpu).collect();
        let console = self.devices.console().state();
        let shape = Shape {
            layout: self.ram().layout().clone(),
            payload: lock(&self.payload).clone(),
        };
        let needs = self.needs.clone();
        Ok(state::take(
            &self.vm,
            &vcpus,
            &self.msr_indices,
            shape,
            needs,
            console,
        )?)
    }

    /// Ends a machine that runs elsewhere now.
    pub(in crate::kvm) fn release(&self) -> Result<(), OperationError> {
        let _operation = lock(&self.operation);
        match self.gate.phase() {
            Phase::Paused => {
                self.stop(ExitReason::Released);
                Ok(())
            }
            Phase::Stopped(ExitReason::Released) => Ok(()),
            Phase::Stopped(reason) => Err(OperationError::Stopped(reason)),
            Phase::Incoming => Err(OperationError::Incoming),
            Phase::Running => Err(OperationError::NotPaused),
        }
    }

    /// Whether all of it is here.
    pub(in crate::kvm) fn check_movable(&self) -> Result<(), OperationError> {
        match self.gate.phase() {
            Phase::Incoming => Err(OperationError::Incoming),
            Phase::Stopped(reason) => Err(OperationError::Stopped(reason)),
            _ if !self.memory_complete.load(Ordering::Acquire) => {
                Err(OperationError::MemoryArriving)
            }
            _ => Ok(()),
        }
    }

    pub(in crate::kvm) fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    pub(in crate::kvm) fn offer(&self) -> &MachineOffer {
        &self.offer
    }

    pub(in crate::kvm) fn id(&self) -> &str {
        &self.id
    }

    pub(in crate::kvm) fn status(&self) -> Status {
        let state = match self.gate.phase() {
            Phase::Incoming => RunState::Incoming,
            Phase::Running => RunState::Running,
            Phase::Paused => RunState::Paused,
            Phase::Stopped(_) => RunState::Stopped,
        };
        let console = self.devices.console().report();
        Status {
            id: self.id.clone(),
            kind: compatibility::KIND.to_owned(),
            state,
            payload: lock(&self.payload).clone(),
            cpus: self.needs.cpus,
            memory_bytes: self.ram().layout().bytes(),
            memory_complete: self.memory_complete.load(Ordering::Acquire),
            handed_out: self.handed_out.load(Ordering::Acquire),
            pid: std::process::id(),
            serial_bytes: console.bytes,
            serial_lines: console.lines,
            serial_last_line: console.last_line,
        }
    }

    pub(in crate::kvm) fn keep_house(&self) {
        for round in 1_u32.. {
            if self.gate.wait_stopped_for(HOUSEKEEPING) {
                return;
            }
            self.devices.console().flush();
            if round % PROBE_EVERY == 0 {
                self.gate.ask(|| self.call_vcpus());
            }
        }
    }

    /// Whether a state is of a machine like this one.
    pub(in crate::kvm) fn check_shape(&self, state: &MachineState) -> Result<(), LoadStateError> {
        let describe = |needs: &Compatibility, layout: &Layout| {
            let (cpus, bytes) = (needs.cpus, layout.bytes());
            let regions = layout.regions().len();
            format!("{cpus} vCPUs and {bytes} bytes of memory in {regions} regions")
        };
        let layout = self.ram().layout();
        if state.needs != self.needs || state.shape.layout != *layout {
            return Err(LoadStateError::Shape {
                state: describe(&state.needs, &state.shape.layout),
                prepared: describe(&self.needs, layout),
            });
        }
        Ok(())
    }

    /// Loads a state into the machine before its start.
    pub(in crate::kvm) fn load_state(&self, state: &MachineState) -> Result<(), LoadStateError> {
        let _operation = lock(&self.operation);
        let vcpus: Vec<_> = self.slots.iter().map(|slot| lock(&slot.vcpu)).collect();
        let vcpus: Vec<&Vcpu> = vcpus.iter().map(|vcpu| &**vcpu).collect();
        state::load(&self.vm, &vcpus, state)?;
        self.devices.console().load(&state.console)?;
        lock(&self.payload).clone_from(&state.shape.payload);
        Ok(())
    }
}

/// The signal only has to interrupt `KVM_RUN`.
extern "C" fn ignore_signal(
    _: nix::libc::c_int,
    _: *mut nix::libc::siginfo_t,
    _: *mut nix::libc::c_void,
) {
}

/// A random number from the kernel, or, without `/proc`, one that is at least this process's own.
fn machine_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid").map_or_else(
        |_| format!("pid-{}", std::process::id()),
        |id| id.trim().to_owned(),
    )
}
