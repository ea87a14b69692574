//! A machine from start to end.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use lazyvm_wire::{Backing, Layout, MachineOffer};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::boot::{self, LoadError, Payload};
use super::compatibility::{self, Compatibility};
use super::control::server::ControlServer;
use super::control::{RunState, Status};
use super::destination::LoadStateError;
use super::devices::Devices;
use super::exit::ExitReason;
use super::gate::{Gate, Phase};
use super::hardware::{Hardware, HardwareError, Hypervisor};
use super::lock;
use super::memory::{GuestRam, MemoryError};
use super::serial::{self, Console, SerialTarget};
use super::state::{self, MachineState, Shape, TransferError};
use super::sys::{GuestVm, Vcpu};
use super::vcpu::Slot;

/// How often held-back console output is written out.
const HOUSEKEEPING: Duration = Duration::from_millis(100);

/// Every so many of those, the vCPUs are asked whether anything can wake them.
const PROBE_EVERY: u32 = 10;

/// What `lazyvm run` starts.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What runs in it.
    pub payload: Payload,
    /// Guest memory, in bytes: whole pages of `backing`, at least [`super::MEMORY_MIN`].
    pub memory_bytes: u64,
    /// What backs the memory on this host.
    pub backing: Backing,
    /// vCPUs.
    pub cpus: u32,
    /// Where its serial output goes.
    pub serial: SerialTarget,
    /// Where its control socket is made.
    pub control: PathBuf,
}

/// A machine that can't be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// KVM or the host.
    #[error("cannot make the machine")]
    Hardware(#[from] HardwareError),
    /// Its memory.
    #[error("cannot make its memory")]
    Memory(#[from] MemoryError),
    /// What is to run in it.
    #[error("cannot load its payload")]
    Load(#[from] LoadError),
    /// All around it.
    #[error("cannot set it up")]
    Assemble(#[from] AssembleError),
}

/// What stands around a machine's hardware can't be made.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// The serial output's file.
    #[error("cannot open the serial console's output {target:?}")]
    Console {
        /// Where it was to go.
        target: SerialTarget,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The control socket.
    #[error("cannot make the control socket {}", path.display())]
    Control {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: super::control::BindError,
    },
    /// The description of its needs.
    #[error("cannot write down what the machine needs")]
    Offer(#[from] postcard::Error),
    /// Interrupt lines, signals, threads.
    #[error("cannot {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// Why it could not.
        #[source]
        source: io::Error,
    },
}

/// Something that the machine can't do now.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// It has not started here yet.
    #[error("the machine has not arrived yet: it has no state")]
    Incoming,
    /// It was started before.
    #[error("the machine has been started already")]
    Started,
    /// It is no more.
    #[error("the machine has ended: {0}")]
    Stopped(ExitReason),
    /// Not all its memory is here.
    #[error("the machine's memory is still arriving; it can be moved on once that is complete")]
    MemoryArriving,
    /// It may run elsewhere.
    #[error(
        "the machine's state was handed out for a move, so it may be running elsewhere; resuming it here too would \
         give two of it. If it is certain that it does not run elsewhere, resume it by force"
    )]
    HandedOut,
    /// It runs, so this would cut it short.
    #[error("the machine is running; only a paused one can be released")]
    NotPaused,
    /// KVM refused.
    #[error("cannot take the machine's state")]
    Transfer(#[from] TransferError),
    /// The state can't be written.
    #[error("cannot encode the machine's state")]
    Encode(#[from] postcard::Error),
    /// A thread can't be made.
    #[error("cannot start a vCPU's thread")]
    Thread(#[source] io::Error),
}

/// A machine. It ends when this is dropped.
pub struct Machine {
    shared: Arc<Shared>,
    housekeeper: Option<JoinHandle<()>>,
    control: ControlServer,
}

/// What the machine's threads have in common.
pub(super) struct Shared {
    /// Tells this machine, in this process, from any other.
    id: String,
    payload: Mutex<String>,
    offer: MachineOffer,
    vm: Arc<GuestVm>,
    needs: Compatibility,
    msr_indices: Vec<u32>,
    slots: Vec<Slot>,
    gate: Gate,
    devices: Devices,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Held while the machine is started, paused, resumed or its state taken: one at a time.
    operation: Mutex<()>,
    memory_complete: AtomicBool,
    /// Its state was given away, and it has not been resumed since.
    handed_out: AtomicBool,
}

impl Machine {
    /// Makes a machine and starts it.
    ///
    /// # Errors
    /// [`BootError`]; nothing is left behind.
    pub fn boot(config: &MachineConfig) -> Result<Self, BootError> {
        let hypervisor = Hypervisor::open()?;
        let needs = hypervisor.host(config.cpus)?.has;
        let ram = Arc::new(GuestRam::new(config.memory_bytes, config.backing)?);
        let hardware = hypervisor.build(ram, needs)?;
        boot::load(&hardware, &config.payload)?;
        let machine = Self::assemble(
            hardware,
            config.payload.name(),
            &config.serial,
            config.control.clone(),
        )?;
        machine.set_memory_complete();
        machine
            .shared
            .start()
            .map_err(|error| AssembleError::Step {
                step: "start the machine",
                source: io::Error::other(error),
            })?;
        Ok(machine)
    }

    /// Puts everything around the hardware, but starts nothing.
    pub(super) fn assemble(
        hardware: Hardware,
        payload: String,
        serial: &SerialTarget,
        control: PathBuf,
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
        let shared = Arc::new(Shared {
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
        });
        let control = ControlServer::bind(&control, Arc::clone(&shared)).map_err(|source| {
            AssembleError::Control {
                path: control.clone(),
                source,
            }
        })?;
        let housekeeper = std::thread::Builder::new()
            .name("housekeeper".to_owned())
            .spawn({
                let shared = Arc::clone(&shared);
                move || shared.keep_house()
            })
            .map_err(step("start the housekeeper's thread"))?;
        Ok(Self {
            shared,
            housekeeper: Some(housekeeper),
            control,
        })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Waits until the machine ends.
    pub fn wait(&self) -> ExitReason {
        self.shared.gate.wait_stopped()
    }

    /// Ends the machine, wherever it is.
    pub fn quit(&self) {
        self.shared.stop(ExitReason::Quit);
    }

    /// Stops every vCPU, whatever it is doing. No effect on a paused machine.
    ///
    /// # Errors
    /// [`OperationError::Incoming`], [`OperationError::Stopped`].
    pub fn pause(&self) -> Result<(), OperationError> {
        self.shared.pause()
    }

    /// Lets a paused machine run on. No effect on a running one.
    ///
    /// # Errors
    /// As for [`Machine::pause`]; and [`OperationError::HandedOut`], unless by `force`.
    pub fn resume(&self, force: bool) -> Result<(), OperationError> {
        self.shared.resume(force)
    }

    /// Pauses the machine and takes its state. On failure it runs on, if it ran before.
    ///
    /// # Errors
    /// As for [`Machine::pause`]; [`OperationError::MemoryArriving`]; [`OperationError::Transfer`].
    pub fn take_state(&self) -> Result<Vec<u8>, OperationError> {
        self.shared.take_state()
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        self.shared.status()
    }

    /// The file behind its memory: byte `n` of the image is byte `n` of the file. Whoever writes to it under a running
    /// guest does what a device would do.
    pub fn memory_file(&self) -> &Arc<File> {
        self.shared.ram().file()
    }

    /// How its memory lies.
    pub fn layout(&self) -> &Layout {
        self.shared.ram().layout()
    }

    /// Says that all its memory is here, so that it can be moved on.
    pub fn set_memory_complete(&self) {
        self.shared.memory_complete.store(true, Ordering::Release);
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Machine").field(&self.status()).finish()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.stop(ExitReason::Quit);
        let threads = std::mem::take(&mut *lock(&self.shared.threads));
        for thread in threads.into_iter().chain(self.housekeeper.take()) {
            if thread.join().is_err() {
                tracing::error!("a thread of the machine panicked");
            }
        }
        self.shared.devices.console().flush();
        self.control.close();
    }
}

impl Shared {
    /// Starts the vCPUs' threads. Once.
    pub(super) fn start(self: &Arc<Self>) -> Result<(), OperationError> {
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

    fn run_vcpu(&self, cpu: usize) {
        let slot = &self.slots[cpu];
        if let Some(reason) = slot.run(&self.gate, &self.devices) {
            self.stop(reason);
        }
    }

    /// Gets every vCPU out of the guest. Under the gate's lock; see there.
    fn call_vcpus(&self) {
        for slot in &self.slots {
            slot.immediate_exit.set(true);
        }
        for thread in &*lock(&self.threads) {
            // A thread that ended needs no call.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Ends the machine; the first reason given stays.
    pub(super) fn stop(&self, reason: ExitReason) {
        let running = |phase: &Phase| !matches!(phase, Phase::Stopped(_));
        let told = reason.to_string();
        let before = self
            .gate
            .change(Phase::Stopped(reason), running, || self.call_vcpus());
        if running(&before) {
            tracing::info!(reason = told, "the machine ended");
        }
    }

    pub(super) fn pause(&self) -> Result<(), OperationError> {
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

    pub(super) fn resume(&self, force: bool) -> Result<(), OperationError> {
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

    pub(super) fn take_state(&self) -> Result<Vec<u8>, OperationError> {
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
    pub(super) fn read_state(&self) -> Result<MachineState, OperationError> {
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
    pub(super) fn release(&self) -> Result<(), OperationError> {
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
    pub(super) fn check_movable(&self) -> Result<(), OperationError> {
        match self.gate.phase() {
            Phase::Incoming => Err(OperationError::Incoming),
            Phase::Stopped(reason) => Err(OperationError::Stopped(reason)),
            _ if !self.memory_complete.load(Ordering::Acquire) => {
                Err(OperationError::MemoryArriving)
            }
            _ => Ok(()),
        }
    }

    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        self.vm.ram()
    }

    pub(super) fn offer(&self) -> &MachineOffer {
        &self.offer
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn status(&self) -> Status {
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

    fn keep_house(&self) {
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
    pub(super) fn check_shape(&self, state: &MachineState) -> Result<(), LoadStateError> {
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
    pub(super) fn load_state(&self, state: &MachineState) -> Result<(), LoadStateError> {
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
