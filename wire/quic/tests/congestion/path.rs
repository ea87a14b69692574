//! Flows over one bottleneck, in virtual time.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use lazyvm_quic::Congestion;

pub const PACKET: f64 = 1_452.0;

/// A bottleneck and what lies behind it.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// Bytes a second.
    pub rate: f64,
    /// Round trip without a queue.
    pub rtt: Duration,
    /// Time that a full queue takes to drain.
    pub queue: Duration,
    /// Share of packets that is lost by itself.
    pub loss: f64,
    /// Packets come up to this much later, redrawn every 5 ms; they stay in order.
    pub jitter: Duration,
    /// Nothing comes through.
    pub dark: bool,
}

impl Path {
    pub fn new(mbit_s: f64, rtt_ms: u64) -> Self {
        Self {
            rate: mbit_s * 1e6 / 8.0,
            rtt: Duration::from_millis(rtt_ms),
            queue: Duration::from_millis(100),
            loss: 0.0,
            jitter: Duration::ZERO,
            dark: false,
        }
    }
}

/// What decides on a flow's window.
pub enum Control {
    Lazyvm(Box<Congestion>),
    Tcp(Tcp),
}

/// TCP with CUBIC (RFC 9438) and its slow start, as a rival.
pub struct Tcp {
    window: f64,
    threshold: f64,
    before: f64,
    lost_at: f64,
}

impl Tcp {
    pub fn new() -> Self {
        Self {
            window: 10.0,
            threshold: f64::INFINITY,
            before: 0.0,
            lost_at: 0.0,
        }
    }

    fn acked(&mut self, now: f64, rtt: f64) {
        if self.window < self.threshold {
            self.window += 1.0;
            return;
        }
        let age = now - self.lost_at + rtt;
        let goal = 0.4 * (age - (self.before * 0.3 / 0.4).cbrt()).powi(3) + self.before;
        let reno = self.before * 0.7 + 0.53 * (now - self.lost_at) / rtt;
        let goal = goal.max(reno).min(1.5 * self.window);
        self.window += ((goal - self.window) / self.window).max(0.0);
    }

    fn lost(&mut self, now: f64, rtt: f64) {
        if now < self.lost_at + rtt {
            return;
        }
        self.lost_at = now;
        let cut_early = self.window < self.before;
        self.before = if cut_early {
            0.85 * self.window
        } else {
            self.window
        };
        self.window = (self.window * 0.7).max(2.0);
        self.threshold = self.window;
    }
}

struct Sent {
    number: u64,
    at: Duration,
    lost: bool,
}

/// A flow that always has something to send while it is on.
pub struct Flow {
    pub control: Control,
    pub on: bool,
    in_flight: VecDeque<Sent>,
    next: u64,
    rtt: Duration,
    tokens: f64,
    filled_at: Duration,
    heard_at: Duration,
    /// Bytes that arrived since they were last asked for.
    pub delivered: f64,
    pub lost: u64,
}

impl Flow {
    pub fn new(control: Control) -> Self {
        Self {
            control,
            on: true,
            in_flight: VecDeque::new(),
            next: 0,
            rtt: Duration::from_millis(100),
            tokens: 0.0,
            filled_at: Duration::ZERO,
            heard_at: Duration::ZERO,
            delivered: 0.0,
            lost: 0,
        }
    }

    fn window(&self) -> f64 {
        match &self.control {
            Control::Lazyvm(core) => core.told_window() as f64,
            Control::Tcp(tcp) => tcp.window * PACKET,
        }
    }

    /// As quinn paces: a quarter faster than a window in a round trip, in bursts of 2 ms.
    fn may_send(&mut self, now: Duration) -> Option<Duration> {
        if !self.on || (self.in_flight.len() as f64 + 1.0) * PACKET > self.window() {
            return None;
        }
        let pace = 1.25 * self.window() / self.rtt.as_secs_f64();
        let burst = (pace * 0.002 / 1.25).clamp(10.0 * PACKET, 256.0 * PACKET);
        let elapsed = (now - self.filled_at).as_secs_f64();
        self.tokens = (self.tokens + elapsed * pace).min(burst);
        self.filled_at = now;
        if self.tokens >= PACKET {
            return Some(now);
        }
        Some(
            now + Duration::from_secs_f64((burst - self.tokens) / pace * 0.8)
                + Duration::from_nanos(100),
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Arrived { flow: usize, number: u64 },
    Wake { flow: usize },
}

/// Times in which nothing runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stalls {
    pub from: Duration,
    pub every: Duration,
    pub length: Duration,
}

impl Stalls {
    /// When the one that `at` falls into ends.
    fn end_of(&self, at: Duration) -> Option<Duration> {
        let since = at.checked_sub(self.from)?.as_nanos();
        let into = since.checked_rem(self.every.as_nanos())?;
        let left = self.length.as_nanos().checked_sub(into)?;
        (left > 0).then(|| at + Duration::from_nanos(left as u64))
    }
}

pub struct Simulation {
    pub path: Path,
    pub now: Duration,
    pub flows: Vec<Flow>,
    busy_until: Duration,
    events: BinaryHeap<Reverse<(Duration, u64, Event)>>,
    order: u64,
    random: u64,
    last_ack: Duration,
    jitter: (Duration, Duration),
    woken: Vec<bool>,
    /// How late the senders' timers are.
    pub late: Duration,
    /// When the senders get no processor.
    pub stalls: Stalls,
    /// From when to when acknowledgements that come seem to come at its begin.
    pub misread: (Duration, Duration),
    /// Queueing of each packet that passed since it was last asked for, in seconds.
    pub queues: Vec<f64>,
}

impl Simulation {
    pub fn new(path: Path, flows: Vec<Flow>) -> Self {
        Self {
            path,
            now: Duration::ZERO,
            woken: vec![false; flows.len()],
            flows,
            busy_until: Duration::ZERO,
            events: BinaryHeap::new(),
            order: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            last_ack: Duration::ZERO,
            jitter: (Duration::ZERO, Duration::ZERO),
            late: Duration::ZERO,
            stalls: Stalls::default(),
            misread: (Duration::ZERO, Duration::ZERO),
            queues: Vec::new(),
        }
    }

    /// Runs for `span` and gives each flow's bytes a second.
    pub fn run(&mut self, span: Duration) -> Vec<f64> {
        let end = self.now + span;
        self.queues.clear();
        for flow in &mut self.flows {
            flow.delivered = 0.0;
            flow.lost = 0;
        }
        for flow in 0..self.flows.len() {
            self.send(flow);
        }
        while let Some(&Reverse((at, _, event))) = self.events.peek() {
            if at > end {
                break;
            }
            self.events.pop();
            if let Some(end) = self.stalls.end_of(at) {
                self.push(end, event);
                continue;
            }
            self.now = at;
            match event {
                Event::Arrived { flow, number } => self.acked(flow, number),
                Event::Wake { flow } => {
                    self.woken[flow] = false;
                    self.time_out(flow);
                    self.send(flow);
                }
            }
        }
        self.now = end;
        self.flows
            .iter()
            .map(|flow| flow.delivered / span.as_secs_f64())
            .collect()
    }

    /// The queueing that a share of the packets stayed below, in milliseconds.
    pub fn queue_ms(&mut self, share: f64) -> f64 {
        self.queues.sort_by(f64::total_cmp);
        let place = (self.queues.len() as f64 * share) as usize;
        self.queues[place.min(self.queues.len() - 1)] * 1e3
    }

    fn draw(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.order += 1;
        self.events.push(Reverse((at, self.order, event)));
    }

    fn wake(&mut self, flow: usize, at: Duration) {
        if !std::mem::replace(&mut self.woken[flow], true) {
            self.push(at, Event::Wake { flow });
        }
    }

    fn send(&mut self, number: usize) {
        while let Some(at) = self.flows[number].may_send(self.now) {
            if at > self.now {
                return self.wake(number, at + self.late);
            }
            self.send_one(number);
        }
        if !self.flows[number].in_flight.is_empty() {
            let at = self.now + self.flows[number].rtt;
            self.wake(number, at);
        }
    }

    fn send_one(&mut self, number: usize) {
        let (loss, now) = (self.draw() < self.path.loss || self.path.dark, self.now);
        let queueing = self.busy_until.saturating_sub(now);
        let lost = loss || queueing > self.path.queue;
        let flow = &mut self.flows[number];
        flow.tokens -= PACKET;
        let sent = Sent {
            number: flow.next,
            at: now,
            lost,
        };
        flow.next += 1;
        if let Control::Lazyvm(core) = &mut flow.control {
            core.on_sent(now, PACKET as u64);
        }
        let packet = sent.number;
        flow.in_flight.push_back(sent);
        if lost {
            return;
        }
        self.queues.push(queueing.as_secs_f64());
        self.busy_until =
            self.busy_until.max(now) + Duration::from_secs_f64(PACKET / self.path.rate);
        if now >= self.jitter.0 + Duration::from_millis(5) {
            self.jitter = (now, self.path.jitter.mul_f64(self.draw()));
        }
        let jitter = self.jitter.1;
        self.last_ack = self.last_ack.max(self.busy_until + self.path.rtt + jitter);
        self.push(
            self.last_ack,
            Event::Arrived {
                flow: number,
                number: packet,
            },
        );
    }

    fn acked(&mut self, number: usize, packet: u64) {
        let (from, to) = self.misread;
        let now = match self.now {
            now if (from..to).contains(&now) => from,
            now => now,
        };
        let flow = &mut self.flows[number];
        flow.heard_at = now;
        while let Some(first) = flow.in_flight.front() {
            if first.number > packet || (first.lost && first.number + 3 > packet) {
                break;
            }
            let Some(sent) = flow.in_flight.pop_front() else {
                break;
            };
            let rtt = now - sent.at;
            if sent.lost {
                flow.lost += 1;
                match &mut flow.control {
                    Control::Lazyvm(core) => core.on_loss(now, PACKET as u64, false),
                    Control::Tcp(tcp) => tcp.lost(now.as_secs_f64(), flow.rtt.as_secs_f64()),
                }
                continue;
            }
            flow.rtt = (flow.rtt * 7 + rtt) / 8;
            flow.delivered += PACKET;
            match &mut flow.control {
                Control::Lazyvm(core) => core.on_ack(now, sent.at, PACKET as u64, false),
                Control::Tcp(tcp) => tcp.acked(now.as_secs_f64(), rtt.as_secs_f64()),
            }
        }
        if let Control::Lazyvm(core) = &mut flow.control {
            core.in_flight_is(now, flow.in_flight.len() as u64 * PACKET as u64);
        }
        self.send(number);
    }

    /// Nothing was heard for three round trips: all that is in flight is lost.
    fn time_out(&mut self, number: usize) {
        let now = self.now;
        let flow = &mut self.flows[number];
        let waiting_since = flow
            .in_flight
            .front()
            .map_or(now, |sent| sent.at.max(flow.heard_at));
        if now < waiting_since + 4 * flow.rtt {
            return;
        }
        let bytes = flow.in_flight.len() as u64 * PACKET as u64;
        flow.in_flight.clear();
        flow.heard_at = now;
        match &mut flow.control {
            Control::Lazyvm(core) => core.on_loss(now, bytes, true),
            Control::Tcp(tcp) => {
                tcp.threshold = tcp.window / 2.0;
                tcp.window = 2.0;
            }
        }
    }
}
