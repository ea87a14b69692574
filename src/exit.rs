//! Exit codes: what a script can rely on.

use std::error::Error;
use std::process::ExitCode;

use lazyvm_pager::uffd::RegisterError;
use lazyvm_pager::{ConnectError, PagerError};
use lazyvm_server::{RecordError, ServerError, snapshot};
use lazyvm_vmm_glue::attach::AttachError;
use lazyvm_vmm_glue::firecracker;
use lazyvm_vmm_glue::firecracker::api::ApiError;
use lazyvm_vmm_glue::firecracker::snapshot::SnapshotError;
use lazyvm_vmm_glue::kvm::machine::AssembleError;
use lazyvm_vmm_glue::kvm::source::RemoteError;
use lazyvm_vmm_glue::kvm::{
    CompatibilityError, ControlError, HardwareError, LoadError, MemoryError,
};
use lazyvm_vmm_glue::qemu::{self, QmpError, TransferError};
use lazyvm_wire::TicketError;
use lazyvm_wire::control::Rejection;

/// How a command ended. The numbers stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// What was asked for is done.
    Done = 0,
    /// Anything that no other code tells.
    Failed = 1,
    /// The command line.
    Usage = 2,
    /// No right to the session.
    Authentication = 3,
    /// No hand-over took place.
    NotMoved = 4,
    /// The move was broken off after the hand-over.
    BrokenOff = 5,
    /// The destination does not take the machine.
    Refused = 6,
    /// Pages differ.
    Integrity = 7,
    /// The host.
    Environment = 8,
}

impl Exit {
    const ALL: [Self; 9] = [
        Self::Done,
        Self::Failed,
        Self::Usage,
        Self::Authentication,
        Self::NotMoved,
        Self::BrokenOff,
        Self::Refused,
        Self::Integrity,
        Self::Environment,
    ];

    /// For the help text.
    const fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Failed => "another failure, told in the message",
            Self::Usage => {
                "usage: the command line is wrong, or names a file that is not what it must be"
            }
            Self::Authentication => {
                "authentication: wrong secret or key, or a ticket that is expired or used"
            }
            Self::NotMoved => {
                "the other side was lost, or a signal came, before the hand-over: the VM runs at the source"
            }
            Self::BrokenOff => {
                "broken off after the hand-over: the VM's memory may not be complete"
            }
            Self::Refused => {
                "refused: the destination can't run this VM, which runs on at the source"
            }
            Self::Integrity => {
                "integrity: --verify found pages that differ from the source's, or a snapshot's files are damaged"
            }
            Self::Environment => {
                "this host lacks something: KVM, userfaultfd, memory, a free port, a machine at the socket"
            }
        }
    }

    /// The codes and their meanings, one a line.
    pub fn table() -> String {
        let lines = Self::ALL.map(|exit| format!("  {}  {}", exit as u8, exit.meaning()));
        format!("Exit codes:\n{}", lines.join("\n"))
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A failure that is told in words of the command line's own.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Problem {
    exit: Exit,
    text: String,
}

impl Problem {
    /// With this code and these words, which say what to do.
    pub fn new(exit: Exit, text: impl Into<String>) -> Self {
        Self {
            exit,
            text: text.into(),
        }
    }

    /// For what a later release will do.
    pub fn not_in_this_release(what: &str) -> Self {
        Self::new(Exit::Usage, format!("{what} is not in this release"))
    }
}

/// The code of a failure.
pub fn of_anyhow(error: &anyhow::Error) -> Exit {
    of(error.as_ref())
}

/// The code of a failure: the first of its causes that has one.
pub fn of(error: &(dyn Error + 'static)) -> Exit {
    std::iter::successors(Some(error), |&error| error.source())
        .find_map(of_one)
        .unwrap_or(Exit::Failed)
}

fn of_one(error: &(dyn Error + 'static)) -> Option<Exit> {
    None.or_else(|| error.downcast_ref().map(|problem: &Problem| problem.exit))
        .or_else(|| error.downcast_ref().and_then(of_pager))
        .or_else(|| error.downcast_ref().map(of_connect))
        .or_else(|| error.downcast_ref().and_then(of_server))
        .or_else(|| error.downcast_ref().map(of_record))
        .or_else(|| error.downcast_ref().and_then(of_hardware))
        .or_else(|| error.downcast_ref().map(of_memory))
        .or_else(|| error.downcast_ref().map(of_lazy_memory))
        .or_else(|| error.downcast_ref().and_then(of_assembly))
        .or_else(|| error.downcast_ref().and_then(of_control))
        .or_else(|| error.downcast_ref().and_then(of_remote))
        .or_else(|| error.downcast_ref().and_then(of_api))
        .or_else(|| error.downcast_ref().and_then(of_firecracker_source))
        .or_else(|| error.downcast_ref().and_then(of_firecracker))
        .or_else(|| error.is::<SnapshotError>().then_some(Exit::Usage))
        .or_else(|| error.downcast_ref().map(of_snapshot))
        .or_else(|| error.downcast_ref().and_then(of_taking))
        .or_else(|| error.downcast_ref().and_then(of_qemu_source))
        .or_else(|| error.downcast_ref().and_then(of_qemu_destination))
        .or_else(|| error.is::<CompatibilityError>().then_some(Exit::Refused))
        .or_else(|| (error.is::<LoadError>() || error.is::<TicketError>()).then_some(Exit::Usage))
}

fn of_pager(error: &PagerError) -> Option<Exit> {
    Some(match error {
        PagerError::Refused(_) => Exit::Refused,
        PagerError::SourceLost => Exit::NotMoved,
        PagerError::SourceLostAtHandover => Exit::BrokenOff,
        PagerError::Register(RegisterError::Memory(error)) => of_lazy_memory(error),
        PagerError::Open(_) | PagerError::Register(_) | PagerError::Thread(_) => Exit::Environment,
        PagerError::Shared(error) => of(error.as_ref()),
        PagerError::Connect(_) | PagerError::Memory(_) | PagerError::Trust(_) => return None,
    })
}

fn of_connect(error: &ConnectError) -> Exit {
    match error {
        ConnectError::WrongServer(_) => Exit::Authentication,
        ConnectError::Rejected(rejection) => match rejection {
            Rejection::WrongSecret | Rejection::Expired | Rejection::Used => Exit::Authentication,
            Rejection::Version(_) => Exit::Refused,
            Rejection::Machine(_) => Exit::NotMoved,
            Rejection::Protocol(_) => Exit::Failed,
        },
        ConnectError::Unreachable { .. } | ConnectError::Control(_) => Exit::NotMoved,
        ConnectError::Socket(_) => Exit::Environment,
        ConnectError::Setup(_) | ConnectError::Protocol(_) => Exit::Failed,
    }
}

fn of_server(error: &ServerError) -> Option<Exit> {
    matches!(error, ServerError::Bind { .. } | ServerError::Thread(_)).then_some(Exit::Environment)
}

fn of_record(error: &RecordError) -> Exit {
    match error {
        RecordError::Io { .. } => Exit::Environment,
        RecordError::Malformed(_) | RecordError::InUse { .. } => Exit::Usage,
    }
}

fn of_hardware(error: &HardwareError) -> Option<Exit> {
    match error {
        HardwareError::Cpus { .. } => Some(Exit::Usage),
        HardwareError::Kvm { .. } => None,
        _ => Some(Exit::Environment),
    }
}

fn of_memory(error: &MemoryError) -> Exit {
    match error {
        MemoryError::TooSmall { .. }
        | MemoryError::NotWhole { .. }
        | MemoryError::Layout { .. } => Exit::Usage,
        MemoryError::Foreign(_) => Exit::Refused,
        MemoryError::Create { .. } | MemoryError::Map { .. } => Exit::Environment,
    }
}

fn of_lazy_memory(error: &lazyvm_pager::memory::MemoryError) -> Exit {
    use lazyvm_pager::memory::MemoryError;
    match error {
        MemoryError::Map { .. } | MemoryError::HugePages { .. } => Exit::Environment,
        _ => Exit::Refused,
    }
}

fn of_assembly(error: &AssembleError) -> Option<Exit> {
    matches!(
        error,
        AssembleError::Console { .. } | AssembleError::Control { .. }
    )
    .then_some(Exit::Environment)
}

fn of_control(error: &ControlError) -> Option<Exit> {
    matches!(
        error,
        ControlError::NotThere { .. } | ControlError::Permission { .. }
    )
    .then_some(Exit::Environment)
}

fn of_api(error: &ApiError) -> Option<Exit> {
    matches!(error, ApiError::NotThere { .. }).then_some(Exit::Environment)
}

/// Errors of an API that show themselves as these have only those causes.
fn of_firecracker(error: &firecracker::destination::DestinationError) -> Option<Exit> {
    use firecracker::destination::DestinationError;
    match error {
        DestinationError::Api(error) => of_api(error),
        DestinationError::Folder(_)
        | DestinationError::Socket { .. }
        | DestinationError::Thread(_) => Some(Exit::Environment),
        _ => None,
    }
}

fn of_firecracker_source(error: &firecracker::source::SourceError) -> Option<Exit> {
    use firecracker::source::SourceError;
    match error {
        SourceError::Api(error) => of_api(error),
        SourceError::Folder(_) | SourceError::NoRoom { .. } => Some(Exit::Environment),
        SourceError::NotRunning { .. } | SourceError::Device(_) => Some(Exit::Usage),
        _ => None,
    }
}

fn of_snapshot(error: &snapshot::SnapshotError) -> Exit {
    use snapshot::SnapshotError;
    match error {
        SnapshotError::Damaged { .. } | SnapshotError::Chunk { .. } => Exit::Integrity,
        SnapshotError::Io { .. } | SnapshotError::Random => Exit::Environment,
        SnapshotError::None(_)
        | SnapshotError::Base { .. }
        | SnapshotError::OtherBase { .. }
        | SnapshotError::Foreign { .. }
        | SnapshotError::Busy(_)
        | SnapshotError::TooLarge => Exit::Usage,
    }
}

/// One that shows itself as its cause has only that one's causes.
fn of_taking(error: &snapshot::TakeError) -> Option<Exit> {
    match error {
        snapshot::TakeError::Files(error) => Some(of_snapshot(error)),
        _ => None,
    }
}

/// An error that shows itself as its cause has only that one's causes.
fn of_remote(error: &RemoteError) -> Option<Exit> {
    match error {
        RemoteError::Control(error) => of_control(error),
        _ => None,
    }
}

/// An error that shows itself as its cause has only that one's causes, so these are looked into here.
fn of_qemu_source(error: &qemu::SourceError) -> Option<Exit> {
    use qemu::SourceError;
    match error {
        SourceError::Qmp(error) | SourceError::Transfer(TransferError::Qmp(error)) => of_qmp(error),
        SourceError::Process(_) | SourceError::Peer { .. } => Some(Exit::Environment),
        SourceError::Memory(error) => Some(of_qemu_memory(error)),
        SourceError::NotRunning(_)
        | SourceError::Migrating
        | SourceError::Blocked(_)
        | SourceError::OtherUser { .. } => Some(Exit::Usage),
        SourceError::Transfer(_) | SourceError::DidNotRun(_) => None,
    }
}

fn of_qemu_destination(error: &qemu::DestinationError) -> Option<Exit> {
    use qemu::DestinationError;
    match error {
        DestinationError::Argument(_)
        | DestinationError::VhostUser(_)
        | DestinationError::InUse { .. } => Some(Exit::Usage),
        DestinationError::Start { .. } | DestinationError::Silent(_) => Some(Exit::Environment),
        DestinationError::Attach(error) => Some(of_attach(error)),
        DestinationError::Memory(error) => Some(of_qemu_memory(error)),
        DestinationError::Qmp(error) | DestinationError::Transfer(TransferError::Qmp(error)) => {
            of_qmp(error).or(Some(Exit::Refused))
        }
        _ => Some(Exit::Refused),
    }
}

fn of_qmp(error: &QmpError) -> Option<Exit> {
    matches!(
        error,
        QmpError::NotThere { .. }
            | QmpError::NoAccess { .. }
            | QmpError::NoGreeting { .. }
            | QmpError::NoAnswer { .. }
    )
    .then_some(Exit::Environment)
}

fn of_attach(_: &AttachError) -> Exit {
    Exit::Environment
}

fn of_qemu_memory(error: &qemu::MemoryError) -> Exit {
    use qemu::MemoryError;
    match error {
        MemoryError::Process(error) => of_attach(error),
        MemoryError::File { .. } => Exit::Environment,
        MemoryError::Qmp(error) => of_qmp(error).unwrap_or(Exit::Failed),
        _ => Exit::Usage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_found_under_what_was_said_about_it() {
        let error = PagerError::Connect(ConnectError::Rejected(Rejection::Expired));
        assert_eq!(
            of_anyhow(&anyhow::Error::new(error).context("outer")),
            Exit::Authentication
        );
        let error = PagerError::Shared(std::sync::Arc::new(PagerError::SourceLost));
        assert_eq!(of(&error), Exit::NotMoved);
        let error = Problem::not_in_this_release("this");
        assert_eq!(of_anyhow(&anyhow::Error::new(error)), Exit::Usage);
        assert_eq!(of_anyhow(&anyhow::anyhow!("of no kind")), Exit::Failed);
    }

    #[test]
    fn a_qemu_that_does_not_answer_has_one_code_wherever_it_is_asked() {
        let error = || QmpError::NoAnswer {
            command: "stop".to_owned(),
            within: std::time::Duration::from_secs(60),
        };
        let at_the_source: [qemu::SourceError; 3] = [
            error().into(),
            qemu::MemoryError::from(error()).into(),
            TransferError::from(error()).into(),
        ];
        let at_the_destination: [qemu::DestinationError; 3] = [
            error().into(),
            qemu::MemoryError::from(error()).into(),
            TransferError::from(error()).into(),
        ];
        for error in &at_the_source {
            assert_eq!(of(error), Exit::Environment, "{error}");
        }
        for error in &at_the_destination {
            assert_eq!(of(error), Exit::Environment, "{error}");
        }
    }

    #[test]
    fn the_table_names_every_code() {
        let table = Exit::table();
        for code in 0..=8 {
            assert!(table.contains(&format!("\n  {code}  ")), "{table}");
        }
    }
}
