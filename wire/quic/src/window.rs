//! The congestion window of the fault lane.

use std::any::Any;
use std::sync::Arc;
use std::time::Instant;

use quinn::congestion::{Controller, ControllerFactory};

/// A congestion window that stays as it is.
///
/// Faults limit themselves: each vCPU waits for its page before it asks for another. A window that reacts to loss
/// would let a push that fills the bottleneck's queue shrink it to two packets, as CUBIC did in trials.
#[derive(Clone, Copy, Debug)]
pub struct FixedWindow {
    /// The window, in bytes.
    pub bytes: u64,
}

impl ControllerFactory for FixedWindow {
    fn build(self: Arc<Self>, _now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(*self)
    }
}

impl Controller for FixedWindow {
    fn on_congestion_event(&mut self, _: Instant, _: Instant, _: bool, _: u64) {}

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        self.bytes
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(*self)
    }

    fn initial_window(&self) -> u64 {
        self.bytes
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
