//! One machine on the move, and who may have it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lazyvm_quic::describe;
use lazyvm_wire::control::{Hello, Lane, Rejection, Switchover, Welcome};
use lazyvm_wire::held;
use lazyvm_wire::ledger::SUPPORTED;
use lazyvm_wire::trust::Fingerprint;
use lazyvm_wire::{PageIndex, PageMap, PageMapError, PageRange, Secret, SessionId};
use quinn::Connection;
use tokio::sync::{Notify, watch};

use crate::early::Early;
use crate::frames::FrameReader;
use crate::handover::{Action, EndReason, Event, Handover, Phase};
use crate::port::{DirtyTracker, Hints, Profile, Scout, SourceMachine};
use crate::record::SessionRecord;
use crate::rounds::Mode;
use crate::scheduler::{Batch, Policy, PushScheduler, VirtualOrder};
use crate::trace::{Recorder, Trace};

/// What a session is made of.
pub struct SessionConfig {
    /// The machine.
    pub machine: Arc<dyn SourceMachine>,
    /// How long the ticket lets a destination in for the first time.
    pub ticket_lifetime: Duration,
    /// Whether pages are pushed; without, only faults bring them.
    pub push: bool,
    /// Limit of the push in bytes a second; faults are not limited.
    pub max_bandwidth: Option<u64>,
    /// How long the running machine is watched before the pause, and what it needs first is sent. Without a
    /// [`Scout`](crate::port::Scout), or with zero, the pause comes at once.
    pub warm_up: Duration,
    /// How the machine is moved. Without a [`DirtyTracker`], or with a destination that can't take pages before the
    /// pause, [`Mode::Hybrid`] is [`Mode::Postcopy`], and [`Mode::Precopy`] fails.
    pub mode: Mode,
    /// How long memory goes ahead of the pause; `None` for as long as it pays.
    pub precopy_limit: Option<Duration>,
    /// How long the machine may stand still for what is left in [`Mode::Precopy`].
    pub downtime_limit: Duration,
    /// What is pushed first; any but the whole is there for comparisons.
    pub policy: Policy,
    /// Where the session is recorded; `None` for a machine whose loss nobody minds (benchmarks, tests).
    pub record: Option<SessionRecord>,
    /// Records which pages the machine touches, for the simulator; nothing is pushed meanwhile.
    pub trace: Option<Recorder>,
}

impl SessionConfig {
    /// A session with a ticket for ten minutes and a push without limit, recorded nowhere.
    pub fn new(machine: Arc<dyn SourceMachine>) -> Self {
        Self {
            machine,
            ticket_lifetime: Duration::from_secs(600),
            push: true,
            max_bandwidth: None,
            warm_up: WARM_UP,
            mode: Mode::default(),
            precopy_limit: None,
            downtime_limit: DOWNTIME_LIMIT,
            policy: Policy::default(),
            record: None,
            trace: None,
        }
    }
}

/// How long the running machine is watched, unless said otherwise: a hot set shows within half a second.
pub const WARM_UP: Duration = Duration::from_secs(1);

/// How long a machine may stand still in pre-copy, unless said otherwise: what QEMU and libvirt take for it.
pub const DOWNTIME_LIMIT: Duration = Duration::from_millis(300);

/// How far a session is. Counts pages of 4 KiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStatus {
    /// Where the hand-over is.
    pub phase: Phase,
    /// Pages of the image.
    pub pages_total: u64,
    /// Pages that hold data, known from the pause on.
    pub pages_data: u64,
    /// Pages sent in answer to faults.
    pub pages_demand: u64,
    /// Pages pushed.
    pub pages_pushed: u64,
    /// Pages that the destination last said it has, zero pages among them.
    pub pages_at_destination: u64,
    /// From the pause until the source heard of the start, less half a round trip; 0 before.
    pub downtime_us: u64,
}

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

/// What the pause gave.
#[derive(Clone)]
pub(crate) struct Paused {
    pub switchover: Arc<Switchover>,
    pub map: Arc<PageMap>,
    /// The pages that the destination has already.
    pub held: Arc<PageMap>,
    /// When the machine began to stop.
    pub at: Instant,
}

/// What the last look gave.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// What goes first, in this order.
    pub lead: Vec<PageRange>,
    /// That was recorded, and is what the machine needs in that order.
    pub is_exact: bool,
    /// Which pages stand together in virtual memory.
    pub order: Arc<VirtualOrder>,
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

    /// Stops the machine, takes its state and finds its data. Blocks.
    pub fn pause(&self) -> Result<(), String> {
        let machine = &self.config.machine;
        machine
            .prepare_pause()
            .map_err(|error| describe(error.as_ref()))?;
        let at = Instant::now();
        let state = machine.pause().map_err(|error| describe(error.as_ref()))?;
        let paused = at.elapsed();
        self.last_writes();
        let map = self.page_map().inspect_err(|_| self.resume())?;
        self.counters
            .data
            .store(map.data_pages(), Ordering::Relaxed);
        let mut runs = lock(&self.early).held(machine.memory().as_ref(), &map);
        if let Some(recorder) = &self.config.trace {
            let held = map_of(&map, &runs);
            recorder.paused(Trace::at_pause(&map, &held, state.len() as u64), at);
            runs.clear();
        }
        let (held, told) = held::encode(&runs);
        runs.truncate(told);
        let switchover = Switchover {
            state,
            page_map: map.encode(),
            held,
            wait: self.config.mode.waits(),
        };
        let held = map_of(&map, &runs);
        tracing::debug!(
            session = %self.id,
            state_us = paused.as_micros() as u64,
            map_us = (at.elapsed() - paused).as_micros() as u64,
            data_pages = map.data_pages(),
            held_pages = held.data_pages(),
            residual_pages = lock(&self.residual).len(),
            "the machine is paused"
        );
        *lock(&self.paused) = Some(Paused {
            switchover: Arc::new(switchover),
            map: Arc::new(map),
            held: Arc::new(held),
            at,
        });
        Ok(())
    }

    /// What the paused machine needs first. Blocks.
    pub fn last_look(self: &Arc<Self>) -> Look {
        if let Some(profile) = &self.profile {
            return Look {
                lead: profile.lead(),
                is_exact: true,
                ..Look::default()
            };
        }
        let hints = self.look_paused();
        if let Some(recorder) = &self.config.trace {
            recorder.hints(&hints);
            let session = Arc::clone(self);
            recorder.write_later(move || {
                if let Some(paused) = session.paused() {
                    session.begin_push_of(&paused, &Look::default());
                }
            });
        }
        let residual = self.take_residual();
        Look {
            is_exact: false,
            order: Arc::new(VirtualOrder::new(&hints.virtual_order)),
            lead: Policy::lead(&hints, &residual),
        }
    }

    /// Begins to note the machine's writes; `false` where that can't be. Blocks.
    pub fn track(&self) -> bool {
        let Some(mut tracker) = self.config.machine.tracker() else {
            return false;
        };
        if let Err(error) = tracker.start() {
            let error = describe(error.as_ref());
            tracing::warn!(session = %self.id, %error, "the VM's writes can't be noted");
            return false;
        }
        lock(&self.early).writes_are_tracked();
        *lock(&self.tracker) = Some(tracker);
        true
    }

    /// The machine is the destination's, and writes here no more. Blocks.
    pub fn stop_tracking(&self) {
        *lock(&self.tracker) = None;
    }

    /// Hears which pages were written; gives those that had gone. Nothing that went counts where that fails. Blocks.
    pub fn collect_writes(&self) -> Result<Vec<PageIndex>, String> {
        let mut tracker = lock(&self.tracker);
        let Some(active) = tracker.as_mut() else {
            return Ok(Vec::new());
        };
        let mut stale = Vec::new();
        let collected = active.collect(&mut |range| {
            lock(&self.early).written(range, |page| stale.push(page));
        });
        if let Err(error) = collected {
            lock(&self.early).give_up();
            *tracker = None;
            return Err(describe(error.as_ref()));
        }
        Ok(stale)
    }

    /// What was written up to the pause. Blocks.
    fn last_writes(&self) {
        match self.collect_writes() {
            Ok(stale) => lock(&self.residual).extend(stale),
            Err(error) => {
                tracing::warn!(session = %self.id, %error, "the VM's last writes are not known: all pages go again");
            }
        }
    }

    /// These pages were written after they had gone, and do not go again before the pause.
    pub fn leave_for_push(&self, stale: Vec<PageIndex>) {
        lock(&self.residual).extend(stale);
    }

    /// What is left of pre-copy, what was written most often first.
    fn take_residual(&self) -> Vec<PageRange> {
        let mut pages = std::mem::take(&mut *lock(&self.residual));
        let early = lock(&self.early);
        pages.sort_unstable_by_key(|&page| (std::cmp::Reverse(early.heat(page)), page));
        pages.into_iter().map(PageRange::one).collect()
    }

    /// All pages that hold data while the machine runs. Blocks.
    pub fn data_now(&self) -> Result<Vec<PageRange>, String> {
        let mut runs = Vec::new();
        self.find_data(&mut |range| runs.push(range))?;
        Ok(runs)
    }

    fn look_paused(&self) -> Hints {
        let Some(scout) = &mut *lock(&self.scout) else {
            return Hints::default();
        };
        let hints = scout.look_paused().unwrap_or_else(|error| {
            let error = describe(error.as_ref());
            tracing::warn!(session = %self.id, %error, "can't find out what the machine needs first; the push goes from front to back");
            Hints::default()
        });
        self.config.policy.keep(hints)
    }

    fn page_map(&self) -> Result<PageMap, String> {
        let mut map = PageMap::zeroed(self.config.machine.layout().pages());
        self.find_data(&mut |range| map.set_data(range))?;
        Ok(map)
    }

    fn find_data(&self, data: &mut dyn FnMut(PageRange)) -> Result<(), String> {
        let memory = self.config.machine.memory();
        memory
            .data_runs(data)
            .map_err(|error| format!("can't find the data in the machine's memory: {error}"))
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

    /// Begins the push of all data pages that the destination does not have, these first.
    pub fn begin_first_push(&self, paused: &Paused, look: &Look) {
        // The recorder begins it when it is done; a machine that was refused meanwhile runs here.
        if self.config.trace.is_none() && self.serves_pages() {
            self.begin_push_of(paused, look);
        }
    }

    fn begin_push_of(&self, paused: &Paused, look: &Look) {
        let mut missing = paused.map.bits().to_bitvec();
        // What was on its way when a connection was lost may be held and yet not be there.
        if !lock(&self.early).is_void() {
            missing &= !paused.held.bits().to_bitvec();
        }
        self.begin_push(&PageMap::from_bits(missing), look);
    }

    fn begin_push(&self, map: &PageMap, look: &Look) {
        if !self.config.push {
            return;
        }
        let mut push = PushScheduler::new(map, self.config.machine.layout().clone());
        push.lead_with(look.lead.iter().copied());
        if look.is_exact {
            push.trust_lead();
        }
        push.order_by(look.order.clone());
        push.choose(self.config.policy.neighbours);
        *lock(&self.push) = Some(push);
        self.push_wake.notify_waiters();
    }

    /// Begins the push anew, with the pages that a destination which came back says are missing there.
    pub fn push_missing(&self, missing: &[u8]) -> Result<(), PageMapError> {
        let missing = PageMap::decode(missing, self.config.machine.layout().pages())?;
        if self.serves_pages() {
            let order = lock(&self.push).as_ref().map(|push| push.order().clone());
            let order = order.unwrap_or_default();
            let look = Look {
                order,
                ..Look::default()
            };
            self.begin_push(&missing, &look);
        }
        Ok(())
    }

    /// The next pages to push, if any.
    pub fn next_batch(&self, pages_max: u64) -> Option<Batch> {
        lock(&self.push).as_mut()?.next(pages_max)
    }

    /// These pages are to be sent before the pause.
    pub fn queue_early(&self, ranges: impl IntoIterator<Item = PageRange>) {
        lock(&self.early).queue(self.config.machine.layout(), ranges);
        self.push_wake.notify_waiters();
    }

    /// The next pages that go before the pause, and their round, if any.
    pub fn next_early(&self) -> Option<(PageRange, u8)> {
        if self.phase() != Phase::Offered {
            return None;
        }
        lock(&self.early).next()
    }

    /// So many bytes of what goes before the pause have arrived.
    pub fn early_has_arrived(&self, bytes: u64) {
        lock(&self.early).arrived(bytes);
        self.early_moved.notify_waiters();
    }

    /// Waits until all that was queued to go before the pause is on the path, and nothing of it waits here.
    pub async fn early_sent(&self) {
        loop {
            let moved = self.early_moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            {
                let early = lock(&self.early);
                let window = self.path_window.load(Ordering::Relaxed);
                if early.waiting() == 0 && early.unacked() <= window {
                    return;
                }
            }
            moved.await;
        }
    }

    /// Tells the push that a fault was answered.
    pub fn answered(&self, range: PageRange) {
        self.counters
            .demand
            .fetch_add(range.count, Ordering::Relaxed);
        if let Some(recorder) = &self.config.trace {
            recorder.touched(range.first);
        }
        if let Some(profile) = &self.profile {
            profile.demanded(range);
        }
        if let Some(push) = lock(&self.push).as_mut() {
            push.fault(range);
        }
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

/// A bit for each page of these runs, as many as the image has.
fn map_of(image: &PageMap, runs: &[held::HeldRun]) -> PageMap {
    let mut map = PageMap::zeroed(image.bits().len() as u64);
    for run in runs {
        map.set_data(run.range);
    }
    map
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
