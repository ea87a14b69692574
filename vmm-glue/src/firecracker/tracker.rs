//! Which pages a Firecracker's guest and its devices write: [`WriteWatch`] on the guest's memory in the process.
//!
//! All devices of a Firecracker write to its guest's memory by its page tables: from its own threads, by system calls of
//! theirs that copy (`readv` of a TAP device, of a file, of a socket), or from io_uring's threads, which copy as well since
//! no drive is opened with `O_DIRECT`; it registers no buffers there. KVM writes by page tables that follow the process's.
//! vhost-user drives write from another process, and need shared memory for that (`src/vmm/src/resources.rs`), so only
//! memory that nobody else can have mapped is watched. A balloon gives memory back with `MADV_DONTNEED`, which counts as
//! a write; of huge pages, for which the kernel does not see that, whatever is not there does. After a restore from a file it maps new memory instead, which the next scan refuses, since that is not watched.
//!
//! Saving the state writes to the guest's memory too (`prepare_save` of the devices). Firecracker is held after that, so the
//! last look sees it.

use std::sync::Arc;

use lazyvm_server::port::{DirtyTracker, MachineError};
use lazyvm_wire::{Backing, PAGE_SHIFT, PageRange};

use super::guest::{Guest, ProcessMemory};
use super::process::PeerProcess;
use super::source::ServedMemory;
use crate::attach::{AttachError, Process};
use crate::dirty::WriteWatch;
use crate::dirty::unseen::{self, Commands};

/// Why a Firecracker's writes can't be noted.
#[derive(Debug, thiserror::Error)]
enum TrackError {
    #[error(transparent)]
    Process(#[from] AttachError),
    #[error("Firecracker has ended")]
    Ended,
    #[error("can't look at the open files of this Firecracker")]
    Files(#[source] std::io::Error),
    #[error(
        "this Firecracker has {0} open, through which memory may be written unseen (O_DIRECT, FUSE, VFIO and the like): \
         move it with post-copy"
    )]
    Unseen(String),
    #[error(
        "this Firecracker's memory is in a file, or shared with other processes, whose writes would not be seen: it was \
         restored from a memory file, or has a vhost-user device; move it with post-copy"
    )]
    NotPrivate,
    #[error("Firecracker has mapped its guest's memory anew, so that writes may have been missed")]
    Changed,
    #[error("writes are not being noted")]
    NotStarted,
}

/// See the module.
pub(super) struct Tracker {
    peer: PeerProcess,
    guest: Arc<Guest>,
    memory: Arc<ServedMemory>,
    backing: Backing,
    watched: Option<Watched>,
}

struct Watched {
    process: Process,
    watch: WriteWatch,
}

impl Tracker {
    /// While it notes writes, the running machine's memory can be read as `memory`.
    pub fn new(
        peer: PeerProcess,
        guest: Arc<Guest>,
        memory: Arc<ServedMemory>,
        backing: Backing,
    ) -> Self {
        Self {
            peer,
            guest,
            memory,
            backing,
            watched: None,
        }
    }

    fn begin(&self) -> Result<Watched, MachineError> {
        let process = Process::open(self.peer.pid())?;
        // The number was its own when it was opened, if it lives still.
        if self.peer.has_ended() {
            return Err(TrackError::Ended.into());
        }
        check(&process, &self.guest, TrackError::NotPrivate)?;
        let ranges: Vec<_> = self.guest.ranges().collect();
        let data = self.guest.data()?;
        let mut watch = WriteWatch::start(&process, &ranges, &data)?;
        if self.backing == Backing::Huge2M {
            watch = watch.reporting_absent(&ranges);
        }
        check(&process, &self.guest, TrackError::Changed)?;
        Ok(Watched { process, watch })
    }

    fn scan(&mut self, dirty: &mut dyn FnMut(PageRange)) -> Result<(), MachineError> {
        let Watched { process, watch } = self.watched.as_mut().ok_or(TrackError::NotStarted)?;
        // Before a scan, so that it is known what is scanned, and after it: what has come meanwhile may have written.
        check(process, &self.guest, TrackError::Changed)?;
        watch.collect(&mut |start, end| {
            if let Some(first) = self.guest.page_at(start) {
                dirty(PageRange::new(first, (end - start) >> PAGE_SHIFT));
            }
        })?;
        check(process, &self.guest, TrackError::Changed)?;
        Ok(())
    }

    fn end(&mut self) {
        self.memory.untracked();
        self.watched = None;
    }
}

fn check(process: &Process, guest: &Guest, not_private: TrackError) -> Result<(), TrackError> {
    let commands = Commands::ReadAndWrite;
    let found = unseen::descriptor(process.pid(), commands).map_err(TrackError::Files)?;
    if let Some(name) = found {
        return Err(TrackError::Unseen(name));
    }
    if !guest.is_private(&process.mappings()?) {
        return Err(not_private);
    }
    Ok(())
}

impl DirtyTracker for Tracker {
    fn start(&mut self) -> Result<(), MachineError> {
        self.end();
        self.watched = Some(self.begin()?);
        let memory = ProcessMemory::running(Arc::clone(&self.guest));
        self.memory.running(Arc::new(memory));
        Ok(())
    }

    fn collect(&mut self, dirty: &mut dyn FnMut(PageRange)) -> Result<(), MachineError> {
        let scanned = self.scan(dirty);
        if scanned.is_err() {
            // What was missed would never be reported.
            self.end();
        }
        scanned
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.end();
        Ok(())
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        self.end();
    }
}
