//! The emulated wide-area path: two network namespaces, a TUN device in each, and a thread that carries packets between
//! them as `PathQueue` says.
//!
//! The devices hand over packets that stand for many (TSO, USO), so that a read and a write carry up to 64 KB. Rate, queue
//! and loss are kept packet by packet all the same; what a read brought is taken apart where its packets fare differently,
//! and where it would take the path longer than `TOGETHER`.
//!
//! Delays are exact to some microseconds on a quiet path, and up to `NAP` too long at each end of a busy one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use super::namespace::{Namespace, Raised};
use super::packet::{PACKET_BYTES_MAX, Packet};
use super::queue::{Dropped, PathConfig, PathQueue, nanoseconds};
use super::sys::{self, Offload};
use super::traffic::Traffic;
use super::{WanError, lock};

/// Addresses of the two ends.
pub const SOURCE: &str = "10.77.0.1";
/// The other.
pub const DESTINATION: &str = "10.77.0.2";

/// The device's name in both namespaces.
const DEVICE: &str = "wan";

/// Packets that arrive within this time of each other may arrive together.
const TOGETHER: Duration = Duration::from_micros(600);

/// Reads of one device before the other has its turn.
const READS_IN_TURN: usize = 32;

/// What a busy relay sleeps for between two looks, as network cards do that join interrupts: waking up is most of what it
/// costs, and it shares its processors with those whose work is measured.
const NAP: Duration = Duration::from_micros(200);

/// Reads and writes within [`BUSY_WINDOW_NS`] from which on a relay is busy.
const BUSY_PACKETS: u32 = 20;
const BUSY_WINDOW_NS: u64 = 5_000_000;

/// How long a quiet relay sleeps before it looks whether it is to end.
const IDLE: Duration = Duration::from_millis(20);

/// How often the relay's own processor time is looked at.
const CPU_EVERY_NS: u64 = 5_000_000;

/// Packets that a device keeps for the relay. The path's queue is the relay's; this one must not be full first.
const DEVICE_QUEUE: u32 = 20_000;

/// TCP's limits of its buffers: 64 MB fill 1 Gbit/s for half a second.
const TCP_BUFFERS: &str = "4096 131072 67108864";
const UDP_BUFFER_BYTES: u64 = 64 << 20;

/// A packet from the source that is about to go on its way.
#[derive(Clone, Copy, Debug)]
pub struct Passing {
    /// The port that it goes to.
    pub to_port: Option<u16>,
    /// Bytes of IP.
    pub bytes: u64,
}

/// Says of each packet from the source whether it is to be lost.
type Choice = Box<dyn FnMut(Passing) -> bool + Send>;

/// The path, until it is dropped.
pub struct Emulator {
    /// The source's end.
    pub source: Namespace,
    /// The destination's end.
    pub destination: Namespace,
    /// When time 0 of [`Traffic`] was.
    pub started_at: Instant,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    _settings: Vec<Raised>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// From when until when nothing goes through.
    blackout_from_ns: AtomicU64,
    blackout_to_ns: AtomicU64,
    /// A path that the relay has not taken up yet.
    change: Mutex<Option<PathConfig>>,
    changed: AtomicBool,
    traffic: Mutex<Traffic>,
    choice: Mutex<Option<Choice>>,
    chooses: AtomicBool,
}

impl Emulator {
    /// Makes the namespaces and starts to carry packets.
    ///
    /// # Errors
    /// [`WanError`]: not root, no TUN, no `ip`.
    pub fn start(path: PathConfig) -> Result<Self, WanError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(WanError::NotRoot);
        }
        let mut settings = Vec::new();
        for path in ["/proc/sys/net/core/rmem_max", "/proc/sys/net/core/wmem_max"] {
            settings.extend(Raised::to(path, UDP_BUFFER_BYTES).map_err(WanError::Network)?);
        }
        let (source, source_device) = end(SOURCE)?;
        let (destination, destination_device) = end(DESTINATION)?;
        let started_at = Instant::now();
        let shared = Arc::new(Shared::default());
        let mut relay = Relay {
            devices: [source_device, destination_device],
            queues: [0, 1].map(|number| {
                PathQueue::new(PathConfig {
                    seed: path.seed.wrapping_mul(2).wrapping_add(number),
                    ..path
                })
            }),
            started_at,
            shared: shared.clone(),
            buffer: vec![0; PACKET_BYTES_MAX],
            cpu_seen_ns: 0,
            activity: Activity::default(),
        };
        let thread = std::thread::Builder::new()
            .name("wan-relay".to_owned())
            .spawn(move || {
                if let Err(error) = relay.run() {
                    tracing::error!(%error, "the emulated path ends");
                }
            })
            .map_err(WanError::Network)?;
        Ok(Self {
            source,
            destination,
            started_at,
            shared,
            thread: Some(thread),
            _settings: settings,
        })
    }

    /// Nothing goes through from `from` on, for `time`.
    pub fn black_out(&self, from: Instant, time: Duration) {
        let from = from.saturating_duration_since(self.started_at);
        let to = nanoseconds(from.saturating_add(time));
        self.shared
            .blackout_from_ns
            .store(nanoseconds(from), Ordering::Relaxed);
        self.shared.blackout_to_ns.store(to, Ordering::Relaxed);
    }

    /// The path is another one from now on: its rate, its round trip, what it loses. What is under way arrives as it would
    /// have.
    pub fn change(&self, path: PathConfig) {
        *lock(&self.shared.change) = Some(path);
        self.shared.changed.store(true, Ordering::Release);
    }

    /// Loses those packets from the source of which `choice` says so, one by one and on the relay's thread: for who wants to
    /// lose a certain one.
    pub fn lose(&self, choice: impl FnMut(Passing) -> bool + Send + 'static) {
        *lock(&self.shared.choice) = Some(Box::new(choice));
        self.shared.chooses.store(true, Ordering::Release);
    }

    /// What has gone through so far.
    pub fn traffic(&self) -> Traffic {
        lock(&self.shared.traffic).clone()
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A namespace with its device.
fn end(address: &str) -> Result<(Namespace, File), WanError> {
    let namespace = Namespace::new().map_err(WanError::Network)?;
    let (device, offload) = namespace
        .within(|| sys::tun(DEVICE))
        .map_err(WanError::Tun)?;
    if offload != Offload::TcpAndUdp {
        tracing::warn!(
            "this kernel can't hand over many UDP packets at once: the emulator takes more processor time"
        );
    }
    // Not all kernels have IPv6; where it is, it would talk by itself.
    let _ = namespace.set("ipv6/conf/all/disable_ipv6", "1");
    for name in ["ipv4/tcp_rmem", "ipv4/tcp_wmem"] {
        namespace
            .set(name, TCP_BUFFERS)
            .map_err(WanError::Network)?;
    }
    namespace.ip("link set lo up")?;
    namespace.ip(&format!("address add {address}/30 dev {DEVICE}"))?;
    namespace.ip(&format!(
        "link set {DEVICE} mtu 1500 txqueuelen {DEVICE_QUEUE} up"
    ))?;
    Ok((namespace, device))
}

struct Relay {
    /// The source's, the destination's.
    devices: [File; 2],
    /// From the source, from the destination.
    queues: [PathQueue<Packet>; 2],
    started_at: Instant,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
    cpu_seen_ns: u64,
    activity: Activity,
}

/// Reads and writes in this window of time, and whether those of the one before were many.
#[derive(Default)]
struct Activity {
    window: u64,
    packets: u32,
    busy: bool,
}

impl Activity {
    fn note(&mut self, now_ns: u64, packets: u32) {
        let window = now_ns / BUSY_WINDOW_NS;
        if window != self.window {
            self.busy = self.packets >= BUSY_PACKETS && window == self.window + 1;
            self.window = window;
            self.packets = 0;
        }
        self.packets += packets;
    }
}

impl Relay {
    fn run(&mut self) -> io::Result<()> {
        if let Err(error) = sys::run_first() {
            tracing::warn!(%error, "the emulator has no real-time priority; delays vary more");
        }
        while !self.shared.stop.load(Ordering::Relaxed) {
            let blackout = (self.shared.blackout_from_ns.load(Ordering::Relaxed)
                ..self.shared.blackout_to_ns.load(Ordering::Relaxed))
                .contains(&self.now_ns());
            if self.shared.changed.swap(false, Ordering::Acquire)
                && let Some(path) = lock(&self.shared.change).take()
            {
                self.queues
                    .iter_mut()
                    .for_each(|queue| queue.set_config(path));
            }
            let mut more = false;
            for from in 0..2 {
                self.queues[from].set_blackout(blackout);
                more |= self.take_in(from)?;
            }
            for from in 0..2 {
                self.hand_out(from);
            }
            self.note_cpu()?;
            self.activity.note(self.now_ns(), 0);
            match (more, self.activity.busy) {
                (true, _) => {}
                (false, true) => std::thread::sleep(NAP),
                (false, false) => self.wait()?,
            }
        }
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        nanoseconds(self.started_at.elapsed())
    }

    /// Reads what one device has; says whether it may have more.
    fn take_in(&mut self, from: usize) -> io::Result<bool> {
        for _ in 0..READS_IN_TURN {
            let length = match (&self.devices[from]).read(&mut self.buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let Some(packet) = Packet::new(&self.buffer[..length]) else {
                continue;
            };
            let now = self.now_ns();
            self.activity.note(now, 1);
            let dropped = if from == 0 && self.shared.chooses.load(Ordering::Acquire) {
                let to_port = packet.to_port();
                let mut choice = lock(&self.shared.choice);
                enqueue(&mut self.queues[from], now, packet, |bytes| {
                    let passing = Passing { to_port, bytes };
                    choice.as_mut().is_some_and(|choice| choice(passing))
                })
            } else {
                enqueue(&mut self.queues[from], now, packet, |_| false)
            };
            lock(&self.shared.traffic).took(dropped);
        }
        Ok(true)
    }

    /// Writes what has arrived by now.
    fn hand_out(&mut self, from: usize) {
        let now = self.now_ns();
        let mut device = &self.devices[1 - from];
        while let Some(packet) = self.queues[from].pop(now) {
            self.activity.note(now, 1);
            let written = device.write(packet.bytes()).is_ok();
            let mut traffic = lock(&self.shared.traffic);
            if written {
                traffic.delivered(from, now, packet.wire_bytes(), packet.count() as u64);
            } else {
                traffic.write_failures += 1;
            }
        }
    }

    fn note_cpu(&mut self) -> io::Result<()> {
        let now = self.now_ns();
        if now - self.cpu_seen_ns < CPU_EVERY_NS {
            return Ok(());
        }
        self.cpu_seen_ns = now;
        let used = Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?);
        lock(&self.shared.traffic).relay_cpu_us = used.as_micros() as u64;
        Ok(())
    }

    /// Sleeps until a packet comes or arrives.
    fn wait(&self) -> io::Result<()> {
        let next = self.queues.iter().filter_map(PathQueue::next_due_ns).min();
        let most = next.map_or(IDLE, |due| {
            Duration::from_nanos(due.saturating_sub(self.now_ns())).min(IDLE)
        });
        let mut polled = self
            .devices
            .each_ref()
            .map(|device| PollFd::new(device.as_fd(), PollFlags::POLLIN));
        match ppoll(&mut polled, Some(TimeSpec::from_duration(most)), None) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Puts a packet, which may stand for many, on its way: in one where all of it fares alike. `lose` hears how long each of
/// them is and says whether it is lost. Says what is lost of it.
fn enqueue(
    queue: &mut PathQueue<Packet>,
    now_ns: u64,
    packet: Packet,
    mut lose: impl FnMut(u64) -> bool,
) -> Vec<Dropped> {
    struct Run {
        first: usize,
        count: usize,
        first_due_ns: u64,
        due_ns: u64,
    }
    let mut runs: Vec<Run> = Vec::new();
    let mut dropped = Vec::new();
    for (number, bytes) in packet.segments().enumerate() {
        let due_ns = match queue.admit(now_ns, bytes) {
            Ok(_) if lose(bytes) => {
                dropped.push(Dropped::Lost);
                continue;
            }
            Ok(due_ns) => due_ns,
            Err(why) => {
                dropped.push(why);
                continue;
            }
        };
        match runs.last_mut() {
            Some(run)
                if run.first + run.count == number
                    && due_ns >= run.due_ns
                    && due_ns - run.first_due_ns <= nanoseconds(TOGETHER) =>
            {
                run.count += 1;
                run.due_ns = due_ns;
            }
            _ => runs.push(Run {
                first: number,
                count: 1,
                first_due_ns: due_ns,
                due_ns,
            }),
        }
    }
    match runs[..] {
        [Run { count, due_ns, .. }] if count == packet.count() => queue.push(due_ns, packet),
        _ => {
            for run in runs {
                queue.push(run.due_ns, packet.part(run.first, run.count));
            }
        }
    }
    dropped
}
