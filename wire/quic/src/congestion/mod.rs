//! Congestion control of the push: fills the path and keeps its queue short.
//!
//! A push that fills the bottleneck's buffer adds that buffer to the latency of every fault; on a long path CUBIC
//! does so until it loses thousands of packets. This controller goes by delay. It keeps some bytes of its own in the
//! queue, 0.7 ms of them at a gigabit a second, and no more.
//!
//! | part | from |
//! |---|---|
//! | the law: `w := w + (w * base / rtt + target - w) / 2`, once a round trip | FAST TCP (Wei, Jin, Low, Hegde, IEEE/ACM ToN 2006) |
//! | the round trip it sees: the smallest of the last half round trip, so that jitter is no queue | Copa's standing RTT (Arun, Balakrishnan, NSDI 2018) |
//! | a target that grows more slowly than the rate, so that flows become equal | Swift's flow scaling (Kumar et al., SIGCOMM 2020) |
//! | the window never far above delivery rate times path delay, whatever the delay says; drained rounds to see the path's own delay again | BBR (Cardwell et al., draft-ietf-ccwg-bbr) |
//! | the start: doubling until the delay grows by an eighth | HyStart++ (RFC 9406) |
//! | the path's rate is what comes through the queue that ended the start | own |
//! | a delay that grows by a leap from one packet to the next is none of the queue: a thread had no processor, or the path stood still | own |
//! | what the sender's late timers have left is made up for while the start doubles | own |
//! | faster and faster growth while the queue stays empty and the bytes arrive | Copa's velocity |
//! | a queue that stays although the window was cut by twice as much is looked at in a drained round, as a rival's is: the path may have become longer | own |
//! | a queue that others fill is shared, by CUBIC's curve, until a drained round finds it gone | Copa's competitive mode, CUBIC (RFC 9438) |
//!
//! Lost packets by themselves mean little here: up to a tenth of a round may be lost to errors of the path. More is
//! taken for a narrower path, and the window follows what arrived.
//!
//! After the path has become longer (another route) the old, shorter delay counts until three drained rounds in a row have
//! found the same delay, which no rival's queue does: two or three seconds.

mod core;
mod cubic;
mod filter;

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

pub use self::core::{Core, Rival};

/// Makes the push's congestion controllers.
#[derive(Clone, Copy, Debug)]
pub struct ShortQueue {
    /// The first window, in bytes.
    pub initial_window: u64,
    /// What is done when others fill the queue.
    pub rival: Rival,
}

/// The bytes that may be in flight on a connection. Its statistics tell what it was told last ([`Core::told_window`]).
pub fn window(connection: &quinn::Connection) -> u64 {
    let state = connection.congestion_state();
    let told = state.window();
    let own = state.into_any().downcast::<OnConnection>();
    own.map_or(told, |own| own.core.window())
}

impl ControllerFactory for ShortQueue {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(OnConnection {
            core: Core::new(self.initial_window, current_mtu, self.rival),
            initial_window: self.initial_window,
            began: now,
        })
    }
}

/// A [`Core`] with a connection's clock.
#[derive(Clone, Debug)]
struct OnConnection {
    core: Core,
    initial_window: u64,
    began: Instant,
}

impl OnConnection {
    fn since_began(&self, instant: Instant) -> Duration {
        instant.saturating_duration_since(self.began)
    }
}

impl Controller for OnConnection {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        let now = self.since_began(now);
        self.core.on_sent(now, bytes);
    }

    fn on_ack(
        &mut self,
        _heard: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        _: &RttEstimator,
    ) {
        // quinn looks at the clock before it takes packets from the socket. Where the thread then gets no processor for some
        // milliseconds, an acknowledgement that comes meanwhile seems to be that much earlier, and the path shorter than it
        // is. A path never seems longer for more than a moment, so this errs to that side.
        let now = Instant::now();
        let (now, sent) = (self.since_began(now), self.since_began(sent));
        self.core.on_ack(now, sent, bytes, app_limited);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        _app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        let now = self.since_began(now);
        self.core.in_flight_is(now, in_flight);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        _sent: Instant,
        persistent: bool,
        lost_bytes: u64,
    ) {
        self.core
            .on_loss(self.since_began(now), lost_bytes, persistent);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.core.set_mtu(new_mtu);
    }

    fn window(&self) -> u64 {
        self.core.told_window()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.initial_window
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
