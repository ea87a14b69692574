//! A Firecracker that is held in the middle of making a snapshot: its state is written, its memory is not yet.
//!
//! Firecracker gives its state out only with its memory, and writing that takes seconds a GiB while the VM stands still.
//! But of all releases `create_snapshot` in `src/vmm/src/persist.rs` saves and syncs the state first, then opens the
//! memory file, on the one thread that runs all devices. So the memory file that it is told of is a FIFO: `open(2)`
//! waits there until someone reads from it, and nobody does. From then on the process does nothing at all, and its
//! memory, which belongs to just that state, is read from outside for as long as it takes.
//!
//! That no device can write into the memory any more is what a pause alone does not give: the devices of a paused VM go
//! on, and a packet that comes in is still put into the guest's receive queue.
//!
//! To let it go the FIFO is opened for reading. Firecracker finds then that it can't set a FIFO's length, tells of it,
//! and is a paused VM as before: neither its memory nor its record of dirty pages was touched.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::api::{Api, ApiError, SnapshotKind};
use super::folder::{FolderError, SharedFolder};
use super::process::PeerProcess;

/// Time for Firecracker to write its state; a slow disk has it wait.
const STATE_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for it to answer once it is let go.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked whether the state is written.
const LOOK_EVERY: Duration = Duration::from_micros(100);

/// `open` and `openat` of x86-64, each with the argument that is the path.
const OPENS: [(libc::c_long, usize); 2] = [(libc::SYS_openat, 1), (libc::SYS_open, 0)];

const FIFO: &str = "memory-is-read-from-the-process";

/// A Firecracker that can't be held.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// Files.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The FIFO.
    #[error("can't make the FIFO {}", path.display())]
    Fifo {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// It said no before.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// It did not come to the FIFO.
    #[error("Firecracker did not write its state within {STATE_TIMEOUT:?}")]
    Late,
    /// It did what it can't.
    #[error("Firecracker made a snapshot of its own where it was to wait")]
    Passed,
    /// It can't be looked at.
    #[error("can't look at Firecracker's threads")]
    Look(#[source] io::Error),
    /// No thread.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
}

/// See the module. It is let go when this value goes.
#[derive(Debug)]
pub(super) struct Frozen {
    fifo: PathBuf,
    holds: Arc<AtomicBool>,
    answer: Receiver<Result<(), ApiError>>,
}

impl Frozen {
    /// Has a paused Firecracker write its state to `state` in `folder`, and holds it there.
    ///
    /// After a failure it is a paused VM as before.
    pub fn freeze(
        api: &Api,
        process: &PeerProcess,
        folder: &SharedFolder,
        state: &str,
    ) -> Result<Self, FreezeError> {
        let fifo = folder.ours(FIFO);
        let make = || {
            let _ = fs::remove_file(&fifo);
            mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR)
        };
        make().map_err(|source| FreezeError::Fifo {
            path: fifo.clone(),
            source,
        })?;
        folder.give(FIFO)?;
        let theirs = folder.theirs(FIFO);
        let frozen = Self::ask(api, fifo, folder.theirs(state), theirs.clone())?;
        frozen.wait_until_held(process, &theirs)?;
        Ok(frozen)
    }

    fn ask(api: &Api, fifo: PathBuf, state: PathBuf, memory: PathBuf) -> Result<Self, FreezeError> {
        let holds = Arc::new(AtomicBool::new(true));
        let (done, answer) = channel();
        let (api, held) = (api.clone(), Arc::clone(&holds));
        thread::Builder::new()
            .name("freeze".to_owned())
            .spawn(move || {
                let result = api.create_snapshot(SnapshotKind::Full, &state, &memory);
                held.store(false, Ordering::SeqCst);
                // Nobody listens to one that was let go.
                let _ = done.send(result);
            })
            .map_err(FreezeError::Thread)?;
        Ok(Self {
            fifo,
            holds,
            answer,
        })
    }

    fn wait_until_held(&self, process: &PeerProcess, theirs: &Path) -> Result<(), FreezeError> {
        let start = Instant::now();
        while start.elapsed() < STATE_TIMEOUT {
            if waits_to_open(process.pid(), theirs).map_err(FreezeError::Look)? {
                return Ok(());
            }
            match self.answer.recv_timeout(LOOK_EVERY) {
                Ok(Err(error)) => return Err(error.into()),
                Ok(Ok(())) | Err(RecvTimeoutError::Disconnected) => {
                    return Err(FreezeError::Passed);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Err(FreezeError::Late)
    }

    /// Whether it is still held; false as soon as it has answered.
    pub fn holds(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.holds)
    }
}

impl Drop for Frozen {
    /// Lets it go, and waits until it has answered.
    fn drop(&mut self) {
        let start = Instant::now();
        while self.holds.load(Ordering::SeqCst) && start.elapsed() < ANSWER_TIMEOUT {
            // Open until it has answered: it may come to the FIFO only now.
            let reader = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&self.fifo);
            let answered = self.answer.recv_timeout(Duration::from_millis(100));
            if let Ok(Err(ApiError::Refused { fault, .. })) = &answered {
                tracing::debug!(fault, "Firecracker was let go");
            }
            if reader.is_err() || answered.is_ok() {
                break;
            }
        }
        let _ = fs::remove_file(&self.fifo);
    }
}

/// Whether a thread of this process waits in the system call that opens `path`: `proc_pid_syscall(5)`.
fn waits_to_open(pid: i32, path: &Path) -> io::Result<bool> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut wanted = path.as_os_str().as_bytes().to_vec();
    wanted.push(0);
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end at any time.
        let Ok(text) = fs::read_to_string(entry?.path().join("syscall")) else {
            continue;
        };
        if path_argument(&text).is_some_and(|address| {
            let mut found = vec![0; wanted.len()];
            memory.read_exact_at(&mut found, address).is_ok() && found == wanted
        }) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Where the path is that a system call opens, if it is one that does.
fn path_argument(text: &str) -> Option<u64> {
    let mut fields = text.split_ascii_whitespace();
    // "running" has no number.
    let number: libc::c_long = fields.next()?.parse().ok()?;
    let &(_, argument) = OPENS.iter().find(|(open, _)| *open == number)?;
    let address = fields.nth(argument)?.strip_prefix("0x")?;
    u64::from_str_radix(address, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_an_open_is_found() {
        let openat = "257 0xffffff9c 0x7fffbad91710 0x80041 0x1b6 0x0 0x1 0x7fff 0x7f40";
        assert_eq!(path_argument(openat), Some(0x7fff_bad9_1710));
        assert_eq!(path_argument("2 0x1000 0x80041 0x0"), Some(0x1000));
        for other in ["running", "-1 0x7ff 0x7f4", "202 0x55 0x89", "257", ""] {
            assert_eq!(path_argument(other), None, "{other}");
        }
    }

    #[test]
    fn one_that_waits_is_found() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("fifo");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let pid = std::process::id() as i32;
        assert!(!waits_to_open(pid, &path).unwrap());
        let writer = thread::spawn({
            let path = path.clone();
            move || OpenOptions::new().write(true).open(path)
        });
        let start = Instant::now();
        while !waits_to_open(pid, &path).unwrap() {
            assert!(start.elapsed() < Duration::from_secs(10));
        }
        assert!(!waits_to_open(pid, &home.path().join("other")).unwrap());
        let _reader = File::open(&path).unwrap();
        writer.join().unwrap().unwrap();
    }
}
