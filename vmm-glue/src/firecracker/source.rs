//! A Firecracker that gives a machine away.
//!
//! An unmodified Firecracker gives its state out with `PUT /snapshot/create` alone, which writes the memory to a file
//! too, and only while the VM is paused. So the pause grows with what is written. Where the VM keeps a record of dirty
//! pages (`track_dirty_pages`), a full snapshot is made beforehand, for which the VM stands still once and runs on; at
//! the hand-over only what changed since is written, into the same file. The files lie in memory (`/dev/shm`) where
//! there is room, since Firecracker waits until a disk has them.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_server::port::{MachineError, SourceMachine, SourceMemory};
use lazyvm_wire::{Backing, Layout, LayoutError, MachineOffer, PageRange};
use nix::sys::statvfs::statvfs;

use super::api::{Api, ApiError, SnapshotKind, release};
use super::folder::{FolderError, SharedFolder};
use super::process::PeerProcess;
use super::snapshot::{self, SnapshotError, SnapshotFiles, SnapshotMachine};

/// The first release whose diff snapshots after a full one hold only what changed since, and are merged into its file.
const DIFFS_AFTER_FULL: (u32, u32) = (1, 8);

/// Time for Firecracker to end by itself.
const END_TIMEOUT: Duration = Duration::from_secs(3);

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
    /// A full snapshot is in the folder, and the VM keeps a record of what changed since.
    has_base: AtomicBool,
    /// It was paused already when it was found, so it stays so.
    was_paused: bool,
    memory: Arc<PausedMemory>,
    /// Never two pauses at a time.
    pausing: Mutex<()>,
}

/// The memory file, once there is one. Nobody asks before the pause.
#[derive(Debug, Default)]
struct PausedMemory(Mutex<Option<SnapshotMachine>>);

impl PausedMemory {
    fn set(&self, snapshot: Option<SnapshotMachine>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = snapshot;
    }

    fn get(&self) -> io::Result<Arc<dyn SourceMemory>> {
        let snapshot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        snapshot
            .as_ref()
            .map(SourceMachine::memory)
            .ok_or_else(|| io::Error::other("the VM is not paused"))
    }
}

impl SourceMemory for PausedMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        self.get()?.read(range, out)
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        self.get()?.data_runs(data)
    }
}

impl FirecrackerMachine {
    /// Looks at the Firecracker at this API, and makes the snapshot that can be made beforehand. `scratch` is where its
    /// files go.
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
        let bytes = config.mem_size_mib << 20;
        let huge_pages = config.huge_pages.as_deref() == Some("2M");
        let backing = if huge_pages {
            Backing::Huge2M
        } else {
            Backing::Small
        };
        let parent = scratch_in(&api, &process, scratch, config.mem_size_mib)?;
        let machine = Self {
            folder: SharedFolder::new(&parent, &process)?,
            process,
            layout: snapshot::flat(bytes, backing)?,
            huge_pages,
            has_base: AtomicBool::new(false),
            was_paused: info.state == "Paused",
            memory: Arc::default(),
            pausing: Mutex::default(),
            release: info.vmm_version,
            api,
        };
        let merges = release(&machine.release).is_some_and(|release| release >= DIFFS_AFTER_FULL);
        if config.track_dirty_pages && merges && !machine.was_paused {
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
        let snapshot = SnapshotMachine::open(&files, self.huge_pages)?;
        let (got, expected) = (snapshot.layout().bytes(), self.layout.bytes());
        if got != expected {
            return Err(SourceError::MemorySize { got, expected });
        }
        let state = snapshot::read_state(&files.state)?;
        self.memory.set(Some(snapshot));
        Ok(state)
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

/// A directory with room for the memory, which Firecracker sees.
fn scratch_in(
    api: &Api,
    process: &PeerProcess,
    scratch: Option<&Path>,
    needed: u64,
) -> Result<PathBuf, SourceError> {
    let beside = match api.path().parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let shm = Path::new("/dev/shm");
    let candidates = match scratch {
        Some(scratch) => vec![scratch],
        None if sees(process, shm) => vec![shm, beside],
        None => vec![beside],
    };
    let mut refused = None;
    for path in candidates {
        let free = free_mib(path);
        if free >= needed + needed / 64 {
            return Ok(path.to_owned());
        }
        refused = Some(SourceError::NoRoom {
            path: path.to_owned(),
            needed,
            free,
        });
    }
    refused.map_or_else(|| Ok(beside.to_owned()), Err)
}

/// Whether this directory is the same one for that process.
fn sees(process: &PeerProcess, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let theirs = process
        .root()
        .and_then(|root| path.strip_prefix("/").ok().map(|path| root.join(path)));
    let Some(theirs) = theirs else {
        return false;
    };
    match (std::fs::metadata(path), std::fs::metadata(theirs)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

fn free_mib(path: &Path) -> u64 {
    statvfs(path).map_or(0, |found| {
        found
            .blocks_available()
            .saturating_mul(found.fragment_size())
            >> 20
    })
}

impl SourceMachine for FirecrackerMachine {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn offer(&self) -> MachineOffer {
        snapshot::offer(Some(&self.release))
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        Arc::clone(&self.memory) as _
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        let _alone = self.pausing.lock().unwrap_or_else(PoisonError::into_inner);
        self.api.pause().map_err(SourceError::Api)?;
        match self.take_snapshot() {
            Ok(state) => Ok(state),
            Err(error) => {
                self.resume()?;
                Err(error.into())
            }
        }
    }

    fn resume(&self) -> Result<(), MachineError> {
        self.memory.set(None);
        if !self.was_paused {
            self.api.resume().map_err(SourceError::Api)?;
        }
        Ok(())
    }

    /// Firecracker ends by itself at SIGTERM, or is ended.
    fn release(&self) -> Result<(), MachineError> {
        self.memory.set(None);
        for by_force in [false, true] {
            if self.process.has_ended() {
                break;
            }
            self.process.signal(by_force)?;
            let start = Instant::now();
            while !self.process.has_ended() && start.elapsed() < END_TIMEOUT {
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }
}
