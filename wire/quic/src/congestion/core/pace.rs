//! What the sender is told of the window while there is room in it.
//!
//! quinn lets 2 ms worth of the window go at a time, a quarter faster than a window in a round trip (its `pacing.rs`), and what
//! a timer that comes late has not used is gone. Where timers come 2 ms late, as tokio's do, three quarters of a
//! window are used, and a start that doubles it each round takes half as long again. So in the start, while there is room, the sender is told
//! a larger window than it has, which sets its pace; and it is counted what should have gone by now. While that is more than what has, it is
//! told a window that is larger still, and makes its bursts larger.

use std::time::Duration;

use super::{Core, Phase};

/// Windows in a round trip, and the time between two bursts: quinn's.
const PACE: f64 = 1.25;
const BURST: Duration = Duration::from_millis(2);

/// The same in the start, between Linux's TCP (2, `tcp_pacing_ss_ratio` of `Documentation/networking/ip-sysctl.rst`) and BBR (2.8): each round's
/// packets leave in less than half of it, and what acknowledges them lets twice as many leave in as much of the next. So a path that is
/// nearly full shows by its queue before the window has gone beyond it.
const PACE_START: f64 = 2.5;

/// The longest that the sender may have been late and makes up for.
const BEHIND_MAX: Duration = Duration::from_millis(6);

/// So many times larger a window is told to a sender that is behind. Its bursts are so much larger.
const TOLD: f64 = 2.0;

/// Packets that leave at once, before they are heard of: quinn's most.
const UNHEARD_PACKETS: f64 = 10.0;

/// How far the sender is behind.
#[derive(Clone, Debug, Default)]
pub(super) struct Pace {
    pub(super) in_flight: f64,
    /// Bytes that should have gone, at this time.
    behind: f64,
    at: Duration,
}

impl Core {
    /// The window that the sender is to be told, for its pace as well as for what may be in flight.
    pub fn told_window(&self) -> u64 {
        let window = self.window();
        if !matches!(self.phase, Phase::Start) || !self.has_room() {
            return window;
        }
        let is_behind = self.pace.behind > self.bytes_in(BURST);
        let makes_up = if is_behind { TOLD } else { 1.0 };
        (window as f64 * makes_up * self.pace_now() / PACE) as u64
    }

    /// Windows in a round trip that are to leave.
    fn pace_now(&self) -> f64 {
        match self.phase {
            Phase::Start => PACE_START,
            _ => PACE,
        }
    }

    /// `bytes` have left.
    pub fn on_sent(&mut self, now: Duration, bytes: u64) {
        let elapsed = now.saturating_sub(self.pace.at).min(BEHIND_MAX);
        let pace = self.pace_now();
        let behind = self.pace.behind + pace * self.bytes_in(elapsed);
        let most = pace * self.bytes_in(BEHIND_MAX);
        self.pace.behind = (behind.min(most) - bytes as f64).max(0.0);
        self.pace.at = now;
        self.pace.in_flight += bytes as f64;
        if !self.has_room() {
            self.pace.behind = 0.0;
        }
    }

    /// So many bytes are in flight.
    pub fn in_flight_is(&mut self, now: Duration, bytes: u64) {
        // Who had to wait for this was not late.
        if !self.has_room() {
            self.pace.at = now;
        }
        self.pace.in_flight = bytes as f64;
    }

    fn has_room(&self) -> bool {
        self.pace.in_flight + UNHEARD_PACKETS * self.packet < self.window() as f64
    }

    /// A window in a round trip for so long.
    fn bytes_in(&self, time: Duration) -> f64 {
        match self.rtt {
            Duration::ZERO => 0.0,
            rtt => self.window() as f64 * time.as_secs_f64() / rtt.as_secs_f64(),
        }
    }
}
