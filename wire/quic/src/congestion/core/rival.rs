//! What else is on the path: a rival that fills the queue, or a route that has become longer. Drained rounds tell them apart.

use std::time::Duration;

use super::{BASE_AGE, Core, Cubic, FLAT_S, Phase, Rival};

/// Growth of a shared window in a round, where the round trip does not grow with it.
const SHARE_GROWTH: f64 = 0.01;

/// Such rounds before that growth doubles with each.
const SHARE_HASTE_AFTER: u32 = 3;

/// Drained rounds with the same round trip that make it the path's own.
const SAME_DRAINS: u32 = 2;

/// How long the smallest round trip counts as the path's own where a rival was seen.
const HIDDEN_AGE: Duration = Duration::from_secs(300);

/// A queue longer than so many times this flow's own, and this much, is another's.
const RIVAL_RATIO: f64 = 6.0;
const RIVAL_DELAY: Duration = Duration::from_millis(5);

/// Part of that which is enough where a rival was seen lately.
const RIVAL_DOUBT: f64 = 0.4;

impl Core {
    /// Beside a rival, or looking whether it is still there.
    pub(super) fn is_sharing(&self) -> bool {
        matches!(
            self.phase,
            Phase::Share { .. }
                | Phase::Drain {
                    shared: Some(_),
                    ..
                }
        )
    }

    /// Whether a queue that is not this flow's has stood for some rounds; what is to be done is done.
    pub(super) fn meets_rival(&mut self, now: Duration) -> bool {
        let long = self.rival_delay();
        if self.queueing() <= long {
            self.window_ahead = None;
            return false;
        }
        let path = self.rate_most * self.base.get().unwrap_or_default().as_secs_f64();
        let ahead = self.window_ahead.get_or_insert(self.window).max(path);
        if !self.queues.is_full() || self.queues.min() <= long.as_secs_f64() {
            return false;
        }
        if self.rival == Rival::Yield {
            self.rival_at = Some(now);
            return false;
        }
        self.drain(now, Some(Cubic::new(ahead, self.packet, now)));
        true
    }

    /// A round of a shared queue. While the round trip stays as it is although the window grows, there is no queue:
    /// the path has become longer.
    pub(super) fn share(&mut self, cubic: f64) {
        let standing = self.standing.get().unwrap_or_default().as_secs_f64();
        let flat = standing < self.standing_shared + FLAT_S;
        self.open = if flat { self.open + 1 } else { 0 };
        self.standing_shared = standing;
        let haste = 1.0
            + SHARE_GROWTH * 2_f64.powi(self.open.saturating_sub(SHARE_HASTE_AFTER).min(6) as i32);
        self.window = cubic.max(self.window * haste).min(2.0 * self.window);
    }

    /// Two round trips: one until the queue is gone, one until what came after it was acknowledged.
    pub(super) fn drain(&mut self, now: Duration, shared: Option<Cubic>) {
        let until = now + 2 * self.standing.get().unwrap_or_default();
        self.phase = Phase::Drain { until, shared };
        self.ended_start = None;
    }

    /// What queue there is now is not this flow's.
    pub(super) fn end_drain(&mut self, now: Duration, shared: Option<Cubic>) {
        self.based_at = now;
        self.queues.clear();
        self.window_ahead = None;
        self.cut_bytes = 0.0;
        self.open = 0;
        let is_longer = self.is_longer();
        match shared {
            Some(cubic) if self.queueing() > self.rival_delay() && !is_longer => {
                self.window = cubic.window(now, self.rtt);
                self.phase = Phase::Share {
                    cubic,
                    since: now,
                    lost_at: now,
                };
            }
            _ => {
                self.window = self.window.min(self.path_bytes() + self.target());
                self.phase = Phase::Steady;
            }
        }
    }

    /// Drained rounds one after the other found the same round trip, and a rival's queue does not stay the same: the
    /// path has become longer.
    fn is_longer(&mut self) -> bool {
        let standing = self.standing.get().unwrap_or_default();
        let same = self.standing_drained.abs_diff(standing) < Duration::from_secs_f64(FLAT_S);
        self.standing_drained = standing;
        self.same_drains = if same { self.same_drains + 1 } else { 0 };
        let longer = self.same_drains >= SAME_DRAINS && self.queueing() > self.target_delay();
        if longer {
            self.base = self.standing.clone();
            self.rival_at = None;
        }
        longer
    }

    /// A rival hides the path's own round trip.
    pub(super) fn base_age(&mut self, now: Duration) -> Duration {
        if self.is_sharing() {
            self.rival_at = Some(now);
        }
        if self.rival_at.is_some_and(|at| now > at + HIDDEN_AGE) {
            self.rival_at = None;
        }
        4 * self.rtt
            + if self.rival_at.is_some() {
                HIDDEN_AGE
            } else {
                BASE_AGE
            }
    }

    /// A longer queue than this flow would keep at its best.
    pub(super) fn rival_delay(&self) -> Duration {
        let own = self.quiet_target(self.rate_most) / self.rate_most.max(1.0);
        // A rival that was there may only have paused.
        let doubt = if self.rival_at.is_some() && !self.is_sharing() {
            RIVAL_DOUBT
        } else {
            1.0
        };
        let long = (own * RIVAL_RATIO + 2.0 * self.noise).min(1.0);
        (RIVAL_DELAY + Duration::from_secs_f64(long)).mul_f64(doubt)
    }
}
