//! What a machine cannot do, and why.

use std::io;
use std::path::PathBuf;

use super::super::boot::LoadError;
use super::super::control::BindError;
use super::super::exit::ExitReason;
use super::super::hardware::HardwareError;
use super::super::memory::MemoryError;
use super::super::serial::SerialTarget;
use super::super::state::TransferError;

/// A machine that can't be started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// KVM or the host.
    #[error("cannot make the machine")]
    Hardware(#[from] HardwareError),
    /// Its memory.
    #[error("cannot make its memory")]
    Memory(#[from] MemoryError),
    /// What is to run in it.
    #[error("cannot load its payload")]
    Load(#[from] LoadError),
    /// All around it.
    #[error("cannot set it up")]
    Assemble(#[from] AssembleError),
}

/// What stands around a machine's hardware can't be made.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// The serial output's file.
    #[error("cannot open the serial console's output {target:?}")]
    Console {
        /// Where it was to go.
        target: SerialTarget,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The control socket.
    #[error("cannot make the control socket {}", path.display())]
    Control {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: BindError,
    },
    /// The description of its needs.
    #[error("cannot write down what the machine needs")]
    Offer(#[from] postcard::Error),
    /// Interrupt lines, signals, threads.
    #[error("cannot {step}")]
    Step {
        /// What was to be done.
        step: &'static str,
        /// Why it could not.
        #[source]
        source: io::Error,
    },
}

/// Something that the machine can't do now.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// It has not started here yet.
    #[error("the machine has not arrived yet: it has no state")]
    Incoming,
    /// It was started before.
    #[error("the machine has been started already")]
    Started,
    /// It is no more.
    #[error("the machine has ended: {0}")]
    Stopped(ExitReason),
    /// Not all its memory is here.
    #[error("the machine's memory is still arriving; it can be moved on once that is complete")]
    MemoryArriving,
    /// It may run elsewhere.
    #[error(
        "the machine's state was handed out for a move, so it may be running elsewhere; resuming it here too would \
         give two of it. If it is certain that it does not run elsewhere, resume it by force"
    )]
    HandedOut,
    /// It runs, so this would cut it short.
    #[error("the machine is running; only a paused one can be released")]
    NotPaused,
    /// KVM refused.
    #[error("cannot take the machine's state")]
    Transfer(#[from] TransferError),
    /// KVM does not note writes.
    #[error("cannot note which pages the machine writes (KVM's dirty log; Linux 5.5 or newer)")]
    Track(#[source] vmm_sys_util::errno::Error),
    /// Nobody notes them, or for someone else.
    #[error(
        "the machine's writes are not being noted for this tracker; another one may have begun"
    )]
    NotTracked,
    /// KVM does not give registers.
    #[error("cannot read the machine's registers")]
    Registers(#[source] vmm_sys_util::errno::Error),
    /// A vCPU does not come out of the guest.
    #[error("vCPU {cpu} does not tell its registers")]
    Silent {
        /// Which.
        cpu: u32,
    },
    /// The kernel does not tell which pages are mapped.
    #[error("cannot watch which pages the machine touches (PAGEMAP_SCAN; Linux 6.7 or newer)")]
    Watch(#[source] io::Error),
    /// The state can't be written.
    #[error("cannot encode the machine's state")]
    Encode(#[from] postcard::Error),
    /// A thread can't be made.
    #[error("cannot start a vCPU's thread")]
    Thread(#[source] io::Error),
}
