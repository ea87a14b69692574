//! The source's side of the hand-over: never two running machines, never none. Pure logic.
//!
//! ```text
//!  Offered --Ready--> Pausing --Paused--> Recording --Recorded--> HandedOver --Started--> Started --Complete--> Releasing
//!     |                  |                    |                       |                                           |
//!  Refused, lost      lost, failed        lost, failed             Refused                                     Released
//!     v                  v                    v                       v                                           v
//!   Ended              resume, Ended        resume, Ended           resume, Ended                                Moved
//! ```
//!
//! The point of no return is [`Action::SendSwitchover`], and the session's record says so before it is sent. Up to
//! there any failure lets the machine run on here. From there on silence means nothing: only the destination's own
//! word, or an operator's, lets it run here again.

use std::fmt;

/// Why a session ended with the machine at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The destination said no, in its own words.
    Refused(String),
    /// The connection was lost before the machine was handed over.
    PeerLost,
    /// The machine could not be paused, read or recorded.
    MachineFailed(String),
    /// It can't be moved the way that was asked for, and runs.
    GaveUp(String),
    /// The destination broke the protocol before the machine was handed over.
    Protocol(&'static str),
    /// The source's operator took the offer back.
    Withdrawn,
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(reason) => write!(f, "the destination refused the machine: {reason}"),
            Self::PeerLost => f.write_str("the destination was lost before the hand-over"),
            Self::MachineFailed(reason) | Self::GaveUp(reason) => {
                write!(f, "the machine can't be handed over: {reason}")
            }
            Self::Protocol(what) => write!(f, "the destination broke the protocol: {what}"),
            Self::Withdrawn => f.write_str("the offer was taken back before the hand-over"),
        }
    }
}

/// Where a session is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The machine runs; a destination may look at what is offered and get ready.
    Offered,
    /// The machine is being stopped and its state taken.
    Pausing,
    /// The machine is stopped; that it will be handed over is being recorded.
    Recording,
    /// The machine is the destination's, which has not said that it runs.
    HandedOver,
    /// The machine runs at the destination, which still needs pages.
    Started,
    /// The destination has everything; the machine here is being ended.
    Releasing,
    /// Done: the machine is gone from here.
    Moved,
    /// Over: the machine runs here.
    Ended(EndReason),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The destination is ready for the machine.
    Ready,
    /// The destination says no.
    Refused(String),
    /// The machine can't be moved the way that was asked for.
    GaveUp(String),
    /// The machine is stopped, or could not be.
    Paused(Result<(), String>),
    /// The record is on disk, or could not be written.
    Recorded(Result<(), String>),
    /// The destination's vCPUs run.
    Started,
    /// The destination has all pages.
    Complete,
    /// The machine here was ended, well or not.
    Released,
    /// No connection to the destination is left.
    PeerLost,
    /// The source's operator takes the offer back.
    Withdrawn,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Stop the machine and take its state; answer with [`Event::Paused`].
    Pause,
    /// Write to disk that the machine is handed over; answer with [`Event::Recorded`].
    RecordHandedOver,
    /// Send state and page map, and begin the push.
    SendSwitchover,
    /// Tell the destination that its start was heard.
    SendRunning,
    /// Let the machine run on here, and record that.
    Resume,
    /// End the machine here; answer with [`Event::Released`].
    Release,
    /// Tell the destination that the source has let go.
    SendReleased,
    /// Tell the destination that it gets no machine, and why.
    SendRejected(EndReason),
}

/// The state machine.
#[derive(Debug)]
pub struct Handover {
    phase: Phase,
    /// Why the move must end, since an action is under way that has to end first.
    ending: Option<EndReason>,
}

impl Default for Handover {
    fn default() -> Self {
        Self {
            phase: Phase::Offered,
            ending: None,
        }
    }
}

impl Handover {
    /// Where the session is.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Whether the destination may ask for pages.
    pub fn serves_pages(&self) -> bool {
        matches!(self.phase, Phase::HandedOver | Phase::Started)
    }

    /// Takes an event and says what to do.
    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        match (&self.phase, event) {
            (Phase::Offered, Event::Ready) => self.go(Phase::Pausing, vec![Action::Pause]),
            (Phase::Offered, Event::Refused(reason)) => {
                self.end(EndReason::Refused(reason), vec![])
            }
            (Phase::Offered, Event::GaveUp(reason)) => {
                let reason = EndReason::GaveUp(reason);
                self.end(reason.clone(), vec![Action::SendRejected(reason)])
            }
            (Phase::Offered, Event::PeerLost) => self.end(EndReason::PeerLost, vec![]),
            (Phase::Offered, Event::Withdrawn) => self.end(EndReason::Withdrawn, vec![]),

            (Phase::Pausing | Phase::Recording, Event::PeerLost) => {
                self.ending.get_or_insert(EndReason::PeerLost);
                vec![]
            }
            (Phase::Pausing | Phase::Recording, Event::Withdrawn) => {
                self.ending.get_or_insert(EndReason::Withdrawn);
                vec![]
            }
            (Phase::Pausing, Event::Paused(Err(error))) => {
                let reason = EndReason::MachineFailed(error);
                self.end(reason.clone(), vec![Action::SendRejected(reason)])
            }
            (Phase::Pausing, Event::Paused(Ok(()))) => match self.ending.take() {
                Some(reason) => self.end(reason, vec![Action::Resume]),
                None => self.go(Phase::Recording, vec![Action::RecordHandedOver]),
            },
            (Phase::Recording, Event::Recorded(Err(error))) => {
                let reason = EndReason::MachineFailed(error);
                self.end(
                    reason.clone(),
                    vec![Action::Resume, Action::SendRejected(reason)],
                )
            }
            (Phase::Recording, Event::Recorded(Ok(()))) => match self.ending.take() {
                // Nothing was sent, so nobody can have started it.
                Some(reason) => self.end(reason, vec![Action::Resume]),
                None => self.go(Phase::HandedOver, vec![Action::SendSwitchover]),
            },

            // The answer to the first one was lost with its connection.
            (Phase::HandedOver, Event::Ready) => vec![Action::SendSwitchover],
            (Phase::HandedOver, Event::Refused(reason)) => {
                self.end(EndReason::Refused(reason), vec![Action::Resume])
            }
            (Phase::HandedOver, Event::Started) => {
                self.go(Phase::Started, vec![Action::SendRunning])
            }
            (Phase::Started, Event::Started) => vec![Action::SendRunning],
            (Phase::Started, Event::Complete) => self.go(Phase::Releasing, vec![Action::Release]),
            (Phase::Releasing, Event::Released) => {
                self.go(Phase::Moved, vec![Action::SendReleased])
            }
            // A destination that missed the answer says it again on a new connection.
            (Phase::Moved, Event::Complete) => vec![Action::SendReleased],

            // Silence after the switchover means nothing, and the offer was taken up.
            (_, Event::PeerLost | Event::Withdrawn) => vec![],
            (Phase::Offered, _) => {
                let reason = EndReason::Protocol("a message that comes before the hand-over");
                self.end(reason.clone(), vec![Action::SendRejected(reason)])
            }
            // After the hand-over a message out of order changes nothing: the pages are still needed.
            _ => vec![],
        }
    }

    fn go(&mut self, phase: Phase, actions: Vec<Action>) -> Vec<Action> {
        self.phase = phase;
        actions
    }

    fn end(&mut self, reason: EndReason, actions: Vec<Action>) -> Vec<Action> {
        self.go(Phase::Ended(reason), actions)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_move_in_good_order() {
        let mut handover = Handover::default();
        let steps = [
            (Event::Ready, vec![Action::Pause]),
            (Event::Paused(Ok(())), vec![Action::RecordHandedOver]),
            (Event::Recorded(Ok(())), vec![Action::SendSwitchover]),
            (Event::Started, vec![Action::SendRunning]),
            (Event::PeerLost, vec![]),
            (Event::Complete, vec![Action::Release]),
            (Event::Released, vec![Action::SendReleased]),
        ];
        for (event, actions) in steps {
            assert_eq!(handover.handle(event), actions);
        }
        assert_eq!(*handover.phase(), Phase::Moved);
    }

    #[test]
    fn silence_after_the_switchover_never_resumes() {
        let mut handover = Handover::default();
        for event in [Event::Ready, Event::Paused(Ok(())), Event::Recorded(Ok(()))] {
            handover.handle(event);
        }
        assert_eq!(handover.handle(Event::PeerLost), vec![]);
        assert_eq!(*handover.phase(), Phase::HandedOver);
        assert_eq!(
            handover.handle(Event::Refused("no".into())),
            vec![Action::Resume]
        );
    }

    #[test]
    fn an_offer_is_taken_back_while_nobody_can_have_started_the_machine() {
        for (events, actions) in [
            (vec![], vec![]),
            (vec![Event::Ready], vec![Action::Resume]),
            (
                vec![Event::Ready, Event::Paused(Ok(()))],
                vec![Action::Resume],
            ),
        ] {
            let mut handover = Handover::default();
            for event in &events {
                handover.handle(event.clone());
            }
            let mut done = handover.handle(Event::Withdrawn);
            done.extend(match handover.phase() {
                Phase::Pausing => handover.handle(Event::Paused(Ok(()))),
                Phase::Recording => handover.handle(Event::Recorded(Ok(()))),
                _ => vec![],
            });
            assert_eq!(done, actions, "after {events:?}");
            assert_eq!(*handover.phase(), Phase::Ended(EndReason::Withdrawn));
        }
    }

    fn events() -> impl Strategy<Value = Vec<(Event, bool)>> {
        let event = prop_oneof![
            Just(Event::Ready),
            Just(Event::Refused("no".into())),
            Just(Event::Started),
            Just(Event::Complete),
            Just(Event::PeerLost),
            Just(Event::Withdrawn),
        ];
        proptest::collection::vec((event, proptest::bool::weighted(0.9)), 0..40)
    }

    /// The world around the state machine: one machine here, perhaps one there.
    #[derive(Default)]
    struct World {
        paused_here: bool,
        gone_here: bool,
        sent: bool,
        started_there: bool,
        complete_there: bool,
        refused_there: bool,
    }

    impl World {
        /// Carries an action out and gives the event that answers it.
        fn act(&mut self, action: &Action, works: bool) -> Option<Event> {
            let result = || {
                if works {
                    Ok(())
                } else {
                    Err("broken".to_owned())
                }
            };
            match action {
                Action::Pause => {
                    self.paused_here = works;
                    Some(Event::Paused(result()))
                }
                Action::RecordHandedOver => Some(Event::Recorded(result())),
                Action::SendSwitchover => {
                    assert!(self.paused_here, "the machine is handed over while it runs");
                    self.sent = true;
                    None
                }
                Action::Resume => {
                    assert!(self.paused_here && !self.gone_here);
                    assert!(!self.sent || self.refused_there, "resumed on silence");
                    assert!(!self.started_there, "two machines run");
                    self.paused_here = false;
                    None
                }
                Action::Release => {
                    assert!(self.complete_there, "released before all pages had arrived");
                    self.gone_here = true;
                    Some(Event::Released)
                }
                Action::SendRunning | Action::SendReleased | Action::SendRejected(_) => None,
            }
        }

        /// Whether an honest destination could say this now.
        fn plausible(&mut self, event: &Event) -> bool {
            match event {
                Event::Started => {
                    self.started_there |= self.sent && !self.refused_there;
                    self.started_there
                }
                Event::Complete => {
                    self.complete_there |= self.started_there;
                    self.complete_there
                }
                Event::Refused(_) => {
                    let may = !self.started_there;
                    self.refused_there |= may;
                    may
                }
                _ => true,
            }
        }
    }

    proptest! {
        /// Whatever an honest destination says, in whatever order and with whatever failures: never two, never none.
        #[test]
        fn never_two_never_none(events in events()) {
            let mut handover = Handover::default();
            let mut world = World::default();
            for (event, works) in events {
                if !world.plausible(&event) {
                    continue;
                }
                let mut queue = vec![event];
                while let Some(event) = queue.pop() {
                    for action in handover.handle(event) {
                        queue.extend(world.act(&action, works));
                    }
                }
                match handover.phase() {
                    Phase::Offered | Phase::Ended(_) => prop_assert!(!world.paused_here),
                    Phase::HandedOver | Phase::Started => prop_assert!(world.paused_here),
                    Phase::Moved => prop_assert!(world.started_there && world.gone_here),
                    Phase::Pausing | Phase::Recording | Phase::Releasing => {
                        prop_assert!(false, "an action was left without an answer");
                    }
                }
            }
        }
    }
}
