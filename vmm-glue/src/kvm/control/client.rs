//! The other side of the control socket: whoever asks and tells.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lazyvm_wire::STATE_MAX;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::x86;

use super::{
    CONTROL_VERSION, Command, MemoryInfo, Outcome, REPLY_MAX, Reply, Request, Status, line_of,
    parse,
};

/// How long the machine may take to answer. A pause may have to wait for a page that is on its way.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A request that was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody answers there.
    #[error("no machine answers at {}", path.display())]
    NotThere {
        /// Where.
        path: PathBuf,
        /// The system's words.
        #[source]
        source: io::Error,
    },
    /// Not for this user.
    #[error("no permission to talk to the machine at {}", path.display())]
    Permission {
        /// Where.
        path: PathBuf,
    },
    /// The conversation broke.
    #[error("lost the machine at {}", path.display())]
    Lost {
        /// Where.
        path: PathBuf,
        /// How.
        #[source]
        source: io::Error,
    },
    /// Not this protocol.
    #[error("what answers at {} does not speak as a machine does: {problem}", path.display())]
    Protocol {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The machine says no.
    #[error("the machine refuses: {0}")]
    Refused(String),
}

/// A conversation with a machine.
#[derive(Debug)]
pub struct ControlClient {
    path: PathBuf,
    stream: UnixStream,
    /// Read, and not yet used.
    buffer: Vec<u8>,
}

impl ControlClient {
    /// Connects to the machine whose control socket is at `path`.
    ///
    /// # Errors
    /// [`ControlError::NotThere`], [`ControlError::Permission`], [`ControlError::Lost`].
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let owned = || path.to_owned();
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => ControlError::Permission { path: owned() },
            _ => ControlError::NotThere {
                path: owned(),
                source,
            },
        })?;
        stream
            .set_read_timeout(Some(TIMEOUT))
            .and_then(|()| stream.set_write_timeout(Some(TIMEOUT)))
            .map_err(|source| ControlError::Lost {
                path: owned(),
                source,
            })?;
        Ok(Self {
            path: owned(),
            stream,
            buffer: Vec::new(),
        })
    }

    /// Asks what the machine is doing.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn status(&mut self) -> Result<Status, ControlError> {
        match self.request(Command::Status)?.0 {
            Outcome::Status(status) => Ok(*status),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Stops its vCPUs.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn pause(&mut self) -> Result<(), ControlError> {
        self.do_it(Command::Pause)
    }

    /// Lets it run on. `force`: even if its state was handed out, so that it may be running elsewhere.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn resume(&mut self, force: bool) -> Result<(), ControlError> {
        self.do_it(Command::Resume { force })
    }

    /// Ends it.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn quit(&mut self) -> Result<(), ControlError> {
        self.do_it(Command::Quit)
    }

    /// Ends it because it runs elsewhere now.
    ///
    /// # Errors
    /// [`ControlError`]; refused unless it is paused.
    pub fn release(&mut self) -> Result<(), ControlError> {
        self.do_it(Command::Release)
    }

    /// Asks for its memory: how it lies, what it needs, and the file behind it, for reading.
    ///
    /// # Errors
    /// [`ControlError`]; refused while the memory is still arriving.
    pub fn memory(&mut self) -> Result<(MemoryInfo, File), ControlError> {
        match self.request(Command::Memory)? {
            (Outcome::Memory(info), Some(file)) => Ok((*info, file)),
            (Outcome::Memory(_), None) => Err(self.problem("its memory came without a descriptor")),
            (other, _) => Err(self.unexpected(&other)),
        }
    }

    /// Pauses it and takes its state.
    ///
    /// # Errors
    /// [`ControlError`]; where it is [`ControlError::Refused`], the machine runs on if it ran before.
    pub fn state(&mut self) -> Result<Vec<u8>, ControlError> {
        let bytes = match self.request(Command::State)?.0 {
            Outcome::State { bytes } => bytes,
            other => return Err(self.unexpected(&other)),
        };
        if bytes > STATE_MAX as u64 {
            return Err(self.problem(&format!("a state of {bytes} bytes")));
        }
        self.read_bytes(bytes as usize)
    }

    /// Has it note which pages it writes from now on; gives the session's number.
    ///
    /// # Errors
    /// [`ControlError`]; refused while the memory is still arriving, and by monitors that can't.
    pub fn track(&mut self) -> Result<u64, ControlError> {
        match self.request(Command::Track)?.0 {
            Outcome::Tracking { session } => Ok(session),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Takes the pages that it has written since the last time, of an image of `pages`: page `n` is bit `n % 8` of byte
    /// `n / 8`.
    ///
    /// # Errors
    /// [`ControlError`]; what was written may then be lost, and any page may have been. Refused for a session that has
    /// ended.
    pub fn written(&mut self, session: u64, pages: u64) -> Result<Vec<u8>, ControlError> {
        match self.request(Command::Written { session })?.0 {
            Outcome::Written { bytes } if bytes == pages.div_ceil(8) => {
                self.read_bytes(bytes as usize)
            }
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has it note writes no longer. No effect on a session that has ended.
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn untrack(&mut self, session: u64) -> Result<(), ControlError> {
        self.do_it(Command::Untrack { session })
    }

    /// Asks where its processors are: the registers that point at memory.
    ///
    /// # Errors
    /// [`ControlError`]; refused by monitors that can't.
    pub fn registers(&mut self) -> Result<Vec<x86::Vcpu>, ControlError> {
        match self.request(Command::Registers)?.0 {
            Outcome::Registers { vcpus } => Ok(vcpus),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has it show what it touches from now on.
    ///
    /// # Errors
    /// [`ControlError`]; refused while the memory is still arriving, and by monitors that can't.
    pub fn watch(&mut self) -> Result<(), ControlError> {
        self.do_it(Command::Watch)
    }

    /// Asks which pages of `pages` it has touched since; a bitmap as of [`ControlClient::written`].
    ///
    /// # Errors
    /// [`ControlError`].
    pub fn touched(&mut self, pages: u64) -> Result<Vec<u8>, ControlError> {
        match self.request(Command::Touched)?.0 {
            Outcome::Touched { bytes } if bytes == pages.div_ceil(8) => {
                self.read_bytes(bytes as usize)
            }
            other => Err(self.unexpected(&other)),
        }
    }

    /// What comes behind a reply's line.
    fn read_bytes(&mut self, count: usize) -> Result<Vec<u8>, ControlError> {
        let mut bytes = vec![0; count];
        let buffered = self.buffer.len().min(count);
        bytes[..buffered].copy_from_slice(&self.buffer[..buffered]);
        self.buffer.drain(..buffered);
        self.stream
            .read_exact(&mut bytes[buffered..])
            .map_err(|source| self.lost(source))?;
        Ok(bytes)
    }

    fn do_it(&mut self, command: Command) -> Result<(), ControlError> {
        match self.request(command)?.0 {
            Outcome::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn request(&mut self, command: Command) -> Result<(Outcome, Option<File>), ControlError> {
        let line = line_of(&Request {
            v: CONTROL_VERSION,
            command,
        })
        .map_err(|error| self.problem(&error.to_string()))?;
        self.stream
            .write_all(&line)
            .map_err(|source| self.lost(source))?;
        let (line, file) = self.read_line()?;
        let reply: Reply = parse(&line).map_err(|problem| self.problem(&problem))?;
        match reply.outcome {
            Outcome::Error { message } => Err(ControlError::Refused(message)),
            outcome => Ok((outcome, file)),
        }
    }

    /// A line without its end, and the descriptor that came with it, if any.
    fn read_line(&mut self) -> Result<(Vec<u8>, Option<File>), ControlError> {
        let mut received = None;
        let mut searched = 0;
        loop {
            if let Some(end) = self.buffer[searched..]
                .iter()
                .position(|&byte| byte == b'\n')
            {
                let mut line: Vec<u8> = self.buffer.drain(..=searched + end).collect();
                line.pop();
                return Ok((line, received));
            }
            searched = self.buffer.len();
            if searched >= REPLY_MAX {
                return Err(self.problem("a reply without an end"));
            }
            let mut chunk = [0; 16 * 1024];
            let (count, file) = match self.stream.recv_with_fd(&mut chunk) {
                Ok(received) => received,
                Err(error) if error.errno() == nix::libc::EINTR => continue,
                Err(error) => return Err(self.lost(error.into())),
            };
            if count == 0 {
                return Err(self.lost(io::ErrorKind::UnexpectedEof.into()));
            }
            self.buffer.extend_from_slice(&chunk[..count]);
            if let Some(file) = file {
                // As it came, a child process would inherit it; a clone is not inherited.
                received = Some(file.try_clone().map_err(|source| self.lost(source))?);
            }
        }
    }

    fn lost(&self, source: io::Error) -> ControlError {
        ControlError::Lost {
            path: self.path.clone(),
            source,
        }
    }

    fn problem(&self, problem: &str) -> ControlError {
        ControlError::Protocol {
            path: self.path.clone(),
            problem: problem.to_owned(),
        }
    }

    fn unexpected(&self, outcome: &Outcome) -> ControlError {
        self.problem(&format!("an answer to another question: {outcome:?}"))
    }
}
