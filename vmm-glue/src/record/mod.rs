//! Which pages of shared memory a process touches, one by one and in the order of their first touches.
//!
//! The memory is registered with a userfaultfd of that process for *minor* faults (Linux 5.14 for tmpfs and memfds,
//! `Documentation/admin-guide/mm/userfaultfd.rst`): who touches a page that is there but has no entry in the page table waits
//! until the entry is made by `UFFDIO_CONTINUE`. So the entries are dropped first, and whatever is touched then is heard of, and
//! nothing else: the kernel maps no neighbours of a page that is registered so. That costs the process two wake-ups a page, so it is for a
//! short time.
//!
//! When the recording process dies, its descriptor is closed, and whoever waits goes on.

mod sys;

use std::io::{self, PipeWriter, pipe};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use lazyvm_server::port::{MachineError, TouchRecorder};
use lazyvm_wire::{PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange};
use nix::errno::Errno;
use nix::libc::c_void;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use userfaultfd::{Error, Event, EventBuffer, FaultKind, RegisterMode, Uffd};

use crate::attach::{AttachError, Process};

/// Most pages that are recorded. Behind them nobody waits any more.
const PAGES_MAX: usize = 16 * 1024;

/// Faults that are read at once.
const EVENTS_MAX: usize = 64;

/// Why touches can't be recorded.
#[derive(Debug, thiserror::Error)]
enum RecordError {
    #[error(transparent)]
    Process(#[from] AttachError),
    #[error("none of its memory is shared and of small pages")]
    Nothing,
    #[error(
        "this kernel can't tell touches of shared memory (userfaultfd MINOR_SHMEM); Linux 5.14 or newer can"
    )]
    Kernel(#[source] Errno),
    #[error(
        "the memory at {start:#x} can't be watched for touches; another userfaultfd may have it"
    )]
    Register {
        start: u64,
        #[source]
        source: Error,
    },
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
}

/// A piece of shared memory where the process has it mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte there.
    pub host: u64,
    /// Bytes, in whole pages of 4 KiB.
    pub bytes: u64,
    /// The image's page there.
    pub first: PageIndex,
}

/// Records the touches of another process.
pub struct Recorder {
    shared: Arc<Shared>,
    recording: Option<Recording>,
}

struct Shared {
    uffd: Uffd,
    pieces: Vec<Piece>,
    registered: Mutex<Registered>,
}

/// What is registered. An older kernel lets anyone lift what another userfaultfd has registered, so it is known.
#[derive(Default)]
struct Registered {
    pieces: Vec<Piece>,
    /// Nobody answers any more.
    ended: bool,
}

struct Recording {
    thread: JoinHandle<Vec<PageIndex>>,
    /// Closed to end it.
    until: PipeWriter,
}

impl Recorder {
    /// Of these pieces of the process's memory, which are mapped from files and shared. Nothing is recorded yet.
    ///
    /// # Errors
    /// The process can't be attached to, or the kernel can't.
    pub fn new(process: &Process, pieces: Vec<Piece>) -> Result<Self, MachineError> {
        if pieces.is_empty() {
            return Err(RecordError::Nothing.into());
        }
        let fd = process.take_userfaultfd().map_err(RecordError::Process)?;
        let uffd = sys::agree(fd).map_err(RecordError::Kernel)?;
        Ok(Self {
            shared: Arc::new(Shared {
                uffd,
                pieces,
                registered: Mutex::default(),
            }),
            recording: None,
        })
    }

    fn end(&mut self) -> Vec<PageIndex> {
        let Some(Recording { thread, until }) = self.recording.take() else {
            return Vec::new();
        };
        drop(until);
        let touched = thread.join().unwrap_or_default();
        // Where the thread has panicked.
        self.shared.unregister();
        touched
    }
}

impl TouchRecorder for Recorder {
    fn start(&mut self) -> Result<(), MachineError> {
        self.end();
        self.shared.registered().ended = false;
        let (ends, until) = pipe().map_err(RecordError::Thread)?;
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new()
            .name("touches".to_owned())
            .spawn(move || {
                let touched = shared.follow(ends.as_fd());
                shared.unregister();
                touched
            })
            .map_err(RecordError::Thread)?;
        self.recording = Some(Recording { thread, until });
        self.shared.register().inspect_err(|_| drop(self.end()))?;
        Ok(())
    }

    fn stop(&mut self) -> Vec<PageIndex> {
        self.end()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn register(&self) -> Result<(), RecordError> {
        for &piece in &self.pieces {
            let mut registered = self.registered();
            if registered.ended {
                break;
            }
            self.uffd
                .register_with_mode(piece.start(), piece.bytes as usize, RegisterMode::MINOR)
                .map_err(|source| RecordError::Register {
                    start: piece.host,
                    source,
                })?;
            registered.pieces.push(piece);
        }
        Ok(())
    }

    fn registered(&self) -> MutexGuard<'_, Registered> {
        self.registered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets everybody go on who waits.
    fn unregister(&self) {
        let mut registered = self.registered();
        registered.ended = true;
        for piece in registered.pieces.drain(..) {
            // Both fail where the process has ended. The kernel wakes nobody of itself who waits for a minor fault
            // (`userfaultfd_unregister` of `fs/userfaultfd.c`).
            let _ = self.uffd.unregister(piece.start(), piece.bytes as usize);
            let _ = self.uffd.wake(piece.start(), piece.bytes as usize);
        }
    }

    /// Lets who touches a page go on and notes it, until the other end of `until` is closed or there are enough.
    fn follow(&self, until: BorrowedFd<'_>) -> Vec<PageIndex> {
        let mut touched = Vec::new();
        let mut buffer = EventBuffer::new(EVENTS_MAX);
        while touched.len() < PAGES_MAX {
            let mut waits = [
                PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
                PollFd::new(until, PollFlags::POLLIN),
            ];
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => break,
            }
            if waits[1].any() != Some(false) {
                break;
            }
            let Ok(events) = self.uffd.read_events(&mut buffer) else {
                break;
            };
            for event in events {
                let Ok(Event::Pagefault {
                    kind: FaultKind::Minor,
                    addr,
                    ..
                }) = event
                else {
                    return touched;
                };
                touched.extend(self.page_at(addr as u64));
                if !self.go_on(addr) {
                    return touched;
                }
            }
        }
        touched
    }

    fn page_at(&self, address: u64) -> Option<PageIndex> {
        let within = |piece: &&Piece| (piece.host..piece.host + piece.bytes).contains(&address);
        let piece = self.pieces.iter().find(within)?;
        Some(piece.pages(address, address).first)
    }

    /// Makes the entry of a page; `false` where the kernel can't, so that nobody must wait any more.
    fn go_on(&self, address: *mut c_void) -> bool {
        let start = (address as usize & !(PAGE_SIZE - 1)) as *mut c_void;
        loop {
            let Err(error) = self.uffd.r#continue(start, PAGE_SIZE, true) else {
                return true;
            };
            match errno(&error) {
                // The memory map changes at this moment.
                Some(Errno::EAGAIN) => thread::yield_now(),
                // Another thread's touch has made it, or the page was given back: then the kernel serves the next touch.
                Some(Errno::EEXIST | Errno::EFAULT) => {
                    return self.uffd.wake(start, PAGE_SIZE).is_ok();
                }
                _ => return false,
            }
        }
    }
}

/// The crate's `nix` is another version than ours.
fn errno(error: &Error) -> Option<Errno> {
    match error {
        Error::SystemError(errno) => Some(Errno::from_raw(*errno as i32)),
        _ => None,
    }
}

impl Piece {
    /// What lies between two addresses of the piece.
    pub(crate) fn pages(&self, start: u64, end: u64) -> PageRange {
        let page = self.first.0 + ((start - self.host) >> PAGE_SHIFT);
        PageRange::new(PageIndex(page), (end - start) >> PAGE_SHIFT)
    }

    /// Where pages of the piece begin and end.
    pub(crate) fn hosts(&self, pages: PageRange) -> (u64, u64) {
        let start = self.host + ((pages.first.0 - self.first.0) << PAGE_SHIFT);
        (start, start + pages.bytes())
    }

    fn start(&self) -> *mut c_void {
        self.host as *mut c_void
    }
}
