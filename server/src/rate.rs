//! The push's speed limit: a token bucket. Pure logic; the caller brings the time.

use std::time::{Duration, Instant};

/// How far the bucket fills: what may go at once after a pause.
const BURST: Duration = Duration::from_millis(20);

/// A limit in bytes a second.
#[derive(Debug)]
pub struct RateLimit {
    bytes_per_s: f64,
    /// May go below zero: a batch is let through whole, and the next one waits.
    tokens: f64,
    filled_at: Instant,
}

impl RateLimit {
    /// At most `bytes_per_s` on average; 0 counts as 1.
    pub fn new(bytes_per_s: u64, now: Instant) -> Self {
        Self {
            bytes_per_s: bytes_per_s.max(1) as f64,
            tokens: 0.0,
            filled_at: now,
        }
    }

    /// How long to wait until something may go.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.filled_at);
        self.filled_at = now;
        let most = self.bytes_per_s * BURST.as_secs_f64();
        self.tokens = (self.tokens + elapsed.as_secs_f64() * self.bytes_per_s).min(most);
        Duration::from_secs_f64((-self.tokens).max(0.0) / self.bytes_per_s)
    }

    /// Takes note of what went.
    pub fn sent(&mut self, bytes: u64) {
        self.tokens -= bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_ten_seconds_of_virtual_time_the_limit_holds_and_is_used() {
        let start = Instant::now();
        let mut now = start;
        let mut limit = RateLimit::new(1_000_000, now);
        let mut bytes = 0_u64;
        while now < start + Duration::from_secs(10) {
            now += limit.wait(now);
            limit.sent(64 * 1024);
            bytes += 64 * 1024;
            now += Duration::from_micros(50);
        }
        assert!((9_900_000..=10_150_000).contains(&bytes), "{bytes}");
    }

    #[test]
    fn a_long_pause_saves_up_no_more_than_the_burst() {
        let start = Instant::now();
        let mut limit = RateLimit::new(1_000_000, start);
        let later = start + Duration::from_secs(3600);
        assert_eq!(limit.wait(later), Duration::ZERO);
        limit.sent(20_000);
        assert_eq!(limit.wait(later), Duration::ZERO);
        limit.sent(1_000);
        assert!(limit.wait(later) > Duration::ZERO);
    }
}
