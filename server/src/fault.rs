//! The fault lane: the control conversation, and demand faults answered as they come.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lazyvm_quic::{
    ControlReceiver, ControlSender, ControlStreamError, FAULT_STREAMS_MAX, close_code,
};
use lazyvm_wire::control::{Lane, Rejection, Switchover, ToDestination, ToSource, to_source_max};
use lazyvm_wire::frame::{FaultRequest, FrameError, REQUEST_LEN};
use lazyvm_wire::ledger::{SWITCHOVER_AHEAD, SWITCHOVER_PACKED, TOUCHES_RECORDED, Version};
use quinn::{Connection, ReadExactError, RecvStream, SendStream, VarInt, WriteError};
use tokio::task::JoinSet;

use crate::handover::{Action, Event, Phase};
use crate::packing;
use crate::session::Session;
use crate::warm_up::warm_up;

/// Time for a destination that was told all to close its connection.
const FAREWELL: Duration = Duration::from_secs(1);

/// Holds the conversation with the session's destination, in this version, until it is over or the connection is lost.
pub(crate) async fn converse(
    session: &Arc<Session>,
    connection: &Connection,
    version: Option<Version>,
    mut sender: ControlSender,
    mut receiver: ControlReceiver,
) {
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(1 + FAULT_STREAMS_MAX));
    let answering = tokio::spawn(answer_faults(session.clone(), connection.clone()));
    let mut conversation = Conversation {
        session,
        connection,
        version,
        sender: &mut sender,
        is_sent: false,
    };
    let end = conversation.run(&mut receiver).await;
    if let Some(profile) = &session.profile {
        profile.parted();
    }
    match end {
        Ok(()) => {
            sender.finish().await;
            // The destination closes it when it has heard; this side's closing could overtake what it has not read.
            let _ = tokio::time::timeout(FAREWELL, connection.closed()).await;
            // A destination that has ended its threads closes nothing any more.
            session.close();
        }
        Err(error) if session.is_attached(Lane::Fault, connection) => {
            tracing::info!(session = %session.id, %error, "the destination's connection is lost");
            session.detach(Lane::Fault, connection);
            let mut conversation = Conversation {
                session,
                connection,
                version,
                sender: &mut sender,
                is_sent: false,
            };
            // Nobody is there to be told; what is to be done to the machine is done.
            let _ = conversation.take(Event::PeerLost).await;
        }
        // A newer connection has taken over.
        Err(_) => {}
    }
    answering.abort();
    // Streams that the destination keeps for its next faults hold on to connection and session until then.
    connection.close(close_code::DONE, b"");
}

struct Conversation<'a> {
    session: &'a Arc<Session>,
    connection: &'a Connection,
    /// Both speak it.
    version: Option<Version>,
    sender: &'a mut ControlSender,
    /// The switchover was sent over this connection.
    is_sent: bool,
}

impl Conversation<'_> {
    async fn run(&mut self, receiver: &mut ControlReceiver) -> Result<(), ControlStreamError> {
        let limit = to_source_max(self.session.config.machine.layout().pages());
        // Dropped with the conversation, which ends it.
        let mut warming = JoinSet::new();
        if self.version >= Some(TOUCHES_RECORDED)
            && self.session.phase() == Phase::Offered
            && let Some(profile) = &self.session.profile
            && profile.wants_record()
        {
            self.sender.send(&ToDestination::RecordTouches).await?;
        }
        let ahead = self.version >= Some(SWITCHOVER_AHEAD);
        let at_once = ahead && self.session.config.machine.stands_still();
        if at_once && self.session.phase() == Phase::Offered {
            self.take(Event::Ready).await?;
            if let Phase::Ended(_) = self.session.phase() {
                return Ok(());
            }
        }
        loop {
            let message: ToSource = tokio::select! {
                message = receiver.recv(limit) => message?,
                // One that ended early has done what it could.
                Some(warmed) = warming.join_next() => {
                    match warmed {
                        Ok(Err(why)) => {
                            self.take(Event::GaveUp(why)).await?;
                            return Ok(());
                        }
                        _ => self.take(Event::Ready).await?,
                    }
                    continue;
                }
            };
            let event = match message {
                // Its answer was on the way.
                ToSource::Ready { .. } if self.is_sent => continue,
                ToSource::Ready { .. } if !self.session.has_bulk_lane() => {
                    let rejection = Rejection::Protocol("ready without a bulk lane".to_owned());
                    return self.sender.send(&ToDestination::Rejected(rejection)).await;
                }
                ToSource::Ready { early } if self.session.phase() == Phase::Offered => {
                    if warming.is_empty() {
                        warming.spawn(warm_up(self.session.clone(), early));
                    }
                    continue;
                }
                ToSource::Ready { .. } => Event::Ready,
                ToSource::Refused { reason } => Event::Refused(reason),
                ToSource::Started => Event::Started,
                ToSource::Progress { pages_here } => {
                    let counter = &self.session.counters.at_destination;
                    counter.store(pages_here, Ordering::Relaxed);
                    continue;
                }
                ToSource::Complete { verified } => {
                    if verified == Some(false) {
                        tracing::error!(session = %self.session.id, "the destination found pages that differ");
                    }
                    Event::Complete
                }
                ToSource::Touched { pages } => {
                    let session = self.session.clone();
                    tokio::task::spawn_blocking(move || {
                        if let Some(profile) = &session.profile {
                            profile.touched(pages);
                        }
                    });
                    continue;
                }
                ToSource::Rejoin { missing } => {
                    if self.session.push_missing(&missing).is_err() {
                        let rejection = Rejection::Protocol("a bad page map".to_owned());
                        return self.sender.send(&ToDestination::Rejected(rejection)).await;
                    }
                    continue;
                }
            };
            let was_last = event == Event::Complete;
            self.take(event).await?;
            match self.session.phase() {
                // One that came back after it was over says again what it had said before.
                Phase::Moved if was_last => return Ok(()),
                Phase::Ended(_) => return Ok(()),
                _ => {}
            }
        }
    }

    /// Takes an event, carries out what follows from it, and what follows from that.
    async fn take(&mut self, event: Event) -> Result<(), ControlStreamError> {
        let mut actions = self.session.handle(event);
        while !actions.is_empty() {
            let mut events = Vec::new();
            for action in actions {
                events.extend(self.act(action).await?);
            }
            actions = events
                .into_iter()
                .flat_map(|event| self.session.handle(event))
                .collect();
        }
        Ok(())
    }

    async fn act(&mut self, action: Action) -> Result<Option<Event>, ControlStreamError> {
        match action {
            Action::Pause => {
                let result = self.blocking(Session::pause).await;
                if self.connection.close_reason().is_some() {
                    self.session.handle(Event::PeerLost);
                }
                return Ok(Some(Event::Paused(result)));
            }
            Action::RecordHandedOver => {
                let result = self
                    .blocking(|session| session.record(&Phase::HandedOver))
                    .await;
                return Ok(Some(Event::Recorded(result)));
            }
            Action::SendSwitchover => self.send_switchover().await?,
            Action::SendRunning => {
                let downtime_us = self.downtime_us();
                self.sender
                    .send(&ToDestination::Running { downtime_us })
                    .await?;
            }
            Action::Resume => {
                self.blocking(|session| {
                    session.resume();
                    session.record(&session.phase())
                })
                .await
                .unwrap_or_else(
                    |error| tracing::error!(session = %self.session.id, %error, "can't record"),
                );
            }
            Action::Release => {
                self.blocking(|session| {
                    if let Some(profile) = &session.profile {
                        profile.finished();
                    }
                    // The move is done whatever comes of this; both failures are for the operator to see.
                    if let Err(error) = session.config.machine.release() {
                        tracing::warn!(session = %session.id, %error, "the moved machine could not be ended here");
                    }
                    session.record(&Phase::Moved)
                })
                .await
                .unwrap_or_else(|error| tracing::warn!(session = %self.session.id, %error, "can't record"));
                return Ok(Some(Event::Released));
            }
            Action::SendReleased => self.sender.send(&ToDestination::Released).await?,
            Action::SendRejected(reason) => {
                self.sender
                    .send(&ToDestination::Rejected((&reason).into()))
                    .await?;
            }
        }
        Ok(None)
    }

    async fn send_switchover(&mut self) -> Result<(), ControlStreamError> {
        let Some(paused) = self.session.paused() else {
            return Ok(());
        };
        let switchover = &paused.switchover;
        let packed = if self.version >= Some(SWITCHOVER_PACKED) {
            // Other machines' faults wait for this thread.
            let switchover = Arc::clone(switchover);
            let packed =
                tokio::task::spawn_blocking(move || packing::pack_state(&switchover.state));
            packed.await.ok().flatten()
        } else {
            None
        };
        let message = match packed {
            Some(state) => ToDestination::SwitchoverPacked(Box::new(Switchover {
                state,
                page_map: switchover.page_map.clone(),
                held: switchover.held.clone(),
                wait: switchover.wait,
            })),
            None => ToDestination::Switchover(Box::new((**switchover).clone())),
        };
        self.sender.send(&message).await?;
        self.is_sent = true;
        // While the switchover is on its way; the word that the machine runs must not wait for it.
        let session = self.session.clone();
        tokio::spawn(async move {
            let looking = session.clone();
            let look = tokio::task::spawn_blocking(move || looking.last_look()).await;
            session.begin_first_push(&paused, &look.unwrap_or_default());
            // The push need not wait for it.
            tokio::task::spawn_blocking(move || session.stop_tracking());
        });
        Ok(())
    }

    /// The downtime, as it is known when the start is heard; the same when it is heard again.
    fn downtime_us(&self) -> u64 {
        let counter = &self.session.counters.downtime_us;
        if counter.load(Ordering::Relaxed) == 0
            && let Some(paused) = self.session.paused()
        {
            let downtime = paused
                .at
                .elapsed()
                .saturating_sub(self.connection.rtt() / 2);
            counter.store(downtime.as_micros() as u64, Ordering::Relaxed);
        }
        counter.load(Ordering::Relaxed)
    }

    /// Runs a call to the machine or the disk where it may block.
    async fn blocking(
        &self,
        call: impl FnOnce(&Session) -> Result<(), String> + Send + 'static,
    ) -> Result<(), String> {
        let session = self.session.clone();
        match tokio::task::spawn_blocking(move || call(&session)).await {
            Ok(result) => result,
            Err(error) => Err(format!("a call to the machine ended early: {error}")),
        }
    }
}

/// A demand stream that can't go on.
#[derive(Debug, thiserror::Error)]
enum DemandError {
    #[error("a request was cut short")]
    Read(#[from] ReadExactError),
    #[error("the answer can't be sent")]
    Write(#[from] WriteError),
    #[error("a bad request")]
    Frame(#[from] FrameError),
    #[error("a request for pages before the hand-over")]
    TooEarly,
}

/// Answers the demand streams of a connection until it is lost.
async fn answer_faults(session: Arc<Session>, connection: Connection) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        let session = session.clone();
        let connection = connection.clone();
        tokio::spawn(async move {
            // Any other error is the connection's own end, which is seen elsewhere.
            if let Err(error @ (DemandError::Frame(_) | DemandError::TooEarly)) =
                answer_stream(&session, send, recv).await
            {
                tracing::warn!(session = %session.id, %error, "the destination breaks the protocol");
                connection.close(close_code::PROTOCOL, b"bad request");
            }
        });
    }
}

/// One request after another, each with its answer.
async fn answer_stream(
    session: &Session,
    mut send: SendStream,
    mut recv: RecvStream,
) -> Result<(), DemandError> {
    let image_pages = session.config.machine.layout().pages();
    loop {
        let mut request = [0; REQUEST_LEN];
        match recv.read_exact(&mut request).await {
            Ok(()) => {}
            Err(ReadExactError::FinishedEarly(0)) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let FaultRequest(range) = FaultRequest::decode(&request, image_pages)?;
        if !session.serves_pages() {
            return Err(DemandError::TooEarly);
        }
        send.write_chunk(session.frames.demand_frame(range)).await?;
        session.answered(range);
    }
}
