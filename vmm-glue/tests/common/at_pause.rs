//! A machine whose memory is kept as it is at the pause, for a test to compare with.

use std::sync::{Arc, Mutex};

use lazyvm_server::port::{DirtyTracker, MachineError, Scout, SourceMachine, SourceMemory};
use lazyvm_server::snapshot::Snapshot;
use lazyvm_wire::{Layout, MachineOffer};

use super::copy::{Copy, assert_same};

/// See the module.
pub struct AtPause<M> {
    machine: M,
    kept: Mutex<Vec<u8>>,
}

impl<M: SourceMachine> AtPause<M> {
    pub fn new(machine: M) -> Self {
        Self {
            machine,
            kept: Mutex::default(),
        }
    }

    /// That the snapshot has the memory of the last pause, byte for byte.
    pub fn assert_is_in(&self, snapshot: &Snapshot) {
        let mut bytes = Vec::new();
        for chunk in 0..lazyvm_server::snapshot::format::chunks(self.layout()) {
            bytes.extend(snapshot.chunk(chunk).unwrap());
        }
        assert_same(&self.kept.lock().unwrap(), &bytes);
    }
}

impl<M: SourceMachine> SourceMachine for AtPause<M> {
    fn layout(&self) -> &Layout {
        self.machine.layout()
    }

    fn offer(&self) -> MachineOffer {
        self.machine.offer()
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        self.machine.memory()
    }

    fn scout(&self) -> Option<Box<dyn Scout>> {
        self.machine.scout()
    }

    fn tracker(&self) -> Option<Box<dyn DirtyTracker>> {
        self.machine.tracker()
    }

    fn prepare_pause(&self) -> Result<(), MachineError> {
        self.machine.prepare_pause()
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        self.machine.pause()
    }

    /// It has stood still up to here.
    fn resume(&self) -> Result<(), MachineError> {
        *self.kept.lock().unwrap() = Copy::of(&self.machine).bytes;
        self.machine.resume()
    }

    fn release(&self) -> Result<(), MachineError> {
        self.machine.release()
    }
}
