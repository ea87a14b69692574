//! A client of the QEMU machine protocol: QEMU's `docs/interop/qmp-spec`.
//!
//! One command at a time, each with a number (`id`) that its answer repeats. What comes besides is passed over: events,
//! since what is waited for is asked for, so that none can be missed; and the answer to a command that was given up,
//! which may come later and would be taken for the next one's otherwise.

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt::PeerCredentials};
use serde_json::{Value, json};

use super::line::{Lines, Message, version};

/// How long QEMU may take for an answer. Its main loop may wait for a disk or for a page.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// How long it may take to greet: it does so at once, but serves one client at a time.
const GREETING_WITHIN: Duration = Duration::from_secs(5);

/// A conversation that fails.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody is there.
    #[error("no QEMU answers at {}: start it with -qmp unix:{},server=on,wait=off", path.display(), path.display())]
    NotThere {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The socket is another user's.
    #[error(
        "the QMP socket {} may not be used by this user: run lazyvm as root or as QEMU's user", path.display()
    )]
    NoAccess {
        /// Where.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No greeting came.
    #[error(
        "{} does not greet as QMP does: it is no QMP socket, or another client is connected to it, of which QEMU serves \
         one at a time; give QEMU one more -qmp for lazyvm", path.display()
    )]
    NoGreeting {
        /// Where.
        path: PathBuf,
        /// What came instead.
        #[source]
        source: io::Error,
    },
    /// QEMU ended or closed.
    #[error(
        "the connection to QEMU was lost at {command}: it has ended, or closed its QMP socket; its own messages say why"
    )]
    Lost {
        /// Doing what.
        command: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// QEMU is there and silent.
    #[error(
        "QEMU has not answered {command} within {} s: it is stopped (kill -STOP, a debugger), or waits for a disk or for \
         network storage; see to that, and try again", within.as_secs()
    )]
    NoAnswer {
        /// What was asked. It may still be done, late.
        command: String,
        /// For how long the answer was waited for.
        within: Duration,
    },
    /// QEMU refused.
    #[error("QEMU refuses {command}: {text}")]
    Refused {
        /// What.
        command: String,
        /// In its own words.
        text: String,
    },
    /// An answer of another form.
    #[error("QEMU's answer to {command} lacks {field}")]
    Unexpected {
        /// To what.
        command: String,
        /// What is missing.
        field: &'static str,
    },
}

/// A connection.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: Lines,
    version: String,
    /// Of the last command.
    id: u64,
    answer_within: Duration,
}

impl Qmp {
    /// Connects and takes the greeting.
    ///
    /// # Errors
    /// [`QmpError`]; QEMU is not disturbed.
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(path).map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::PermissionDenied => QmpError::NoAccess { path, source },
                _ => QmpError::NotThere { path, source },
            }
        })?;
        let mut qmp = Self {
            stream,
            lines: Lines::default(),
            version: String::new(),
            id: 0,
            answer_within: ANSWER_WITHIN,
        };
        let greeting = qmp
            .line(Instant::now() + GREETING_WITHIN)
            .and_then(|line| version(&line).ok_or_else(|| invalid("no greeting")));
        qmp.version = greeting.map_err(|source| QmpError::NoGreeting {
            path: path.to_owned(),
            source,
        })?;
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// With another limit for answers; gives the one before.
    pub(super) fn answer_within(&mut self, limit: Duration) -> Duration {
        std::mem::replace(&mut self.answer_within, limit)
    }

    /// QEMU's version, to be shown.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The process at the other end: it called `listen(2)`.
    ///
    /// # Errors
    /// The system's.
    pub fn peer(&self) -> io::Result<i32> {
        Ok(getsockopt(&self.stream, PeerCredentials)?.pid())
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.exchange(command, &arguments, None)
    }

    /// Hands QEMU a descriptor, which it knows by this name from then on (`getfd`).
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn give(&mut self, name: &str, fd: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.exchange("getfd", &json!({ "fdname": name }), Some(fd))
            .map(drop)
    }

    /// Runs a command of the human monitor, for what QMP has no command.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn human(&mut self, line: &str) -> Result<String, QmpError> {
        let answer = self.run("human-monitor-command", json!({ "command-line": line }))?;
        match answer {
            Value::String(text) => Ok(text),
            _ => Err(QmpError::Unexpected {
                command: line.to_owned(),
                field: "text",
            }),
        }
    }

    /// The VM's run state: `running`, `paused`, `inmigrate`, …
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn status(&mut self) -> Result<String, QmpError> {
        let answer = self.run("query-status", json!({}))?;
        text(&answer, "query-status", "status")
    }

    fn exchange(
        &mut self,
        command: &str,
        arguments: &Value,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Value, QmpError> {
        let within = self.answer_within;
        let failed = |source: io::Error| {
            let command = command.to_owned();
            match source.kind() {
                io::ErrorKind::TimedOut => QmpError::NoAnswer { command, within },
                _ => QmpError::Lost { command, source },
            }
        };
        self.id += 1;
        let id = self.id;
        let mut request =
            json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        request.push('\n');
        let deadline = Instant::now() + within;
        self.send(request.as_bytes(), fd, deadline)
            .map_err(failed)?;
        loop {
            let line = self.line(deadline).map_err(failed)?;
            let message = Message::parse_with_id(&line)
                .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
            match message {
                (Some(of), Message::Return(value)) if of == id => return Ok(value),
                // Without a number: QEMU could not read the command, and so not its number.
                (of, Message::Error(text)) if of.is_none_or(|of| of == id) => {
                    return Err(QmpError::Refused {
                        command: command.to_owned(),
                        text,
                    });
                }
                (of, message) => tracing::trace!(of, ?message, "passed over"),
            }
        }
    }

    fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>, deadline: Instant) -> io::Result<()> {
        let fds: Vec<_> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let mut control = if fd.is_some() { &rights[..] } else { &[] };
        let mut rest = bytes;
        while !rest.is_empty() {
            self.stream.set_write_timeout(Some(left(deadline)?))?;
            let sent = sendmsg::<()>(
                self.stream.as_fd().as_raw_fd(),
                &[IoSlice::new(rest)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            );
            match sent {
                Ok(sent) => {
                    control = &[];
                    rest = &rest[sent..];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The next line.
    fn line(&mut self, deadline: Instant) -> io::Result<Vec<u8>> {
        loop {
            match self.lines.next() {
                Ok(Some(line)) => return Ok(line),
                Ok(None) => {}
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
            }
            self.stream.set_read_timeout(Some(left(deadline)?))?;
            let mut piece = [0; 8192];
            match self.stream.read(&mut piece) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => self.lines.push(&piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// The time until then.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(io::ErrorKind::TimedOut.into()),
        false => Ok(left),
    }
}

/// A text field of an answer.
pub(super) fn text(answer: &Value, command: &str, field: &'static str) -> Result<String, QmpError> {
    answer
        .get(field)
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| QmpError::Unexpected {
            command: command.to_owned(),
            field,
        })
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::Command;

    use super::*;
    use crate::qemu::peer::{Peer, conversation, listening};

    /// Long enough that an answer that is there is taken, and short to wait for one that is not.
    const SOON: Duration = Duration::from_secs(1);

    #[test]
    fn events_between_a_command_and_its_answer_are_passed_over() {
        let answer = |peer: &mut Peer, request: &Value| {
            peer.say(&json!({ "event": "STOP" }));
            match request["execute"].as_str() {
                Some("query-status") => peer.answer(request, json!({ "status": "paused" })),
                Some("cont") => peer.refuse(request, "no"),
                _ => return false,
            }
            true
        };
        conversation(answer, |mut qmp| {
            assert_eq!(qmp.version(), "9.1.0");
            assert_eq!(qmp.peer().unwrap(), std::process::id() as i32);
            assert_eq!(qmp.status().unwrap(), "paused");
            let refused = qmp.run("cont", json!({})).unwrap_err();
            assert_eq!(refused.to_string(), "QEMU refuses cont: no");
            let lost = qmp.run("quit", json!({})).unwrap_err();
            assert!(matches!(lost, QmpError::Lost { .. }), "{lost}");
        });
    }

    #[test]
    fn a_qemu_that_does_not_answer_is_told_apart_from_one_that_is_gone() {
        let answer = |peer: &mut Peer, _: &Value| {
            // What is no answer does not count as one.
            peer.say(&json!({ "return": {} }));
            peer.say(&json!({ "return": {}, "id": 1_000_000 }));
            peer.say(&json!({ "return": {}, "id": "mine" }));
            true
        };
        conversation(answer, |mut qmp| {
            qmp.answer_within(SOON);
            let error = qmp.run("quit", json!({})).unwrap_err();
            assert!(matches!(error, QmpError::NoAnswer { .. }), "{error}");
            assert!(error.to_string().contains("kill -STOP"), "{error}");
        });
    }

    #[test]
    fn a_late_answer_is_not_taken_for_the_next_commands() {
        let mut held_back = None;
        let answer = |peer: &mut Peer, request: &Value| {
            match held_back.take() {
                None => held_back = Some(request.clone()),
                Some(late) => {
                    peer.answer(&late, json!({ "status": "running" }));
                    peer.say(&json!({ "event": "STOP" }));
                    peer.answer(request, json!({ "status": "paused" }));
                }
            }
            true
        };
        conversation(answer, |mut qmp| {
            qmp.answer_within(SOON);
            qmp.status().unwrap_err();
            assert_eq!(qmp.status().unwrap(), "paused");
        });
    }

    #[test]
    fn a_late_refusal_is_not_taken_for_the_next_commands() {
        let mut held_back = None;
        let answer = |peer: &mut Peer, request: &Value| {
            match held_back.take() {
                None => held_back = Some(request.clone()),
                Some(late) => {
                    peer.refuse(&late, "late");
                    peer.answer(request, json!({ "status": "paused" }));
                }
            }
            true
        };
        conversation(answer, |mut qmp| {
            qmp.answer_within(SOON);
            qmp.status().unwrap_err();
            assert_eq!(qmp.status().unwrap(), "paused");
        });
    }

    /// A stop and `kill -CONT` interrupt a wait on a socket that has a time limit, without any handler: `signal(7)`.
    #[test]
    fn a_stop_of_lazyvm_does_not_break_a_command_off() {
        let serve = |stream: UnixStream| {
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut peer = Peer::greet(stream);
            let mut line = String::new();
            lines.read_line(&mut line).unwrap();
            peer.answer(&serde_json::from_str(&line).unwrap(), json!({}));
            // The other side is at it, and can't end before it is read from.
            lines.fill_buf().unwrap();
            let own = std::process::id();
            let stop = format!("sleep 0.1; kill -STOP {own}; sleep 0.02; kill -CONT {own};");
            // The first one finds part of it sent, the second one nothing.
            let stop = stop.repeat(2);
            let stopped = Command::new("sh").args(["-c", &stop]).status().unwrap();
            assert!(stopped.success());
            line.clear();
            lines.read_line(&mut line).unwrap();
            let request: Value = serde_json::from_str(&line).unwrap();
            peer.answer(&request, request["arguments"].clone());
        };
        let long = json!({ "text": "x".repeat(8 << 20) });
        let echoed = listening(serve, |path| {
            let mut qmp = Qmp::connect(path).unwrap();
            qmp.run("echo", long.clone())
        });
        assert!(echoed.unwrap() == long);
    }

    #[test]
    fn what_is_no_qmp_socket_is_told_so() {
        for nonsense in ["HTTP/1.1 400\r\n", "{}\n", "{\"QMP\":{}}\n"] {
            let error = Peer::greeting_with(nonsense, |path| Qmp::connect(path).unwrap_err());
            assert!(matches!(error, QmpError::NoGreeting { .. }), "{error}");
        }
        let error = Qmp::connect(Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("-qmp unix:"), "{error}");
    }
}
