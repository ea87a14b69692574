//! The conversation with the source, over as many connections as it takes. Runs on the fault lane.

mod lanes;
mod memory;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lazyvm_quic::{ControlStreamError, close_code, describe};
use lazyvm_wire::control::{
    Rejection, Switchover, ToDestination, ToSource, short_text, switchover_max,
};
use lazyvm_wire::held::HeldError;
use lazyvm_wire::{Layout, PageMap, PageMapError, STATE_MAX};
use quinn::Connection;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use self::lanes::spawn_demand;
use self::memory::{all_here, recorded};
use crate::connect::{ConnectError, Credentials, Link};
use crate::core::Core;
use crate::error::PagerError;
use crate::handover::{Action, Event, Failure, Handover, Phase};
use crate::install::{InstallError, Shelf};
use crate::push::Intake;
use crate::report::Statistics;
use crate::stage::{Stage, StageCell};

/// How often the source hears how far this side is.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);

/// How long a lost source is looked for while nothing here depends on it.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

/// Time for the last message to be heard.
const FAREWELL: Duration = Duration::from_secs(2);

/// What the owner of the move says.
pub(crate) enum Command {
    /// Memory and machine are there.
    Take(Arc<Core>),
    /// The machine is there. Its memory, of this layout, comes to be when it has its state; what comes before that goes on
    /// the shelf.
    Ask(Layout, Option<Arc<Shelf>>),
    /// That memory is there.
    Place(Arc<Core>),
    /// It can't be run here: the offer, or the state.
    Refuse(String),
    /// The vCPUs run.
    Started,
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("the control stream ends")]
    Control(#[from] ControlStreamError),
    #[error("the bulk lane can't be opened")]
    Bulk(#[source] ConnectError),
    #[error("a lane ends: {0}")]
    Lane(String),
    #[error("the machine's state can't be unpacked")]
    State(#[source] io::Error),
    #[error("the page map can't be read")]
    Map(#[from] PageMapError),
    #[error(transparent)]
    Held(#[from] HeldError),
    #[error("the page map can't be taken in")]
    Install(#[from] InstallError),
}

/// A machine that has no memory yet, and what waits for that.
pub(crate) struct Unplaced {
    /// Where what comes on the bulk lane goes. The lane is joined, since the source hands nothing over before.
    intake: Intake,
    memory: watch::Sender<Option<Arc<Core>>>,
    /// The bulk lane's.
    bulk: Option<Connection>,
    switchover: Option<Arc<Switchover>>,
}

pub(crate) struct Driver {
    pub credentials: Arc<Credentials>,
    pub commands: mpsc::UnboundedReceiver<Command>,
    pub stage: Arc<StageCell>,
    pub statistics: Arc<Statistics>,
    pub bulk_lane: Handle,
    /// The bulk lane's first connection, which is made beside the fault lane's.
    pub bulk_ahead: Option<JoinHandle<Result<Link, ConnectError>>>,
    /// Pages of the machine that is offered.
    pub offered_pages: u64,
    /// A switchover that came before there was anything to take it.
    pub ahead: Option<Arc<Switchover>>,
    pub handover: Handover,
    pub core: Option<Arc<Core>>,
    pub unplaced: Option<Unplaced>,
    /// The owner has let go of its handle; what is under way goes on.
    pub alone: bool,
    /// The machine is to be started when all its pages are here.
    pub waiting: Option<Arc<Switchover>>,
    /// The page map, until the verifier knows of the pages that it has made zero.
    pub zeros: Option<PageMap>,
    /// The source would like to hear which pages are touched first.
    pub records: bool,
    /// Until when they are recorded, once the machine runs.
    pub recorded_until: Option<Instant>,
    /// What the source last said when it let nobody in.
    pub rejection: Option<Rejection>,
}

impl Driver {
    /// Holds the conversation until the move is over.
    pub async fn run(mut self, link: Link) {
        let mut link = link;
        let mut opening = Vec::new();
        let mut backoff = BACKOFF_MIN;
        loop {
            let connected_at = Instant::now();
            let Err(lost) = self.converse(link, opening).await else {
                return;
            };
            tracing::warn!(error = %describe(&lost), "the connection to the source is lost");
            if self.has_heard_refusal(&lost) {
                self.handover.handle(Event::Released);
            } else {
                self.handover.handle(Event::LinkLost);
            }
            if self.conclude() {
                return;
            }
            // One that does not last would be lost again at once: the memory may be gone, which its owner is to find out.
            if connected_at.elapsed() < BACKOFF_MAX {
                tokio::time::sleep(backoff).await;
                backoff = (backoff * 2).min(BACKOFF_MAX);
            } else {
                backoff = BACKOFF_MIN;
            }
            link = match self.reconnect().await {
                Ok(link) => {
                    opening = self.handover.handle(Event::LinkBack);
                    link
                }
                Err(event) => {
                    self.handover.handle(event);
                    self.conclude();
                    return;
                }
            };
        }
    }

    /// Converses over one connection; `Ok` when the move is over.
    async fn converse(&mut self, mut link: Link, opening: Vec<Action>) -> Result<(), Lost> {
        let mut lanes = JoinSet::new();
        if let Some(core) = self.core.clone().filter(|_| self.needs_lanes()) {
            core.count_bytes_of(&link.connection);
            self.open_bulk(&core, &mut lanes).await?;
            if *self.handover.phase() != Phase::Asking {
                spawn_demand(&core, &link, &mut lanes);
            }
        } else if self.unplaced.is_some() && self.needs_lanes() {
            self.open_bulk_unplaced(&mut lanes).await?;
        }
        self.perform(opening, &mut link).await?;
        let mut progress = tokio::time::interval(PROGRESS_EVERY);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let core = self.core.clone();
            let limit = switchover_max(self.offered_pages);
            let event = tokio::select! {
                message = link.receiver.recv(limit) => self.on_message(message?, &link, &mut lanes)?,
                command = self.commands.recv(), if !self.alone => {
                    self.on_command(command, &link, &mut lanes).await?
                }
                () = all_here(core.as_deref()), if *self.handover.phase() == Phase::Running => {
                    self.end_record(&mut link).await?;
                    self.complete().await
                }
                () = recorded(core.as_deref(), self.recorded_until), if self.recorded_until.is_some() => {
                    self.end_record(&mut link).await?;
                    None
                }
                () = all_here(core.as_deref()), if self.waiting.is_some() => {
                    self.stop_waiting();
                    None
                }
                Some(end) = lanes.join_next(), if self.needs_lanes() && !lanes.is_empty() => {
                    return Err(Lost::Lane(end.unwrap_or_else(|error| error.to_string())));
                }
                _ = progress.tick(), if core.is_some() => {
                    self.send_progress(&mut link).await?;
                    None
                }
            };
            let Some(event) = event else {
                continue;
            };
            let actions = self.handover.handle(event);
            self.perform(actions, &mut link).await?;
            if self.conclude() {
                let _ = tokio::time::timeout(FAREWELL, link.sender.finish()).await;
                link.connection.close(close_code::DONE, b"");
                return Ok(());
            }
        }
    }

    async fn on_command(
        &mut self,
        command: Option<Command>,
        link: &Link,
        lanes: &mut JoinSet<String>,
    ) -> Result<Option<Event>, Lost> {
        Ok(Some(match command {
            Some(Command::Take(core)) => {
                core.count_bytes_of(&link.connection);
                self.take_core(core.clone());
                self.open_bulk(&core, lanes).await?;
                return self.prepared(link, lanes);
            }
            Some(Command::Ask(layout, shelf)) => {
                let memory = watch::Sender::new(None);
                let intake = Intake {
                    layout,
                    shelf,
                    core: memory.subscribe(),
                };
                self.unplaced = Some(Unplaced {
                    intake,
                    memory,
                    bulk: None,
                    switchover: None,
                });
                self.open_bulk_unplaced(lanes).await?;
                return self.prepared(link, lanes);
            }
            Some(Command::Place(core)) => {
                self.place(&core, link, lanes)?;
                return Ok(None);
            }
            Some(Command::Started) => {
                self.statistics
                    .resumed_at_us
                    .store(self.statistics.since_start_us(), Ordering::Relaxed);
                self.started();
                Event::Started
            }
            Some(Command::Refuse(reason)) => self.refusal(reason),
            None => {
                self.alone = true;
                self.refusal("it was given up".to_owned())
            }
        }))
    }

    /// Asks for the machine, unless it has come already.
    fn prepared(
        &mut self,
        link: &Link,
        lanes: &mut JoinSet<String>,
    ) -> Result<Option<Event>, Lost> {
        let Some(switchover) = self.ahead.take() else {
            return Ok(Some(Event::Prepared));
        };
        self.handover.handle(Event::Prepared);
        self.switch(switchover, link, lanes)?;
        Ok(None)
    }

    /// The event for a refusal: of the offer before the switchover, of the state after it. Later it has no effect.
    fn refusal(&self, reason: String) -> Event {
        match self.handover.phase() {
            Phase::Preparing => Event::CannotPrepare(reason),
            _ => Event::CannotLoad(reason),
        }
    }

    fn on_message(
        &mut self,
        message: ToDestination,
        link: &Link,
        lanes: &mut JoinSet<String>,
    ) -> Result<Option<Event>, Lost> {
        match message {
            ToDestination::Switchover(switchover) => {
                self.on_switchover(switchover, link, lanes)?;
                Ok(None)
            }
            ToDestination::SwitchoverPacked(mut switchover) => {
                switchover.state = unpack_state(&switchover.state)?;
                self.on_switchover(switchover, link, lanes)?;
                Ok(None)
            }
            ToDestination::Running { downtime_us } => {
                self.statistics
                    .downtime_us
                    .store(downtime_us, Ordering::Relaxed);
                self.stage.set(Stage::Running);
                self.note_zeros();
                Ok(None)
            }
            ToDestination::Released => Ok(Some(Event::Released)),
            ToDestination::Rejected(rejection) => {
                self.rejection = Some(rejection);
                Ok(Some(Event::Rejected))
            }
            ToDestination::RecordTouches => {
                if matches!(self.handover.phase(), Phase::Preparing | Phase::Asking) {
                    self.record_touches();
                }
                Ok(None)
            }
            ToDestination::Welcome(_) | ToDestination::Joined => Ok(None),
        }
    }

    fn on_switchover(
        &mut self,
        switchover: Box<Switchover>,
        link: &Link,
        lanes: &mut JoinSet<String>,
    ) -> Result<(), Lost> {
        match self.handover.phase() {
            Phase::Asking => self.switch(Arc::from(switchover), link, lanes)?,
            Phase::Preparing => {
                self.handover.handle(Event::Switchover);
                self.ahead = Some(Arc::from(switchover));
            }
            _ => {}
        }
        Ok(())
    }

    /// The machine is this side's.
    fn switch(
        &mut self,
        switchover: Arc<Switchover>,
        link: &Link,
        lanes: &mut JoinSet<String>,
    ) -> Result<(), Lost> {
        if let Some(core) = self.core.clone() {
            self.take_over(&core, &switchover)?;
            spawn_demand(&core, link, lanes);
        } else if let Some(unplaced) = &mut self.unplaced {
            // Only a map that can be read is worth the machine.
            PageMap::decode(&switchover.page_map, unplaced.intake.layout.pages())?;
            unplaced.switchover = Some(switchover.clone());
        } else {
            return Ok(());
        }
        self.handover.handle(Event::Switchover);
        if let Some(core) = self.core.clone().filter(|_| switchover.wait) {
            self.wait_for_all(&core, switchover);
        } else {
            self.stage.set(Stage::Switched(switchover));
        }
        Ok(())
    }

    async fn perform(&mut self, actions: Vec<Action>, link: &mut Link) -> Result<(), Lost> {
        for action in actions {
            let message = match action {
                Action::SendReady => ToSource::Ready {
                    early: self.takes_early(),
                },
                Action::SendRefused(reason) => ToSource::Refused {
                    reason: short_text(&reason),
                },
                Action::SendStarted => ToSource::Started,
                Action::SendComplete => ToSource::Complete {
                    verified: self.core.as_ref().and_then(|core| core.verified()),
                },
                Action::SendRejoin => {
                    let Some(missing) = self.missing() else {
                        continue;
                    };
                    ToSource::Rejoin { missing }
                }
                // The runner does it when the connection is gone.
                Action::Reconnect => continue,
            };
            link.sender.send(&message).await?;
        }
        Ok(())
    }

    async fn send_progress(&self, link: &mut Link) -> Result<(), Lost> {
        if let Some(core) = &self.core {
            let pages_here = core.layout.pages() - core.installer.table().remaining();
            link.sender.send(&ToSource::Progress { pages_here }).await?;
        }
        Ok(())
    }

    /// Whether the connection's end is the source's answer to a refusal: it ends the stream in good order.
    fn has_heard_refusal(&self, lost: &Lost) -> bool {
        matches!(self.handover.phase(), Phase::Refusing(_))
            && matches!(lost, Lost::Control(ControlStreamError::Finished))
    }

    /// Tells the owner when the move is over; whether it is.
    fn conclude(&mut self) -> bool {
        let error = match self.handover.phase() {
            Phase::Done => {
                self.statistics
                    .complete_at_us
                    .store(self.statistics.since_start_us(), Ordering::Relaxed);
                self.stage.set(Stage::Done);
                return true;
            }
            Phase::Failed(failure) => match (failure, self.rejection.take()) {
                (Failure::Refused(reason), _) => PagerError::Refused(reason.clone()),
                (Failure::Rejected, Some(rejection)) => {
                    PagerError::Connect(ConnectError::Rejected(rejection))
                }
                (Failure::Rejected | Failure::LostBefore, _) => PagerError::SourceLost,
                (Failure::LostAsking, _) => PagerError::SourceLostAtHandover,
            },
            _ => return false,
        };
        self.stage.set(Stage::Failed(Arc::new(error)));
        true
    }
}

/// The state of a switchover that came packed.
fn unpack_state(packed: &[u8]) -> Result<Vec<u8>, Lost> {
    let mut state = zstd::bulk::decompress(packed, STATE_MAX).map_err(Lost::State)?;
    // It was made for the largest there may be.
    state.shrink_to_fit();
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packed_state_is_unpacked_whole_or_not_at_all() {
        let state: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let packed = zstd::bulk::compress(&state, 1).unwrap();
        assert_eq!(unpack_state(&packed).unwrap(), state);
        assert!(unpack_state(&packed[..packed.len() - 1]).is_err());
        assert!(unpack_state(b"no frame").is_err());
        let too_large = zstd::bulk::compress(&vec![0; STATE_MAX + 1], 1).unwrap();
        assert!(unpack_state(&too_large).is_err());
    }
}
