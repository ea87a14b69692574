//! Traffic over the emulated path without a machine that moves: the push's QUIC connection, and TCP of the kernel's as
//! its rival. Both always have something to send, from the source to the destination.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use lazyvm_quic::{LaneThread, Rival, Urgency};
use lazyvm_wire::control::Lane;
use lazyvm_wire::trust::{Identity, SERVER_NAME};
use nix::sys::socket::{setsockopt, sockopt::TcpCongestion};
use quinn::{Connection, Endpoint, EndpointConfig, TokioRuntime};

use super::emulator::{DESTINATION, Emulator, SOURCE};

/// Bytes of a stream of the push.
const STREAM_BYTES: usize = 4 << 20;

const CHUNK: usize = 128 << 10;

/// Bytes that have arrived.
type Count = Arc<AtomicU64>;

/// A connection with the settings of the bulk lane, its source sending as fast as its congestion controller lets it.
pub struct Push {
    arrived: Count,
    connection: Connection,
    // Each drives one end.
    _source: (LaneThread, Endpoint),
    _destination: (LaneThread, Endpoint),
}

impl Push {
    /// Connects, and starts to send.
    ///
    /// # Errors
    /// Of sockets, threads, keys and QUIC alike.
    pub fn start(emulator: &Emulator, rival: Rival) -> io::Result<Self> {
        let identity = Identity::generate().map_err(io::Error::other)?;
        let config = lazyvm_quic::server_configs(&identity, rival).map_err(io::Error::other)?;
        let source = emulator.source.within(|| {
            let thread = LaneThread::start("flow-source", Urgency::Bulk)?;
            let endpoint = endpoint(&thread, address(SOURCE)?, Some(config.bulk))?;
            let accepting = endpoint.clone();
            thread.handle().spawn(async move {
                let connection = accepting.accept().await?.await.ok()?;
                send(&connection).await
            });
            Ok((thread, endpoint))
        })?;
        let server = source.1.local_addr()?;
        let client = Identity::generate().map_err(io::Error::other)?;
        let config = lazyvm_quic::client_config(&client, identity.fingerprint(), Lane::Bulk);
        let config = config.map_err(io::Error::other)?;
        let arrived = Count::default();
        let (destination, connection) = emulator.destination.within(|| {
            let thread = LaneThread::start("flow-destination", Urgency::Bulk)?;
            let endpoint = endpoint(&thread, address(DESTINATION)?, None)?;
            let (answer, answered) = std::sync::mpsc::channel();
            let (connecting, arrived) = (endpoint.clone(), arrived.clone());
            thread.handle().spawn(async move {
                let connection = match connecting.connect_with(config, server, SERVER_NAME) {
                    Ok(connecting) => connecting.await.map_err(io::Error::other),
                    Err(error) => Err(io::Error::other(error)),
                };
                let receiving = connection.as_ref().ok().cloned();
                drop(answer.send(connection));
                receive(&receiving?, &arrived).await
            });
            let connection = answered.recv().map_err(io::Error::other)??;
            Ok(((thread, endpoint), connection))
        })?;
        Ok(Self {
            arrived,
            connection,
            _source: source,
            _destination: destination,
        })
    }

    /// Bytes that have arrived so far.
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Why the connection ended, if it did.
    pub fn ended(&self) -> Option<String> {
        self.connection.close_reason().map(|why| why.to_string())
    }
}

fn address(of: &str) -> io::Result<SocketAddr> {
    let address: Ipv4Addr = of.parse().map_err(io::Error::other)?;
    Ok((address, 0).into())
}

fn endpoint(
    thread: &LaneThread,
    address: SocketAddr,
    server: Option<quinn::ServerConfig>,
) -> io::Result<Endpoint> {
    let _context = thread.handle().enter();
    let socket = lazyvm_quic::bind(address)?;
    let config = match &server {
        Some(_) => lazyvm_quic::endpoint_config(Lane::Bulk),
        None => EndpointConfig::default(),
    };
    Endpoint::new(config, server, socket, Arc::new(TokioRuntime))
}

async fn send(connection: &Connection) -> Option<()> {
    let chunk = bytes::Bytes::from(vec![7; CHUNK]);
    loop {
        let mut stream = connection.open_uni().await.ok()?;
        for _ in 0..STREAM_BYTES / CHUNK {
            stream.write_chunk(chunk.clone()).await.ok()?;
        }
        stream.finish().ok()?;
    }
}

async fn receive(connection: &Connection, arrived: &Count) -> Option<()> {
    loop {
        let mut stream = connection.accept_uni().await.ok()?;
        let arrived = arrived.clone();
        tokio::spawn(async move {
            while let Ok(Some(chunk)) = stream.read_chunk(CHUNK, false).await {
                arrived.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
            }
        });
    }
}

/// A TCP connection with the kernel's CUBIC, whatever the system's own choice is. It ends when this is dropped.
pub struct Tcp {
    arrived: Count,
    stop: Arc<AtomicBool>,
    stream: TcpStream,
    threads: Vec<JoinHandle<()>>,
}

impl Tcp {
    /// Connects, and starts to send.
    ///
    /// # Errors
    /// Of sockets and threads; the kernel may lack CUBIC.
    pub fn start(emulator: &Emulator) -> io::Result<Self> {
        let listener = emulator
            .destination
            .within(|| TcpListener::bind(address(DESTINATION)?))?;
        let to = listener.local_addr()?;
        let stream = emulator.source.within(|| TcpStream::connect(to))?;
        setsockopt(&stream, TcpCongestion, &OsString::from("cubic"))?;
        let (mut from, _) = listener.accept()?;
        let (arrived, stop) = (Count::default(), Arc::new(AtomicBool::new(false)));
        let mut to = stream.try_clone()?;
        let sending = stop.clone();
        let sender = std::thread::Builder::new().spawn(move || {
            let chunk = vec![7; CHUNK];
            while !sending.load(Ordering::Relaxed) && to.write_all(&chunk).is_ok() {}
        })?;
        let count = arrived.clone();
        let receiver = std::thread::Builder::new().spawn(move || {
            let mut buffer = vec![0; CHUNK];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
        })?;
        Ok(Self {
            arrived,
            stop,
            stream,
            threads: vec![sender, receiver],
        })
    }

    /// Bytes that have arrived so far.
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Fails for a connection that is closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
