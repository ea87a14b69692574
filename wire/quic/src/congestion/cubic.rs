//! CUBIC's window in congestion avoidance (RFC 9438), for a share of a queue that others fill.

use std::time::Duration;

/// Of the window at a loss, what is kept (section 4.6).
const BETA: f64 = 0.7;

/// Growth in packets per cubic second (section 5).
const C: f64 = 0.4;

/// A window that grows by CUBIC's curve since the last loss.
#[derive(Clone, Debug)]
pub(super) struct Cubic {
    packet: f64,
    /// The window before the last loss, in packets.
    before: f64,
    /// When the curve began, in seconds of the connection's time; before 0 if need be.
    began_s: f64,
}

impl Cubic {
    /// Begins on the plateau of the curve with `window` bytes.
    pub fn new(window: f64, packet: f64, now: Duration) -> Self {
        Self {
            packet,
            before: window / packet,
            // The plateau is where the curve is `k` seconds old.
            began_s: now.as_secs_f64() - k(window / packet),
        }
    }

    /// The window at `now`, in bytes; no less than what Reno's additive increase would give (section 4.3).
    pub fn window(&self, now: Duration, rtt: Duration) -> f64 {
        let age = now.as_secs_f64() - self.began_s;
        let curve = C * (age - k(self.before)).powi(3) + self.before;
        let rounds = age / rtt.as_secs_f64().max(1e-4);
        let reno = self.before * BETA + 3.0 * (1.0 - BETA) / (1.0 + BETA) * rounds;
        curve.max(reno) * self.packet
    }

    /// A loss at a window of `window` bytes.
    pub fn on_loss(&mut self, now: Duration, window: f64) {
        let packets = window / self.packet;
        // Fast convergence (section 4.7): a flow that was cut before it reached its old window makes room.
        self.before = if packets < self.before {
            packets * (1.0 + BETA) / 2.0
        } else {
            packets
        };
        self.began_s = now.as_secs_f64();
    }
}

/// Seconds from a loss until the window is what it was before (section 4.2).
fn k(before: f64) -> f64 {
    (before * (1.0 - BETA) / C).cbrt()
}
