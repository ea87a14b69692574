//! A move from its destination's side, in the order in which it happens: [`connect`], [`Offer::take`],
//! [`Arrived::started`], [`Filling::wait`]. Each step is a type, so that none can be left out or done twice.
//!
//! All of these block and belong on threads of the caller's own, not into an async runtime.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyvm_quic::{LaneThread, Urgency, describe};
use lazyvm_wire::control::{Switchover, Welcome};
use lazyvm_wire::trust::Identity;
use lazyvm_wire::{Layout, MachineOffer, Ticket};
use tokio::sync::mpsc;

use crate::connect::{Credentials, connect_bulk, connect_fault};
use crate::core::{Core, LocalReader, Supply};
use crate::demand::RequestQueue;
use crate::driver::{Command, Driver};
use crate::error::PagerError;
use crate::faults;
use crate::filling::Filling;
use crate::handover::Handover;
use crate::install::{Installer, Registration, Shelf};
use crate::memory::{LazyMemory, MemoryError};
use crate::port::{DestinationMachine, HandedOver, LateMachine, MachineError};
use crate::report::Statistics;
use crate::room::shelf_for;
use crate::stage::{Stage, StageCell};
use crate::uffd::Uffd;

/// How a move is taken in.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Compare a digest of every page with the source's, taken at the pause. Takes nine bytes of memory a page.
    pub verify: bool,
    /// The memory's owner may give pages back (a balloon). Costs a lock on the way of each page.
    pub removals: bool,
}

/// How often it is asked whether a machine that waits for its pages still lives.
const CHECK_EVERY: Duration = Duration::from_millis(200);

/// What all steps of a move hold on to.
pub(crate) struct Move {
    // Both lanes end when the move is dropped; see `Filling` for one that is not at its end.
    fault_lane: LaneThread,
    _bulk_lane: LaneThread,
    commands: mpsc::UnboundedSender<Command>,
    pub(crate) stage: Arc<StageCell>,
    statistics: Arc<Statistics>,
    pub(crate) session: String,
    pub(crate) welcome: Box<Welcome>,
    options: Options,
}

/// Connects to the source that a ticket names and hears what it offers. The machine runs on there.
///
/// # Errors
/// [`PagerError::Connect`] says whether the source is not there, is another one, or does not want the ticket.
pub fn connect(ticket: &Ticket, options: Options) -> Result<Offer, PagerError> {
    let statistics = Arc::new(Statistics::new(Instant::now()));
    let credentials = Arc::new(Credentials {
        ticket: ticket.clone(),
        identity: Identity::generate()?,
        verify: options.verify,
    });
    let fault_lane = LaneThread::start("fault-lane", Urgency::Fault).map_err(PagerError::Thread)?;
    let bulk_lane = LaneThread::start("bulk-lane", Urgency::Bulk).map_err(PagerError::Thread)?;
    let (commands, receiver) = mpsc::unbounded_channel();
    let stage = Arc::new(StageCell::new());
    // Its handshake need not wait for the other one's.
    let bulk = bulk_lane.handle().spawn(connect_bulk(credentials.clone()));
    let mut driver = Driver {
        credentials: credentials.clone(),
        commands: receiver,
        stage: stage.clone(),
        statistics: statistics.clone(),
        bulk_lane: bulk_lane.handle().clone(),
        bulk_ahead: Some(bulk),
        offered_pages: 0,
        ahead: None,
        handover: Handover::default(),
        core: None,
        unplaced: None,
        alone: false,
        waiting: None,
        zeros: None,
        records: false,
        recorded_until: None,
        rejection: None,
    };
    let (answer, answered) = std::sync::mpsc::channel();
    fault_lane.handle().spawn(async move {
        match connect_fault(&credentials).await {
            Ok((link, welcome)) => {
                driver.offered_pages = welcome.layout.pages();
                if answer.send(Ok(welcome)).is_ok() {
                    driver.run(link).await;
                }
            }
            Err(error) => drop(answer.send(Err(error))),
        }
    });
    let welcome = answered.recv().map_err(|_| PagerError::SourceLost)??;
    let session = ticket.session.to_string();
    Ok(Offer(Move {
        fault_lane,
        _bulk_lane: bulk_lane,
        commands,
        stage,
        statistics,
        session,
        welcome,
        options,
    }))
}

/// What a source offers. Dropping it refuses: the machine runs on at the source.
pub struct Offer(Move);

impl Offer {
    /// The region table of the machine's memory.
    pub fn layout(&self) -> &Layout {
        &self.0.welcome.layout
    }

    /// The machine.
    pub fn machine(&self) -> &MachineOffer {
        &self.0.welcome.offer
    }

    /// Tells the source that the machine can't be run here. It runs on there.
    pub fn refuse(self, reason: &str) -> PagerError {
        self.0.refuse(reason)
    }

    /// Registers `memory`, which must be empty and of the offer's layout, and has the source hand over: when this
    /// returns, a touch of it is served and the push is under way.
    ///
    /// # Errors
    /// [`PagerError`]; but for [`PagerError::SourceLostAtHandover`] the machine runs on at the source.
    pub fn take(self, memory: Arc<LazyMemory>) -> Result<Arrived, PagerError> {
        let core = match self.register(memory) {
            Ok(core) => Arc::new(core),
            Err(error) => {
                self.0.refuse(&describe(&error));
                return Err(error);
            }
        };
        self.0.fault_lane.handle().spawn(watch(core.clone()));
        self.0.tell(Command::Take(core.clone()));
        let switchover = self.0.switched()?;
        Ok(Arrived {
            inner: self.0,
            core,
            switchover,
        })
    }

    /// Has the source hand over before there is memory: for a monitor that makes it only when it has the state.
    /// [`Offer::take`] is the way for all others, since here the memory can still be refused when the machine stands
    /// paused already.
    ///
    /// # Errors
    /// [`PagerError`]; but for [`PagerError::SourceLostAtHandover`] the machine runs on at the source.
    pub fn ask(self) -> Result<Unplaced, PagerError> {
        let shelf = shelf_for(self.layout());
        self.0
            .tell(Command::Ask(self.layout().clone(), shelf.clone()));
        let switchover = self.0.switched()?;
        Ok(Unplaced {
            inner: self.0,
            switchover,
            shelf,
        })
    }

    /// [`Offer::take`] for memory that is no machine's: there is nothing to load or to start.
    ///
    /// # Errors
    /// As [`Offer::take`].
    pub fn fill(self, memory: Arc<LazyMemory>) -> Result<Filling, PagerError> {
        self.take(memory)?.started()
    }

    fn register(&self, memory: Arc<LazyMemory>) -> Result<Core, PagerError> {
        let (uffd, registration) = match memory.take_userfaultfd() {
            Some(handed_over) => handed_over,
            None => (
                Uffd::open(&memory, self.0.options.removals)?,
                Registration::Register,
            ),
        };
        let installer = Installer::new(self.layout(), memory, uffd, registration)?;
        let statistics = self.0.statistics.clone();
        let supply = Supply::Source(RequestQueue::default());
        let verify = self.0.options.verify;
        Ok(Core::new(
            self.layout().clone(),
            installer,
            statistics,
            supply,
            verify,
        ))
    }
}

/// A machine that is this side's, and has no memory yet. Dropping it refuses.
pub struct Unplaced {
    inner: Move,
    switchover: Arc<Switchover>,
    /// What came before the machine.
    shelf: Option<Arc<Shelf>>,
}

impl Unplaced {
    /// The machine's state, in its monitor's own format.
    pub fn state(&self) -> &[u8] {
        &self.switchover.state
    }

    /// Tells the source that the machine can't be run here; returns when it has heard. It runs the machine again.
    pub fn refuse(self, reason: &str) -> PagerError {
        self.inner.refuse(reason)
    }

    /// Fills this memory, which must be empty: its touches are served when this returns.
    ///
    /// # Errors
    /// [`PagerError`]; the memory does not fit. The source runs the machine again.
    pub fn place(self, handed: HandedOver) -> Result<Arrived, PagerError> {
        let core = match self.register(handed) {
            Ok(core) => Arc::new(core),
            Err(error) => {
                self.inner.refuse(&describe(&error));
                return Err(error);
            }
        };
        self.inner.tell(Command::Place(core.clone()));
        Ok(Arrived {
            inner: self.inner,
            core,
            switchover: self.switchover,
        })
    }

    fn register(&self, handed: HandedOver) -> Result<Core, PagerError> {
        check_same_pages(&self.inner.welcome.layout, &handed.layout)?;
        let HandedOver {
            layout,
            memory,
            uffd,
        } = handed;
        let mut installer = Installer::new(&layout, Arc::new(memory), uffd, Registration::Done)?;
        if let Some(shelf) = &self.shelf {
            installer = installer.with_shelf(shelf.clone());
        }
        let statistics = self.inner.statistics.clone();
        let supply = Supply::Source(RequestQueue::default());
        let verify = self.inner.options.verify;
        Ok(Core::new(layout, installer, statistics, supply, verify))
    }
}

/// The source sends whole pages of its own kind, so both must have the same.
fn check_same_pages(theirs: &Layout, ours: &Layout) -> Result<(), MemoryError> {
    let expected = theirs.bytes();
    if ours.bytes() != expected {
        return Err(MemoryError::ImageSize {
            expected,
            got: ours.bytes(),
        });
    }
    for region in theirs.regions() {
        if let Some(other) = ours
            .regions()
            .iter()
            .find(|other| other.backing != region.backing)
        {
            return Err(MemoryError::RegionBacking {
                region: other.name.clone(),
                expected: region.backing,
                got: other.backing,
            });
        }
    }
    Ok(())
}

/// A machine that is this side's: it runs nowhere until [`Arrived::started`] or [`Arrived::refuse`]. Dropping it
/// refuses.
pub struct Arrived {
    inner: Move,
    core: Arc<Core>,
    switchover: Arc<Switchover>,
}

impl Arrived {
    /// The machine's state, in its monitor's own format.
    pub fn state(&self) -> &[u8] {
        &self.switchover.state
    }

    /// Tells the source that the state can't be run here; returns when it has heard. It runs the machine again.
    pub fn refuse(self, reason: &str) -> PagerError {
        self.inner.refuse(reason)
    }

    /// Waits until all pages are here, where the source has it so (pre-copy, stop-and-copy); `check` is asked now and then
    /// whether there is still something to wait for.
    ///
    /// # Errors
    /// [`PagerError`]; what `check` says is told to the source, which runs the machine again.
    pub fn wait_for_pages(
        self,
        mut check: impl FnMut() -> Result<(), MachineError>,
    ) -> Result<Self, PagerError> {
        let is_here = || self.core.is_all_here();
        while self.switchover.wait && !self.inner.stage.wait_briefly(CHECK_EVERY, is_here)? {
            if let Err(error) = check() {
                return Err(self.refuse(&describe(error.as_ref())));
            }
        }
        Ok(self)
    }

    /// Tells the source that the vCPUs run; returns when it has heard.
    ///
    /// # Errors
    /// [`PagerError`].
    pub fn started(self) -> Result<Filling, PagerError> {
        self.inner.tell(Command::Started);
        self.inner
            .stage
            .wait(|stage| matches!(stage, Stage::Running | Stage::Done).then_some(()))?;
        Ok(Filling::new(self.inner, self.core))
    }
}

impl Move {
    /// Waits until the machine is this side's.
    fn switched(&self) -> Result<Arc<Switchover>, Arc<PagerError>> {
        self.stage.wait(|stage| match stage {
            Stage::Switched(switchover) => Some(switchover.clone()),
            _ => None,
        })
    }

    fn tell(&self, command: Command) {
        // Fails only when the move is over, which the stage tells.
        let _ = self.commands.send(command);
    }

    fn refuse(&self, reason: &str) -> PagerError {
        self.tell(Command::Refuse(reason.to_owned()));
        match self.stage.wait(|_| None::<std::convert::Infallible>) {
            Ok(never) => match never {},
            Err(error) => error.into(),
        }
    }
}

/// Fills `memory`, which must be empty, from pages that are at hand: a touch is served with what `read` gives.
///
/// It goes on for as long as the process.
///
/// # Errors
/// [`PagerError`].
pub fn fill_locally(
    layout: &Layout,
    memory: Arc<LazyMemory>,
    read: Box<LocalReader>,
) -> Result<(), PagerError> {
    let uffd = Uffd::open(&memory, false)?;
    let installer = Installer::new(layout, memory, uffd, Registration::Register)?;
    let statistics = Arc::new(Statistics::new(Instant::now()));
    let core = Core::new(
        layout.clone(),
        installer,
        statistics,
        Supply::Local(read),
        false,
    );
    let lane = LaneThread::start("fault-lane", Urgency::Fault).map_err(PagerError::Thread)?;
    lane.handle().spawn(watch(Arc::new(core)));
    // Absent pages must not turn into zeros, so the lane goes on.
    std::mem::forget(lane);
    Ok(())
}

/// Serves the faults of this memory, for ever.
pub(crate) async fn watch(core: Arc<Core>) {
    if let Err(error) = faults::watch(core).await {
        tracing::error!(%error, "the userfaultfd can't be watched; who touches an absent page waits");
    }
}

/// Moves a machine here: prepares it, takes it over, loads and starts it.
///
/// `arrived` is called when the machine runs. On failure before that the machine runs on at the source.
///
/// # Errors
/// [`PagerError`].
pub fn resume(offer: Offer, machine: &mut dyn DestinationMachine) -> Result<Filling, PagerError> {
    let memory = match machine.prepare(offer.layout(), offer.machine()) {
        Ok(memory) => memory,
        Err(error) => return Err(offer.refuse(&describe(error.as_ref()))),
    };
    let arrived = offer.take(Arc::new(memory))?;
    let run = machine.load(arrived.state()).and_then(|()| machine.start());
    match run {
        Ok(()) => arrived.started(),
        Err(error) => Err(arrived.refuse(&describe(error.as_ref()))),
    }
}

/// [`resume`] for a monitor that makes its memory only when it is given the state.
///
/// # Errors
/// [`PagerError`].
pub fn resume_late(offer: Offer, machine: &mut dyn LateMachine) -> Result<Filling, PagerError> {
    if let Err(error) = machine.prepare(offer.layout(), offer.machine()) {
        return Err(offer.refuse(&describe(error.as_ref())));
    }
    let unplaced = offer.ask()?;
    let handed = match machine.begin_load(unplaced.state()) {
        Ok(handed) => handed,
        Err(error) => return Err(unplaced.refuse(&describe(error.as_ref()))),
    };
    let arrived = unplaced.place(handed)?;
    if let Err(error) = machine.finish_load() {
        return Err(arrived.refuse(&describe(error.as_ref())));
    }
    let arrived = arrived.wait_for_pages(|| machine.check_alive())?;
    match machine.start() {
        Ok(()) => arrived.started(),
        Err(error) => Err(arrived.refuse(&describe(error.as_ref()))),
    }
}
