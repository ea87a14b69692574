//! QUIC without pages: what the network and the library cost by themselves.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lazyvm_quic::{LaneThread, Urgency};
use lazyvm_wire::PAGE_SIZE;
use lazyvm_wire::control::Lane;
use lazyvm_wire::frame::REQUEST_LEN;
use lazyvm_wire::trust::{Fingerprint, Identity, SERVER_NAME};
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TokioRuntime, VarInt,
};
use serde::{Deserialize, Serialize};
use tokio::runtime::{Handle, Runtime};

use crate::error::BenchError;

/// Bytes written at a time.
const CHUNK: usize = 1 << 20;

/// Which settings and threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Flavour {
    /// As the library comes: its default transport settings and socket, tokio's default runtime.
    Stock,
    /// lazyvm's settings, sockets and threads.
    Tuned,
}

/// Where a side's tasks run.
enum Threads {
    Many(Runtime),
    Lane(LaneThread),
}

impl Threads {
    fn start(flavour: Flavour) -> std::io::Result<Self> {
        Ok(match flavour {
            Flavour::Stock => Self::Many(Runtime::new()?),
            Flavour::Tuned => Self::Lane(LaneThread::start("bare", Urgency::Fault)?),
        })
    }

    fn handle(&self) -> &Handle {
        match self {
            Self::Many(runtime) => runtime.handle(),
            Self::Lane(lane) => lane.handle(),
        }
    }

    /// Runs a future there and waits for it here.
    fn run<T: Send + 'static>(
        &self,
        future: impl Future<Output = Result<T, BenchError>> + Send + 'static,
    ) -> Result<T, BenchError> {
        let (answer, answered) = std::sync::mpsc::channel();
        self.handle()
            .spawn(async move { drop(answer.send(future.await)) });
        answered
            .recv()
            .map_err(|_| BenchError::Bare("the thread ended".to_owned()))?
    }
}

fn endpoint(
    flavour: Flavour,
    server: Option<ServerConfig>,
    at: IpAddr,
) -> std::io::Result<Endpoint> {
    let any = (at, 0).into();
    match (flavour, server) {
        (Flavour::Stock, Some(config)) => Endpoint::server(config, any),
        (Flavour::Stock, None) => Endpoint::client(any),
        (Flavour::Tuned, server) => {
            let socket = lazyvm_quic::bind(any)?;
            Endpoint::new(
                EndpointConfig::default(),
                server,
                socket,
                Arc::new(TokioRuntime),
            )
        }
    }
}

fn bare(error: impl ToString) -> BenchError {
    BenchError::Bare(error.to_string())
}

/// Answers every 16 bytes on the fault lane with a page, and sends as much as it is asked for on the bulk lane.
pub(crate) struct Server {
    pub address: SocketAddr,
    _endpoint: Endpoint,
    _threads: Threads,
}

impl Server {
    pub fn start(
        identity: &Identity,
        flavour: Flavour,
        lane: Lane,
        at: IpAddr,
    ) -> Result<Self, BenchError> {
        let configs = lazyvm_quic::server_configs(identity, lazyvm_quic::Rival::Share)?;
        let mut config = match lane {
            Lane::Fault => configs.fault,
            Lane::Bulk => configs.bulk,
        };
        if flavour == Flavour::Stock {
            config.transport_config(Arc::new(quinn::TransportConfig::default()));
        }
        let threads = Threads::start(flavour)?;
        let context = threads.handle().enter();
        let endpoint = endpoint(flavour, Some(config), at)?;
        drop(context);
        let address = endpoint.local_addr()?;
        let accepting = endpoint.clone();
        threads.handle().spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                tokio::spawn(async move {
                    let connection = incoming.await.map_err(bare)?;
                    match lane {
                        Lane::Fault => echo(&connection).await,
                        Lane::Bulk => send_bulk(&connection).await,
                    }
                });
            }
        });
        Ok(Self {
            address,
            _endpoint: endpoint,
            _threads: threads,
        })
    }
}

async fn echo(connection: &Connection) -> Result<(), BenchError> {
    let (mut send, mut recv) = connection.accept_bi().await.map_err(bare)?;
    let page = bytes_of(PAGE_SIZE);
    let mut request = [0; REQUEST_LEN];
    loop {
        recv.read_exact(&mut request).await.map_err(bare)?;
        send.write_all(&page).await.map_err(bare)?;
    }
}

async fn send_bulk(connection: &Connection) -> Result<(), BenchError> {
    let (_, mut recv) = connection.accept_bi().await.map_err(bare)?;
    let mut wanted = [0; 8];
    recv.read_exact(&mut wanted).await.map_err(bare)?;
    let mut send = connection.open_uni().await.map_err(bare)?;
    let chunk = bytes_of(CHUNK);
    let mut left = u64::from_le_bytes(wanted);
    while left > 0 {
        let part = left.min(CHUNK as u64) as usize;
        send.write_all(&chunk[..part]).await.map_err(bare)?;
        left -= part as u64;
    }
    // Fails only for a stream that is closed already.
    let _ = send.finish();
    connection.closed().await;
    Ok(())
}

fn bytes_of(length: usize) -> Vec<u8> {
    (0..length).map(|number| (number % 251) as u8).collect()
}

/// A client of [`Server`].
pub(crate) struct Client {
    connection: Connection,
    _endpoint: Endpoint,
    threads: Threads,
}

impl Client {
    pub fn connect(
        server: SocketAddr,
        fingerprint: Fingerprint,
        lane: Lane,
        flavour: Flavour,
    ) -> Result<Self, BenchError> {
        let identity = Identity::generate()?;
        let mut config: ClientConfig = lazyvm_quic::client_config(&identity, fingerprint, lane)?;
        if flavour == Flavour::Stock {
            config.transport_config(Arc::new(quinn::TransportConfig::default()));
        }
        let threads = Threads::start(flavour)?;
        let (connection, endpoint) = threads.run(async move {
            let endpoint = endpoint(flavour, None, Ipv4Addr::UNSPECIFIED.into())?;
            let connecting = endpoint
                .connect_with(config, server, SERVER_NAME)
                .map_err(bare)?;
            Ok((connecting.await.map_err(bare)?, endpoint))
        })?;
        Ok(Self {
            connection,
            _endpoint: endpoint,
            threads,
        })
    }

    /// Adds round trips of a small request and a page back, on one stream that is kept, in microseconds; the first
    /// `uncounted` don't count.
    pub fn round_trips(
        &self,
        uncounted: u64,
        count: u64,
        times: &mut Histogram<u64>,
    ) -> Result<(), BenchError> {
        let connection = self.connection.clone();
        let rounds = self.threads.run(async move {
            let (mut send, mut recv) = connection.open_bi().await.map_err(bare)?;
            let mut page = vec![0; PAGE_SIZE];
            let mut rounds = Vec::with_capacity(count as usize);
            for round in 0..count + uncounted {
                let start = Instant::now();
                send.write_all(&[0; REQUEST_LEN]).await.map_err(bare)?;
                recv.read_exact(&mut page).await.map_err(bare)?;
                if round >= uncounted {
                    rounds.push(start.elapsed().as_micros() as u64);
                }
            }
            Ok(rounds)
        })?;
        for round in rounds {
            times.saturating_record(round);
        }
        Ok(())
    }

    /// Time to take `bytes` in on one stream, in order, as they come.
    pub fn bulk(&self, bytes: u64) -> Result<Duration, BenchError> {
        let connection = self.connection.clone();
        let elapsed = self.threads.run(async move {
            let start = Instant::now();
            let (mut send, _recv) = connection.open_bi().await.map_err(bare)?;
            send.write_all(&bytes.to_le_bytes()).await.map_err(bare)?;
            let mut recv = connection.accept_uni().await.map_err(bare)?;
            let mut left = bytes;
            while left > 0 {
                let chunk = recv.read_chunk(CHUNK, true).await.map_err(bare)?;
                let chunk = chunk.ok_or_else(|| bare("the stream ends early"))?;
                left = left.saturating_sub(chunk.bytes.len() as u64);
            }
            Ok(start.elapsed())
        })?;
        self.connection.close(VarInt::from_u32(0), b"");
        Ok(elapsed)
    }
}
