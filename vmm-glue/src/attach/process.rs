//! A process to be attached to.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;
use std::time::Duration;

use lazyvm_pager::LazyMemory;
use lazyvm_pager::uffd::{OpenError, Uffd};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::inject::{self, Call, InjectError, Injected, Until};
use super::maps::{Mapping, Mappings, MapsError};
use super::sys;

/// The `syscall` instruction of x86-64.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How much of a mapping is searched for it.
const SEARCH_BYTES: u64 = 2 << 20;

/// `USERFAULTFD_IOC_NEW` of `linux/userfaultfd.h`.
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

/// The device that gives a userfaultfd to whoever could open it.
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// How often a thread that can be interrupted is looked for.
const ATTEMPTS: usize = 50;

/// A process that can't be attached to.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It is this one.
    #[error("process {0} is lazyvm itself")]
    Own(i32),
    /// There is none.
    #[error("there is no process {pid}")]
    Gone {
        /// The number.
        pid: i32,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// Its memory map.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// What `/proc` tells of it can't be read.
    #[error(
        "can't look at process {pid}: run lazyvm as root, as that process's user, or with the capability CAP_SYS_PTRACE"
    )]
    Look {
        /// The process.
        pid: i32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No instruction to use.
    #[error("process {0} has no syscall instruction where one is looked for")]
    NoInstruction(i32),
    /// All are in system calls that would notice.
    #[error("every thread of process {0} is in a system call that a stop would break")]
    NoThread(i32),
    /// A thread can't be used.
    #[error("can't attach to process {pid}")]
    Inject {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: InjectError,
    },
    /// A seccomp filter that can't be lifted.
    #[error(
        "process {0} is under a seccomp filter, which may kill it for a userfaultfd system call; run lazyvm as root, on \
         a kernel with CONFIG_CHECKPOINT_RESTORE, or start the process without the filter"
    )]
    Seccomp(i32),
    /// The process may not have a userfaultfd.
    #[error(
        "process {pid} may not use userfaultfd: set the sysctl vm.unprivileged_userfaultfd to 1, or give lazyvm access \
         to /dev/userfaultfd, or run that process as root"
    )]
    Forbidden {
        /// The process.
        pid: i32,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// Memory that is not shared must stay mapped.
    #[error(
        "the memory at {start:#x} of process {pid} is not shared, and would lose what it holds"
    )]
    NotShared {
        /// Whose.
        pid: i32,
        /// Where.
        start: u64,
    },
    /// Its kernel refuses.
    #[error("process {pid} can't drop its map of shared memory")]
    Unmap {
        /// Whose.
        pid: i32,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// The descriptor can't be brought over.
    #[error("can't take the userfaultfd over from process {pid}")]
    Fetch {
        /// The process.
        pid: i32,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// The kernel's userfaultfd lacks something.
    #[error("can't use the userfaultfd of process {pid}")]
    Open {
        /// The process.
        pid: i32,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// No thread of ours.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
}

/// A userfaultfd of another process.
#[derive(Debug)]
pub struct Attached {
    /// The descriptor, here. The process keeps its own, so what is registered stays so when this side ends.
    pub uffd: Uffd,
    /// For how long one of its threads was stopped.
    pub stopped: Duration,
}

/// Another process, held by a pidfd.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// The process of this number.
    ///
    /// # Errors
    /// [`AttachError::Gone`], [`AttachError::Own`].
    pub fn open(pid: i32) -> Result<Self, AttachError> {
        if pid == std::process::id() as i32 {
            return Err(AttachError::Own(pid));
        }
        let pidfd = sys::pidfd_open(pid).map_err(|source| AttachError::Gone { pid, source })?;
        Ok(Self { pid, pidfd })
    }

    /// Its number.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.wait(PollTimeout::ZERO)
    }

    /// Waits for its end for so long; whether it came.
    pub fn wait(&self, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, timeout), Ok(ready) if ready > 0)
    }

    /// Ends it at once.
    pub(crate) fn kill(&self) {
        // It may have ended already.
        let _ = sys::pidfd_kill(self.pidfd.as_fd());
    }

    /// What it has mapped.
    ///
    /// # Errors
    /// [`AttachError::Maps`]; [`AttachError::Gone`] for one that has ended, which has an empty map until it is waited for.
    pub fn mappings(&self) -> Result<Mappings, AttachError> {
        let found = Mappings::of(self.pid);
        if self.has_ended() {
            let (pid, source) = (self.pid, Errno::ESRCH);
            return Err(AttachError::Gone { pid, source });
        }
        found.map_err(|error| match error {
            MapsError::Read { pid, source } => AttachError::Look { pid, source },
            error => AttachError::Maps(error),
        })
    }

    /// The file behind a mapping, through `/proc`: whatever its name is now, in whichever mount namespace, and for memfds.
    ///
    /// # Errors
    /// [`AttachError::Look`].
    pub fn open_file_of(&self, mapping: &Mapping, writable: bool) -> Result<File, AttachError> {
        let pid = self.pid;
        let look = |source| AttachError::Look { pid, source };
        let open = |path: &str| File::options().read(true).write(writable).open(path);
        let is_it = |found: &fs::Metadata| {
            let device = found.dev();
            (libc::major(device).into(), libc::minor(device).into()) == mapping.device
                && found.ino() == mapping.inode
        };
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(look)? {
            let path = entry.map_err(look)?.path();
            if fs::metadata(&path).is_ok_and(|found| is_it(&found)) {
                return open(&path.to_string_lossy()).map_err(look);
            }
        }
        let (start, end) = (mapping.start, mapping.end);
        open(&format!("/proc/{pid}/map_files/{start:x}-{end:x}")).map_err(look)
    }

    /// A userfaultfd of its own for `memory`, which is memory of it; `removals` as for [`Uffd::open`].
    ///
    /// # Errors
    /// [`AttachError`] names the setting that is in the way. The process goes on in any case.
    pub fn userfaultfd(
        &self,
        memory: &LazyMemory,
        removals: bool,
    ) -> Result<Attached, AttachError> {
        let pid = self.pid;
        let (_, fd, stopped) = self.open_userfaultfd()?;
        let uffd =
            sys::adopt(fd, memory, removals).map_err(|source| AttachError::Open { pid, source })?;
        tracing::info!(pid, stopped_us = stopped.as_micros() as u64, "attached");
        Ok(Attached { uffd, stopped })
    }

    /// Has it drop its page-table entries for these ranges (host address, bytes) of shared memory, whose contents stay in
    /// their files; gives how long one of its threads was stopped. What it touches afterwards is mapped again.
    ///
    /// # Errors
    /// [`AttachError::NotShared`] before anything is done: private memory would lose what it holds.
    pub fn unmap_shared(&self, ranges: &[(u64, u64)]) -> Result<Duration, AttachError> {
        let pid = self.pid;
        let mappings = self.mappings()?;
        for &(start, bytes) in ranges {
            let shared = mappings
                .piece(start, bytes)
                .is_some_and(|(mapping, _)| mapping.shared && mapping.inode != 0);
            if !shared {
                return Err(AttachError::NotShared { pid, start });
            }
        }
        let advice = libc::MADV_DONTNEED as u64;
        let calls: Vec<Call> = ranges
            .iter()
            .map(|&(start, bytes)| [libc::SYS_madvise as u64, start, bytes, advice])
            .collect();
        if calls.is_empty() {
            return Ok(Duration::ZERO);
        }
        let injected = self.inject(&calls, Until::Failure)?;
        match i32::try_from(injected.result) {
            Ok(negative) if negative < 0 => Err(AttachError::Unmap {
                pid,
                source: Errno::from_raw(-negative),
            }),
            _ => Ok(injected.stopped),
        }
    }

    /// Has it open a userfaultfd: the number there, the descriptor here, and for how long a thread was stopped.
    pub(super) fn open_userfaultfd(&self) -> Result<(i32, OwnedFd, Duration), AttachError> {
        let pid = self.pid;
        // Without UFFD_USER_MODE_ONLY: faults of KVM and of system calls come from kernel mode.
        let flags = (OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).bits() as u64;
        let mut calls = Vec::new();
        if let Some(device) = self.device() {
            calls.push([libc::SYS_ioctl as u64, device, USERFAULTFD_IOC_NEW, flags]);
        }
        calls.push([libc::SYS_userfaultfd as u64, flags, 0, 0]);
        let injected = self.inject(&calls, Until::Success)?;
        let theirs = i32::try_from(injected.result).unwrap_or(-libc::EBADF);
        if theirs < 0 {
            let source = Errno::from_raw(-theirs);
            return Err(AttachError::Forbidden { pid, source });
        }
        let fd = sys::pidfd_getfd(self.pidfd.as_fd(), theirs)
            .map_err(|source| AttachError::Fetch { pid, source })?;
        Ok((theirs, fd, injected.stopped))
    }

    /// Has one of its threads do system calls.
    pub(super) fn inject(&self, calls: &[Call], until: Until) -> Result<Injected, AttachError> {
        let pid = self.pid;
        let instruction = self.find_instruction()?;
        let options = if self.has_seccomp_filter() {
            sys::SUSPEND_SECCOMP
        } else {
            0
        };
        let thread = self.find_thread()?;
        // What a thread traces is let go at the latest when that thread ends.
        thread::scope(|scope| {
            let run = || inject::run(thread, instruction, calls, until, options);
            thread::Builder::new()
                .name("attach".to_owned())
                .spawn_scoped(scope, run)
                .map(|running| running.join())
        })
        .map_err(AttachError::Thread)?
        .map_err(|_| AttachError::NoThread(pid))?
        .map_err(|source| match source {
            InjectError::Refused { .. } if options != 0 => AttachError::Seccomp(pid),
            source => AttachError::Inject { pid, source },
        })
    }

    /// A thread that does not notice a stop, its first one if possible.
    fn find_thread(&self) -> Result<i32, AttachError> {
        let pid = self.pid;
        for _ in 0..ATTEMPTS {
            let mut threads = self.threads()?;
            threads.sort_unstable_by_key(|&thread| (thread != pid, thread));
            let found = threads
                .into_iter()
                .find(|&thread| inject::can_be_interrupted(pid, thread));
            if let Some(thread) = found {
                return Ok(thread);
            }
            thread::sleep(Duration::from_millis(2));
        }
        Err(AttachError::NoThread(pid))
    }

    fn threads(&self) -> Result<Vec<i32>, AttachError> {
        let pid = self.pid;
        let look = |source| AttachError::Look { pid, source };
        let entries = fs::read_dir(format!("/proc/{pid}/task")).map_err(look)?;
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect())
    }

    /// Whether any of its threads is under a filter (`Seccomp: 2` in `proc_pid_status(5)`) or in strict mode.
    fn has_seccomp_filter(&self) -> bool {
        let threads = self.threads().unwrap_or_default();
        threads.iter().any(|thread| {
            fs::read_to_string(format!("/proc/{}/task/{thread}/status", self.pid))
                .unwrap_or_default()
                .lines()
                .filter_map(|line| line.strip_prefix("Seccomp:"))
                .any(|mode| mode.trim() != "0")
        })
    }

    /// Its descriptor of [`DEVICE`], where it has inherited one.
    fn device(&self) -> Option<u64> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid)).ok()?;
        entries
            .filter_map(Result::ok)
            .find(|entry| fs::read_link(entry.path()).is_ok_and(|to| to.as_os_str() == DEVICE))
            .and_then(|entry| entry.file_name().to_str()?.parse().ok())
    }

    /// A `syscall` instruction: in the kernel's own mapping, else in the C library, else anywhere.
    fn find_instruction(&self) -> Result<u64, AttachError> {
        let pid = self.pid;
        let mappings = self.mappings()?;
        let memory = File::open(format!("/proc/{pid}/mem"))
            .map_err(|source| AttachError::Look { pid, source })?;
        let mut code: Vec<_> = mappings.iter().filter(|found| found.executable).collect();
        code.sort_by_key(|found| match found.name.as_str() {
            "[vdso]" => 0,
            name if name.contains("libc") => 1,
            "[vsyscall]" => 3,
            _ => 2,
        });
        code.into_iter()
            .find_map(|found| {
                let length = (found.end - found.start).min(SEARCH_BYTES);
                let mut bytes = vec![0; usize::try_from(length).ok()?];
                memory.read_exact_at(&mut bytes, found.start).ok()?;
                let at = bytes.windows(2).position(|pair| pair == SYSCALL)?;
                Some(found.start + at as u64)
            })
            .ok_or(AttachError::NoInstruction(pid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_has_ended_is_told_so_before_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        assert!(process.mappings().is_ok());
        child.kill().unwrap();
        assert!(process.wait(PollTimeout::NONE));
        for gone in [
            process.mappings().map(drop),
            process.unmap_shared(&[(0x1000, 0x1000)]).map(drop),
        ] {
            assert!(matches!(gone, Err(AttachError::Gone { .. })), "{gone:?}");
        }
        child.wait().unwrap();
    }
}
