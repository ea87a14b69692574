//! A Firecracker that gives a machine away.
//!
//! An unmodified Firecracker gives its state out with `PUT /snapshot/create` alone, which writes the memory to a file
//! too, and only while the VM is paused. So it is held in the middle of that, when the state is written and the memory is
//! not, and its memory is read from the process (`frozen.rs`, `guest.rs`): the pause does not
//! grow with the memory.
//!
//! Where the process may not be looked into, or its memory is not found, Firecracker writes its memory, and the pause
//! grows with what is written. Where the VM keeps a record of dirty pages (`track_dirty_pages`), a full snapshot is made
//! beforehand then, for which the VM stands still once and runs on; at the hand-over only what changed since is written,
//! into the same file. The files lie in memory (`/dev/shm`) where there is room, since Firecracker waits until a disk has
//! them.

mod memory;
mod scratch;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_server::port::{DirtyTracker, MachineError, SourceMachine, SourceMemory};
use lazyvm_wire::{Backing, Layout, LayoutError, MachineOffer};

pub(super) use self::memory::ServedMemory;
use self::scratch::scratch_in;
use super::api::{Api, ApiError, SnapshotKind, release};
use super::folder::{FolderError, SharedFolder};
use super::frozen::{FreezeError, Frozen};
use super::guest::{Guest, ProcessMemory};
use super::offer;
use super::process::PeerProcess;
use super::snapshot::{self, SnapshotError, SnapshotFiles, SnapshotMachine, SnapshotOptions};
use super::tracker::Tracker;

/// The first release whose diff snapshots after a full one hold only what changed since, and are merged into its file.
const DIFFS_AFTER_FULL: (u32, u32) = (1, 8);

/// Room for a state, of which some have several MiB.
const STATE_ROOM_MIB: u64 = 32;

/// Time for Firecracker to end at SIGTERM, for which it has no handler: it ends at once, or, as the first process of a
/// jail with a pid namespace of its own, never.
const END_TIMEOUT: Duration = Duration::from_millis(300);

/// Time for it to end when it is killed: much memory takes a while.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

const STATE: &str = "state";
const MEMORY: &str = "memory";

/// A Firecracker that can't be served.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The API.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Nothing runs there.
    #[error("the Firecracker at {} runs no VM (it says: {state})", path.display())]
    NotRunning {
        /// Where.
        path: PathBuf,
        /// What it says.
        state: String,
    },
    /// It has what can't be moved.
    #[error("this VM can't be moved: it has {0}")]
    Device(&'static str),
    /// Files.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// No room.
    #[error(
        "no room for the VM's memory, {needed} MiB, in {}: {free} MiB are free; name another directory with --scratch", path.display()
    )]
    NoRoom {
        /// Where.
        path: PathBuf,
        /// What it takes, in MiB.
        needed: u64,
        /// What is there, in MiB.
        free: u64,
    },
    /// The layout.
    #[error("this VM's memory can't be served")]
    Layout(#[from] LayoutError),
    /// What it wrote.
    #[error("Firecracker's snapshot can't be used")]
    Snapshot(#[from] SnapshotError),
    /// It says that it has more memory than there can be.
    #[error("Firecracker tells of {0} MiB of memory, which no machine has")]
    TooLarge(u64),
    /// It can't be held.
    #[error(
        "Firecracker can't be held while its memory is read; have it write its memory to a file with --scratch DIR"
    )]
    Freeze(#[from] FreezeError),
    /// Its memory is another size than it said.
    #[error("Firecracker wrote {got} bytes of memory, where its configuration says {expected}")]
    MemorySize {
        /// Of the file.
        got: u64,
        /// Of the configuration.
        expected: u64,
    },
}

/// See the module.
#[derive(Debug)]
pub struct FirecrackerMachine {
    api: Api,
    process: PeerProcess,
    folder: SharedFolder,
    layout: Layout,
    release: String,
    huge_pages: bool,
    /// It keeps a record of the pages that it writes.
    tracks: bool,
    /// Where its memory is read from the process.
    guest: Option<Arc<Guest>>,
    /// A full snapshot is in the folder, and the VM keeps a record of what changed since.
    has_base: AtomicBool,
    /// It was paused already when it was found, so it stays so.
    was_paused: bool,
    memory: Arc<ServedMemory>,
    /// From the pause on, where its memory is read from the process. Never two pauses at a time.
    frozen: Mutex<Option<Frozen>>,
}

impl FirecrackerMachine {
    /// Looks at the Firecracker at this API, and makes ready what can be beforehand. With `scratch`, Firecracker writes
    /// its memory to a file there; without, it is read from the process where that is possible.
    ///
    /// # Errors
    /// [`SourceError`]. The VM runs on.
    pub fn connect(api: Api, scratch: Option<&Path>) -> Result<Self, SourceError> {
        let info = api.info()?;
        if info.state == "Not started" {
            return Err(SourceError::NotRunning {
                path: api.path().to_owned(),
                state: info.state,
            });
        }
        let config = api.machine_config()?;
        check_devices(&api)?;
        let process = api.process()?;
        let bytes = config
            .mem_size_mib
            .checked_mul(1 << 20)
            .ok_or(SourceError::TooLarge(config.mem_size_mib))?;
        let huge_pages = config.huge_pages.as_deref() == Some("2M");
        let backing = if huge_pages {
            Backing::Huge2M
        } else {
            Backing::Small
        };
        let guest = match scratch {
            Some(_) => None,
            None => find_guest(&process, bytes),
        };
        let needed = guest
            .as_ref()
            .map_or(config.mem_size_mib, |_| STATE_ROOM_MIB);
        let parent = scratch_in(&api, &process, scratch, needed)?;
        let machine = Self {
            folder: SharedFolder::new(&parent, &process)?,
            process,
            layout: snapshot::flat(bytes, backing)?,
            huge_pages,
            tracks: config.track_dirty_pages,
            guest,
            has_base: AtomicBool::new(false),
            was_paused: info.state == "Paused",
            memory: Arc::default(),
            frozen: Mutex::default(),
            release: info.vmm_version,
            api,
        };
        let merges = release(&machine.release).is_some_and(|release| release >= DIFFS_AFTER_FULL);
        if machine.guest.is_none() && machine.tracks && merges && !machine.was_paused {
            machine.make_base()?;
        }
        Ok(machine)
    }

    /// Writes all memory, so that the hand-over only has to write what changes from here on.
    fn make_base(&self) -> Result<(), SourceError> {
        let start = Instant::now();
        self.api.pause()?;
        let made = self.create(SnapshotKind::Full);
        // Whatever came of it, the VM runs on.
        self.api.resume()?;
        made?;
        tracing::info!(
            stopped_us = start.elapsed().as_micros() as u64,
            "the VM keeps a record of dirty pages: its memory was written beforehand, and the pause will be short"
        );
        self.has_base.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn create(&self, kind: SnapshotKind) -> Result<(), ApiError> {
        self.api.create_snapshot(
            kind,
            &self.folder.theirs(STATE),
            &self.folder.theirs(MEMORY),
        )
    }

    /// The state of the paused VM, and from then on its memory.
    fn take_state(&self, frozen: &mut Option<Frozen>) -> Result<Vec<u8>, SourceError> {
        match &self.guest {
            Some(guest) => self.freeze(guest, frozen),
            None => self.take_snapshot(),
        }
    }

    fn freeze(
        &self,
        guest: &Arc<Guest>,
        frozen: &mut Option<Frozen>,
    ) -> Result<Vec<u8>, SourceError> {
        let start = Instant::now();
        let held = Frozen::freeze(&self.api, &self.process, &self.folder, STATE)?;
        let state = snapshot::read_state(&self.folder.ours(STATE))?;
        tracing::info!(
            us = start.elapsed().as_micros() as u64,
            bytes = state.len(),
            "Firecracker has written its state, and is held; its memory is read from the process"
        );
        let memory = ProcessMemory::held(Arc::clone(guest), held.holds());
        self.memory.paused(Arc::new(memory));
        *frozen = Some(held);
        Ok(state)
    }

    fn take_snapshot(&self) -> Result<Vec<u8>, SourceError> {
        // Of a diff that failed nobody knows what it held, so it is a full one the next time.
        let kind = if self.has_base.swap(false, Ordering::Relaxed) {
            SnapshotKind::Diff
        } else {
            SnapshotKind::Full
        };
        let start = Instant::now();
        self.create(kind)?;
        self.has_base
            .store(kind == SnapshotKind::Diff, Ordering::Relaxed);
        tracing::info!(
            ?kind,
            us = start.elapsed().as_micros() as u64,
            "Firecracker has written its snapshot"
        );
        let files = SnapshotFiles {
            state: self.folder.ours(STATE),
            memory: self.folder.ours(MEMORY),
        };
        // Written just now, with all that there is: by one snapshot, or by two into one file.
        let options = SnapshotOptions {
            huge_pages: self.huge_pages,
            is_whole: true,
        };
        let snapshot = SnapshotMachine::open(&files, options)?;
        let (got, expected) = (snapshot.layout().bytes(), self.layout.bytes());
        if got != expected {
            return Err(SourceError::MemorySize { got, expected });
        }
        let state = snapshot::read_state(&files.state)?;
        self.memory.paused(snapshot.memory());
        Ok(state)
    }

    fn let_go(&self) {
        self.memory.end();
        *self.frozen.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The guest's memory in the process, or nothing and a word about it.
fn find_guest(process: &PeerProcess, bytes: u64) -> Option<Arc<Guest>> {
    if process.pid() <= 0 {
        return None;
    }
    match Guest::find(process.pid(), bytes) {
        Ok(guest) => Some(Arc::new(guest)),
        Err(error) => {
            let why: &dyn std::error::Error = &error;
            tracing::warn!(
                why,
                "the VM's memory can't be read from Firecracker's process, so Firecracker writes it to a file, and the VM \
                 stands still meanwhile"
            );
            None
        }
    }
}

/// Refuses what Firecracker itself can't snapshot, or what this release of lazyvm can't.
fn check_devices(api: &Api) -> Result<(), SourceError> {
    // One that does not tell its configuration says itself what it can't when it makes the snapshot.
    let Ok(config) = api.full_config() else {
        return Ok(());
    };
    let vhost_user = config
        .get("drives")
        .and_then(|drives| drives.as_array())
        .is_some_and(|drives| {
            drives
                .iter()
                .any(|drive| drive.get("socket").is_some_and(|socket| !socket.is_null()))
        });
    if vhost_user {
        return Err(SourceError::Device(
            "a vhost-user drive, which Firecracker can't snapshot",
        ));
    }
    if config
        .get("memory-hotplug")
        .is_some_and(|hotplug| !hotplug.is_null())
    {
        return Err(SourceError::Device(
            "hotpluggable memory; make a snapshot yourself and use --snapshot",
        ));
    }
    Ok(())
}

impl SourceMachine for FirecrackerMachine {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn offer(&self) -> MachineOffer {
        offer::of(&self.release, self.tracks)
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        Arc::clone(&self.memory) as _
    }

    /// There is one where the memory is read from the process: what Firecracker writes to a file is there at the pause only.
    fn tracker(&self) -> Option<Box<dyn DirtyTracker>> {
        let (guest, memory) = (Arc::clone(self.guest.as_ref()?), Arc::clone(&self.memory));
        let backing = if self.huge_pages {
            Backing::Huge2M
        } else {
            Backing::Small
        };
        let process = self.process.clone();
        Some(Box::new(Tracker::new(process, guest, memory, backing)))
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        self.api.pause().map_err(SourceError::Api)?;
        let taken = {
            let mut frozen = self.frozen.lock().unwrap_or_else(PoisonError::into_inner);
            self.take_state(&mut frozen)
        };
        match taken {
            Ok(state) => Ok(state),
            Err(error) => {
                self.resume()?;
                Err(error.into())
            }
        }
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.let_go();
        if !self.was_paused {
            self.api.resume().map_err(SourceError::Api)?;
        }
        Ok(())
    }

    fn release(&self) -> Result<(), MachineError> {
        self.memory.end();
        for (by_force, timeout) in [(false, END_TIMEOUT), (true, KILL_TIMEOUT)] {
            if self.process.has_ended() {
                break;
            }
            self.process.signal(by_force)?;
            let start = Instant::now();
            while !self.process.has_ended() && start.elapsed() < timeout {
                thread::sleep(Duration::from_millis(10));
            }
        }
        self.let_go();
        Ok(())
    }
}
