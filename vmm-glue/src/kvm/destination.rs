//! A machine that is being moved here.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use lazyvm_pager::port::{DestinationMachine, MachineError};
use lazyvm_pager::{InstallMode, LazyMemory};
use lazyvm_wire::{Layout, MachineOffer};

use super::compatibility::{Compatibility, CompatibilityError};
use super::hardware::{HardwareError, Hypervisor};
use super::machine::{AssembleError, Machine, OperationError};
use super::memory::{GuestRam, MemoryError};
use super::serial::{ConsoleStateError, SerialTarget};
use super::state::{self, DecodeError, TransferError};
use super::sys;

/// What the user of the destination decides; all else comes with the machine.
#[derive(Clone, Debug)]
pub struct DestinationConfig {
    /// Where the machine's serial output goes.
    pub serial: SerialTarget,
    /// Where its control socket is made.
    pub control: PathBuf,
    /// How pages are put into its memory.
    pub install: InstallMode,
}

/// A machine that can't be made here.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Called twice.
    #[error("a machine has been prepared already")]
    Twice,
    /// It does not fit this host.
    #[error("the machine cannot run on this host")]
    Compatibility(#[from] CompatibilityError),
    /// KVM or the host.
    #[error("cannot make the machine")]
    Hardware(#[from] HardwareError),
    /// Its memory.
    #[error("cannot make its memory")]
    Memory(#[from] MemoryError),
    /// Its memory, for the pager.
    #[error("its memory cannot be filled lazily")]
    LazyMemory(#[from] lazyvm_pager::memory::MemoryError),
    /// All around it.
    #[error("cannot set it up")]
    Assemble(#[from] AssembleError),
}

/// A state that can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadStateError {
    /// There is no machine yet.
    #[error("no machine has been prepared for this state")]
    NotPrepared,
    /// The bytes are no state.
    #[error("cannot read the machine's state")]
    Decode(#[from] DecodeError),
    /// It is another machine's.
    #[error(
        "the state is of another machine ({state}) than the one that was announced ({prepared})"
    )]
    Shape {
        /// What the state says.
        state: String,
        /// What was prepared.
        prepared: String,
    },
    /// KVM refused a part.
    #[error("cannot load the machine's state")]
    Transfer(#[from] TransferError),
    /// The console refused its part.
    #[error("cannot load the machine's state")]
    Console(#[from] ConsoleStateError),
}

/// The machine that a [`Destination`] makes, for whoever goes on with it after the move.
#[derive(Clone, Debug, Default)]
pub struct ArrivingMachine(Arc<OnceLock<Machine>>);

impl ArrivingMachine {
    /// The machine, once it is prepared. It ends with the last clone of this and the [`Destination`].
    pub fn get(&self) -> Option<&Machine> {
        self.0.get()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Destination {
    config: DestinationConfig,
    machine: ArrivingMachine,
}

impl Destination {
    /// Nothing is made yet.
    pub fn new(config: DestinationConfig) -> Self {
        Self {
            config,
            machine: ArrivingMachine::default(),
        }
    }

    /// Where the machine will be found. Its memory counts as incomplete until
    /// [`Machine::set_memory_complete`] is called, and it cannot be moved on before that.
    pub fn machine(&self) -> ArrivingMachine {
        self.machine.clone()
    }

    /// What [`DestinationMachine::prepare`] does.
    ///
    /// # Errors
    /// [`PrepareError`]; nothing is left behind.
    pub fn prepare_machine(
        &mut self,
        layout: &Layout,
        offer: &MachineOffer,
    ) -> Result<LazyMemory, PrepareError> {
        if self.machine.get().is_some() {
            return Err(PrepareError::Twice);
        }
        let needs = Compatibility::read(offer)?;
        let hypervisor = Hypervisor::open()?;
        needs.check(&hypervisor.host(needs.cpus)?)?;
        let ram = Arc::new(GuestRam::like(layout)?);
        let hardware = hypervisor.build(Arc::clone(&ram), needs)?;
        let machine = Machine::assemble(
            hardware,
            "moved here".to_owned(),
            &self.config.serial,
            self.config.control.clone(),
        )?;
        self.machine
            .0
            .set(machine)
            .map_err(|_| PrepareError::Twice)?;
        Ok(sys::lazy_memory(&ram, self.config.install)?)
    }

    /// What [`DestinationMachine::load`] does.
    ///
    /// # Errors
    /// [`LoadStateError`]; the machine is of no use then.
    pub fn load_state(&mut self, bytes: &[u8]) -> Result<(), LoadStateError> {
        let machine = self.machine.get().ok_or(LoadStateError::NotPrepared)?;
        let state = state::decode(bytes)?;
        machine.shared().check_shape(&state)?;
        machine.shared().load_state(&state)
    }
}

impl DestinationMachine for Destination {
    fn prepare(
        &mut self,
        layout: &Layout,
        offer: &MachineOffer,
    ) -> Result<LazyMemory, MachineError> {
        Ok(self.prepare_machine(layout, offer)?)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Ok(self.load_state(state)?)
    }

    fn start(&mut self) -> Result<(), MachineError> {
        let machine = self.machine.get().ok_or(OperationError::Incoming)?;
        Ok(machine.shared().start()?)
    }
}
