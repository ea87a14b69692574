//! The device state, out of a QEMU and into another: its own migration, over a socket that lazyvm holds the other end of,
//! so that it never touches a disk.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_wire::STATE_MAX;
use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};

/// QEMU's name for the socket.
const SOCKET_NAME: &str = "lazyvm-state";

/// How long QEMU may be silent while it writes its state, or take to load it.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often QEMU is asked how far it is.
const ASK_EVERY: Duration = Duration::from_micros(500);

/// The capability that leaves shared RAM out.
const IGNORE_SHARED: &str = "x-ignore-shared";

/// Capabilities that make another stream, or one that needs an answer. Those that are on are switched off for the move.
const UNWANTED: [&str; 12] = [
    "multifd",
    "mapped-ram",
    "postcopy-ram",
    "postcopy-preempt",
    "background-snapshot",
    "return-path",
    "switchover-ack",
    "x-colo",
    "compress",
    "xbzrle",
    "zero-copy-send",
    "pause-before-switchover",
];

/// As fast as it goes, in bytes a second: the socket is in memory.
const BANDWIDTH_MAX: u64 = 1 << 40;

/// A state that can't be brought out or in.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The conversation.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// QEMU is too old, or built without migration.
    #[error("this QEMU has no migration capability {IGNORE_SHARED}; QEMU 4.0 and later have it")]
    NoCapability,
    /// The socket.
    #[error("QEMU's device state can't be carried over")]
    Socket(#[source] io::Error),
    /// More than a state can be.
    #[error(
        "QEMU's device state is larger than {} MiB; is all of its RAM shared, and is video memory small?", STATE_MAX >> 20
    )]
    TooLarge,
    /// QEMU says that it failed.
    #[error("QEMU's migration ended as {status}: {reason}")]
    Failed {
        /// Its word for it.
        status: String,
        /// Its reason.
        reason: String,
    },
    /// It takes too long.
    #[error("QEMU's migration is still {0} after 60 s")]
    Slow(String),
}

/// What was changed in a QEMU, to be put back.
#[derive(Clone, Debug, Default)]
pub(super) struct Changed {
    capabilities: Vec<Value>,
    parameters: Value,
}

impl Changed {
    /// Puts it back.
    pub fn undo(self, qmp: &mut Qmp) -> Result<(), QmpError> {
        if !self.capabilities.is_empty() {
            let capabilities = json!({ "capabilities": self.capabilities });
            qmp.run("migrate-set-capabilities", capabilities)?;
        }
        if self.parameters.is_object() {
            qmp.run("migrate-set-parameters", self.parameters)?;
        }
        Ok(())
    }
}

/// Whether QEMU can leave shared RAM out.
pub(super) fn check(qmp: &mut Qmp) -> Result<(), TransferError> {
    let answer = qmp.run("query-migrate-capabilities", json!({}))?;
    capability(&answer, IGNORE_SHARED)
        .map(drop)
        .ok_or(TransferError::NoCapability)
}

/// Sets what the move needs.
pub(super) fn configure(qmp: &mut Qmp) -> Result<Changed, TransferError> {
    let answer = qmp.run("query-migrate-capabilities", json!({}))?;
    let ignore = capability(&answer, IGNORE_SHARED).ok_or(TransferError::NoCapability)?;
    let state = |name: &str, on: bool| json!({ "capability": name, "state": on });
    let mut wanted = vec![state(IGNORE_SHARED, true)];
    let mut before = vec![state(IGNORE_SHARED, ignore)];
    for name in UNWANTED {
        if capability(&answer, name) == Some(true) {
            wanted.push(state(name, false));
            before.push(state(name, true));
        }
    }
    let parameters = qmp.run("query-migrate-parameters", json!({}))?;
    let kept: serde_json::Map<_, _> = ["max-bandwidth", "downtime-limit"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), parameters.get(name)?.clone())))
        .collect();
    qmp.run(
        "migrate-set-capabilities",
        json!({ "capabilities": wanted }),
    )?;
    // The VM stands still while its state is written: there is nothing to be slow for.
    let fast = json!({ "max-bandwidth": BANDWIDTH_MAX, "downtime-limit": 2_000_000 });
    qmp.run("migrate-set-parameters", fast)?;
    Ok(Changed {
        capabilities: before,
        parameters: Value::Object(kept),
    })
}

fn capability(answer: &Value, name: &str) -> Option<bool> {
    answer
        .as_array()?
        .iter()
        .find(|entry| entry.get("capability").and_then(Value::as_str) == Some(name))?
        .get("state")?
        .as_bool()
}

/// One end of a fresh socket is QEMU's, the other one is given.
pub(super) fn open(qmp: &mut Qmp) -> Result<UnixStream, TransferError> {
    let (ours, theirs) = UnixStream::pair().map_err(TransferError::Socket)?;
    qmp.give(SOCKET_NAME, theirs.as_fd())?;
    ours.set_read_timeout(Some(PATIENCE))
        .and_then(|()| ours.set_write_timeout(Some(PATIENCE)))
        .map_err(TransferError::Socket)?;
    Ok(ours)
}

/// The state of a QEMU that was stopped.
pub(super) fn save(qmp: &mut Qmp, socket: &mut UnixStream) -> Result<Vec<u8>, TransferError> {
    qmp.run("migrate", json!({ "uri": format!("fd:{SOCKET_NAME}") }))?;
    let mut state = Vec::with_capacity(1 << 20);
    socket
        .take(STATE_MAX as u64 + 1)
        .read_to_end(&mut state)
        .map_err(TransferError::Socket)?;
    if state.len() > STATE_MAX {
        return Err(TransferError::TooLarge);
    }
    wait_completed(qmp)?;
    Ok(state)
}

/// Loads a state into a QEMU that waits for one.
pub(super) fn load(
    qmp: &mut Qmp,
    mut socket: UnixStream,
    state: &[u8],
) -> Result<(), TransferError> {
    thread::scope(|scope| {
        // QEMU reads while it answers; it may wait for pages meanwhile.
        let writer = scope.spawn(move || socket.write_all(state));
        let uri = json!({ "uri": format!("fd:{SOCKET_NAME}") });
        let start = Instant::now();
        qmp.run("migrate-incoming", uri)?;
        let asked = start.elapsed();
        wait_completed(qmp)?;
        tracing::debug!(
            asked_us = asked.as_micros() as u64,
            us = start.elapsed().as_micros() as u64,
            "QEMU has taken the state in"
        );
        match writer.join() {
            Ok(written) => written.map_err(TransferError::Socket),
            Err(_) => Err(TransferError::Socket(io::ErrorKind::BrokenPipe.into())),
        }
    })
}

fn wait_completed(qmp: &mut Qmp) -> Result<(), TransferError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = qmp.run("query-migrate", json!({}))?;
        let field = |name| answer.get(name).and_then(Value::as_str);
        let status = field("status").unwrap_or("not begun");
        match status {
            "completed" => return Ok(()),
            "failed" | "cancelled" | "cancelling" | "failing" => {
                return Err(TransferError::Failed {
                    status: status.to_owned(),
                    reason: field("error-desc").unwrap_or("no reason given").to_owned(),
                });
            }
            _ if Instant::now() > deadline => return Err(TransferError::Slow(status.to_owned())),
            _ => thread::sleep(ASK_EVERY),
        }
    }
}

/// Whether a migration is under way.
pub(super) fn is_under_way(answer: &Value) -> bool {
    let status = answer.get("status").and_then(Value::as_str);
    !matches!(
        status,
        None | Some("none" | "completed" | "failed" | "cancelled")
    )
}

/// Ends a migration that failed half-way, so that the VM can go on.
pub(super) fn cancel(qmp: &mut Qmp) -> Result<(), QmpError> {
    let deadline = Instant::now() + PATIENCE;
    let mut asked = false;
    loop {
        let answer = qmp.run("query-migrate", json!({}))?;
        if !is_under_way(&answer) || Instant::now() > deadline {
            return Ok(());
        }
        if !asked {
            qmp.run("migrate_cancel", json!({}))?;
            asked = true;
        }
        thread::sleep(ASK_EVERY);
    }
}
