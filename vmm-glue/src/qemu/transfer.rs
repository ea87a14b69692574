//! The device state, out of a QEMU and into another: its own migration, over a socket that lazyvm holds the other end of,
//! so that it never touches a disk.

use std::io::{self, Read, Write};
use std::net::Shutdown;
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
    #[error("QEMU's migration is still {status} after {} s", within.as_secs())]
    Slow {
        /// Its word for what it does.
        status: String,
        /// For how long it was waited for.
        within: Duration,
    },
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
pub(super) fn load(qmp: &mut Qmp, socket: UnixStream, state: &[u8]) -> Result<(), TransferError> {
    let socket = &socket;
    thread::scope(|scope| {
        // QEMU reads while it answers; it may wait for pages meanwhile.
        let writer = scope.spawn(move || {
            let mut socket = socket;
            socket
                .write_all(state)
                .and_then(|()| socket.shutdown(Shutdown::Write))
        });
        // Nobody reads any more after a failure, and the writer would wait.
        take_in(qmp).inspect_err(|_| {
            let _ = socket.shutdown(Shutdown::Both);
        })?;
        match writer.join() {
            Ok(written) => written.map_err(TransferError::Socket),
            Err(_) => Err(TransferError::Socket(io::ErrorKind::BrokenPipe.into())),
        }
    })
}

/// Has QEMU take in what comes through the socket.
fn take_in(qmp: &mut Qmp) -> Result<(), TransferError> {
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
    Ok(())
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
            _ if Instant::now() > deadline => {
                return Err(TransferError::Slow {
                    status: status.to_owned(),
                    within: PATIENCE,
                });
            }
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
pub(super) fn cancel(qmp: &mut Qmp) -> Result<(), TransferError> {
    cancel_within(qmp, PATIENCE)
}

fn cancel_within(qmp: &mut Qmp, limit: Duration) -> Result<(), TransferError> {
    let deadline = Instant::now() + limit;
    let mut asked = false;
    loop {
        let answer = qmp.run("query-migrate", json!({}))?;
        if !is_under_way(&answer) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let status = answer.get("status").and_then(Value::as_str);
            let status = status.unwrap_or("under way").to_owned();
            return Err(TransferError::Slow {
                status,
                within: limit,
            });
        }
        if !asked {
            qmp.run("migrate_cancel", json!({}))?;
            asked = true;
        }
        thread::sleep(ASK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::qemu::peer::{Peer, conversation};

    #[test]
    fn a_migration_that_does_not_end_is_not_taken_as_cancelled() {
        let goes_on = |peer: &mut Peer, request: &Value| {
            let answer = match request["execute"].as_str() {
                Some("query-migrate") => json!({ "status": "cancelling" }),
                _ => json!({}),
            };
            peer.answer(request, answer);
            true
        };
        conversation(goes_on, |mut qmp| {
            let error = cancel_within(&mut qmp, Duration::from_millis(20)).unwrap_err();
            assert!(error.to_string().contains("still cancelling"), "{error}");
        });
    }

    #[test]
    fn a_migration_that_ends_is_cancelled_once() {
        let mut asked = 0;
        let mut looks = 0;
        let ends = |peer: &mut Peer, request: &Value| {
            let answer = match request["execute"].as_str() {
                Some("query-migrate") => {
                    looks += 1;
                    json!({ "status": if looks > 3 { "cancelled" } else { "active" } })
                }
                _ => {
                    asked += 1;
                    json!({})
                }
            };
            peer.answer(request, answer);
            true
        };
        conversation(ends, |mut qmp| cancel(&mut qmp).unwrap());
        assert_eq!(asked, 1);
    }

    #[test]
    fn a_refused_load_does_not_wait_for_a_reader() {
        let (told, result) = mpsc::channel();
        thread::spawn(move || {
            let refuses = |peer: &mut Peer, request: &Value| {
                peer.refuse(request, "no such fd");
                true
            };
            // More than a socket holds, and nobody reads it or closes.
            let (ours, _theirs) = UnixStream::pair().unwrap();
            let error = conversation(refuses, |mut qmp| load(&mut qmp, ours, &vec![0; 8 << 20]));
            told.send(error.unwrap_err().to_string()).unwrap();
        });
        // Without an end there would be none.
        let error = result.recv_timeout(Duration::from_secs(30)).unwrap();
        assert_eq!(error, "QEMU refuses migrate-incoming: no such fd");
    }
}
