//! Where vCPU threads are let into the guest, and called out of it.
//!
//! ```text
//!             start                     pause
//!  Incoming ---------> Running <-----------------> Paused
//!      |                  |          resume           |
//!      +------------------+---------> Stopped <-------+     (once, for good)
//! ```
//!
//! A vCPU thread runs the guest only between [`Gate::enter`] and [`Gate::leave`]. Whoever changes the phase sets,
//! under the gate's lock, each vCPU's `immediate_exit` and then signals the threads. Whatever the thread is doing,
//! the next thing it hears of KVM is `EINTR`:
//!
//! - in the guest: the signal ends `KVM_RUN`;
//! - on its way there: `immediate_exit` ends it at once;
//! - handling an exit: it enters `KVM_RUN` again, where KVM completes the exit (a port read gets its value into the
//!   guest's register) before it looks at `immediate_exit`.
//!
//! Only on `EINTR` does it leave. So a vCPU that left has no half-done instruction in it, and no call is lost.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::exit::ExitReason;
use super::lock;

/// What the machine is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its state is not loaded yet.
    Incoming,
    Running,
    Paused,
    Stopped(ExitReason),
}

/// What a vCPU that was called out of the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Leave.
    Leave,
    /// Nothing, or nothing any more: go on.
    GoOn,
    /// Say whether anything can wake it, and go on.
    Probe,
}

struct State {
    phase: Phase,
    /// vCPUs between enter and leave.
    inside: u32,
    /// Of each vCPU: whether it was asked since it last answered.
    asked: Vec<bool>,
    /// Of each vCPU: whether it said that nothing can wake it.
    asleep: Vec<bool>,
}

/// See the module.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn new(cpus: u32, phase: Phase) -> Self {
        let cpus = cpus as usize;
        let state = State {
            phase,
            inside: 0,
            asked: vec![false; cpus],
            asleep: vec![false; cpus],
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        lock(&self.state).phase.clone()
    }

    /// Waits until the machine runs, and goes in. `false`: it never will again. `clear` takes back the vCPU's
    /// `immediate_exit`; no call can come between that and the entry.
    pub(super) fn enter(&self, clear: impl FnOnce()) -> bool {
        let mut state = lock(&self.state);
        loop {
            match state.phase {
                Phase::Running => {
                    clear();
                    state.inside += 1;
                    return true;
                }
                Phase::Stopped(_) => return false,
                Phase::Incoming | Phase::Paused => state = self.wait(state),
            }
        }
    }

    /// The vCPU is out, and nothing holds it any more.
    pub(super) fn leave(&self) {
        lock(&self.state).inside -= 1;
        self.changed.notify_all();
    }

    /// A vCPU heard `EINTR`. `clear` as for [`Gate::enter`], called unless it has to leave.
    pub(super) fn interrupted(&self, cpu: u32, clear: impl FnOnce()) -> Order {
        let mut state = lock(&self.state);
        if state.phase != Phase::Running {
            return Order::Leave;
        }
        clear();
        if std::mem::take(&mut state.asked[cpu as usize]) {
            Order::Probe
        } else {
            Order::GoOn
        }
    }

    /// The answer to [`Order::Probe`]. `true`: this was the last of all vCPUs to be asleep.
    pub(super) fn answer(&self, cpu: u32, asleep: bool) -> bool {
        let mut state = lock(&self.state);
        state.asleep[cpu as usize] = asleep;
        state.asleep.iter().all(|&asleep| asleep)
    }

    /// Asks every vCPU whether anything can wake it. `call` as for [`Gate::change`].
    pub(super) fn ask(&self, call: impl FnOnce()) {
        let mut state = lock(&self.state);
        if state.phase == Phase::Running {
            state.asked.fill(true);
            state.asleep.fill(false);
            call();
        }
    }

    /// Calls every vCPU, for what it looks after by itself when it is called; whether the machine runs. `call` as for
    /// [`Gate::change`].
    pub(super) fn call(&self, call: impl FnOnce()) -> bool {
        let state = lock(&self.state);
        let runs = state.phase == Phase::Running;
        if runs {
            call();
        }
        runs
    }

    /// Moves to `next` if `allowed` says so of the present phase, calling the vCPUs out by `call`: it sets each
    /// one's `immediate_exit`, then signals it. Gives the phase before.
    pub(super) fn change(
        &self,
        next: Phase,
        allowed: impl FnOnce(&Phase) -> bool,
        call: impl FnOnce(),
    ) -> Phase {
        let mut state = lock(&self.state);
        let before = state.phase.clone();
        if allowed(&before) {
            state.phase = next;
            call();
            self.changed.notify_all();
        }
        before
    }

    /// Waits until no vCPU is inside.
    pub(super) fn wait_empty(&self) {
        let mut state = lock(&self.state);
        while state.inside > 0 {
            state = self.wait(state);
        }
    }

    /// Waits until the machine has stopped and no vCPU is inside.
    pub(super) fn wait_stopped(&self) -> ExitReason {
        let mut state = lock(&self.state);
        loop {
            match &state.phase {
                Phase::Stopped(reason) if state.inside == 0 => return reason.clone(),
                _ => state = self.wait(state),
            }
        }
    }

    /// Waits until the machine has stopped (`true`) or `timeout` is over.
    pub(super) fn wait_stopped_for(&self, timeout: Duration) -> bool {
        let state = lock(&self.state);
        let stopped = |state: &mut State| !matches!(state.phase, Phase::Stopped(_));
        let (state, _) = self
            .changed
            .wait_timeout_while(state, timeout, stopped)
            .unwrap_or_else(PoisonError::into_inner);
        matches!(state.phase, Phase::Stopped(_))
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}
