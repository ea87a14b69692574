//! How long memory is sent, or written to a snapshot, ahead of the pause. Pure logic: the caller tells what each round left,
//! and hears what to do.
//!
//! A round ends when all that was to go has gone. What the machine wrote meanwhile is the *residual*. Another round pays while
//! it makes the residual smaller: what is left at the pause is what the guest may have to wait for, or, in
//! [`Mode::Precopy`], what it stands still for. A machine that writes faster than the path carries gets no smaller residual,
//! and nothing is won by going on (Clark et al., "Live Migration of Virtual Machines", NSDI 2005, section 3.2).

use std::collections::VecDeque;
use std::time::Duration;

use lazyvm_wire::PAGE_SIZE;

/// How a machine is moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Memory goes ahead while that pays; what is left follows the machine.
    Hybrid,
    /// Only what the machine needs first goes ahead; all else follows it.
    #[default]
    Postcopy,
    /// Memory goes ahead until so little is left that the machine can stand still for it.
    Precopy,
    /// The machine stands still until all memory is there.
    Stop,
}

impl Mode {
    /// Its name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
            Self::Precopy => "precopy",
            Self::Stop => "stop",
        }
    }

    /// Whether the machine is started only when all its memory is there.
    pub const fn waits(self) -> bool {
        matches!(self, Self::Precopy | Self::Stop)
    }
}

/// A residual that is copied in this time is small: less is written anew meanwhile.
const SMALL: Duration = Duration::from_millis(20);

/// A round pays that leaves less than this part of what the one before has left.
const PAYS_BELOW: f64 = 0.85;

/// A residual that takes longer to copy is not sent where what was written last shows that as much would be left.
const DEAR: Duration = Duration::from_millis(300);

/// Looks at what was written that count.
const LOOKS: usize = 16;

/// Rounds in a row that do not pay, after which it is enough: one may have met a burst.
const VAIN_MAX: u32 = 2;

/// The same for pre-copy, which has nothing else to try.
const VAIN_MAX_PRECOPY: u32 = 20;

/// What a round has left.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Round {
    /// Since the first round began.
    pub elapsed: Duration,
    /// Pages that were written after they had gone.
    pub residual_pages: u64,
    /// How fast the residual is copied: what the path carries; for a snapshot, which keeps it in memory until the machine
    /// runs on, how fast that is read.
    pub bytes_per_s: f64,
    /// There can be another round.
    pub more: bool,
}

/// What follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Send the residual, and ask again.
    GoOn,
    /// Pause the machine now.
    Pause,
    /// It can't be moved this way; it runs on.
    GiveUp(String),
}

/// Judges the rounds of one move, or of one snapshot.
#[derive(Clone, Debug)]
pub struct Judge {
    mode: Mode,
    /// How long memory may go ahead.
    time_limit: Option<Duration>,
    /// How long the machine may stand still in [`Mode::Precopy`].
    downtime_limit: Duration,
    least: Option<u64>,
    vain: u32,
    /// How many pages were written within times of these lengths, the last ones known.
    written: VecDeque<(Duration, u64)>,
}

impl Judge {
    /// For a snapshot that begins. Its machine stands still while the residual is copied to memory; that has no alternative,
    /// so the judge never gives up, as in a hybrid move.
    pub fn of_snapshot() -> Self {
        Self::new(Mode::Hybrid, None, Duration::ZERO)
    }

    /// For a move that begins.
    pub fn new(mode: Mode, time_limit: Option<Duration>, downtime_limit: Duration) -> Self {
        Self {
            mode,
            time_limit,
            downtime_limit,
            least: None,
            vain: 0,
            written: VecDeque::new(),
        }
    }

    /// So many pages were written within a time of this length.
    pub fn saw(&mut self, pages: u64, within: Duration) {
        self.written.truncate(LOOKS - 1);
        self.written.push_front((within, pages));
    }

    /// How many pages will be written within a time of this length. The longer the time the fewer new ones come: between two
    /// lengths that are known there are more than on the straight line that is taken. Beyond the longest it goes on as it does
    /// where some pages are written again and again in any order.
    fn will_be_written(&self, within: Duration) -> f64 {
        let seen = self.written.iter();
        let shorter = seen.clone().filter(|(time, _)| *time <= within).max();
        let longer = seen.filter(|(time, _)| *time > within).min();
        let (time, pages) = shorter.copied().unwrap_or_default();
        let pages = pages as f64;
        let Some(&(longer, more)) = longer else {
            return self.goes_on(time, pages, within);
        };
        let part = (within - time).as_secs_f64() / (longer - time).as_secs_f64();
        pages + (more as f64 - pages) * part
    }

    /// Of `all` pages in any order, `all * (1 - q^2)` are written in twice the time in which `all * (1 - q)` are.
    fn goes_on(&self, time: Duration, pages: f64, within: Duration) -> f64 {
        if time.is_zero() || pages <= 0.0 {
            return 0.0;
        }
        let times = within.as_secs_f64() / time.as_secs_f64();
        let in_half = self.will_be_written(time / 2).max(1.0);
        let q = (pages / in_half - 1.0).clamp(0.0, 1.0);
        if q > 0.99 {
            return pages * times;
        }
        pages / (1.0 - q * q) * (1.0 - q.powf(2.0 * times))
    }

    /// What to do after a round.
    pub fn after(&mut self, round: Round) -> Verdict {
        let bytes = round.residual_pages as f64 * PAGE_SIZE as f64;
        let needed = Duration::try_from_secs_f64(bytes / round.bytes_per_s.max(1.0));
        let needed = needed.unwrap_or(Duration::MAX);
        let paid = self
            .least
            .is_none_or(|least| (round.residual_pages as f64) < PAYS_BELOW * least as f64);
        self.vain = if paid { 0 } else { self.vain + 1 };
        self.least = Some(self.least.map_or(round.residual_pages, |least| {
            least.min(round.residual_pages)
        }));
        let late = self.time_limit.is_some_and(|limit| round.elapsed >= limit);
        match self.mode {
            Mode::Stop => Verdict::Pause,
            Mode::Precopy if needed <= self.downtime_limit => Verdict::Pause,
            Mode::Precopy if late || !round.more || self.vain >= VAIN_MAX_PRECOPY => {
                Verdict::GiveUp(format!(
                    "after {:.1} s of pre-copy {} pages are written anew in each round, for which the VM would stand still \
                     for {:.2} s, and the limit is {:.2} s; raise --downtime-limit, or use --mode hybrid, which needs no limit",
                    round.elapsed.as_secs_f64(),
                    round.residual_pages,
                    needed.as_secs_f64(),
                    self.downtime_limit.as_secs_f64(),
                ))
            }
            Mode::Precopy => Verdict::GoOn,
            Mode::Hybrid | Mode::Postcopy
                if needed <= SMALL
                    || late
                    || !round.more
                    || self.vain >= VAIN_MAX
                    || (needed > DEAR
                        && self.will_be_written(needed)
                            >= PAYS_BELOW * round.residual_pages as f64) =>
            {
                Verdict::Pause
            }
            Mode::Hybrid | Mode::Postcopy => Verdict::GoOn,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINK: f64 = 125e6;

    /// Rounds of a machine that writes `writes_per_s` random pages of a hot set, and what became of it: seconds, the last
    /// residual and the verdict.
    fn simulate(
        mode: Mode,
        memory: u64,
        hot: f64,
        writes_per_s: f64,
        limit: Option<Duration>,
    ) -> (f64, u64, Verdict) {
        let mut judge = Judge::new(mode, limit, Duration::from_millis(300));
        let (mut elapsed, mut pages) = (0.0, memory);
        for number in 1.. {
            let seconds = pages as f64 * PAGE_SIZE as f64 / LINK + 0.005;
            elapsed += seconds;
            let written =
                |seconds: f64| (hot * (1.0 - (-writes_per_s * seconds / hot).exp())) as u64;
            pages = written(seconds);
            let mut last = seconds;
            let mut look = 0.5;
            while number == 1 && last > look {
                judge.saw(written(look), Duration::from_secs_f64(look));
                last -= look;
                look *= 2.0;
            }
            judge.saw(written(last), Duration::from_secs_f64(last));
            let verdict = judge.after(Round {
                elapsed: Duration::from_secs_f64(elapsed),
                residual_pages: pages,
                bytes_per_s: LINK,
                more: number < 254,
            });
            if verdict != Verdict::GoOn {
                return (elapsed, pages, verdict);
            }
        }
        unreachable!()
    }

    #[test]
    fn what_writes_slower_than_the_path_is_sent_until_little_is_left() {
        let (seconds, pages, verdict) = simulate(Mode::Hybrid, 400_000, 16_384.0, 20_000.0, None);
        assert_eq!(verdict, Verdict::Pause);
        assert!(pages < 1000, "{pages}");
        assert!(seconds < 18.0, "{seconds}");
    }

    #[test]
    fn what_writes_three_times_faster_is_paused_soon() {
        let copy = 400_000.0 * PAGE_SIZE as f64 / LINK;
        let (seconds, _, verdict) = simulate(Mode::Hybrid, 400_000, 100_000.0, 92_000.0, None);
        assert_eq!(verdict, Verdict::Pause);
        assert!(seconds < 1.1 * copy, "{seconds}");
    }

    #[test]
    fn what_was_written_tells_what_will_be() {
        let hot = 60_000.0;
        let written = |seconds: f64| hot * (1.0 - (-seconds / 3.0).exp());
        let mut judge = Judge::of_snapshot();
        assert_eq!(judge.will_be_written(Duration::from_secs(3)), 0.0);
        for seconds in [0.5, 1.0, 2.0, 3.5] {
            judge.saw(written(seconds) as u64, Duration::from_secs_f64(seconds));
        }
        for seconds in [0.2, 0.7, 1.5, 3.0, 5.0, 10.0, 100.0] {
            let guess = judge.will_be_written(Duration::from_secs_f64(seconds));
            let error = guess / written(seconds) - 1.0;
            assert!(error.abs() < 0.1, "{seconds} s: {guess}");
        }
    }

    #[test]
    fn pre_copy_says_why_it_gives_up() {
        let (_, _, verdict) = simulate(Mode::Precopy, 400_000, 100_000.0, 92_000.0, None);
        assert!(matches!(verdict, Verdict::GiveUp(why) if why.contains("--downtime-limit")));
        let (_, pages, verdict) = simulate(Mode::Precopy, 400_000, 16_384.0, 10_000.0, None);
        assert_eq!(verdict, Verdict::Pause);
        assert!(pages as f64 * PAGE_SIZE as f64 / LINK <= 0.3, "{pages}");
    }

    proptest! {
        /// It always ends, and no limit of time is passed by more than a round.
        #[test]
        fn every_move_ends(
            memory in 1..1_000_000_u64,
            hot in 1.0..1e6_f64,
            writes in 0.0..1e7_f64,
            limit in proptest::option::of(1..60_u64),
            precopy in any::<bool>(),
        ) {
            let mode = if precopy { Mode::Precopy } else { Mode::Hybrid };
            let limit = limit.map(Duration::from_secs);
            let (seconds, _, _) = simulate(mode, memory, hot, writes, limit);
            if let Some(limit) = limit {
                let round = memory.max(hot as u64) as f64 * PAGE_SIZE as f64 / LINK + 0.005;
                prop_assert!(seconds <= limit.as_secs_f64() + 2.0 * round);
            }
        }
    }
}
