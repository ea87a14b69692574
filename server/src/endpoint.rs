//! The endpoint: one UDP port, any number of sessions.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use dashmap::DashMap;
use lazyvm_quic::{
    ControlReceiver, ControlSender, LaneThread, Rival, ServerConfigs, SetupError, Urgency,
    close_code, control_stream,
};
use lazyvm_wire::control::{HELLO_MAX, Hello, Lane, Rejection, ToDestination};
use lazyvm_wire::ledger::{SUPPORTED, Version};
use lazyvm_wire::trust::{Fingerprint, Identity};
use lazyvm_wire::{Secret, SessionId, Ticket};
use quinn::rustls::pki_types::CertificateDer;
use quinn::{Connection, Incoming, ServerConfig, TokioRuntime};
use tokio::sync::{Notify, Semaphore};

use crate::fleet::{Fleet, FleetConfig};
use crate::handover::{Event, Phase};
use crate::paths::{OnPath, Paths};
use crate::session::{Session, SessionConfig, SessionStatus};
use crate::{bulk, fault};

/// Most sessions of one endpoint.
pub const SESSIONS_MAX: usize = 1024;

/// Most connections of one endpoint; each session needs two.
const CONNECTIONS_MAX: usize = 2 * SESSIONS_MAX + 64;

/// From here on a peer must show that its address is its own before it costs a handshake.
const HANDSHAKES_FREE: usize = 16;

/// Time for a peer to end the handshake and to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for a destination's fault lane to be let in after its bulk lane has come.
const FAULT_LANE_WITHIN: Duration = Duration::from_secs(5);

/// An endpoint that can't be set up, or a session that can't be added.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The port is taken, or the address is not of this machine.
    #[error("can't listen on {address}; is the port taken? Name another one with --listen")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// QUIC or its keys.
    #[error("can't set up QUIC")]
    Setup(#[from] SetupError),
    /// The system's event queue or its UDP sockets.
    #[error("can't set up a UDP socket")]
    Socket(#[source] io::Error),
    /// A thread could not be started.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
    /// More than [`SESSIONS_MAX`].
    #[error("this endpoint serves {SESSIONS_MAX} sessions already")]
    TooManySessions,
    /// No random bytes for a secret.
    #[error("the system gives no random bytes")]
    Random,
    /// The new session could not be recorded.
    #[error("can't record the session: {0}")]
    Record(String),
}

/// A page server.
///
/// Two threads carry all its sessions: the fault lane with control messages and demand faults, and the bulk lane with
/// the push. Dropping it closes all connections; a machine that was handed over stays paused.
pub struct Server {
    shared: Arc<Shared>,
    fingerprint: Fingerprint,
    fault: LaneEndpoint,
    bulk: LaneEndpoint,
}

/// One lane's socket and thread; both lanes have the same port.
struct LaneEndpoint {
    endpoint: quinn::Endpoint,
    // Dropped after the endpoint, whose tasks run on it.
    _thread: LaneThread,
}

struct Shared {
    sessions: DashMap<SessionId, Arc<Session>>,
    /// What many destinations may have, each in a session of its own, by the ID in the ticket that they share.
    fleets: DashMap<SessionId, Arc<Fleet>>,
    /// One permit a connection.
    connections: Arc<Semaphore>,
    /// A destination's fault lane was let in.
    joined: Notify,
    /// What the paths of earlier pushes carried.
    paths: Arc<Mutex<Paths>>,
    configs: ServerConfigs,
}

/// A machine for many destinations, as its owner sees it.
#[derive(Clone, Debug)]
pub struct FleetHandle {
    fleet: Arc<Fleet>,
}

/// A session that was added, as its owner sees it.
#[derive(Clone, Debug)]
pub struct SessionHandle {
    session: Arc<Session>,
}

impl Server {
    /// Listens on `address`; port 0 takes a free one. The push takes a fair share of the path.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind(address: SocketAddr, identity: &Identity) -> Result<Self, ServerError> {
        Self::bind_as(address, identity, Rival::Share)
    }

    /// Like [`Self::bind`], with what the push does when others fill the path.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn bind_as(
        address: SocketAddr,
        identity: &Identity,
        rival: Rival,
    ) -> Result<Self, ServerError> {
        let configs = lazyvm_quic::server_configs(identity, rival)?;
        let bind_error = |source| ServerError::Bind { address, source };
        let (fault_socket, bulk_socket) = lazyvm_quic::bind_lanes(address).map_err(bind_error)?;
        let shared = Arc::new(Shared {
            sessions: DashMap::new(),
            fleets: DashMap::new(),
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            joined: Notify::new(),
            paths: Arc::default(),
            configs: configs.clone(),
        });
        let lane = |lane, config, socket| LaneEndpoint::start(lane, config, socket, shared.clone());
        let fault = lane(Lane::Fault, configs.fault, fault_socket)?;
        let bulk = lane(Lane::Bulk, configs.bulk, bulk_socket)?;
        Ok(Self {
            shared,
            fingerprint: identity.fingerprint(),
            fault,
            bulk,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.fault.endpoint.local_addr()
    }

    /// Serves one more machine, to one destination.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn add_session(&self, config: SessionConfig) -> Result<SessionHandle, ServerError> {
        if self.shared.sessions.len() >= SESSIONS_MAX {
            return Err(ServerError::TooManySessions);
        }
        let id = SessionId::random().map_err(|_| ServerError::Random)?;
        let secret = Secret::random().map_err(|_| ServerError::Random)?;
        let session = Arc::new(Session::new(id, secret, config));
        session
            .record(&Phase::Offered)
            .map_err(ServerError::Record)?;
        self.shared.sessions.insert(id, session.clone());
        Ok(SessionHandle { session })
    }

    /// Serves one more machine, to any number of destinations at once: each that shows the ticket gets a session of its
    /// own. For what never runs here (a snapshot), since every one of them runs it.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn add_fleet(&self, config: FleetConfig) -> Result<FleetHandle, ServerError> {
        if self.shared.sessions.len() + self.shared.fleets.len() >= SESSIONS_MAX {
            return Err(ServerError::TooManySessions);
        }
        let id = SessionId::random().map_err(|_| ServerError::Random)?;
        let secret = Secret::random().map_err(|_| ServerError::Random)?;
        let fleet = Arc::new(Fleet::new(id, secret, config));
        self.shared.fleets.insert(id, fleet.clone());
        Ok(FleetHandle { fleet })
    }

    /// The ticket that the destinations of a fleet share. It holds the secret.
    pub fn fleet_ticket(&self, handle: &FleetHandle, addresses: Vec<SocketAddr>) -> Ticket {
        Ticket {
            addresses,
            server: self.fingerprint,
            session: handle.fleet.id(),
            secret: handle.fleet.secret().clone(),
            expires_at_s: handle.fleet.expires_at_s(),
        }
    }

    /// Forgets a session. Its connections are closed; a machine that was handed over stays paused.
    pub fn remove_session(&self, handle: &SessionHandle) {
        self.shared.sessions.remove(&handle.session.id);
        handle.session.close();
    }

    /// The ticket of a session for destinations that reach this server at `addresses`. It holds the secret.
    pub fn ticket(&self, handle: &SessionHandle, addresses: Vec<SocketAddr>) -> Ticket {
        Ticket {
            addresses,
            server: self.fingerprint,
            session: handle.session.id,
            secret: handle.session.secret.clone(),
            expires_at_s: handle.session.expires_at_s,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for lane in [&self.fault, &self.bulk] {
            lane.endpoint.close(close_code::GONE, b"the server ends");
        }
    }
}

impl FleetHandle {
    /// The ID in the ticket.
    pub fn id(&self) -> SessionId {
        self.fleet.id()
    }

    /// The sessions of destinations that came, as long as they are remembered.
    pub fn sessions(&self) -> Vec<SessionHandle> {
        let handle = |session| SessionHandle { session };
        self.fleet.sessions().into_iter().map(handle).collect()
    }

    /// Lets nobody else in. Who is in stays.
    pub fn close(&self) {
        self.fleet.close();
    }
}

impl SessionHandle {
    /// The session's ID.
    pub fn id(&self) -> SessionId {
        self.session.id
    }

    /// How far it is.
    pub fn status(&self) -> SessionStatus {
        self.session.status()
    }

    /// Whether its destination is connected.
    pub fn is_connected(&self) -> bool {
        self.session.is_connected()
    }

    /// Takes the offer back, unless the machine has been handed over: [`SessionHandle::outcome`] tells. The machine
    /// runs on here.
    pub fn withdraw(&self) {
        // Nothing is to be done at once: a conversation that is under way finds out by itself.
        self.session.handle(Event::Withdrawn);
    }

    /// Waits until the conversation with the destination is over: it has heard all that it was told, or is gone.
    pub async fn parted(&self) {
        self.session.parted().await;
    }

    /// Waits until the session is over and says how: [`Phase::Moved`] or [`Phase::Ended`].
    pub async fn outcome(&self) -> Phase {
        let mut phase = self.session.watch_phase();
        match phase
            .wait_for(|phase| matches!(phase, Phase::Moved | Phase::Ended(_)))
            .await
        {
            Ok(phase) => phase.clone(),
            // The sender lives as long as the session, which this handle holds.
            Err(_) => self.session.phase(),
        }
    }
}

impl LaneEndpoint {
    fn start(
        lane: Lane,
        config: ServerConfig,
        socket: UdpSocket,
        shared: Arc<Shared>,
    ) -> Result<Self, ServerError> {
        let (name, urgency) = match lane {
            Lane::Fault => ("fault-lane", Urgency::Fault),
            Lane::Bulk => ("bulk-lane", Urgency::Bulk),
        };
        let thread = LaneThread::start(name, urgency).map_err(ServerError::Thread)?;
        let context = thread.handle().enter();
        let endpoint = quinn::Endpoint::new(
            lazyvm_quic::endpoint_config(lane),
            Some(config),
            socket,
            Arc::new(TokioRuntime),
        )
        .map_err(ServerError::Socket)?;
        drop(context);
        thread
            .handle()
            .spawn(accept(shared, lane, endpoint.clone()));
        Ok(Self {
            endpoint,
            _thread: thread,
        })
    }
}

/// Takes a lane's connections in.
async fn accept(shared: Arc<Shared>, lane: Lane, endpoint: quinn::Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let used = CONNECTIONS_MAX - shared.connections.available_permits();
        let fleets = shared.fleets.iter().map(|fleet| fleet.len()).sum::<usize>();
        let known = 2 * (shared.sessions.len() + fleets);
        if used >= known + HANDSHAKES_FREE && !incoming.remote_address_validated() {
            // Fails only for an address that is validated.
            let _ = incoming.retry();
            continue;
        }
        let Ok(permit) = shared.connections.clone().try_acquire_owned() else {
            tracing::warn!(peer = %incoming.remote_address(), "refused: too many connections");
            incoming.refuse();
            continue;
        };
        let worker = shared.clone();
        tokio::spawn(async move {
            let peer = incoming.remote_address();
            let on_path = (lane == Lane::Bulk).then(|| OnPath::begin(&worker.paths, peer.ip()));
            let greeting = greet(&worker, incoming, on_path.as_ref());
            match tokio::time::timeout(HELLO_TIMEOUT, greeting).await {
                Ok(Ok(guest)) => {
                    let connection = guest.connection.clone();
                    guest.serve().await;
                    if let Some(mut on_path) = on_path {
                        on_path.window = Some(lazyvm_quic::window(&connection));
                    }
                }
                Ok(Err(reason)) => tracing::warn!(%peer, "refused: {reason}"),
                Err(_) => tracing::warn!(%peer, "refused: no hello in time"),
            }
            drop(permit);
        });
    }
}

impl Shared {
    /// The session that a hello is for: the ticket's own, or the peer's of a fleet.
    fn session_for(&self, hello: &Hello, peer: Fingerprint) -> Result<Arc<Session>, Rejection> {
        let session = self.find(hello, peer)?;
        session.admit(hello, peer)?;
        Ok(session)
    }

    /// The same; a bulk lane may come before its fault lane, and waits for that. Who has no secret does not wait.
    async fn admit(&self, hello: &Hello, peer: Fingerprint) -> Result<Arc<Session>, Rejection> {
        let until = tokio::time::Instant::now() + FAULT_LANE_WITHIN;
        loop {
            let joined = self.joined.notified();
            tokio::pin!(joined);
            // Registered before the look, so that one that comes in between is not lost.
            joined.as_mut().enable();
            match self.session_for(hello, peer) {
                Err(Rejection::Protocol(_)) if hello.lane == Lane::Bulk => {
                    if tokio::time::timeout_at(until, joined).await.is_err() {
                        return self.session_for(hello, peer);
                    }
                }
                answer => {
                    if answer.is_ok() && hello.lane == Lane::Fault {
                        self.joined.notify_waiters();
                    }
                    return answer;
                }
            }
        }
    }

    fn find(&self, hello: &Hello, peer: Fingerprint) -> Result<Arc<Session>, Rejection> {
        if let Some(session) = self.sessions.get(&hello.session) {
            return Ok(session.value().clone());
        }
        let fleet = self
            .fleets
            .get(&hello.session)
            .map(|found| found.value().clone());
        fleet
            .ok_or(Rejection::WrongSecret)?
            .session_for(hello, peer)
    }
}

/// A peer that has shown a ticket.
struct Guest {
    session: Arc<Session>,
    lane: Lane,
    connection: Connection,
    /// Both speak it; none is found only before this guest is one.
    version: Option<Version>,
    control: (ControlSender, ControlReceiver),
}

/// Ends the handshake, hears the hello, and lets the peer in or tells it why not.
async fn greet(
    shared: &Shared,
    incoming: Incoming,
    on_path: Option<&OnPath>,
) -> Result<Guest, String> {
    let connecting = match on_path.and_then(|on_path| on_path.known) {
        Some(window) => {
            let config = shared.configs.bulk_on_known_path(window);
            incoming.accept_with(Arc::new(config))
        }
        None => incoming.accept(),
    };
    let no_handshake = |error| format!("no handshake: {error}");
    let connection = connecting.map_err(no_handshake)?;
    let connection = connection.await.map_err(no_handshake)?;
    let peer = peer_fingerprint(&connection).ok_or("no client key")?;
    let stream = connection
        .accept_bi()
        .await
        .map_err(|error| error.to_string())?;
    let (mut sender, mut receiver) = control_stream(stream);
    let hello: Hello = receiver
        .recv(HELLO_MAX)
        .await
        .map_err(|error| format!("no hello: {error}"))?;
    // A session that is not known and a wrong secret look the same from outside.
    let admitted = shared.admit(&hello, peer).await;
    let answer = match &admitted {
        Ok(session) if hello.lane == Lane::Fault => session.welcome(&hello).map_or(
            ToDestination::Rejected(Rejection::Version(SUPPORTED)),
            |welcome| ToDestination::Welcome(Box::new(welcome)),
        ),
        Ok(_) => ToDestination::Joined,
        Err(rejection) => ToDestination::Rejected(rejection.clone()),
    };
    if let Ok(session) = &admitted {
        session.attach(hello.lane, connection.clone());
    }
    sender
        .send(&answer)
        .await
        .map_err(|error| error.to_string())?;
    match admitted {
        Ok(session) => {
            tracing::info!(session = %session.id, peer = %connection.remote_address(), lane = ?hello.lane, "joined");
            Ok(Guest {
                session,
                lane: hello.lane,
                connection,
                version: hello.versions.newest_common(SUPPORTED),
                control: (sender, receiver),
            })
        }
        Err(rejection) => {
            sender.finish().await;
            connection.close(close_code::REJECTED, b"");
            Err(rejection.to_string())
        }
    }
}

impl Guest {
    async fn serve(self) {
        let Self {
            session,
            lane,
            connection,
            version,
            control: (sender, receiver),
        } = self;
        match lane {
            Lane::Fault => {
                fault::converse(&session, &connection, version, sender, receiver).await;
            }
            Lane::Bulk => serve_bulk(&session, &connection).await,
        }
        session.detach(lane, &connection);
    }
}

async fn serve_bulk(session: &Arc<Session>, connection: &Connection) {
    lazyvm_quic::widen_for_path(connection);
    let digests = tokio::spawn(bulk::digests_once_paused(
        session.clone(),
        connection.clone(),
    ));
    match bulk::push(session, connection).await {
        // The destination closes it when it has heard that all is over.
        Ok(()) => drop(tokio::time::timeout(lazyvm_quic::IDLE_TIMEOUT, connection.closed()).await),
        Err(error) => tracing::info!(session = %session.id, %error, "the push stops"),
    }
    digests.abort();
}

fn peer_fingerprint(connection: &Connection) -> Option<Fingerprint> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().map(Fingerprint::of)
}
