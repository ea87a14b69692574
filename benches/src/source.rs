//! The source of a run: a process of its own, so that its memory and its time are its own.
//!
//! It reads commands, a line each, from standard input and answers each with a line of JSON on standard output. It ends
//! when its standard input does.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use lazyvm_server::{Server, SessionConfig};
use lazyvm_vmm_glue::plain::PlainMachine;
use lazyvm_wire::Ticket;
use lazyvm_wire::control::Lane;
use lazyvm_wire::trust::{Fingerprint, Identity};
use serde::{Deserialize, Serialize};

use crate::bare::{self, Flavour};
use crate::error::BenchError;
use crate::image::{self, Content};

/// The words behind the executable's name that, with an address behind them, have to lead to [`run`].
pub const COMMAND: [&str; 2] = ["bench", "source"];

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Request {
    /// Make an image; answers [`Answer::Ready`].
    Image { bytes: u64, content: Content },
    /// Serve it once more; answers [`Answer::Ticket`].
    Session { push: bool },
    /// Start a bare QUIC server; answers [`Answer::Bare`].
    Bare { flavour: Flavour, bulk: bool },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Answer {
    Ready,
    Ticket(String),
    Bare(SocketAddr, Fingerprint),
}

/// Serves at this address until standard input ends.
///
/// # Errors
/// [`BenchError`].
pub fn run(at: IpAddr) -> Result<(), BenchError> {
    let identity = Identity::generate()?;
    let server = Server::bind((at, 0).into(), &identity)?;
    let mut image: Option<File> = None;
    let mut bare_server = None;
    for line in io::stdin().lock().lines() {
        let request: Request = serde_json::from_str(&line?)
            .map_err(|error| BenchError::SourceSays(error.to_string()))?;
        let answer = match request {
            Request::Image { bytes, content } => {
                image = Some(image::make(bytes, content)?);
                Answer::Ready
            }
            Request::Session { push } => {
                let image = image
                    .as_ref()
                    .ok_or(io::Error::from(io::ErrorKind::NotFound))?;
                let machine = Arc::new(PlainMachine::new(image.try_clone()?)?);
                let session = server.add_session(SessionConfig {
                    push,
                    ..SessionConfig::new(machine)
                })?;
                Answer::Ticket(
                    server
                        .ticket(&session, vec![server.local_addr()?])
                        .to_text(),
                )
            }
            Request::Bare { flavour, bulk } => {
                let lane = if bulk { Lane::Bulk } else { Lane::Fault };
                // The one before has done its work, and ends.
                let started =
                    bare_server.insert(bare::Server::start(&identity, flavour, lane, at)?);
                Answer::Bare(started.address, identity.fingerprint())
            }
        };
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &answer).map_err(io::Error::from)?;
        out.write_all(b"\n")?;
        out.flush()?;
    }
    Ok(())
}

/// A source's process, as the run sees it.
pub(crate) struct Source {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Source {
    pub fn start(at: IpAddr) -> Result<Self, BenchError> {
        let start = || {
            let mut child = Command::new(std::env::current_exe()?)
                .args(COMMAND)
                .arg(at.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()?;
            let pipes = child.stdin.take().zip(child.stdout.take());
            let (input, output) = pipes.ok_or(io::Error::from(io::ErrorKind::BrokenPipe))?;
            Ok(Self {
                child,
                input: Some(input),
                output: BufReader::new(output),
            })
        };
        start().map_err(|error| BenchError::Source("it starts", error))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn image(&mut self, bytes: u64, content: Content) -> Result<(), BenchError> {
        match self.ask(&Request::Image { bytes, content })? {
            Answer::Ready => Ok(()),
            _ => Err(unexpected()),
        }
    }

    pub fn session(&mut self, push: bool) -> Result<Ticket, BenchError> {
        match self.ask(&Request::Session { push })? {
            Answer::Ticket(text) => Ok(Ticket::parse(&text)?),
            _ => Err(unexpected()),
        }
    }

    pub fn bare(
        &mut self,
        flavour: Flavour,
        lane: Lane,
    ) -> Result<(SocketAddr, Fingerprint), BenchError> {
        match self.ask(&Request::Bare {
            flavour,
            bulk: lane == Lane::Bulk,
        })? {
            Answer::Bare(address, fingerprint) => Ok((address, fingerprint)),
            _ => Err(unexpected()),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, BenchError> {
        let mut exchange = || {
            let input = self
                .input
                .as_mut()
                .ok_or(io::Error::from(io::ErrorKind::BrokenPipe))?;
            serde_json::to_writer(&mut *input, request)?;
            input.write_all(b"\n")?;
            input.flush()?;
            let mut line = String::new();
            self.output.read_line(&mut line)?;
            Ok(line)
        };
        let line = exchange().map_err(|error| BenchError::Source("it is asked", error))?;
        serde_json::from_str(&line).map_err(|_| BenchError::SourceSays(line))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        // Its standard input ends, so it does too.
        drop(self.input.take());
        let _ = self.child.wait();
    }
}

fn unexpected() -> BenchError {
    BenchError::SourceSays("an answer to something else".to_owned())
}
