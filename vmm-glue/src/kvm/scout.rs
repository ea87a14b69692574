//! Which pages a machine of another process needs first: from its registers, its page tables, and what it touches while it
//! is watched, all of it asked over the control socket.
//!
//! A watch drops the entries of the monitor's own page tables for the guest's memory, by the monitor itself. KVM's go with
//! them. The memory is a memfd's and shared, so its contents stay. What the guest uses afterwards is mapped again. This
//! monitor's devices have no rings in guest memory.

use std::path::PathBuf;
use std::sync::Arc;

use lazyvm_server::port::{Hints, MachineError, Scout, SourceMemory};
use lazyvm_wire::{Layout, PageRange};

use super::control::{ControlClient, ControlError};
use super::source::RemoteError;
use super::tracker::runs;
use crate::x86::{GuestMemory, Looks};

/// See the module. It has a conversation of its own.
pub(super) struct KvmScout {
    path: PathBuf,
    id: String,
    pages: u64,
    client: Option<ControlClient>,
    looks: Looks,
}

impl KvmScout {
    /// Of the machine `id` with the control socket `path` and this memory.
    pub(super) fn new(
        path: PathBuf,
        id: String,
        layout: &Layout,
        memory: Arc<dyn SourceMemory>,
    ) -> Self {
        Self {
            path,
            id,
            pages: layout.pages(),
            client: None,
            looks: Looks::new(GuestMemory::new(layout.clone(), memory)),
        }
    }

    /// The conversation, which is to be put back by who took it, unless it broke.
    fn client(&mut self) -> Result<ControlClient, MachineError> {
        if let Some(client) = self.client.take() {
            return Ok(client);
        }
        let mut client = ControlClient::connect(&self.path)?;
        if client.status()?.id != self.id {
            let path = self.path.clone();
            return Err(RemoteError::Replaced { path }.into());
        }
        Ok(client)
    }

    fn look_with(
        &mut self,
        look: impl FnOnce(&mut Looks, &mut ControlClient, u64) -> Result<Hints, MachineError>,
    ) -> Result<Hints, MachineError> {
        let mut client = self.client()?;
        let hints = look(&mut self.looks, &mut client, self.pages)?;
        self.client = Some(client);
        Ok(hints)
    }
}

fn touched(client: &mut ControlClient, pages: u64) -> Result<Vec<PageRange>, MachineError> {
    let bitmap = client.touched(pages)?;
    let mut touched = Vec::new();
    runs(&bitmap, pages, &mut |run| touched.push(run));
    Ok(touched)
}

impl Scout for KvmScout {
    fn watch(&mut self) -> Result<(), MachineError> {
        let mut client = self.client()?;
        match client.watch() {
            Ok(()) => self.looks.watch(),
            // An older kernel or an older monitor: registers and page tables may be had all the same.
            Err(ControlError::Refused(why)) => {
                tracing::debug!(why, "the machine's touches can't be watched");
            }
            Err(error) => return Err(error.into()),
        }
        self.client = Some(client);
        Ok(())
    }

    fn look(&mut self) -> Result<Hints, MachineError> {
        self.look_with(|looks, client, pages| {
            let vcpus = client.registers()?;
            looks.look(&vcpus, &mut || touched(client, pages))
        })
    }

    fn look_paused(&mut self) -> Result<Hints, MachineError> {
        self.look_with(|looks, client, pages| {
            let vcpus = client.registers()?;
            looks.look_paused(&vcpus, &mut || touched(client, pages))
        })
    }
}
