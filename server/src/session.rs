//! One machine on the move, and who may have it.

mod ahead;
mod config;
mod pause;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use lazyvm_quic::describe;
use lazyvm_wire::control::{Hello, Lane, Rejection, Welcome};
use lazyvm_wire::ledger::SUPPORTED;
use lazyvm_wire::trust::Fingerprint;
use lazyvm_wire::{PageIndex, PageRange, Secret, SessionId};
use quinn::Connection;
use tokio::sync::{Notify, watch};

use crate::early::Early;
use crate::frames::FrameReader;
use crate::handover::{Action, EndReason, Event, Handover, Phase};
use crate::port::{DirtyTracker, Profile, Scout};
use crate::scheduler::{Batch, PushScheduler};

pub(crate) use self::ahead::Writes;
pub use self::config::{SessionConfig, SessionStatus, WARM_UP};
pub(crate) use self::pause::Paused;

#[derive(Default)]
pub(crate) struct Counters {
    pub data: AtomicU64,
    pub demand: AtomicU64,
    pub pushed: AtomicU64,
    pub at_destination: AtomicU64,
    pub downtime_us: AtomicU64,
}

pub(crate) struct Session {
    pub id: SessionId,
    pub secret: Secret,
    pub expires_at_s: u64,
    pub config: SessionConfig,
    pub frames: Arc<FrameReader>,
    pub counters: Counters,
    /// The destination asked for digests.
    pub verify: AtomicBool,
    /// The push has something to look for: pages, or its end.
    pub push_wake: Notify,
    owner: Mutex<Option<Fingerprint>>,
    /// The connections that are in use, by lane.
    connections: Mutex<[Option<Connection>; 2]>,
    /// A lane has lost its connection.
    detached: Notify,
    handover: Mutex<Handover>,
    phase: watch::Sender<Phase>,
    push: Mutex<Option<PushScheduler>>,
    pub early: Mutex<Early>,
    /// Something of what goes early was sent, or has arrived.
    pub early_moved: Notify,
    /// What the path of the push has under way at most, in bytes, and what it carries, in bytes a second; 0 until known.
    pub path_window: AtomicU64,
    pub path_bytes_s: AtomicU64,
    /// What notes the machine's writes, until it is the destination's.
    tracker: Mutex<Option<Box<dyn DirtyTracker>>>,
    /// Pages that were written after they had gone, and have not gone again.
    residual: Mutex<Vec<PageIndex>>,
    /// What watched the machine, for a last look when it is paused.
    pub scout: Mutex<Option<Box<dyn Scout>>>,
    paused: Mutex<Option<Paused>>,
    /// What earlier sessions needed first, and what this one does.
    pub profile: Option<Box<dyn Profile>>,
}

impl Session {
    pub fn new(id: SessionId, secret: Secret, config: SessionConfig) -> Self {
        let expires_at_s = now_s().saturating_add(config.ticket_lifetime.as_secs());
        Self {
            id,
            secret,
            expires_at_s,
            frames: Arc::new(FrameReader::new(config.machine.memory())),
            early: Mutex::new(Early::new(config.machine.layout(), seed(id))),
            early_moved: Notify::new(),
            path_window: AtomicU64::new(0),
            path_bytes_s: AtomicU64::new(0),
            tracker: Mutex::new(None),
            residual: Mutex::new(Vec::new()),
            scout: Mutex::new(None),
            profile: config.machine.profile(),
            config,
            counters: Counters::default(),
            verify: AtomicBool::new(false),
            push_wake: Notify::new(),
            owner: Mutex::new(None),
            connections: Mutex::new([None, None]),
            detached: Notify::new(),
            handover: Mutex::new(Handover::default()),
            phase: watch::Sender::new(Phase::Offered),
            push: Mutex::new(None),
            paused: Mutex::new(None),
        }
    }

    /// Lets a peer with this key in, or says why not. The first that shows the secret in time owns the session.
    pub fn admit(&self, hello: &Hello, peer: Fingerprint) -> Result<(), Rejection> {
        if !self.secret.matches(&hello.secret) {
            return Err(Rejection::WrongSecret);
        }
        if hello.versions.newest_common(SUPPORTED).is_none() {
            return Err(Rejection::Version(SUPPORTED));
        }
        let mut owner = lock(&self.owner);
        match *owner {
            Some(known) if known == peer => {}
            Some(_) => return Err(Rejection::Used),
            None if now_s() >= self.expires_at_s => return Err(Rejection::Expired),
            None if hello.lane == Lane::Bulk => {
                return Err(Rejection::Protocol(
                    "the bulk lane comes after the fault lane".to_owned(),
                ));
            }
            None => *owner = Some(peer),
        }
        if let Phase::Ended(reason) = self.phase() {
            return Err((&reason).into());
        }
        if hello.lane == Lane::Fault {
            self.verify.store(hello.verify, Ordering::Relaxed);
        }
        Ok(())
    }

    pub fn welcome(&self, hello: &Hello) -> Option<Welcome> {
        Some(Welcome {
            version: hello.versions.newest_common(SUPPORTED)?,
            layout: self.config.machine.layout().clone(),
            offer: self.config.machine.offer(),
            mode: self.config.mode.name().to_owned(),
        })
    }

    /// Makes `connection` the lane's; one that was there before is closed, its peer has a new one.
    pub fn attach(&self, lane: Lane, connection: Connection) {
        if lane == Lane::Bulk {
            lock(&self.early).give_up();
        }
        let old = lock(&self.connections)[lane as usize].replace(connection);
        if let Some(old) = old {
            old.close(lazyvm_quic::close_code::GONE, b"superseded");
        }
    }

    /// Whether `connection` is still the lane's.
    pub fn is_attached(&self, lane: Lane, connection: &Connection) -> bool {
        lock(&self.connections)[lane as usize]
            .as_ref()
            .is_some_and(|attached| attached.stable_id() == connection.stable_id())
    }

    pub fn detach(&self, lane: Lane, connection: &Connection) {
        let mut connections = lock(&self.connections);
        let slot = &mut connections[lane as usize];
        if slot
            .as_ref()
            .is_some_and(|attached| attached.stable_id() == connection.stable_id())
        {
            *slot = None;
            self.detached.notify_waiters();
        }
    }

    /// Waits until the fault lane has no connection.
    pub async fn parted(&self) {
        loop {
            let detached = self.detached.notified();
            if lock(&self.connections)[Lane::Fault as usize].is_none() {
                return;
            }
            detached.await;
        }
    }

    /// Closes both lanes.
    pub fn close(&self) {
        for connection in lock(&self.connections).iter_mut().filter_map(Option::take) {
            connection.close(lazyvm_quic::close_code::GONE, b"the session ends");
        }
        self.detached.notify_waiters();
    }

    /// Whether its destination is there.
    pub fn is_connected(&self) -> bool {
        lock(&self.connections).iter().any(Option::is_some)
    }

    pub fn has_bulk_lane(&self) -> bool {
        lock(&self.connections)[Lane::Bulk as usize].is_some()
    }

    /// Takes an event to the hand-over; the caller carries the actions out.
    pub fn handle(&self, event: Event) -> Vec<Action> {
        let mut handover = lock(&self.handover);
        let before = handover.phase().clone();
        let actions = handover.handle(event);
        let phase = handover.phase().clone();
        drop(handover);
        if phase != before {
            tracing::info!(session = %self.id, ?phase, "session");
            self.phase.send_replace(phase);
            self.push_wake.notify_waiters();
        }
        actions
    }

    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    pub fn watch_phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    pub fn serves_pages(&self) -> bool {
        lock(&self.handover).serves_pages()
    }

    /// Lets the machine run on here. Blocks.
    pub fn resume(&self) {
        *lock(&self.push) = None;
        *lock(&self.paused) = None;
        *lock(&self.tracker) = None;
        if let Err(error) = self.config.machine.resume() {
            let error = describe(error.as_ref());
            tracing::error!(session = %self.id, %error, "the machine stands paused and can't be resumed");
        }
    }

    /// Writes the phase down. Blocks.
    pub fn record(&self, phase: &Phase) -> Result<(), String> {
        let Some(record) = &self.config.record else {
            return Ok(());
        };
        let owner = *lock(&self.owner);
        record
            .write(self, phase, owner)
            .map_err(|error| describe(&error))
    }

    pub fn paused(&self) -> Option<Paused> {
        lock(&self.paused).clone()
    }

    /// The next pages to push, if any.
    pub fn next_batch(&self, pages_max: u64) -> Option<Batch> {
        lock(&self.push).as_mut()?.next(pages_max)
    }

    /// Tells the push that a fault was answered.
    pub fn answered(&self, range: PageRange) {
        self.counters
            .demand
            .fetch_add(range.count, Ordering::Relaxed);
        if let Some(recorder) = &self.config.trace {
            recorder.touched(range.first);
        }
        let mut push = lock(&self.push);
        if let Some(profile) = &self.profile {
            // Before the push begins, nothing has gone.
            let gone = push.as_ref().map_or(Some(0), PushScheduler::lead_gone);
            profile.demanded(range, gone);
        }
        if let Some(push) = push.as_mut() {
            push.fault(range);
        }
        drop(push);
        self.push_wake.notify_waiters();
    }

    pub fn status(&self) -> SessionStatus {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SessionStatus {
            phase: self.phase(),
            pages_total: self.config.machine.layout().pages(),
            pages_data: load(&self.counters.data),
            pages_demand: load(&self.counters.demand),
            pages_pushed: load(&self.counters.pushed),
            pages_at_destination: load(&self.counters.at_destination),
            downtime_us: load(&self.counters.downtime_us),
        }
    }

    /// Whether nothing is to be sent any more.
    pub fn is_over(&self) -> bool {
        matches!(
            self.phase(),
            Phase::Moved | Phase::Releasing | Phase::Ended(_)
        )
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id)
            .field("phase", &self.phase())
            .finish()
    }
}

pub(crate) fn now_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A number that nobody outside of the session knows.
fn seed(id: SessionId) -> u64 {
    id.0.iter()
        .fold(0, |seed, &byte| seed.rotate_left(8) ^ u64::from(byte))
}

/// A panic elsewhere leaves these values whole: each is changed in one step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl From<&EndReason> for Rejection {
    fn from(reason: &EndReason) -> Self {
        match reason {
            EndReason::Protocol(what) => Self::Protocol((*what).to_owned()),
            other => Self::Machine(lazyvm_wire::control::short_text(&other.to_string())),
        }
    }
}
