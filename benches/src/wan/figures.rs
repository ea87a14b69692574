//! From signs of life to figures: pure functions of timelines.

use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::traffic::Totals;

/// How long before the order the guest's own speed is measured.
pub const BASELINE: Duration = Duration::from_secs(2);

/// For how long the guest has to keep its speed until it has recovered.
pub const STEADY: Duration = Duration::from_millis(500);

/// The share of its speed that it has to have back.
const RECOVERED_SHARE: f64 = 0.8;

/// A sign of life, in microseconds from the order to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sign {
    /// When.
    pub at_us: i64,
    /// Whether the guest was at the destination.
    pub moved: bool,
    /// The guest's own count.
    pub number: u64,
}

/// What signs of life tell.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Life {
    /// The first sign from the destination.
    pub first_sign_us: i64,
    /// The last sign from the source: from then on the guest stood still or was on its way.
    pub left_at_us: i64,
    /// The longest time without a sign, after the order.
    pub freeze_us: i64,
    /// From `Life::left_at_us` until the first sign after which it kept `RECOVERED_SHARE` of its speed for `STEADY`.
    pub recovered_us: Option<i64>,
    /// Signs a second in the time before the order.
    pub speed_before_hz: f64,
    /// Signs in the last second that was watched.
    pub speed_after_hz: f64,
    /// Signs that are missing or came twice.
    pub out_of_order: u64,
}

impl Life {
    /// Reads the signs of a guest that was watched until `end_us`; `None` when there is none from one of the ends.
    pub fn of(signs: &[Sign], end_us: i64) -> Option<Self> {
        let left_at_us = signs.iter().rfind(|sign| !sign.moved)?.at_us;
        let moved: Vec<i64> = signs.iter().filter(|s| s.moved).map(|s| s.at_us).collect();
        let first_sign_us = *moved.first()?;
        let speed_before_hz = speed_before_hz(signs)?;
        let wanted = RECOVERED_SHARE * speed_before_hz * STEADY.as_secs_f64();
        let steady_us = STEADY.as_micros() as i64;
        let recovered_us = moved
            .iter()
            .enumerate()
            .take_while(|(_, at)| **at + steady_us <= end_us)
            .find(|(first, at)| {
                let count = moved[*first..].partition_point(|later| *later < **at + steady_us);
                count as f64 >= wanted
            })
            .map(|(_, at)| at - left_at_us);
        let last_us = signs.last()?.at_us;
        let freeze_us = signs
            .windows(2)
            .filter(|pair| pair[1].at_us >= 0)
            .map(|pair| pair[1].at_us - pair[0].at_us)
            .chain([end_us - last_us])
            .max()?;
        Some(Self {
            first_sign_us,
            left_at_us,
            freeze_us,
            recovered_us,
            speed_before_hz,
            speed_after_hz: signs
                .iter()
                .filter(|s| s.at_us > end_us - 1_000_000)
                .count() as f64,
            out_of_order: signs
                .windows(2)
                .filter(|pair| pair[1].number != pair[0].number.wrapping_add(1))
                .count() as u64,
        })
    }
}

/// The signs of a clone that goes on from a pause long ago, as if its guest had been paused at the order: what came from the
/// guest after that pause is not the clone's, nor is what earlier clones said.
pub fn of_clone(signs: &[Sign]) -> Vec<Sign> {
    let moved = signs.iter().filter(|sign| sign.moved && sign.at_us >= 0);
    let first = moved.clone().map(|sign| sign.number).min();
    let before: Vec<&Sign> = signs
        .iter()
        .filter(|sign| !sign.moved && first.is_none_or(|first| sign.number < first))
        .collect();
    let paused_us = before.last().map_or(0, |sign| sign.at_us);
    let earlier = before.into_iter().map(|sign| Sign {
        at_us: sign.at_us - paused_us,
        ..*sign
    });
    earlier.chain(moved.copied()).collect()
}

fn speed_before_hz(signs: &[Sign]) -> Option<f64> {
    let from_us = -(BASELINE.as_micros() as i64);
    let mut before = signs
        .iter()
        .map(|sign| sign.at_us)
        .filter(|at| (from_us..0).contains(at));
    let first = before.next()?;
    let (count, last) = before.fold((0_u32, first), |(count, _), at| (count + 1, at));
    (last > first).then(|| f64::from(count) * 1e6 / (last - first) as f64)
}

/// The figures of one move. Times count from the order to move, where nothing else is said: the start of `lazyvm resume`,
/// QEMU's command `migrate`.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Until the workload's first sign of life at the destination.
    pub first_sign_ms: f64,
    /// The longest gap between two signs of life of the guest's workload, across the move.
    pub freeze_ms: f64,
    /// From the workload's last sign of life at the source until it was back at 80% of its speed there, for half a second;
    /// `None` if it was not.
    pub recovered_ms: Option<f64>,
    /// Until all memory was at the destination and the source had let go.
    pub total_ms: f64,
    /// The same from the workload's last sign of life at the source on.
    pub after_pause_ms: f64,
    /// What the mover itself says of the time in which no vCPU ran.
    pub downtime_us: u64,
    /// Bytes of IP that came from the source, counted on the path.
    pub bytes_wire: u64,
    /// Memory that the guest had written to at the order; `None` of a clone.
    pub data_bytes: Option<u64>,
    /// `total_ms` by the time in which the path carries `data_bytes`; `None` without a limit of its rate.
    pub copies: Option<f64>,
    /// Memory that the guest's workload dirtied in the last second before the order, in bits: a page that was written to
    /// counts once, as a whole; `None` of a clone.
    pub dirty_bit_s: Option<f64>,
    /// The same by the path's rate.
    pub dirty_share: Option<f64>,
    /// Pages that a vCPU waited for, as the mover counts them.
    pub faults: u64,
    /// Pages that the guest's workload touched from its last sign of life at the source until all was there, each counted
    /// once; `None` where its draws are not known.
    pub touched_pages: Option<u64>,
    /// `faults` by `touched_pages`: no more than this waited for a round trip.
    pub fault_share: Option<f64>,
    /// How long they took (`p50`, `p90`, `p99`, `max`); QEMU does not tell.
    pub fault_us: Option<Value>,
    /// Bytes of IP from the source, from the pause until all was there, by what the path carries in that time; `None` without a
    /// rate.
    pub path_share: Option<f64>,
    /// Signs of life a second before.
    pub speed_before_hz: f64,
    /// Signs of life a second in the last second that was watched.
    pub speed_after_hz: f64,
    /// Signs of life that are missing or came twice.
    pub ticks_out_of_order: u64,
    /// What went through the path.
    pub path: Totals,
    /// The share of a processor that the emulator took, from the order until all was there.
    pub emulator_cpu_share: f64,
}

/// The middle one of each figure. What is missing counts as worse than anything; of two in the middle the worse counts.
pub fn median(of: &[Value]) -> Value {
    match of {
        [Value::Object(first), ..] => first
            .keys()
            .map(|key| {
                let each: Vec<Value> = of.iter().map(|value| value[key].clone()).collect();
                (key.clone(), median(&each))
            })
            .collect(),
        _ => {
            let mut sorted = of.to_vec();
            let size = |value: &Value| value.as_f64().unwrap_or(f64::INFINITY);
            sorted.sort_by(|a, b| size(a).total_cmp(&size(b)));
            sorted.get(sorted.len() / 2).cloned().unwrap_or(Value::Null)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A guest that says so every 10 ms from -2.5 s until `left_ms`, then again at these times.
    fn signs(left_ms: i64, moved_ms: impl IntoIterator<Item = i64>) -> Vec<Sign> {
        let source = (-250..=left_ms / 10).map(|ten_ms| (ten_ms * 10, false));
        let times = source.chain(moved_ms.into_iter().map(|ms| (ms, true)));
        (1..)
            .zip(times)
            .map(|(number, (ms, moved))| Sign {
                at_us: ms * 1000,
                moved,
                number,
            })
            .collect()
    }

    #[test]
    fn a_guest_that_stands_still_once() {
        let life = Life::of(&signs(300, (1000..3000).step_by(10)), 3_000_000).unwrap();
        assert_eq!(life.left_at_us, 300_000);
        assert_eq!(life.freeze_us, 700_000);
        assert_eq!(life.recovered_us, Some(700_000));
        assert!((life.speed_before_hz - 100.0).abs() < 0.5);
        assert_eq!(life.out_of_order, 0);
    }

    #[test]
    fn a_clone_goes_on_from_its_snapshot_as_if_that_were_now() {
        // Paused 5 s before the order when it had said 300; it went on to 700, and an earlier clone was there too.
        let sign = |ms: i64, moved: bool, number: u64| Sign {
            at_us: ms * 1000,
            moved,
            number,
        };
        let guest = (1..=700).map(|n| sign(-8000 + n as i64 * 10, false, n));
        let other = (301..400).map(|n| sign(-900 + (n as i64 - 301), true, n));
        let clone = (301..600).map(|n| sign(250 + (n as i64 - 301) * 10, true, n));
        let signs: Vec<Sign> = guest.chain(other).chain(clone).collect();
        let life = Life::of(&of_clone(&signs), 3_240_000).unwrap();
        assert_eq!((life.left_at_us, life.first_sign_us), (0, 250_000));
        assert_eq!(life.freeze_us, 250_000);
        assert_eq!(life.recovered_us, Some(250_000));
        assert_eq!(life.out_of_order, 0);
        assert!((life.speed_before_hz - 100.0).abs() < 0.5);
    }

    #[test]
    fn a_guest_that_comes_back_slowly() {
        // Half of its speed for two seconds, with a gap of 400 ms in between, then all of it.
        let slow = (500..1500).step_by(20).chain((1900..2500).step_by(20));
        let life = Life::of(&signs(100, slow.chain((2500..4000).step_by(10))), 4_000_000).unwrap();
        assert_eq!(life.freeze_us, 420_000, "a gap at the destination counts");
        let recovered = life.recovered_us.unwrap();
        // A window with 80% may begin a fifth of it early, of half the speed.
        assert!((2_200_000..=2_400_000).contains(&recovered), "{recovered}");
    }

    #[test]
    fn a_burst_is_no_recovery_and_neither_is_what_was_not_watched() {
        let burst = (1000..1100).step_by(5);
        let life = Life::of(&signs(0, burst.clone()), 5_000_000).unwrap();
        assert_eq!(life.recovered_us, None);
        assert_eq!(life.freeze_us, 3_905_000, "silence at the end counts");
        assert!(life.speed_after_hz < 0.5);
        let life = Life::of(&signs(0, (1000..1300).step_by(10)), 1_300_000).unwrap();
        assert_eq!(life.recovered_us, None);
    }

    #[test]
    fn a_guest_that_does_not_come_back_has_no_figures() {
        assert_eq!(Life::of(&signs(100, []), 1_000_000), None);
        assert_eq!(Life::of(&[], 1_000_000), None);
    }

    #[test]
    fn ticks_that_are_missing_are_counted() {
        let mut signs = signs(100, (500..2000).step_by(10));
        signs.remove(20);
        assert_eq!(Life::of(&signs, 2_000_000).unwrap().out_of_order, 1);
    }

    #[test]
    fn medians_are_taken_figure_by_figure_and_what_is_missing_is_worst() {
        let runs = [
            json!({"a": 3, "b": {"p50": 1.5}, "c": null}),
            json!({"a": 1, "b": {"p50": 0.5}, "c": 7}),
            json!({"a": 2, "b": {"p50": 2.5}, "c": null}),
        ];
        assert_eq!(median(&runs), json!({"a": 2, "b": {"p50": 1.5}, "c": null}));
        assert_eq!(
            median(&runs[..2]),
            json!({"a": 3, "b": {"p50": 1.5}, "c": null})
        );
    }
}
