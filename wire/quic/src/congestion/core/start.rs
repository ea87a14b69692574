//! The start: doubling until the path is full.

use std::time::Duration;

use super::{Core, Phase, Round};

/// Queueing that ends the start: an eighth of the round trip within these bounds (HyStart++, RFC 9406, section 4.2).
pub(super) const START_DELAY_MIN: Duration = Duration::from_millis(2);
const START_DELAY_MAX: Duration = Duration::from_millis(8);

/// Packets of a round before its delay says something.
const START_PACKETS: f64 = 16.0;

/// How far the start goes beyond the path: a doubling, and what comes until the queue is seen.
const START_OVERSHOOT: f64 = 2.5;

/// A round's share of lost packets that ends the start; the path's own errors may be as many as half of that.
pub(super) const START_LOSS: f64 = 0.06;

/// A start that was ended by the round trip of one packet.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndedStart {
    /// When that packet left, and when it was acknowledged.
    sent: Duration,
    at: Duration,
    /// The window then.
    window: f64,
}

impl Core {
    /// An acknowledgement of the start.
    pub(super) fn go_on_starting(
        &mut self,
        now: Duration,
        sent: Duration,
        bytes: u64,
        app_limited: bool,
    ) {
        let used = self.rate.get() * self.rtt.as_secs_f64();
        if !app_limited && self.window < (4.0 * used).max(self.window_first) {
            self.window += bytes as f64;
        }
        // Few packets far apart are acknowledged late; that is no queue.
        let dense = self.is_dense(&self.round);
        if dense && self.queueing() > self.start_delay() {
            self.ended_start = Some(EndedStart {
                sent,
                at: now,
                window: self.window,
            });
            self.end_start(now);
        }
    }

    /// The queue that ended the start grows until the smaller window tells. Where a packet of the larger one met none, it was
    /// none: a process that gets no processor for some milliseconds, at either end, makes round trips longer too.
    pub(super) fn doubt_end_of_start(&mut self, sent: Duration, rtt: Duration) {
        let Some(ended) = self.ended_start else {
            return;
        };
        let base = self.base.get().unwrap_or_default();
        if sent >= ended.at || !matches!(self.phase, Phase::Steady) {
            self.ended_start = None;
        } else if sent > ended.sent && rtt < base + self.start_delay() / 4 {
            self.ended_start = None;
            self.phase = Phase::Start;
            self.window = self.window.max(ended.window);
        }
    }

    pub(super) fn end_start(&mut self, now: Duration) {
        self.cut_at = now;
        self.phase = Phase::Steady;
        self.queues.clear();
        let base = self.base.get().unwrap_or_default().as_secs_f64();
        // The rounds so far were short of the path's rate; what came last is closest.
        let rate = self.rate.get().max(self.rates.max());
        if rate > 0.0 {
            self.rates.clear();
            self.rates.insert(rate);
            // A window that doubles has not gone farther than this.
            let least = self.window / START_OVERSHOOT;
            self.window = self.window.min(rate * base + self.target()).max(least);
        }
    }

    fn start_delay(&self) -> Duration {
        let base = self.base.get().unwrap_or_default();
        (base / 8).clamp(START_DELAY_MIN, START_DELAY_MAX)
    }

    /// Whether a round's packets are enough to say something.
    pub(super) fn is_dense(&self, round: &Round) -> bool {
        round.acked > START_PACKETS * self.packet
    }
}
