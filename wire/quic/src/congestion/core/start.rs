//! The start: doubling until the path is full.

use std::time::Duration;

use super::{Core, Phase, ROUND_MIN, Round};

/// Queueing that ends the start: an eighth of the round trip within these bounds (HyStart++, RFC 9406, section 4.2).
pub(super) const START_DELAY_MIN: Duration = Duration::from_millis(2);
const START_DELAY_MAX: Duration = Duration::from_millis(8);

/// Part of the round trip whose smallest one tells the start's queue: jitter that is drawn anew meanwhile is none, and a start that
/// goes on for longer goes farther beyond the path.
pub(super) const START_STANDING: u32 = 6;

/// The longest queue that may be none. Stalls take 20 to 40 ms; on a slow path two packets that are acknowledged at once are a leap too.
const DOUBT_MAX: Duration = Duration::from_millis(50);

/// Packets of a round before its delay says something.
const START_PACKETS: f64 = 16.0;

/// A window that is so many times larger than what is in flight is not used, and grows no more.
const USED: f64 = 4.0;

/// Round trips after the start's end in which it may turn out to have ended too early.
const AGAIN_ROUNDS: u32 = 20;

/// Part of the path's round trip in which queued packets tell the path's rate.
const TRAIN: u32 = 8;

/// How far the start goes beyond the path: a doubling, and what comes until the queue is seen.
const START_OVERSHOOT: f64 = 2.5;

/// A round's share of lost packets that ends the start; the path's own errors may be as many as half of that.
pub(super) const START_LOSS: f64 = 0.06;

/// A start that was ended by a queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndedStart {
    at: Duration,
    /// When the packet left that was acknowledged then.
    sent: Duration,
    /// The window then.
    window: f64,
    /// Bytes that were acknowledged since, as long as each of them met a queue.
    queued: Option<f64>,
}

/// Round trips that say nothing of the queue.
#[derive(Clone, Debug, Default)]
pub(super) struct Doubt {
    /// The last packet's round trip.
    rtt: Duration,
    /// Packets that left before this are in doubt.
    before: Duration,
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
        let rtt = now.saturating_sub(sent);
        self.doubt(now, rtt);
        let doubtful = sent < self.doubt.before && self.queueing() < DOUBT_MAX;
        let most = (USED * self.pace.in_flight).max(self.window_first);
        let stays = app_limited || (doubtful && self.is_queued(rtt));
        if !stays && self.window < most {
            self.window += bytes as f64;
        }
        // Few packets far apart are acknowledged late; that is no queue.
        let dense = self.is_dense(&self.round);
        if dense && !doubtful && self.queueing() > self.start_delay() {
            tracing::trace!(
                at_us = now.as_micros() as u64,
                queue_us = self.queueing().as_micros() as u64,
                window = self.window as u64,
                "the start ends"
            );
            let window = self.window;
            self.end_start(now);
            self.start_ended_at = Some(now);
            self.ended_start = Some(EndedStart {
                at: now,
                sent,
                window,
                queued: Some(0.0),
            });
        }
    }

    /// The window then need not wait for as many rounds without a queue as later, before it grows fast.
    pub(super) fn start_has_just_ended(&self, now: Duration) -> bool {
        self.start_ended_at
            .is_some_and(|at| now < at + AGAIN_ROUNDS * self.rtt)
    }

    /// A flow's own queue grows little from packet to packet. Where a round trip is longer by a leap, a process got no processor
    /// for some milliseconds, at either end, or the path stood still; and what had left before may have met the same.
    fn doubt(&mut self, now: Duration, rtt: Duration) {
        let before = std::mem::replace(&mut self.doubt.rtt, rtt);
        let is_leap = rtt > before + self.start_delay() / 2;
        if !before.is_zero() && !self.is_queued(before) && is_leap {
            self.doubt.before = now;
        }
    }

    /// As long as there is a queue, packets come at the path's own rate, and tell it better than what was known when the start ended.
    pub(super) fn see_queued(
        &mut self,
        now: Duration,
        sent: Duration,
        bytes: u64,
        app_limited: bool,
    ) {
        let Some(mut ended) = self.ended_start else {
            return;
        };
        let is_queued = self.is_queued(now.saturating_sub(sent)) && !app_limited;
        ended.queued = ended
            .queued
            .filter(|_| is_queued)
            .map(|queued| queued + bytes as f64);
        self.ended_start = Some(ended);
        let base = self.base.get().unwrap_or_default();
        // Late acknowledgements come closer together than the packets left.
        let elapsed = now
            .saturating_sub(ended.at)
            .max(sent.saturating_sub(ended.sent));
        if let Some(queued) = ended.queued
            && elapsed >= (base / TRAIN).max(ROUND_MIN)
        {
            let rate = queued / elapsed.as_secs_f64();
            self.rates.clear();
            self.rates.insert(rate);
            self.follow(rate, ended.window);
        }
    }

    fn is_queued(&self, rtt: Duration) -> bool {
        rtt > self.base.get().unwrap_or_default() + self.start_delay()
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
        self.follow(rate, ended.window)
    }

    /// The window is what fills a path of this rate, if that is more, up to the one that the start ended with. Tells whether it was.
    fn follow(&mut self, rate: f64, most: f64) -> bool {
        let base = self.base.get().unwrap_or_default().as_secs_f64();
        let carried = (rate * base + self.target()).min(most);
        let is_more = carried > self.window;
        self.window = self.window.max(carried);
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
