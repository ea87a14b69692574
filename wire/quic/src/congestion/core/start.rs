//! The start: doubling until the path is full.

use std::time::Duration;

use super::{Core, Phase, Round};

/// Queueing that ends the start: an eighth of the round trip within these bounds (HyStart++, RFC 9406, section 4.2).
pub(super) const START_DELAY_MIN: Duration = Duration::from_millis(2);
const START_DELAY_MAX: Duration = Duration::from_millis(8);

/// Packets of a round before its delay says something.
const START_PACKETS: f64 = 16.0;

/// A window that is so many times larger than what is in flight is not used, and grows no more.
const USED: f64 = 4.0;

/// How far the start goes beyond the path: a doubling, and what comes until the queue is seen.
const START_OVERSHOOT: f64 = 2.5;

/// The path's rate is no more than so many times what is seen of it while there is a queue.
const DRAINS: f64 = 2.0;

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
    /// The queue then, in seconds, and the bytes a second that came through it.
    queue: f64,
    rate: f64,
    /// Bytes that were acknowledged since.
    acked: f64,
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
        let used = USED * self.pace.in_flight;
        if !app_limited && self.window < used.max(self.window_first) {
            self.window += bytes as f64;
        }
        // Few packets far apart are acknowledged late; that is no queue.
        let dense = self.is_dense(&self.round);
        if dense && self.queueing() > self.start_delay() {
            self.ended_start = Some(EndedStart {
                sent,
                at: now,
                window: self.window,
                queue: self.queueing().as_secs_f64(),
                rate: self.rate.get(),
                acked: 0.0,
            });
            self.end_start(now);
        }
    }

    /// The queue that ended the start grows until the smaller window tells. Where a packet of the larger one met none, and
    /// what left between them does not give it the time to drain, it was none: a process that gets no processor for some
    /// milliseconds, at either end, makes round trips longer too.
    pub(super) fn doubt_end_of_start(&mut self, sent: Duration, bytes: u64, rtt: Duration) {
        let base = self.base.get().unwrap_or_default();
        let Some(ended) = &mut self.ended_start else {
            return;
        };
        ended.acked += bytes as f64;
        let ended = *ended;
        let of_larger = sent > ended.sent && sent < ended.at;
        let elapsed = sent.saturating_sub(ended.sent).as_secs_f64();
        let drains = elapsed - ended.acked / (DRAINS * ended.rate);
        let is_none = drains < ended.queue;
        if !matches!(self.phase, Phase::Steady) {
            self.ended_start = None;
        } else if of_larger && is_none && rtt < base + self.start_delay() / 4 {
            self.ended_start = None;
            self.phase = Phase::Start;
            self.window = self.window.max(ended.window);
        }
    }

    /// What the path carries of the larger window is more exact than what was known of it when the start ended. Tells whether it
    /// was more.
    pub(super) fn correct_end_of_start(&mut self, round: &Round, rate: f64) -> bool {
        let Some(ended) = self.ended_start else {
            return false;
        };
        if round.began >= ended.at {
            self.ended_start = None;
        }
        let base = self.base.get().unwrap_or_default().as_secs_f64();
        let carried = (rate * base + self.target()).min(ended.window);
        let is_more = carried > self.window;
        self.window = self.window.max(carried);
        self.round.window = self.window;
        is_more
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
