//! A wide-area link between two UDP endpoints of this machine: delay, rate, a finite queue, random loss.
//!
//! Packets go through a relay in this process. That holds for latency at moderate rates; it is no substitute for a
//! link with an MTU and a kernel queue of its own.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::image::next_random;

/// How a link behaves. Its one-way delay is half of `rtt`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Link {
    /// Round trip without load.
    pub rtt: Duration,
    /// Bits a second each way; 0 is no limit.
    pub rate_bit_s: u64,
    /// Share of packets that is lost, from 0 to 1.
    pub loss: f64,
}

/// Time that a full queue takes to drain; more is dropped.
const QUEUE: Duration = Duration::from_millis(100);

/// Largest UDP payload.
const PACKET_MAX: usize = 65_535;

/// How long a quiet relay sleeps before it looks whether it is to end.
const IDLE: Duration = Duration::from_millis(50);

impl Link {
    /// Whether it does nothing at all, so that no relay is needed.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }
}

/// A relay in front of a server. Clients connect to [`Relay::address`]; each gets a socket of its own towards the server.
pub struct Relay {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay to `server` on loopback.
    ///
    /// # Errors
    /// The system's, when sockets or threads can't be had.
    pub fn start(server: SocketAddr, link: Link) -> io::Result<Self> {
        let front = lazyvm_quic::bind((Ipv4Addr::LOCALHOST, 0).into())?;
        let address = front.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new()
            .name("relay".to_owned())
            .spawn({
                let stop = stop.clone();
                move || {
                    if let Err(error) = accept(&front, server, link, &stop) {
                        tracing::error!(%error, "the relay ends");
                    }
                }
            })?;
        Ok(Self {
            address,
            stop,
            threads: vec![thread],
        })
    }

    /// Where clients connect to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One direction of one client's traffic.
struct Pipe {
    to: UdpSocket,
    target: Option<SocketAddr>,
    link: Link,
    /// When the last bit of what is queued will have left.
    busy_until: Instant,
    under_way: VecDeque<(Instant, Vec<u8>)>,
    random: u64,
}

impl Pipe {
    fn take(&mut self, now: Instant, packet: &[u8]) {
        let draw = (next_random(&mut self.random) >> 11) as f64 / (1_u64 << 53) as f64;
        if draw < self.link.loss {
            return;
        }
        let start = self.busy_until.max(now);
        if start.saturating_duration_since(now) > QUEUE {
            return;
        }
        let bits = (packet.len() as u64 + 28) * 8;
        let sending = match self.link.rate_bit_s {
            0 => Duration::ZERO,
            rate => Duration::from_secs_f64(bits as f64 / rate as f64),
        };
        self.busy_until = start + sending;
        self.under_way
            .push_back((self.busy_until + self.link.rtt / 2, packet.to_vec()));
    }

    /// Sends what is due, and says when the next packet is.
    fn deliver(&mut self, now: Instant) -> Option<Instant> {
        while let Some((due, packet)) = self.under_way.front() {
            if *due > now {
                return Some(*due);
            }
            // A full socket buffer loses packets on a real link as well.
            let _ = match self.target {
                Some(target) => self.to.send_to(packet, target),
                None => self.to.send(packet),
            };
            self.under_way.pop_front();
        }
        None
    }
}

/// Both directions of one client.
struct Client {
    address: SocketAddr,
    back: UdpSocket,
    there: Pipe,
    here: Pipe,
}

fn accept(front: &UdpSocket, server: SocketAddr, link: Link, stop: &AtomicBool) -> io::Result<()> {
    front.set_nonblocking(true)?;
    let mut clients: Vec<Client> = Vec::new();
    let mut packet = vec![0; PACKET_MAX];
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        while let Ok((length, from)) = front.recv_from(&mut packet) {
            let known = clients.iter().position(|client| client.address == from);
            let number = match known {
                Some(number) => number,
                None => {
                    clients.push(Client::new(
                        front,
                        from,
                        server,
                        link,
                        clients.len() as u64,
                    )?);
                    clients.len() - 1
                }
            };
            clients[number].there.take(now, &packet[..length]);
        }
        let mut next: Option<Instant> = None;
        for client in &mut clients {
            while let Ok(length) = client.back.recv(&mut packet) {
                client.here.take(now, &packet[..length]);
            }
            for due in [client.there.deliver(now), client.here.deliver(now)]
                .into_iter()
                .flatten()
            {
                next = Some(next.map_or(due, |earliest| earliest.min(due)));
            }
        }
        wait(
            front,
            &clients,
            next.map_or(IDLE, |due| due.saturating_duration_since(Instant::now())),
        )?;
    }
    Ok(())
}

impl Client {
    fn new(
        front: &UdpSocket,
        address: SocketAddr,
        server: SocketAddr,
        link: Link,
        number: u64,
    ) -> io::Result<Self> {
        let back = lazyvm_quic::bind((Ipv4Addr::LOCALHOST, 0).into())?;
        back.connect(server)?;
        back.set_nonblocking(true)?;
        let pipe = |to, target, seed| Pipe {
            to,
            target,
            link,
            busy_until: Instant::now(),
            under_way: VecDeque::new(),
            random: 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(2 * number + seed + 1),
        };
        Ok(Self {
            address,
            there: pipe(back.try_clone()?, None, 0),
            here: pipe(front.try_clone()?, Some(address), 1),
            back,
        })
    }
}

/// Sleeps until a packet comes, or `most` has passed.
fn wait(front: &UdpSocket, clients: &[Client], most: Duration) -> io::Result<()> {
    use std::os::fd::AsFd;

    use nix::poll::{PollFd, PollFlags, ppoll};
    use nix::sys::time::TimeSpec;

    let mut polled = vec![PollFd::new(front.as_fd(), PollFlags::POLLIN)];
    polled.extend(
        clients
            .iter()
            .map(|client| PollFd::new(client.back.as_fd(), PollFlags::POLLIN)),
    );
    match ppoll(&mut polled, Some(TimeSpec::from_duration(most)), None) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
