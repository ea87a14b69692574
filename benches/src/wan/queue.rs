//! One direction of the emulated path, as logic alone: packets and the time go in, packets and when they are due come out.
//!
//! A packet waits until all before it have left at the path's rate, then travels for half a round trip. What would wait
//! longer than the queue lasts is dropped at its tail.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use crate::image::next_random;

/// How much later than the others a packet arrives that is reordered.
const REORDERED_BY: Duration = Duration::from_millis(5);

/// How the path behaves, each way alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PathConfig {
    /// Round trip of a path without traffic.
    pub rtt: Duration,
    /// Bits a second of IP packets; 0 is no limit.
    pub rate_bit_s: u64,
    /// The longest that a packet waits for those before it; more is dropped.
    pub queue: Duration,
    /// Share of packets lost at random, from 0 to 1.
    pub loss: f64,
    /// Most that is added to a packet's delay at random. Packets don't overtake each other by that.
    pub jitter: Duration,
    /// Share of packets that arrive 5 ms later, so that others overtake them, from 0 to 1.
    pub reorder: f64,
    /// Where random numbers begin.
    pub seed: u64,
}

impl Default for PathConfig {
    fn default() -> Self {
        Self {
            rtt: Duration::from_millis(100),
            rate_bit_s: 1_000_000_000,
            queue: Duration::from_millis(100),
            loss: 0.0,
            jitter: Duration::ZERO,
            reorder: 0.0,
            seed: 1,
        }
    }
}

/// Why a packet does not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// By chance.
    Lost,
    /// It would have waited too long.
    QueueFull,
    /// Nothing goes through at all.
    Blackout,
}

/// A path's one direction. Time is in nanoseconds from any start.
pub struct PathQueue<T> {
    config: PathConfig,
    random: u64,
    blackout: bool,
    /// When the last bit of what is queued will have left.
    busy_until_ns: u64,
    /// When the last packet arrives that others stay behind.
    last_due_ns: u64,
    number: u64,
    under_way: BinaryHeap<Reverse<UnderWay<T>>>,
}

struct UnderWay<T> {
    due_ns: u64,
    number: u64,
    packet: T,
}

impl<T> PathQueue<T> {
    /// A path with nothing on it.
    pub fn new(config: PathConfig) -> Self {
        Self {
            config,
            // xorshift stays at 0.
            random: config.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            blackout: false,
            busy_until_ns: 0,
            last_due_ns: 0,
            number: 0,
            under_way: BinaryHeap::new(),
        }
    }

    /// The path is another one from now on. What is under way arrives as it would have, and nothing overtakes it.
    pub fn set_config(&mut self, config: PathConfig) {
        self.config = config;
    }

    /// Whether nothing goes through from now on. What is under way arrives.
    pub fn set_blackout(&mut self, on: bool) {
        self.blackout = on;
    }

    /// Takes up a packet of `bytes` at `now_ns`, and says when its last bit arrives. The caller then hands over the packet, or
    /// several in one, with [`PathQueue::push`].
    ///
    /// # Errors
    /// [`Dropped`] says why it does not arrive.
    pub fn admit(&mut self, now_ns: u64, bytes: u64) -> Result<u64, Dropped> {
        if self.blackout {
            return Err(Dropped::Blackout);
        }
        let start = self.busy_until_ns.max(now_ns);
        if start - now_ns > nanoseconds(self.config.queue) {
            return Err(Dropped::QueueFull);
        }
        self.busy_until_ns = start + self.sending_ns(bytes);
        // A packet is lost on its way: it has taken its time on the path.
        if self.happens(self.config.loss) {
            return Err(Dropped::Lost);
        }
        let travels = nanoseconds(self.config.rtt / 2) + self.random_jitter_ns();
        let due = (self.busy_until_ns + travels).max(self.last_due_ns);
        if self.happens(self.config.reorder) {
            return Ok(due + nanoseconds(REORDERED_BY));
        }
        self.last_due_ns = due;
        Ok(due)
    }

    /// Puts on its way what was admitted.
    pub fn push(&mut self, due_ns: u64, packet: T) {
        self.number += 1;
        self.under_way.push(Reverse(UnderWay {
            due_ns,
            number: self.number,
            packet,
        }));
    }

    /// The next packet that has arrived by `now_ns`.
    pub fn pop(&mut self, now_ns: u64) -> Option<T> {
        if self.next_due_ns()? > now_ns {
            return None;
        }
        self.under_way.pop().map(|Reverse(next)| next.packet)
    }

    /// When the next packet arrives.
    pub fn next_due_ns(&self) -> Option<u64> {
        self.under_way.peek().map(|Reverse(next)| next.due_ns)
    }

    fn sending_ns(&self, bytes: u64) -> u64 {
        match self.config.rate_bit_s {
            0 => 0,
            rate => (u128::from(bytes) * 8_000_000_000 / u128::from(rate)) as u64,
        }
    }

    fn random_jitter_ns(&mut self) -> u64 {
        match nanoseconds(self.config.jitter) {
            0 => 0,
            most => next_random(&mut self.random) % (most + 1),
        }
    }

    fn happens(&mut self, share: f64) -> bool {
        // No draw where nothing is asked for: the same seed then gives the same losses with and without.
        share > 0.0 && ((next_random(&mut self.random) >> 11) as f64) < share * (1_u64 << 53) as f64
    }
}

impl<T> PartialEq for UnderWay<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<T> Eq for UnderWay<T> {}

impl<T> PartialOrd for UnderWay<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for UnderWay<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due_ns, self.number).cmp(&(other.due_ns, other.number))
    }
}

/// A time as a number; more than 500 years is as much.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: u64 = 1_000_000;

    fn path(change: impl FnOnce(&mut PathConfig)) -> PathQueue<u64> {
        let mut config = PathConfig::default();
        change(&mut config);
        PathQueue::new(config)
    }

    /// Offers packets of 1250 bytes, 10 µs each at 1 Gbit/s, `every_ns`; gives when each was due.
    fn offer(path: &mut PathQueue<u64>, count: u64, every_ns: u64) -> Vec<Result<u64, Dropped>> {
        (0..count)
            .map(|number| {
                let due = path.admit(number * every_ns, 1250)?;
                path.push(due, number);
                Ok(due)
            })
            .collect()
    }

    #[test]
    fn a_lone_packet_takes_its_own_time_and_half_a_round_trip() {
        let mut path = path(|_| ());
        assert_eq!(path.admit(7 * MS, 1250), Ok(7 * MS + 10_000 + 50 * MS));
        path.push(57 * MS + 10_000, 1);
        assert_eq!(path.next_due_ns(), Some(57 * MS + 10_000));
        assert_eq!(path.pop(57 * MS + 9_999), None);
        assert_eq!(path.pop(57 * MS + 10_000), Some(1));
        assert_eq!(path.pop(u64::MAX), None);
    }

    #[test]
    fn a_full_path_carries_its_rate_and_drops_what_its_queue_does_not_hold() {
        let mut path = path(|_| ());
        // Twice the rate for two seconds.
        let due = offer(&mut path, 400_000, 5_000);
        let arrived = due.iter().filter(|due| due.is_ok()).count();
        // Two seconds' worth, and what the queue holds at the end.
        assert!((210_000..=210_002).contains(&arrived), "{arrived}");
        for (number, due) in (0..).zip(&due) {
            match due {
                Ok(due) => {
                    let waited = due - number * 5_000 - 50 * MS;
                    assert!(waited <= 100 * MS + 10_000, "{waited}");
                }
                Err(why) => assert_eq!(*why, Dropped::QueueFull),
            }
        }
        // Nothing goes faster than the rate.
        let due: Vec<u64> = due.into_iter().flatten().collect();
        assert!(due.windows(2).all(|pair| pair[1] - pair[0] >= 10_000));
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        let mut path = path(|config| config.rate_bit_s = 0);
        assert!(
            offer(&mut path, 1000, 0)
                .iter()
                .all(|due| *due == Ok(50 * MS))
        );
    }

    #[test]
    fn losses_are_as_many_as_asked_for() {
        let mut path = path(|config| config.loss = 0.03);
        let lost = offer(&mut path, 200_000, 10_000)
            .iter()
            .filter(|due| **due == Err(Dropped::Lost))
            .count();
        // Six standard deviations.
        assert!((5_540..6_460).contains(&lost), "{lost}");
    }

    #[test]
    fn reordered_packets_are_overtaken() {
        let mut path = path(|config| config.reorder = 0.1);
        offer(&mut path, 10_000, 10_000);
        let mut last = 0;
        let mut overtaken = 0;
        while let Some(number) = path.pop(u64::MAX) {
            overtaken += u64::from(number < last);
            last = last.max(number);
        }
        assert!((800..1200).contains(&overtaken), "{overtaken}");
    }

    #[test]
    fn a_blackout_drops_what_comes_and_lets_arrive_what_is_under_way() {
        let mut path = path(|_| ());
        offer(&mut path, 1, 0);
        path.set_blackout(true);
        assert_eq!(path.admit(MS, 1250), Err(Dropped::Blackout));
        assert_eq!(path.pop(60 * MS), Some(0));
        path.set_blackout(false);
        assert_eq!(path.admit(2 * MS, 1250), Ok(52 * MS + 10_000));
    }

    #[test]
    fn another_path_holds_for_what_comes_and_nothing_is_overtaken() {
        let mut path = path(|_| ());
        assert_eq!(path.admit(0, 1250), Ok(10_000 + 50 * MS));
        path.set_config(PathConfig {
            rtt: Duration::from_millis(20),
            rate_bit_s: 100_000_000,
            ..PathConfig::default()
        });
        // 100 µs each, and 10 ms of way; but behind the first.
        assert_eq!(path.admit(MS, 1250), Ok(10_000 + 50 * MS));
        assert_eq!(path.admit(60 * MS, 1250), Ok(70 * MS + 100_000));
        assert_eq!(path.admit(60 * MS, 1250), Ok(70 * MS + 200_000));
    }

    proptest! {
        #[test]
        fn packets_stay_in_order_whatever_the_delay_and_none_comes_twice(
            jitter_ms in 0_u64..20,
            loss in 0.0..0.2,
            packets in proptest::collection::vec((0_u64..3 * MS, 40_u64..1500), 1..400),
        ) {
            let mut path = path(|config| {
                config.jitter = Duration::from_millis(jitter_ms);
                config.loss = loss;
                config.rate_bit_s = 10_000_000;
            });
            let mut now = 0;
            let mut admitted = Vec::new();
            for (number, (pause, bytes)) in (0..).zip(packets) {
                now += pause;
                if let Ok(due) = path.admit(now, bytes) {
                    prop_assert!(due >= now + 50 * MS + bytes * 800);
                    prop_assert!(due <= now + 50 * MS + 100 * MS + bytes * 800 + 20 * MS);
                    path.push(due, number);
                    admitted.push(number);
                }
            }
            let arrived: Vec<u64> = std::iter::from_fn(|| path.pop(u64::MAX)).collect();
            prop_assert_eq!(arrived, admitted);
        }
    }
}
