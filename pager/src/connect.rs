//! Making connections, and what can go wrong with them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use lazyvm_quic::{ControlReceiver, ControlSender, ControlStreamError, SetupError, control_stream};
use lazyvm_wire::Ticket;
use lazyvm_wire::control::{CONTROL_MAX, Hello, Lane, Rejection, ToDestination, Welcome};
use lazyvm_wire::ledger::SUPPORTED;
use lazyvm_wire::trust::{Identity, SERVER_NAME};
use quinn::{Connection, ConnectionError, Endpoint, EndpointConfig, TokioRuntime};

/// Time for an address to answer, before the next is tried.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// TLS alerts are QUIC errors from here on (RFC 9001, section 4.8).
const CRYPTO_ERRORS: std::ops::Range<u64> = 0x100..0x200;

/// A connection that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// QUIC or its keys.
    #[error("can't set up QUIC")]
    Setup(#[from] SetupError),
    /// No local socket.
    #[error("can't open a UDP socket")]
    Socket(#[source] std::io::Error),
    /// None of the ticket's addresses answers.
    #[error(
        "no answer from the source at {tried}; does lazyvm serve still run, and do UDP packets get there?"
    )]
    Unreachable {
        /// The addresses.
        tried: String,
        /// What the last of them gave.
        #[source]
        source: Option<ConnectionError>,
    },
    /// It is another server than the ticket's.
    #[error(
        "the server at {0} has another key than the one in the ticket (wrong fingerprint); it is not the source"
    )]
    WrongServer(SocketAddr),
    /// The source lets nobody in.
    #[error("{0}")]
    Rejected(Rejection),
    /// The source was reached, but says nothing of use.
    #[error("the source breaks off")]
    Control(#[from] ControlStreamError),
    /// The source's answer is of another kind than what belongs here.
    #[error("the source breaks the protocol: {0}")]
    Protocol(&'static str),
}

/// What each connection of a move shows.
pub(crate) struct Credentials {
    pub ticket: Ticket,
    pub identity: Identity,
    pub verify: bool,
}

/// A connection that the source has accepted.
pub(crate) struct Link {
    pub connection: Connection,
    pub sender: ControlSender,
    pub receiver: ControlReceiver,
    /// Drives the connection.
    _endpoint: Endpoint,
}

/// Connects the fault lane and hears what is offered.
pub(crate) async fn connect_fault(
    with: &Arc<Credentials>,
) -> Result<(Link, Box<Welcome>), ConnectError> {
    match connect(with, Lane::Fault).await? {
        (link, ToDestination::Welcome(welcome)) => Ok((link, welcome)),
        _ => Err(ConnectError::Protocol("no welcome")),
    }
}

/// Connects the bulk lane; runs on its thread.
pub(crate) async fn connect_bulk(with: Arc<Credentials>) -> Result<Link, ConnectError> {
    match connect(&with, Lane::Bulk).await? {
        (link, ToDestination::Joined) => {
            lazyvm_quic::widen_for_path(&link.connection);
            Ok(link)
        }
        _ => Err(ConnectError::Protocol("the bulk lane is not joined")),
    }
}

async fn connect(with: &Credentials, lane: Lane) -> Result<(Link, ToDestination), ConnectError> {
    let (connection, endpoint) = reach(with, lane).await?;
    let stream = connection
        .open_bi()
        .await
        .map_err(|error| lost(with, error))?;
    let (mut sender, mut receiver) = control_stream(stream);
    let hello = Hello {
        versions: SUPPORTED,
        session: with.ticket.session,
        secret: with.ticket.secret.clone(),
        lane,
        verify: with.verify,
    };
    sender.send(&hello).await?;
    match receiver.recv(CONTROL_MAX).await? {
        ToDestination::Rejected(rejection) => Err(ConnectError::Rejected(rejection)),
        answer => Ok((
            Link {
                connection,
                sender,
                receiver,
                _endpoint: endpoint,
            },
            answer,
        )),
    }
}

/// Tries the ticket's addresses, one after the other.
async fn reach(with: &Credentials, lane: Lane) -> Result<(Connection, Endpoint), ConnectError> {
    let config = lazyvm_quic::client_config(&with.identity, with.ticket.server, lane)?;
    let mut last = None;
    for &address in &with.ticket.addresses {
        let endpoint = endpoint_for(address)?;
        let Ok(connecting) = endpoint.connect_with(config.clone(), address, SERVER_NAME) else {
            continue;
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => return Ok((connection, endpoint)),
            Ok(Err(ConnectionError::TransportError(error)))
                if CRYPTO_ERRORS.contains(&u64::from(error.code)) =>
            {
                tracing::debug!(%address, %error, "handshake");
                return Err(ConnectError::WrongServer(address));
            }
            Ok(Err(error)) => last = Some(error),
            Err(_) => last = Some(ConnectionError::TimedOut),
        }
    }
    Err(unreachable(with, last))
}

fn endpoint_for(address: SocketAddr) -> Result<Endpoint, ConnectError> {
    let local: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = lazyvm_quic::bind(local).map_err(ConnectError::Socket)?;
    Endpoint::new(
        EndpointConfig::default(),
        None,
        socket,
        Arc::new(TokioRuntime),
    )
    .map_err(ConnectError::Socket)
}

fn lost(with: &Credentials, error: ConnectionError) -> ConnectError {
    unreachable(with, Some(error))
}

fn unreachable(with: &Credentials, source: Option<ConnectionError>) -> ConnectError {
    let tried: Vec<String> = with
        .ticket
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect();
    ConnectError::Unreachable {
        tried: tried.join(", "),
        source,
    }
}
