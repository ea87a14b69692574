//! A QEMU that runs, as the source of a move.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lazyvm_server::port::{
    DirtyTracker, MachineError, Scout, SourceMachine, SourceMemory, TouchRecorder,
};
use lazyvm_wire::{Backing, Gpa, Layout, MachineOffer};
use serde_json::{Value, json};

use super::memory::{self, MemoryError, RamRegion};
use super::offer::Offer;
use super::qmp::{Qmp, QmpError};
use super::ram::SharedRam;
use super::recorder::QemuRecorder;
use super::scout::QemuScout;
use super::tracker::QemuTracker;
use super::transfer::{self, Changed, TransferError};
use crate::attach::{AttachError, Process};
use crate::record::{Piece, Recorder};

/// How long a QEMU that was told to quit may take.
const QUIT_WITHIN: u16 = 10_000;

/// How long a VM may take to be running after `cont`.
const RUN_WITHIN: Duration = Duration::from_secs(10);

/// A QEMU that can't be moved. It has not been touched.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The conversation.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Its process.
    #[error(transparent)]
    Process(#[from] AttachError),
    /// Its RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its state.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// The socket's other end is not told.
    #[error("can't tell which process {} belongs to", path.display())]
    Peer {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It stands still, or never ran.
    #[error(
        "the VM is {0}, and only one that runs can be moved; let it run with the QMP command cont"
    )]
    NotRunning(String),
    /// A migration is under way.
    #[error(
        "a migration of this VM is under way already; wait for its end or cancel it with migrate_cancel"
    )]
    Migrating,
    /// Something in it can't be moved.
    #[error("QEMU can't migrate this VM: {0}")]
    Blocked(String),
    /// Others use the RAM.
    #[error(
        "process {pid} has this VM's RAM mapped as well, and would not wait for pages that are still to come: vhost-user \
         devices (virtiofsd, DPDK) can't be moved; remove them from the VM"
    )]
    OtherUser {
        /// Which.
        pid: i32,
    },
    /// It did not run on.
    #[error("the VM is {0} after cont; look at QEMU's own messages")]
    DidNotRun(String),
}

/// See the module. Dropping it leaves the VM as it is.
#[derive(Debug)]
pub struct Source {
    process: Arc<Process>,
    layout: Layout,
    offer: MachineOffer,
    regions: Arc<[RamRegion]>,
    memory: Arc<SharedRam>,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub qmp: Qmp,
    changed: Option<Changed>,
    /// What the state is to come through.
    socket: Option<UnixStream>,
}

impl Source {
    /// The QEMU with this QMP socket. Everything that would keep its VM from being moved is told here.
    ///
    /// # Errors
    /// [`SourceError`]. The VM runs on undisturbed.
    pub fn connect(path: &Path) -> Result<Self, SourceError> {
        let mut qmp = Qmp::connect(path)?;
        let pid = qmp.peer().map_err(|source| SourceError::Peer {
            path: path.to_owned(),
            source,
        })?;
        let process = Process::open(pid)?;
        check_movable(&mut qmp)?;
        transfer::check(&mut qmp)?;
        let regions = memory::find(&mut qmp, &process, false)?;
        memory::check_named(&mut qmp)?;
        for region in &regions {
            let others = memory::users(&region.file, &[pid]);
            if let Some(&pid) = others.first() {
                return Err(SourceError::OtherUser { pid });
            }
        }
        let layout = memory::layout(&regions).map_err(MemoryError::from)?;
        let offer = Offer::of(&mut qmp)?;
        tracing::info!(
            pid,
            qemu = offer.version,
            machine = offer.machine,
            "found the VM"
        );
        Ok(Self {
            process: Arc::new(process),
            layout,
            offer: offer.encode(),
            memory: Arc::new(SharedRam::new(&regions)),
            regions: regions.into(),
            inner: Arc::new(Mutex::new(Inner {
                qmp,
                changed: None,
                socket: None,
            })),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// While the VM runs: QEMU answers slowly then.
    fn prepare(&mut self) -> Result<(), SourceError> {
        check_movable(&mut self.qmp)?;
        self.changed = Some(transfer::configure(&mut self.qmp)?);
        self.socket = Some(transfer::open(&mut self.qmp)?);
        Ok(())
    }

    /// Whether the VM has a balloon or memory that it can unplug.
    fn may_give_memory_back(&mut self) -> bool {
        let balloon = self.qmp.run("query-balloon", json!({}));
        let devices = self.qmp.run("query-memory-devices", json!({}));
        let none = matches!(balloon, Err(QmpError::Refused { .. }))
            && devices.is_ok_and(|devices| devices.as_array().is_some_and(Vec::is_empty));
        !none
    }

    fn stop_and_save(&mut self) -> Result<Vec<u8>, SourceError> {
        let mut socket = match self.socket.take() {
            Some(socket) => socket,
            None => transfer::open(&mut self.qmp)?,
        };
        let start = Instant::now();
        self.qmp.run("stop", json!({}))?;
        let stopped = start.elapsed();
        let state = transfer::save(&mut self.qmp, &mut socket)?;
        tracing::info!(
            stop_us = stopped.as_micros() as u64,
            pause_us = start.elapsed().as_micros() as u64,
            bytes = state.len(),
            "the VM is paused, and its device state is out"
        );
        Ok(state)
    }

    /// What is left of the settings harms nobody.
    fn put_back(&mut self) {
        if let Some(changed) = self.changed.take()
            && let Err(error) = changed.undo(&mut self.qmp)
        {
            tracing::warn!(%error, "QEMU's migration settings are not as they were");
        }
    }

    /// `cont` is said even where the migration does not end: QEMU does one command after the other, so that it undoes a
    /// `stop` that was given up and comes late, and refuses where the VM must not run.
    fn run_on(&mut self) -> Result<(), SourceError> {
        let cancelled = transfer::cancel(&mut self.qmp);
        if cancelled.is_ok() {
            self.put_back();
        }
        let ran = run_vm(&mut self.qmp);
        cancelled?;
        ran
    }
}

fn run_vm(qmp: &mut Qmp) -> Result<(), SourceError> {
    let deadline = Instant::now() + RUN_WITHIN;
    qmp.run("cont", json!({}))?;
    loop {
        let status = qmp.status()?;
        if status == "running" {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(SourceError::DidNotRun(status));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn check_movable(qmp: &mut Qmp) -> Result<(), SourceError> {
    let status = qmp.status()?;
    if status != "running" {
        return Err(SourceError::NotRunning(status));
    }
    let answer = qmp.run("query-migrate", json!({}))?;
    if transfer::is_under_way(&answer) {
        return Err(SourceError::Migrating);
    }
    // Told since QEMU 6.0. Before, the migration itself fails, and the VM runs on.
    let reasons = answer.get("blocked-reasons").and_then(Value::as_array);
    let reasons: Vec<_> = reasons
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if !reasons.is_empty() {
        return Err(SourceError::Blocked(reasons.join("; ")));
    }
    Ok(())
}

/// Tells QEMU to end. One that is silent may still be there, and holds its RAM: that is no success.
fn quit(qmp: &mut Qmp) -> Result<(), QmpError> {
    match qmp.run("quit", json!({})) {
        Ok(_) | Err(QmpError::Lost { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

impl SourceMachine for Source {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn offer(&self) -> MachineOffer {
        self.offer.clone()
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        Arc::clone(&self.memory) as _
    }

    fn scout(&self) -> Option<Box<dyn Scout>> {
        Some(Box::new(QemuScout::new(
            Arc::clone(&self.process),
            Arc::clone(&self.inner),
            Arc::clone(&self.regions),
            &self.layout,
            Arc::clone(&self.memory),
        )))
    }

    fn recorder(&self) -> Option<Box<dyn TouchRecorder>> {
        let small = self
            .regions
            .iter()
            .filter(|region| region.backing == Backing::Small);
        let pieces = small.filter_map(|region| {
            Some(Piece {
                host: region.host,
                bytes: region.bytes,
                first: self.layout.page_of(Gpa(region.gpa))?,
            })
        });
        match Recorder::new(&self.process, pieces.collect()) {
            Ok(recorder) => Some(Box::new(QemuRecorder::new(
                recorder,
                Arc::clone(&self.inner),
            ))),
            Err(error) => {
                tracing::debug!(%error, "QEMU's touches can't be recorded");
                None
            }
        }
    }

    fn tracker(&self) -> Option<Box<dyn DirtyTracker>> {
        let (process, regions) = (Arc::clone(&self.process), Arc::clone(&self.regions));
        let tracker = QemuTracker::new(process, regions, &self.layout, Arc::clone(&self.memory));
        if self.inner().may_give_memory_back() {
            return Some(Box::new(tracker.with_holes()));
        }
        Some(Box::new(tracker))
    }

    fn prepare_pause(&self) -> Result<(), MachineError> {
        let mut inner = self.inner();
        inner.prepare().inspect_err(|_| inner.put_back())?;
        Ok(self.memory.look_ahead()?)
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        let mut inner = self.inner();
        inner.stop_and_save().map_err(|error| {
            if let Err(second) = inner.run_on() {
                tracing::error!(error = %second, "the VM could not be let run on");
            }
            error.into()
        })
    }

    fn resume(&self) -> Result<(), MachineError> {
        Ok(self.inner().run_on()?)
    }

    /// A QEMU that is gone already is what this is for.
    fn release(&self) -> Result<(), MachineError> {
        quit(&mut self.inner().qmp)?;
        if !self.process.wait(QUIT_WITHIN.into()) {
            tracing::warn!(
                pid = self.process.pid(),
                "QEMU has been told to quit and is still there"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::peer::{Peer, conversation};

    #[test]
    fn a_qemu_that_is_gone_is_released_and_one_that_is_silent_is_not() {
        let goes = |_: &mut Peer, _: &Value| false;
        conversation(goes, |mut qmp| quit(&mut qmp).unwrap());
        let is_silent = |_: &mut Peer, _: &Value| true;
        conversation(is_silent, |mut qmp| {
            qmp.answer_within(Duration::from_secs(1));
            let error = quit(&mut qmp).unwrap_err();
            assert!(matches!(error, QmpError::NoAnswer { .. }), "{error}");
        });
    }

    #[test]
    fn a_vm_is_let_run_on_even_where_the_cancelling_is_not_answered() {
        let mut runs = false;
        let answer = |peer: &mut Peer, request: &Value| {
            match request["execute"].as_str() {
                Some("cont") => {
                    runs = true;
                    peer.answer(request, json!({}));
                }
                Some("query-status") => peer.answer(request, json!({ "status": "running" })),
                _ => {}
            }
            true
        };
        conversation(answer, |mut qmp| {
            qmp.answer_within(Duration::from_secs(1));
            let mut inner = Inner {
                qmp,
                changed: None,
                socket: None,
            };
            let error = inner.run_on().unwrap_err();
            assert!(error.to_string().contains("query-migrate"), "{error}");
        });
        assert!(runs);
    }
}
