//! The push's congestion controller, without clock and connection. Times are since any fixed instant.

mod pace;
mod rival;
mod start;

use std::time::Duration;

use self::pace::Pace;
use self::start::{Doubt, EndedStart, START_DELAY_MIN, START_LOSS, START_STANDING};
use super::cubic::Cubic;
use super::filter::{RecentMin, RecentRate, Rounds};

/// What a flow does when another fills the bottleneck's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rival {
    /// Takes a share, as CUBIC would.
    #[default]
    Share,
    /// Gets out of the way, as background traffic should.
    Yield,
}

/// The queue that one flow keeps at a gigabit a second.
const TARGET: Duration = Duration::from_micros(700);
const TARGET_RATE: f64 = 125e6;

/// The queue that the slowest flow keeps.
const TARGET_PACKETS_MIN: f64 = 4.0;

/// How much of the way to its goal the window goes in a round: FAST's gamma.
const GAIN: f64 = 0.5;

/// Rounds that find the path wider before the window goes back to what the path has carried lately, and before it grows
/// faster and faster beyond that.
const HASTE_AFTER: u32 = 2;
const HASTE_LATE: u32 = 6;

/// A round's share of lost packets that no error of the path explains.
const HEAVY_LOSS: f64 = 0.1;

/// A round's share of lost packets that may come of this flow's own queue, where the buffer is small.
const LIGHT_LOSS: f64 = 0.005;

/// The least part of the target that is tried where the buffer is small.
const SCALE_MIN: f64 = 1.0 / 8.0;

/// Losses that are no more than so many times those with the least target are the path's own: no buffer overflows.
const OWN_LOSS: f64 = 2.0;

/// What a round trip has beyond the path's own without a queue, and this part of the path's own at most: what joins
/// interrupts and packets, at both ends and between them, is met by all packets of a busy path and by few of a quiet one.
const SLACK: Duration = Duration::from_micros(400);
const SLACK_SHARE: u32 = 64;

/// A queue that is still there after the window was cut by so many times what of it can be this flow's may be none.
const CUT_IN_VAIN: f64 = 2.0;

/// Seconds of jitter that make a queue doubtful.
const CUT_NOISE: f64 = 2.0;

/// Seconds within which a round trip is the same.
const FLAT_S: f64 = 0.000_5;

/// The shortest round: on a path of microseconds one round trip says little.
const ROUND_MIN: Duration = Duration::from_millis(1);

/// How long the smallest round trip counts as the path's own.
const BASE_AGE: Duration = Duration::from_secs(10);

/// Share of what the path holds by itself that is in flight while the queue drains.
const DRAIN: f64 = 0.85;

/// How long the queue is shared before a drained round shows whether the rival is still there.
const SHARE_TIME: Duration = Duration::from_secs(4);

/// Queue beyond the target that is kept for each second of jitter. More lets the queue swing by itself: its own swings are
/// taken for jitter.
const NOISE_SHARE: f64 = 1.0;

/// Seconds of jitter that are left out of account.
const NOISE_MAX: f64 = 0.005;

const PACKETS_MIN: f64 = 4.0;

/// What the window follows.
#[derive(Clone, Debug)]
enum Phase {
    /// Doubles each round, until the queue or a loss says that the path is full.
    Start,
    /// Keeps the queue at its target.
    Steady,
    /// Keeps less in flight than the path holds, so that the path's own round trip shows.
    Drain {
        until: Duration,
        shared: Option<Cubic>,
    },
    /// Another fills the queue: takes a share of it.
    Share {
        cubic: Cubic,
        since: Duration,
        lost_at: Duration,
    },
}

/// What happened until a packet that left after the round began was acknowledged.
#[derive(Clone, Debug, Default)]
struct Round {
    began: Duration,
    acked: f64,
    lost: f64,
    /// There was not always something to send.
    idle: bool,
    /// The window in the round before, whose packets this round acknowledged.
    window: f64,
}

/// The controller.
#[derive(Clone, Debug)]
pub struct Core {
    rival: Rival,
    packet: f64,
    window_first: f64,
    window: f64,
    phase: Phase,
    round: Round,
    pace: Pace,
    /// The start's end, until what was sent before it has been acknowledged for a round.
    ended_start: Option<EndedStart>,
    doubt: Doubt,
    /// When a queue ended the start. A loss that ends it is no stall's.
    start_ended_at: Option<Duration>,
    rtt: Duration,
    /// The path's own round trip.
    base: RecentMin,
    /// When a round trip last was the path's own.
    based_at: Duration,
    /// The round trip with what stands in the queue, without what jitter adds: Copa's "standing" round trip.
    standing: RecentMin,
    rate: RecentRate,
    /// Bytes a second that the last rounds delivered.
    rates: Rounds<4>,
    /// The most of the last seconds, and when it was nearly reached.
    rate_most: f64,
    most_at: Duration,
    /// By how much the standing round trip changes from round to round, in seconds.
    noise: f64,
    standing_before: f64,
    /// The standing round trip of the last shared round, in seconds.
    standing_shared: f64,
    /// And of the last drained one.
    standing_drained: Duration,
    /// Drained rounds in a row with the same.
    same_drains: u32,
    /// When a rival was last seen.
    rival_at: Option<Duration>,
    /// When a heavy loss last cut the window.
    cut_at: Duration,
    /// Seconds of queue in the last rounds.
    queues: Rounds<5>,
    /// The window when the queue became longer than it should be.
    window_ahead: Option<f64>,
    /// Bytes that the window was cut by since the queue was last short enough.
    cut_bytes: f64,
    /// Rounds in a row that found the path wider than was known.
    open: u32,
    /// Part of the target that the path's buffer holds.
    scale: f64,
    /// Share of packets that is lost with the least target.
    own_loss: f64,
}

impl Core {
    /// A controller that begins with `initial_window` bytes; packets are `mtu` long.
    pub fn new(initial_window: u64, mtu: u16, rival: Rival) -> Self {
        Self {
            rival,
            packet: mtu.into(),
            window_first: initial_window as f64,
            window: initial_window as f64,
            phase: Phase::Start,
            round: Round::default(),
            pace: Pace::default(),
            ended_start: None,
            doubt: Doubt::default(),
            start_ended_at: None,
            rtt: Duration::ZERO,
            base: RecentMin::default(),
            based_at: Duration::ZERO,
            standing: RecentMin::default(),
            rate: RecentRate::default(),
            rates: Rounds::default(),
            rate_most: 0.0,
            most_at: Duration::ZERO,
            noise: 0.0,
            standing_before: 0.0,
            standing_shared: 0.0,
            standing_drained: Duration::ZERO,
            same_drains: 0,
            rival_at: None,
            cut_at: Duration::ZERO,
            queues: Rounds::default(),
            window_ahead: None,
            cut_bytes: 0.0,
            open: 0,
            scale: 1.0,
            own_loss: 0.0,
        }
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        let window = match self.phase {
            Phase::Drain { .. } => self.window.min(self.path_bytes() * DRAIN),
            _ => self.window,
        };
        window.max(PACKETS_MIN * self.packet) as u64
    }

    /// Packets are `mtu` bytes long from now on.
    pub fn set_mtu(&mut self, mtu: u16) {
        self.packet = mtu.into();
    }

    /// A packet of `bytes` that left at `sent` is acknowledged. `app_limited`: there was nothing more to send.
    pub fn on_ack(&mut self, now: Duration, sent: Duration, bytes: u64, app_limited: bool) {
        let rtt = now.saturating_sub(sent);
        self.rtt = match self.rtt {
            Duration::ZERO => rtt,
            smooth => (smooth * 7 + rtt) / 8,
        };
        let near = self.base.get().map(|base| base + self.target_delay() / 2);
        if near.is_none_or(|near| rtt <= near) {
            self.based_at = now;
        }
        let age = self.base_age(now);
        self.base.insert(now, rtt, age);
        let within = match self.phase {
            Phase::Start => self.rtt / START_STANDING,
            _ => self.rtt / 2,
        };
        self.standing.insert(now, rtt, within);
        self.rate.insert(now, bytes as f64, self.rtt);
        self.round.acked += bytes as f64;
        self.round.idle |= app_limited;
        self.see_queued(now, sent, bytes, app_limited);
        if matches!(self.phase, Phase::Start) {
            self.go_on_starting(now, sent, bytes, app_limited);
        }
        if sent >= self.round.began && now >= self.round.began + ROUND_MIN {
            self.end_round(now);
        }
    }

    /// `bytes` are taken for lost. `persistent`: nothing at all came through for some round trips.
    pub fn on_loss(&mut self, now: Duration, bytes: u64, persistent: bool) {
        self.round.lost += bytes as f64;
        self.pace.in_flight = (self.pace.in_flight - bytes as f64).max(0.0);
        if persistent {
            // The path may be another one; what was known of it says nothing any more.
            let window = self.window.min(self.window_first) / 2.0;
            *self = Self {
                window_first: self.window_first,
                based_at: now,
                pace: std::mem::take(&mut self.pace),
                ..Self::new(window as u64, self.packet as u16, self.rival)
            };
            self.round.began = now;
        } else if let Phase::Share { cubic, lost_at, .. } = &mut self.phase
            && now >= *lost_at + self.rtt
        {
            *lost_at = now;
            cubic.on_loss(now, self.window);
            self.window = cubic.window(now, self.rtt);
        }
    }

    fn end_round(&mut self, now: Duration) {
        let next = Round {
            began: now,
            window: self.window,
            ..Round::default()
        };
        let round = std::mem::replace(&mut self.round, next);
        let rate = round.acked / (now - round.began).as_secs_f64();
        let loss = round.lost / (round.lost + round.acked).max(1.0);
        // What is lost in the rounds after a cut was sent before it.
        let heavy = loss > HEAVY_LOSS && now > self.cut_at + 3 * self.rtt;
        if heavy {
            self.cut_at = now;
            self.rates.clear();
            self.rates.insert(self.rate.get());
            self.rate_most = self.rate.get();
        }
        let drained = matches!(self.phase, Phase::Drain { .. });
        if rate > self.rates.max() || !(round.idle || drained) {
            self.rates.insert(rate);
        }
        self.remember_rate(now, now - round.began);
        self.watch_noise();
        self.queues.insert(self.queueing().as_secs_f64());
        self.fit_to_buffer(loss);
        tracing::trace!(
            at_ms = now.as_millis() as u64,
            window = self.window as u64,
            mbit_s = (rate * 8e-6) as u64,
            queue_us = self.queueing().as_micros() as u64,
            base_us = self.base.get().unwrap_or_default().as_micros() as u64,
            loss,
            idle = round.idle,
            phase = ?self.phase,
            "round"
        );
        let is_corrected = self.correct_end_of_start(&round, rate);
        match &self.phase {
            Phase::Start if loss > START_LOSS && self.is_dense(&round) => self.end_start(now),
            Phase::Steady if is_corrected => {}
            Phase::Steady => self.steer(now, &round, rate, heavy),
            Phase::Drain { until, shared } if now >= *until => self.end_drain(now, shared.clone()),
            Phase::Share { cubic, since, .. } if now > *since + SHARE_TIME => {
                self.drain(now, Some(cubic.clone()));
            }
            Phase::Share { cubic, .. } => self.share(cubic.window(now, self.rtt)),
            Phase::Start | Phase::Drain { .. } => {}
        }
    }

    /// A round of FAST's law, towards a window that keeps the target's bytes in the queue.
    fn steer(&mut self, now: Duration, round: &Round, rate: f64, heavy_loss: bool) {
        let base = self.base.get().unwrap_or_default().as_secs_f64();
        let standing = base + self.standing_queue().as_secs_f64();
        let target = self.target();
        if self.meets_rival(now) {
            return;
        }
        if heavy_loss && self.window_ahead.is_none() {
            self.window = self.window.min(self.path_bytes() + target);
            self.open = 0;
            return;
        }
        if now > self.based_at + BASE_AGE {
            return self.drain(now, None);
        }
        let queue = standing - base;
        let is_long = queue > self.target_delay().as_secs_f64() + FLAT_S + CUT_NOISE * self.noise;
        if round.idle {
            // A window that was not used says nothing of the path, but it may fill the queue as soon as it is.
            if is_long && self.is_dense(round) {
                self.open = 0;
                self.window = self.next_window(standing, target).min(self.window);
            }
            return;
        }
        // All of a larger window arrives, and no queue shows: the path is wider than was known.
        let wider =
            rate * standing > 0.7 * round.window && (queue - self.noise) * rate < target / 2.0;
        self.open = if wider { self.open + 1 } else { 0 };
        let known = 0.98 * self.rate_most * base - self.window;
        let soon = known > 0.0 || self.start_has_just_ended(now);
        let after = if soon { HASTE_AFTER } else { HASTE_LATE };
        let mut room = target * 2_f64.powi(self.open.saturating_sub(after).min(20) as i32);
        if self.open >= HASTE_AFTER {
            room = room.max(known.min(self.window / 4.0));
        }
        let window = self.next_window(standing, room);
        let cut = std::mem::replace(&mut self.window, window) - window;
        self.cut_bytes = if cut > 0.0 { self.cut_bytes + cut } else { 0.0 };
        if is_long && self.cut_bytes > CUT_IN_VAIN * self.rates.max() * queue {
            self.drain(now, None);
        }
    }

    /// The law, where `standing` is the round trip in seconds, and the queue is to hold `room`.
    fn next_window(&self, standing: f64, room: f64) -> f64 {
        let base = self.base.get().unwrap_or_default().as_secs_f64();
        let goal = self.window * base / standing.max(1e-9) + room;
        let most = self.rates.max() * self.rtt.as_secs_f64() + 2.0 * room;
        (self.window + GAIN * (goal - self.window)).min(most.min(2.0 * self.window))
    }

    /// What the path has carried counts for as long as its round trip does. A rival takes from the rate, but not from what the
    /// path can carry.
    fn remember_rate(&mut self, now: Duration, elapsed: Duration) {
        if self.window_ahead.is_some() || self.is_sharing() {
            self.most_at += elapsed;
        }
        let rate = self.rates.max();
        if now > self.most_at + BASE_AGE {
            self.rate_most = 0.0;
        }
        if rate > 0.98 * self.rate_most {
            self.most_at = now;
            self.rate_most = self.rate_most.max(rate);
        }
    }

    /// Jitter that is left in the standing round trip is no queue, and is not to be fought.
    fn watch_noise(&mut self) {
        let standing = self.standing.get().unwrap_or_default().as_secs_f64();
        let change = (standing - self.standing_before).abs().min(NOISE_MAX);
        self.standing_before = standing;
        self.noise += (change - self.noise) / 8.0;
    }

    /// A buffer that holds less than the target loses some of every round, without a delay that would tell.
    fn fit_to_buffer(&mut self, loss: f64) {
        let short = self.queueing() < self.target_delay() / 2;
        if self.scale <= SCALE_MIN {
            self.own_loss += (loss - self.own_loss) / 4.0;
        }
        let much = loss > LIGHT_LOSS.max(OWN_LOSS * self.own_loss);
        self.scale = if much && short {
            (self.scale / 2.0).max(SCALE_MIN)
        } else {
            (self.scale * 1.05).min(1.0)
        };
    }

    fn queueing(&self) -> Duration {
        let base = self.base.get().unwrap_or_default();
        self.standing.get().unwrap_or_default().saturating_sub(base)
    }

    /// The queue, without what is none. Beside a rival all of it counts.
    fn standing_queue(&self) -> Duration {
        if self.rival_at.is_some() {
            return self.queueing();
        }
        let base = self.base.get().unwrap_or_default();
        self.queueing()
            .saturating_sub(SLACK.min(base / SLACK_SHARE))
    }

    /// Bytes that the path holds without a queue.
    fn path_bytes(&self) -> f64 {
        self.rates.max() * self.base.get().unwrap_or_default().as_secs_f64()
    }

    /// Bytes that this flow keeps in the queue. They grow more slowly than the rate, so that of two flows that see
    /// the same queue the slower one gains, as with Swift's flow scaling.
    fn target(&self) -> f64 {
        self.target_of(self.rates.max())
    }

    fn target_of(&self, rate: f64) -> f64 {
        self.quiet_target(rate) + NOISE_SHARE * rate * self.noise
    }

    /// The target on a path without jitter.
    fn quiet_target(&self, rate: f64) -> f64 {
        let share = rate / TARGET_RATE;
        let full = TARGET_RATE * TARGET.as_secs_f64();
        let bytes = full * (share + share.sqrt()) / 2.0 * self.scale;
        bytes.max(TARGET_PACKETS_MIN * self.packet)
    }

    fn target_delay(&self) -> Duration {
        match self.rates.max() {
            0.0 => START_DELAY_MIN,
            rate => Duration::from_secs_f64((self.target() / rate).min(1.0)),
        }
    }
}
