//! A Firecracker that takes a machine in: fresh and idle until then, and the user's before and after.
//!
//! Firecracker makes its memory and opens its userfaultfd while it loads the state, hands both over on the page-fault
//! socket, and goes on loading, for which it touches memory. So this machine is a [`LateMachine`]: that its API answers,
//! that it is idle and new enough, and that both see the same directory is all that can be looked at while the source
//! still runs.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_pager::port::{HandedOver, LateMachine, MachineError};
use lazyvm_wire::{Layout, MachineOffer};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::api::{Api, ApiError, LoadSnapshot, release};
use super::folder::{FolderError, SharedFolder};
use super::handshake::{Handshake, HandshakeError};
use super::process::PeerProcess;
use super::receive::{ReceiveError, receive};
use super::{KIND, offer, sys};

/// The first release that gives its memory to a page-fault handler.
const FIRST_RELEASE: (u32, u32) = (1, 1);

/// The first release that keeps the page-fault socket open.
const KEEPS_SOCKET: (u32, u32) = (1, 12);

/// Time for Firecracker to connect to the page-fault socket once it has the state.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

/// Time for its message.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked at whether the load has failed instead.
const LOOK_EVERY_MS: u8 = 20;

const STATE: &str = "state";
const PAGE_FAULTS: &str = "page-faults";

/// A Firecracker that can't take the machine, or did not.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// It is another monitor's.
    #[error(
        "the source offers a machine of the kind {0}, which Firecracker can't run; look at what lazyvm serve was given"
    )]
    Kind(String),
    /// It is not fresh.
    #[error("the Firecracker at {} is not idle ({state}); start a fresh one, and configure nothing", path.display())]
    NotIdle {
        /// Where.
        path: PathBuf,
        /// What it says of itself.
        state: String,
    },
    /// It is too old.
    #[error("Firecracker {0} can't take memory from outside; 1.1 is the first that can")]
    TooOld(String),
    /// It died.
    #[error("Firecracker ended while its memory arrived")]
    Ended,
    /// The API.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Files.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The socket.
    #[error("can't make the page-fault socket {}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It has not asked.
    #[error("Firecracker has loaded the state without connecting to the page-fault socket {}", .0.display())]
    NotAsked(PathBuf),
    /// It does not ask.
    #[error(
        "Firecracker did not connect to the page-fault socket {} within {CONNECT_TIMEOUT:?}; does it see this path?", .0.display()
    )]
    NoConnection(PathBuf),
    /// What it told is wrong.
    #[error("{0}. End this Firecracker: it waits for memory that won't come")]
    Handshake(#[source] ReceiveError),
    /// The descriptor can't be used.
    #[error("Firecracker's userfaultfd can't be used")]
    Uffd(#[source] io::Error),
    /// The pager can't.
    #[error("Firecracker's memory can't be served")]
    Memory(#[from] lazyvm_pager::memory::MemoryError),
    /// No thread.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
    /// The order of calls.
    #[error("the machine has not been prepared, or not been loaded")]
    OutOfOrder,
}

impl From<HandshakeError> for DestinationError {
    fn from(error: HandshakeError) -> Self {
        Self::Handshake(error.into())
    }
}

/// Tells whether the Firecracker that took the machine in still lives.
#[derive(Clone, Debug, Default)]
pub struct Life(Arc<OnceLock<Alive>>);

#[derive(Debug)]
struct Alive {
    process: PeerProcess,
    /// Where its end means the process's end.
    socket: Option<UnixStream>,
    /// Kept, since a Firecracker before 1.12 that finds it closed does not mind, and one of a later one need not.
    _other: Option<UnixStream>,
}

impl Life {
    /// Whether it has ended, as far as that can be told.
    pub fn has_ended(&self) -> bool {
        self.0.get().is_some_and(|alive| {
            alive.process.has_ended() || alive.socket.as_ref().is_some_and(is_at_its_end)
        })
    }
}

fn is_at_its_end(socket: &UnixStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    matches!(
        recv(socket.as_raw_fd(), &mut [0], flags),
        Ok(0) | Err(Errno::ECONNRESET)
    )
}

/// What is there once the machine is prepared.
#[derive(Debug)]
struct Prepared {
    folder: SharedFolder,
    listener: UnixListener,
    release: Option<(u32, u32)>,
    /// The VM keeps a record of dirty pages, and is to go on with it.
    tracks_dirty_pages: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Destination {
    api: Api,
    prepared: Option<Prepared>,
    loading: Option<Receiver<Result<(), ApiError>>>,
    life: Life,
}

impl Destination {
    /// The Firecracker at this API. Nothing is asked yet.
    pub fn new(api: Api) -> Self {
        Self {
            api,
            prepared: None,
            loading: None,
            life: Life::default(),
        }
    }

    /// Where it can be seen whether it lives.
    pub fn life(&self) -> Life {
        self.life.clone()
    }

    fn check(&self, offer: &MachineOffer) -> Result<Prepared, DestinationError> {
        if offer.kind != KIND {
            return Err(DestinationError::Kind(offer.kind.clone()));
        }
        let info = self.api.info()?;
        let not_idle = |state: &str| DestinationError::NotIdle {
            path: self.api.path().to_owned(),
            state: state.to_owned(),
        };
        if info.state != "Not started" {
            return Err(not_idle(&info.state));
        }
        if self.is_configured() {
            return Err(not_idle("it has been given a kernel, a drive or a network"));
        }
        let release = release(&info.vmm_version);
        if release.is_some_and(|release| release < FIRST_RELEASE) {
            return Err(DestinationError::TooOld(info.vmm_version));
        }
        let (theirs, tracks_dirty_pages) = offer::read(offer);
        tracing::info!(
            here = info.vmm_version,
            source = theirs,
            tracks_dirty_pages,
            "Firecracker's releases"
        );
        let parent = self.api.path().parent().unwrap_or_else(|| ".".as_ref());
        let parent = if parent.as_os_str().is_empty() {
            ".".as_ref()
        } else {
            parent
        };
        let folder = SharedFolder::new(parent, &self.api.process()?)?;
        let path = folder.ours(PAGE_FAULTS);
        let listen = || -> io::Result<UnixListener> {
            let listener = UnixListener::bind(&path)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen().map_err(|source| DestinationError::Socket {
            path: path.clone(),
            source,
        })?;
        folder.give(PAGE_FAULTS)?;
        Ok(Prepared {
            folder,
            listener,
            release,
            tracks_dirty_pages,
        })
    }

    /// Whether something is configured that Firecracker does not load a snapshot beside. One that does not tell its
    /// configuration says so itself when it loads.
    fn is_configured(&self) -> bool {
        let Ok(config) = self.api.full_config() else {
            return false;
        };
        let some = |name: &str| {
            config
                .get(name)
                .and_then(|list| list.as_array())
                .is_some_and(|list| !list.is_empty())
        };
        let kernel = config
            .pointer("/boot-source/kernel_image_path")
            .and_then(|path| path.as_str())
            .is_some_and(|path| !path.is_empty());
        kernel || some("drives") || some("network-interfaces")
    }

    fn hand_over(&mut self, state: &[u8]) -> Result<HandedOver, DestinationError> {
        let prepared = self.prepared.as_ref().ok_or(DestinationError::OutOfOrder)?;
        prepared.folder.write(STATE, state)?;
        let (done, loading) = channel();
        let api = self.api.clone();
        let load = LoadSnapshot {
            state: prepared.folder.theirs(STATE),
            page_faults: prepared.folder.theirs(PAGE_FAULTS),
            tracks_dirty_pages: prepared.tracks_dirty_pages,
            release: prepared.release,
        };
        thread::Builder::new()
            .name("load".to_owned())
            .spawn(move || drop(done.send(api.load_snapshot(&load))))
            .map_err(DestinationError::Thread)?;
        let socket = connection(prepared, &loading)?;
        self.loading = Some(loading);
        let process = PeerProcess::of(&socket)
            .map_err(ReceiveError::Socket)
            .map_err(DestinationError::Handshake)?;
        let (handshake, descriptor) =
            receive(&socket, MESSAGE_TIMEOUT).map_err(DestinationError::Handshake)?;
        let tells = prepared
            .release
            .is_some_and(|release| release >= KEEPS_SOCKET);
        let (socket, other) = if tells {
            (Some(socket), None)
        } else {
            (None, Some(socket))
        };
        let _ = self.life.0.set(Alive {
            process,
            socket,
            _other: other,
        });
        log_memory(&handshake);
        Ok(HandedOver {
            layout: handshake.layout()?,
            memory: handshake.memory()?,
            uffd: sys::uffd(descriptor).map_err(DestinationError::Uffd)?,
        })
    }
}

fn log_memory(handshake: &Handshake) {
    tracing::info!(
        regions = handshake.regions().len(),
        bytes = handshake.bytes(),
        "Firecracker has handed its memory over"
    );
}

/// Firecracker's connection to the page-fault socket, or why there will be none.
fn connection(
    prepared: &Prepared,
    loading: &Receiver<Result<(), ApiError>>,
) -> Result<UnixStream, DestinationError> {
    let path = || prepared.folder.ours(PAGE_FAULTS);
    let failed = |source| DestinationError::Socket {
        path: path(),
        source,
    };
    let start = Instant::now();
    loop {
        let mut watched = [PollFd::new(prepared.listener.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut watched, PollTimeout::from(LOOK_EVERY_MS));
        match prepared.listener.accept() {
            Ok((socket, _)) => {
                socket.set_nonblocking(false).map_err(failed)?;
                return Ok(socket);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(failed(error)),
        }
        match loading.try_recv() {
            Ok(Err(error)) => return Err(error.into()),
            Ok(Ok(())) | Err(TryRecvError::Disconnected) => {
                return Err(DestinationError::NotAsked(path()));
            }
            Err(TryRecvError::Empty) => {}
        }
        if start.elapsed() > CONNECT_TIMEOUT {
            return Err(DestinationError::NoConnection(path()));
        }
    }
}

impl LateMachine for Destination {
    fn prepare(&mut self, _: &Layout, offer: &MachineOffer) -> Result<(), MachineError> {
        self.prepared = Some(self.check(offer)?);
        Ok(())
    }

    fn begin_load(&mut self, state: &[u8]) -> Result<HandedOver, MachineError> {
        Ok(self.hand_over(state)?)
    }

    fn finish_load(&mut self) -> Result<(), MachineError> {
        let loading = self.loading.take().ok_or(DestinationError::OutOfOrder)?;
        loading
            .recv()
            .map_err(|_| DestinationError::OutOfOrder)?
            .map_err(DestinationError::Api)?;
        Ok(())
    }

    fn check_alive(&mut self) -> Result<(), MachineError> {
        if self.life.has_ended() {
            return Err(DestinationError::Ended.into());
        }
        Ok(())
    }

    fn start(&mut self) -> Result<(), MachineError> {
        Ok(self.api.resume().map_err(DestinationError::Api)?)
    }
}
