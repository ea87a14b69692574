//! One machine for many destinations: each gets a session of its own, with the ID and the secret of the ticket that
//! they share. Who a destination is, its key tells, as it does for one that comes back to a session.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lazyvm_wire::control::{Hello, Lane, Rejection};
use lazyvm_wire::trust::Fingerprint;
use lazyvm_wire::{Secret, SessionId};

use crate::endpoint::SESSIONS_MAX;
use crate::port::SourceMachine;
use crate::session::{Session, SessionConfig, now_s};

/// How long a session that is over is remembered, for a destination that was lost before it heard of that.
const REMEMBERED: Duration = Duration::from_secs(300);

/// How long one is remembered whose destination is lost, and would have to come back for its memory. Destinations of a
/// fleet end at any time, without a word.
const LOST_REMEMBERED: Duration = Duration::from_secs(3600);

/// What a fleet is made of.
#[derive(Clone)]
pub struct FleetConfig {
    /// The machine, which many may have: pausing and releasing it is to change nothing.
    pub machine: Arc<dyn SourceMachine>,
    /// How long the ticket lets destinations in.
    pub ticket_lifetime: Duration,
    /// Limit of each session's push in bytes a second; faults are not limited.
    pub max_bandwidth: Option<u64>,
}

/// See the module.
pub(crate) struct Fleet {
    id: SessionId,
    secret: Secret,
    expires_at_s: u64,
    config: FleetConfig,
    members: Mutex<Members>,
}

#[derive(Default)]
struct Members {
    closed: bool,
    sessions: HashMap<Fingerprint, Member>,
}

struct Member {
    session: Arc<Session>,
    /// When it was first seen without a destination.
    alone: Option<Instant>,
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet")
            .field("id", &self.id)
            .field("sessions", &self.len())
            .finish()
    }
}

impl Fleet {
    pub fn new(id: SessionId, secret: Secret, config: FleetConfig) -> Self {
        Self {
            id,
            secret,
            expires_at_s: now_s().saturating_add(config.ticket_lifetime.as_secs()),
            config,
            members: Mutex::default(),
        }
    }

    pub fn id(&self) -> SessionId {
        self.id
    }

    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    pub fn expires_at_s(&self) -> u64 {
        self.expires_at_s
    }

    pub fn len(&self) -> usize {
        self.members().sessions.len()
    }

    pub fn sessions(&self) -> Vec<Arc<Session>> {
        let members = self.members();
        members
            .sessions
            .values()
            .map(|member| member.session.clone())
            .collect()
    }

    pub fn close(&self) {
        self.members().closed = true;
    }

    /// The session of the peer with this key: the one that it has, or a new one. Only one with the secret gets any.
    pub fn session_for(&self, hello: &Hello, peer: Fingerprint) -> Result<Arc<Session>, Rejection> {
        if !self.secret.matches(&hello.secret) {
            return Err(Rejection::WrongSecret);
        }
        let mut members = self.members();
        if let Some(member) = members.sessions.get(&peer) {
            return Ok(member.session.clone());
        }
        if members.closed || now_s() >= self.expires_at_s {
            return Err(Rejection::Expired);
        }
        if hello.lane != Lane::Fault {
            return Err(Rejection::Protocol(
                "the bulk lane comes after the fault lane".to_owned(),
            ));
        }
        members.forget_the_old(Instant::now());
        if members.sessions.len() >= SESSIONS_MAX {
            return Err(Rejection::Machine(format!(
                "{SESSIONS_MAX} destinations are served at the moment, which is the most; try again later"
            )));
        }
        let session = Arc::new(Session::new(self.id, self.secret.clone(), self.config()));
        let member = Member {
            session: session.clone(),
            alone: None,
        };
        members.sessions.insert(peer, member);
        Ok(session)
    }

    fn config(&self) -> SessionConfig {
        SessionConfig {
            max_bandwidth: self.config.max_bandwidth,
            ticket_lifetime: self.config.ticket_lifetime,
            ..SessionConfig::new(self.config.machine.clone())
        }
    }

    /// A panic elsewhere leaves the members whole: each is changed in one step.
    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Members {
    fn forget_the_old(&mut self, now: Instant) {
        self.sessions.retain(|_, member| {
            if member.session.is_connected() {
                member.alone = None;
                return true;
            }
            let since = *member.alone.get_or_insert(now);
            let remembered = if member.session.is_over() {
                REMEMBERED
            } else {
                LOST_REMEMBERED
            };
            now.duration_since(since) < remembered
        });
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use lazyvm_wire::ledger::SUPPORTED;
    use lazyvm_wire::trust::Identity;
    use lazyvm_wire::{Layout, MachineOffer, PageRange};

    use super::*;
    use crate::handover::Event;
    use crate::port::{MachineError, SourceMemory};

    struct Nothing(Layout);

    impl SourceMemory for Nothing {
        fn read(&self, _: PageRange, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }

        fn data_runs(&self, _: &mut dyn FnMut(PageRange)) -> io::Result<()> {
            Ok(())
        }
    }

    impl SourceMachine for Nothing {
        fn layout(&self) -> &Layout {
            &self.0
        }

        fn offer(&self) -> MachineOffer {
            MachineOffer {
                kind: "memory".to_owned(),
                state_version: 1,
                compatibility: Vec::new(),
            }
        }

        fn memory(&self) -> Arc<dyn SourceMemory> {
            Arc::new(Self(self.0.clone()))
        }

        fn pause(&self) -> Result<Vec<u8>, MachineError> {
            Ok(Vec::new())
        }

        fn resume(&self) -> Result<(), MachineError> {
            Ok(())
        }

        fn release(&self) -> Result<(), MachineError> {
            Ok(())
        }
    }

    fn fleet(ticket_lifetime: Duration) -> Fleet {
        let config = FleetConfig {
            machine: Arc::new(Nothing(Layout::flat(4).unwrap())),
            ticket_lifetime,
            max_bandwidth: None,
        };
        Fleet::new(
            SessionId::random().unwrap(),
            Secret::random().unwrap(),
            config,
        )
    }

    fn hello(fleet: &Fleet, secret: Secret) -> Hello {
        Hello {
            versions: SUPPORTED,
            session: fleet.id(),
            secret,
            lane: Lane::Fault,
            verify: false,
        }
    }

    fn peer() -> Fingerprint {
        Identity::generate().unwrap().fingerprint()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn each_key_has_a_session_and_keeps_it() {
        let fleet = fleet(HOUR);
        let hello = hello(&fleet, fleet.secret().clone());
        let (one, other) = (peer(), peer());
        let first = fleet.session_for(&hello, one).unwrap();
        let second = fleet.session_for(&hello, other).unwrap();
        assert!(!Arc::ptr_eq(&first, &second));
        assert!(Arc::ptr_eq(
            &first,
            &fleet.session_for(&hello, one).unwrap()
        ));
        first.admit(&hello, one).unwrap();
        assert_eq!(first.admit(&hello, other), Err(Rejection::Used));
        assert_eq!(fleet.len(), 2);
    }

    #[test]
    fn without_the_secret_nobody_gets_a_session() {
        let fleet = fleet(HOUR);
        let hello = hello(&fleet, Secret::random().unwrap());
        let refused = fleet.session_for(&hello, peer()).unwrap_err();
        assert_eq!(refused, Rejection::WrongSecret);
        assert_eq!(fleet.len(), 0);
    }

    #[test]
    fn who_is_in_stays_when_nobody_else_is_let_in() {
        let fleet = fleet(HOUR);
        let hello = hello(&fleet, fleet.secret().clone());
        let early = peer();
        fleet.session_for(&hello, early).unwrap();
        fleet.close();
        fleet.session_for(&hello, early).unwrap();
        assert_eq!(
            fleet.session_for(&hello, peer()).unwrap_err(),
            Rejection::Expired
        );
    }

    #[test]
    fn an_expired_ticket_lets_nobody_in() {
        let fleet = fleet(Duration::ZERO);
        let hello = hello(&fleet, fleet.secret().clone());
        assert_eq!(
            fleet.session_for(&hello, peer()).unwrap_err(),
            Rejection::Expired
        );
    }

    #[test]
    fn what_is_over_is_forgotten_in_the_end() {
        let fleet = fleet(HOUR);
        let hello = hello(&fleet, fleet.secret().clone());
        let session = fleet.session_for(&hello, peer()).unwrap();
        session.handle(Event::Withdrawn);
        fleet.session_for(&hello, peer()).unwrap();
        let mut members = fleet.members();
        let now = Instant::now();
        members.forget_the_old(now);
        assert_eq!(members.sessions.len(), 2);
        members.forget_the_old(now + REMEMBERED);
        assert_eq!(members.sessions.len(), 1);
        members.forget_the_old(now + LOST_REMEMBERED);
        assert_eq!(members.sessions.len(), 0);
    }
}
