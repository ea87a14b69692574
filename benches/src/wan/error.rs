//! What can go wrong on the rig.

use std::io;
use std::path::PathBuf;

use lazyvm_vmm_glue::qemu::QmpError;

/// A run over the emulated path that failed.
#[derive(Debug, thiserror::Error)]
pub enum WanError {
    /// Namespaces, TUN devices and the memory of other processes are root's.
    #[error("only root can emulate a wide-area path: run this with sudo")]
    NotRoot,
    /// A program or a file that is not there.
    #[error("there is no {0}; .ci/set-up build test installs what the runs need")]
    Missing(&'static str),
    /// No kernel for the guest.
    #[error(
        "there is no Linux kernel for the guest at {}; name one with --kernel, or let .ci/set-up test fetch Debian's",
        .0.display()
    )]
    NoKernel(PathBuf),
    /// What was asked for does not go together.
    #[error("{0}")]
    Asked(String),
    /// Not enough memory.
    #[error("{folder} has room for {free} bytes; two guests' memory takes {needed}")]
    NoRoom {
        /// Where.
        folder: &'static str,
        /// What is there.
        free: u64,
        /// What is needed.
        needed: u64,
    },
    /// Namespaces, addresses, settings.
    #[error("can't set up the emulated path")]
    Network(#[source] io::Error),
    /// The TUN device.
    #[error("can't make a TUN device; the kernel's module tun may be missing (modprobe tun)")]
    Tun(#[source] io::Error),
    /// Files, pipes and threads of the run itself.
    #[error("can't set the run up")]
    Io(#[from] io::Error),
    /// The guest's program.
    #[error("can't make the guest's program: {0}")]
    Guest(String),
    /// A child process does not start.
    #[error("can't start {name}")]
    Start {
        /// Which.
        name: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A child process ended too early.
    #[error("{name} ended ({status}); its last words: {log}")]
    Ended {
        /// Which.
        name: String,
        /// How.
        status: String,
        /// The end of its log.
        log: String,
    },
    /// What was waited for did not come.
    #[error("{what} did not come within {seconds} s; {log}")]
    TooLate {
        /// What.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
        /// Last words of who was to bring it.
        log: String,
    },
    /// QMP.
    #[error("QEMU's monitor")]
    Qmp(#[from] QmpError),
    /// QEMU's own migration failed.
    #[error("QEMU's own migration ended as {status}: {text}")]
    PeerFailed {
        /// Its state.
        status: String,
        /// In its own words.
        text: String,
    },
    /// A report that can't be read.
    #[error("can't read the report of lazyvm resume")]
    Report(#[source] serde_json::Error),
    /// The guest found wrong contents in its memory.
    #[error("the guest saw {0} pages with wrong contents after the move by {1}")]
    WrongMemory(u64, String),
    /// A signal.
    #[error("ended by a signal")]
    Interrupted,
}
