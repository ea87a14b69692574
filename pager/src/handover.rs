//! The destination's side of the hand-over: the machine is started once, and only when it is this side's. Pure logic.
//!
//! ```text
//!  Preparing --Prepared--> Asking --Switchover--> Loading --Started--> Running --AllHere--> Completing --Released--> Done
//!      |                     |                       |
//!   lost, refused         rejected               CannotLoad
//!      v                     v                       v
//!    Failed                Failed                 Refusing --Released--> Failed
//! ```
//!
//! A machine that stands still anyway may come before it is asked for: its switchover is kept until this side is prepared,
//! which then loads it at once.
//!
//! Up to [`Action::SendReady`] a lost connection ends the attempt: the machine runs at the source. From there on it may
//! be this side's to run, or to refuse, so this side comes back until it has been told.

/// Why the machine does not run here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// This side refused the machine; the source runs it.
    Refused(String),
    /// The source let nobody in or gave up; it runs the machine.
    Rejected,
    /// The connection was lost before this side was ready; the source runs the machine.
    LostBefore,
    /// The connection was lost for good when the machine may have been handed over. It runs nowhere, or at the source.
    LostAsking,
}

/// Where the move is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The offer is looked at, memory and machine are made.
    Preparing,
    /// Ready; the source pauses the machine.
    Asking,
    /// The machine is this side's; its state is being loaded.
    Loading,
    /// Its vCPUs run.
    Running,
    /// All pages are here; the source has to let go.
    Completing,
    /// It is here and nowhere else.
    Done,
    /// The state can't be loaded; the source has to hear of it.
    Refusing(String),
    /// Over.
    Failed(Failure),
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Memory is registered, the machine is made.
    Prepared,
    /// This machine can't be run here, for this reason.
    CannotPrepare(String),
    /// State and page map are here.
    Switchover,
    /// The state can't be loaded, or the vCPUs can't be started.
    CannotLoad(String),
    /// The vCPUs run.
    Started,
    /// No page is missing any more.
    AllHere,
    /// The source has let go, or heard the refusal.
    Released,
    /// The source lets nobody in, or gave up.
    Rejected,
    /// The connection is lost.
    LinkLost,
    /// There is a new one.
    LinkBack,
    /// No new one could be made for as long as is worth it.
    GaveUp,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Ask for the machine.
    SendReady,
    /// Say that it can't be run here.
    SendRefused(String),
    /// Say which pages are missing.
    SendRejoin,
    /// Say that the vCPUs run.
    SendStarted,
    /// Say that all pages are here.
    SendComplete,
    /// Make a new connection; answer with [`Event::LinkBack`] or [`Event::GaveUp`].
    Reconnect,
}

/// The state machine.
#[derive(Debug)]
pub struct Handover {
    phase: Phase,
    /// The switchover came before this side was prepared.
    ahead: bool,
}

impl Default for Handover {
    fn default() -> Self {
        Self {
            phase: Phase::Preparing,
            ahead: false,
        }
    }
}

impl Handover {
    /// Where the move is.
    pub fn phase(&self) -> &Phase {
        &self.phase
    }

    /// Whether this side may start the machine.
    pub fn may_start(&self) -> bool {
        self.phase == Phase::Loading
    }

    /// Takes an event and says what to do. An event that has no place in the phase changes nothing.
    pub fn handle(&mut self, event: Event) -> Vec<Action> {
        let (phase, actions) = match (&self.phase, event) {
            (Phase::Preparing, Event::Switchover) => {
                self.ahead = true;
                return vec![];
            }
            (Phase::Preparing, Event::Prepared) if self.ahead => (Phase::Loading, vec![]),
            (Phase::Preparing, Event::Prepared) => (Phase::Asking, vec![Action::SendReady]),
            (Phase::Preparing, Event::CannotPrepare(reason)) => (
                Phase::Failed(Failure::Refused(reason.clone())),
                vec![Action::SendRefused(reason)],
            ),
            (Phase::Preparing, Event::LinkLost) => (Phase::Failed(Failure::LostBefore), vec![]),
            (Phase::Preparing | Phase::Asking, Event::Rejected) => {
                (Phase::Failed(Failure::Rejected), vec![])
            }

            (Phase::Asking, Event::Switchover) => (Phase::Loading, vec![]),
            (Phase::Asking, Event::LinkBack) => (Phase::Asking, vec![Action::SendReady]),
            (Phase::Asking, Event::GaveUp) => (Phase::Failed(Failure::LostAsking), vec![]),

            (Phase::Loading, Event::Started) => (Phase::Running, vec![Action::SendStarted]),
            (Phase::Loading, Event::CannotLoad(reason)) => (
                Phase::Refusing(reason.clone()),
                vec![Action::SendRefused(reason)],
            ),
            (Phase::Loading, Event::LinkBack) => (Phase::Loading, vec![Action::SendRejoin]),

            (Phase::Refusing(reason), Event::Released | Event::Rejected | Event::GaveUp) => {
                (Phase::Failed(Failure::Refused(reason.clone())), vec![])
            }
            (Phase::Refusing(reason), Event::LinkBack) => (
                self.phase.clone(),
                vec![Action::SendRefused(reason.clone())],
            ),

            (Phase::Running, Event::AllHere) => (Phase::Completing, vec![Action::SendComplete]),
            (Phase::Running, Event::LinkBack) => (
                Phase::Running,
                vec![Action::SendRejoin, Action::SendStarted],
            ),
            (Phase::Completing, Event::LinkBack) => (
                Phase::Completing,
                vec![Action::SendStarted, Action::SendComplete],
            ),
            // All pages are here, and a source that is gone has nothing to let go.
            (Phase::Completing, Event::Released | Event::GaveUp) => (Phase::Done, vec![]),

            (Phase::Done | Phase::Failed(_), _) => return vec![],
            (_, Event::LinkLost) => (self.phase.clone(), vec![Action::Reconnect]),
            _ => return vec![],
        };
        self.phase = phase;
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_phase(events: &[Event]) -> Handover {
        let mut handover = Handover::default();
        for event in events {
            handover.handle(event.clone());
        }
        handover
    }

    const LOADING: [Event; 2] = [Event::Prepared, Event::Switchover];

    #[test]
    fn a_move_in_good_order() {
        let mut handover = Handover::default();
        let steps = [
            (Event::Prepared, vec![Action::SendReady]),
            (Event::Switchover, vec![]),
            (Event::Started, vec![Action::SendStarted]),
            (Event::LinkLost, vec![Action::Reconnect]),
            (
                Event::LinkBack,
                vec![Action::SendRejoin, Action::SendStarted],
            ),
            (Event::AllHere, vec![Action::SendComplete]),
            (Event::LinkLost, vec![Action::Reconnect]),
            (
                Event::LinkBack,
                vec![Action::SendStarted, Action::SendComplete],
            ),
            (Event::Released, vec![]),
        ];
        for (event, actions) in steps {
            assert_eq!(handover.handle(event), actions);
        }
        assert_eq!(*handover.phase(), Phase::Done);
    }

    #[test]
    fn a_switchover_that_comes_first_is_loaded_when_this_side_is_prepared() {
        let mut handover = in_phase(&[Event::Switchover]);
        assert!(!handover.may_start());
        assert_eq!(*handover.phase(), Phase::Preparing);
        assert_eq!(handover.handle(Event::Prepared), vec![]);
        assert!(handover.may_start());
        let mut handover = in_phase(&[Event::Switchover]);
        let refused = handover.handle(Event::CannotPrepare("no".into()));
        assert_eq!(refused, vec![Action::SendRefused("no".into())]);
        assert!(!handover.may_start());
        let mut handover = in_phase(&[Event::Switchover, Event::LinkLost]);
        assert_eq!(handover.handle(Event::Prepared), vec![]);
        assert!(!handover.may_start());
    }

    #[test]
    fn a_second_switchover_does_not_start_a_second_machine() {
        let mut handover = in_phase(&LOADING);
        assert!(handover.may_start());
        handover.handle(Event::Started);
        handover.handle(Event::Switchover);
        assert!(!handover.may_start());
    }

    #[test]
    fn before_it_is_ready_a_lost_connection_ends_the_attempt() {
        let handover = in_phase(&[Event::LinkLost]);
        assert_eq!(*handover.phase(), Phase::Failed(Failure::LostBefore));
    }

    #[test]
    fn a_refused_state_is_said_until_it_was_heard() {
        let mut handover = in_phase(&LOADING);
        let refused = vec![Action::SendRefused("no".to_owned())];
        assert_eq!(handover.handle(Event::CannotLoad("no".to_owned())), refused);
        assert_eq!(handover.handle(Event::LinkLost), vec![Action::Reconnect]);
        assert_eq!(handover.handle(Event::LinkBack), refused);
        handover.handle(Event::Released);
        assert_eq!(
            *handover.phase(),
            Phase::Failed(Failure::Refused("no".to_owned()))
        );
    }
}
