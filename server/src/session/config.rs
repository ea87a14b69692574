//! What a session is made of, and what can be seen of it.

use std::sync::Arc;
use std::time::Duration;

use crate::handover::Phase;
use crate::port::SourceMachine;
use crate::record::SessionRecord;
use crate::rounds::Mode;
use crate::scheduler::Policy;
use crate::trace::Recorder;

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
    /// How the machine is moved. Without a [`DirtyTracker`](crate::port::DirtyTracker), or with a destination that can't
    /// take pages before the pause, [`Mode::Hybrid`] is [`Mode::Postcopy`], and [`Mode::Precopy`] fails.
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
