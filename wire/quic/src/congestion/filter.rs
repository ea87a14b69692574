//! What was seen lately: the smallest, the largest, how much of it.

use std::collections::VecDeque;
use std::time::Duration;

/// Values that count whatever their age: a thread that had no processor for a while hears of many late ones at a time.
const NEWEST: u64 = 32;

/// How much older than `within` those may be.
const NEWEST_AGE: u32 = 2;

/// The smallest of the values within a length of time. Holds those only that may still become the smallest.
#[derive(Clone, Debug, Default)]
pub(super) struct RecentMin {
    /// Times, numbers and values, all ascending.
    values: VecDeque<(Duration, u64, Duration)>,
    number: u64,
}

impl RecentMin {
    /// Takes a value in, and forgets those older than `within`, except for some of the newest.
    pub fn insert(&mut self, now: Duration, value: Duration, within: Duration) {
        while self.values.back().is_some_and(|&(.., last)| last >= value) {
            self.values.pop_back();
        }
        self.number += 1;
        self.values.push_back((now, self.number, value));
        let oldest = now.saturating_sub(within);
        let too_old = now.saturating_sub(within * NEWEST_AGE);
        let goes = |&(at, number, _): &(Duration, u64, Duration)| {
            at < too_old || (at < oldest && number + NEWEST <= self.number)
        };
        while self.values.len() > 1 && self.values.front().is_some_and(goes) {
            self.values.pop_front();
        }
    }

    /// The smallest.
    pub fn get(&self) -> Option<Duration> {
        self.values.front().map(|&(.., value)| value)
    }
}

/// Bytes a second over the last quarter of a round trip.
#[derive(Clone, Debug, Default)]
pub(super) struct RecentRate {
    /// Times, ascending, and the bytes that had come by then.
    marks: VecDeque<(Duration, f64)>,
    bytes: f64,
}

/// Marks in the length of time that counts.
const MARKS: u32 = 8;

impl RecentRate {
    /// Takes bytes in.
    pub fn insert(&mut self, now: Duration, bytes: f64, rtt: Duration) {
        let within = rtt / 4;
        self.bytes += bytes;
        let due = |&(last, _): &(Duration, f64)| now >= last + within / MARKS;
        if self.marks.back().is_none_or(due) {
            self.marks.push_back((now, self.bytes));
        }
        while self.marks.len() > 2 && self.marks[1].0 + within < now {
            self.marks.pop_front();
        }
    }

    /// The rate; 0 before enough is known.
    pub fn get(&self) -> f64 {
        let (Some(&(from, before)), Some(&(to, after))) = (self.marks.front(), self.marks.back())
        else {
            return 0.0;
        };
        let elapsed = to.saturating_sub(from).as_secs_f64();
        if elapsed > 0.0 {
            (after - before) / elapsed
        } else {
            0.0
        }
    }
}

/// The values of the last `N` rounds.
#[derive(Clone, Debug)]
pub(super) struct Rounds<const N: usize> {
    values: VecDeque<f64>,
}

impl<const N: usize> Default for Rounds<N> {
    fn default() -> Self {
        Self {
            values: VecDeque::with_capacity(N),
        }
    }
}

impl<const N: usize> Rounds<N> {
    /// Takes the value of another round in.
    pub fn insert(&mut self, value: f64) {
        if self.values.len() == N {
            self.values.pop_front();
        }
        self.values.push_back(value);
    }

    /// Whether `N` rounds were seen.
    pub fn is_full(&self) -> bool {
        self.values.len() == N
    }

    /// The largest; 0 of none.
    pub fn max(&self) -> f64 {
        self.values.iter().copied().fold(0.0, f64::max)
    }

    /// The smallest; infinite of none.
    pub fn min(&self) -> f64 {
        self.values.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.values.clear();
    }
}
