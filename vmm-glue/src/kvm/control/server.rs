//! The machine's side of the control socket.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::super::exit::ExitReason;
use super::super::lock;
use super::super::machine::{OperationError, Shared};
use super::{
    CONTROL_VERSION, Command, MemoryInfo, Outcome, REQUEST_MAX, Reply, Request, line_of, parse,
};

/// Most clients at a time.
const CLIENTS_MAX: usize = 16;

/// How long a client may leave a reply unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A control socket that can't be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process answers there.
    #[error("another machine answers there; end it first, or choose another path")]
    InUse,
    /// Something else has that name.
    #[error("there is something else with that name, which is no socket")]
    NotASocket,
    /// What is left of an earlier machine can't be removed.
    #[error("cannot remove what an earlier machine left there")]
    Stale(#[source] io::Error),
    /// The system refuses.
    #[error("the system refuses it")]
    System(#[from] io::Error),
}

/// The listening socket and its threads. Close it; dropping it alone leaves the socket's file behind.
pub(in crate::kvm) struct ControlServer {
    path: PathBuf,
    /// Device and inode of the socket's file, so that another's is never removed.
    file: (u64, u64),
    /// Closed to end the acceptor.
    wake: Option<UnixStream>,
    acceptor: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens at `path` on behalf of `machine`.
    pub(in crate::kvm) fn bind(path: &Path, machine: Arc<Shared>) -> Result<Self, BindError> {
        let listener = listen_at(path)?;
        let metadata = fs::metadata(path)?;
        let (wake, woken) = UnixStream::pair()?;
        let acceptor = Acceptor {
            listener,
            woken,
            machine,
        };
        let acceptor = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || acceptor.run())?;
        Ok(Self {
            path: path.to_owned(),
            file: (metadata.dev(), metadata.ino()),
            wake: Some(wake),
            acceptor: Some(acceptor),
        })
    }

    /// Answers what is being answered, then ends all conversations and removes the socket's file.
    pub(in crate::kvm) fn close(&mut self) {
        let Some(acceptor) = self.acceptor.take() else {
            return;
        };
        self.wake = None;
        if acceptor.join().is_err() {
            tracing::error!("the control socket's thread did not end as it should");
        }
        let ours = fs::metadata(&self.path)
            .is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the control socket");
        }
    }
}

/// Makes the listening socket. A file left by a process that is gone gives way.
fn listen_at(path: &Path) -> Result<UnixListener, BindError> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(BindError::NotASocket),
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(path).map_err(BindError::Stale)?;
            }
            Err(error) => return Err(error.into()),
            Ok(_) => return Err(BindError::InUse),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let fd: OwnedFd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(io::Error::from)?;
    // Linux makes the file with the socket's own mode, so there is no moment at which others could connect.
    fchmod(&fd, Mode::S_IRUSR | Mode::S_IWUSR).map_err(io::Error::from)?;
    let address = UnixAddr::new(path).map_err(io::Error::from)?;
    bind(fd.as_raw_fd(), &address).map_err(io::Error::from)?;
    listen(&fd, Backlog::MAXCONN).map_err(io::Error::from)?;
    Ok(UnixListener::from(fd))
}

/// Connected clients by number, each to be shut down when the machine ends.
type Clients = Arc<Mutex<HashMap<u64, UnixStream>>>;

struct Acceptor {
    listener: UnixListener,
    /// Its other end is closed when the machine ends.
    woken: UnixStream,
    machine: Arc<Shared>,
}

impl Acceptor {
    fn run(self) {
        let clients = Clients::default();
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        for number in 0_u64.. {
            if !self.wait() {
                break;
            }
            threads.retain(|thread| !thread.is_finished());
            match self.listener.accept() {
                Ok((stream, _)) => threads.extend(self.admit(stream, number, &clients)),
                Err(error) => {
                    tracing::warn!(%error, "control socket");
                    // Out of descriptors, mostly: the connection stays in the queue, so do not spin.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
        for stream in lock(&clients).values() {
            // Whoever is being answered still gets the answer.
            let _ = stream.shutdown(Shutdown::Read);
        }
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a control client's thread panicked");
            }
        }
    }

    /// Waits for a client; `false` when the machine ends.
    fn wait(&self) -> bool {
        loop {
            let mut fds = [
                PollFd::new(self.woken.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[0].any() == Some(true) => return false,
                Ok(_) if fds[1].any() == Some(true) => return true,
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "control socket");
                    return false;
                }
            }
        }
    }

    fn admit(&self, stream: UnixStream, number: u64, clients: &Clients) -> Option<JoinHandle<()>> {
        let mut conversation = Conversation {
            stream,
            machine: Arc::clone(&self.machine),
        };
        let shared = conversation.stream.set_write_timeout(Some(WRITE_TIMEOUT));
        let shared = shared.and_then(|()| conversation.stream.try_clone());
        let stream = match shared {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "control client");
                return None;
            }
        };
        if lock(clients).len() >= CLIENTS_MAX {
            let message = format!("{CLIENTS_MAX} clients are connected already");
            let _ = conversation.reply(Outcome::Error { message });
            return None;
        }
        lock(clients).insert(number, stream);
        let registry = Arc::clone(clients);
        let thread = std::thread::Builder::new()
            .name("control-client".to_owned())
            .spawn(move || {
                if let Err(error) = conversation.run() {
                    tracing::debug!(%error, "control client");
                }
                lock(&registry).remove(&number);
            });
        thread
            .inspect_err(|error| {
                tracing::warn!(%error, "control client");
                lock(clients).remove(&number);
            })
            .ok()
    }
}

struct Conversation {
    stream: UnixStream,
    machine: Arc<Shared>,
}

impl Conversation {
    /// Answers requests until the client goes away.
    fn run(&mut self) -> io::Result<()> {
        let mut reader = BufReader::new(self.stream.try_clone()?);
        let mut line = Vec::new();
        loop {
            line.clear();
            let count = (&mut reader)
                .take(REQUEST_MAX as u64)
                .read_until(b'\n', &mut line)?;
            if count == 0 {
                return Ok(());
            }
            if line.pop() != Some(b'\n') {
                let message =
                    format!("a request of more than {REQUEST_MAX} bytes, or without its end");
                // What follows would be taken for requests.
                return self.reply(Outcome::Error { message });
            }
            match parse::<Request>(&line) {
                Ok(request) => self.answer(request.command)?,
                Err(message) => self.reply(Outcome::Error { message })?,
            }
        }
    }

    fn answer(&mut self, command: Command) -> io::Result<()> {
        tracing::debug!(?command, "control request");
        let machine = Arc::clone(&self.machine);
        match command {
            Command::Status => self.reply(Outcome::Status(Box::new(machine.status()))),
            Command::Pause => self.done(machine.pause()),
            Command::Resume { force } => self.done(machine.resume(force)),
            Command::Quit => {
                machine.stop(ExitReason::Quit);
                self.done(Ok(()))
            }
            Command::Release => self.done(machine.release()),
            Command::Memory => self.hand_memory(&machine),
            Command::State => {
                self.with_bytes(machine.take_state(), |bytes| Outcome::State { bytes })
            }
            Command::Track => match machine.track() {
                Ok(session) => self.reply(Outcome::Tracking { session }),
                Err(error) => self.done(Err(error)),
            },
            Command::Written { session } => {
                let written = machine.take_written(session);
                self.with_bytes(written, |bytes| Outcome::Written { bytes })
            }
            Command::Untrack { session } => self.done(machine.untrack(session)),
            Command::Registers => match machine.registers() {
                Ok(vcpus) => self.reply(Outcome::Registers { vcpus }),
                Err(error) => self.done(Err(error)),
            },
            Command::Watch => self.done(machine.watch()),
            Command::Touched => {
                self.with_bytes(machine.touched(), |bytes| Outcome::Touched { bytes })
            }
        }
    }

    /// A line that tells how many bytes come behind it, and these.
    fn with_bytes(
        &mut self,
        result: Result<Vec<u8>, OperationError>,
        outcome: impl FnOnce(u64) -> Outcome,
    ) -> io::Result<()> {
        match result {
            Ok(bytes) => {
                self.reply(outcome(bytes.len() as u64))?;
                self.stream.write_all(&bytes)
            }
            Err(error) => self.done(Err(error)),
        }
    }

    fn hand_memory(&mut self, machine: &Shared) -> io::Result<()> {
        if let Err(error) = machine.check_movable() {
            return self.done(Err(error));
        }
        let file = machine.ram().open_read_only()?;
        let info = MemoryInfo {
            id: machine.id().to_owned(),
            layout: machine.ram().layout().clone(),
            offer: machine.offer().clone(),
        };
        let line = line_of(&Reply {
            v: CONTROL_VERSION,
            outcome: Outcome::Memory(Box::new(info)),
        })?;
        // The descriptor travels with the line's first bytes.
        let sent = self.stream.send_with_fd(&line[..], file.as_raw_fd())?;
        self.stream.write_all(&line[sent..])
    }

    fn done(&mut self, result: Result<(), OperationError>) -> io::Result<()> {
        self.reply(match result {
            Ok(()) => Outcome::Done,
            Err(error) => Outcome::Error {
                message: in_words(&error),
            },
        })
    }

    fn reply(&mut self, outcome: Outcome) -> io::Result<()> {
        self.stream.write_all(&line_of(&Reply {
            v: CONTROL_VERSION,
            outcome,
        })?)
    }
}

/// An error with all its causes.
fn in_words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}
