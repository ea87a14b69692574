//! A machine from start to end.

mod error;
mod looks;
mod shared;
mod writes;

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use lazyvm_wire::{Backing, Layout};

use super::boot::{self, Payload};
use super::control::Status;
use super::control::server::ControlServer;
use super::exit::ExitReason;
use super::hardware::{Hardware, Hypervisor};
use super::memory::GuestRam;
use super::serial::SerialTarget;

pub use error::{AssembleError, BootError, OperationError};
pub(super) use shared::Shared;

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

/// A machine. It ends when this is dropped.
pub struct Machine {
    shared: Arc<Shared>,
    housekeeper: Option<JoinHandle<()>>,
    control: ControlServer,
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
        let shared = Arc::new(Shared::new(hardware, payload, serial)?);
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
            .map_err(|source| AssembleError::Step {
                step: "start the housekeeper's thread",
                source,
            })?;
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
        self.shared.wait()
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
        self.shared.set_memory_complete();
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
        self.shared.join();
        if self
            .housekeeper
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            tracing::error!("the housekeeper panicked");
        }
        self.control.close();
    }
}
