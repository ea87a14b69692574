//! How far a move is: a bar for people, an event a second for programs.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use lazyvm_wire::PAGE_SIZE;

use crate::log::BARS;

const EVENT_EVERY: Duration = Duration::from_secs(1);

/// One move's.
pub struct Meter {
    bar: ProgressBar,
    event_at: Option<Instant>,
}

impl Meter {
    /// Nothing is drawn before the first [`Meter::show`].
    pub fn new() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            event_at: None,
        }
    }

    /// `here` of `total` pages are at the destination, `demand` of them because a vCPU waited.
    pub fn show(&mut self, here: u64, total: u64, demand: u64) {
        if self.bar.length() != Some(total * PAGE_SIZE as u64) {
            self.bar = BARS.add(ProgressBar::new(total * PAGE_SIZE as u64));
            // Fails only for a template that is wrong, and then the bar looks plain.
            if let Ok(style) = ProgressStyle::with_template(
                "memory {bar:30} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {msg}",
            ) {
                self.bar.set_style(style);
            }
        }
        self.bar.set_position(here * PAGE_SIZE as u64);
        self.bar.set_message(format!("{demand} pages on demand"));
        if self.event_at.is_none_or(|at| at.elapsed() >= EVENT_EVERY) {
            self.event_at = Some(Instant::now());
            tracing::info!(
                target: "lazyvm::progress",
                pages_here = here,
                pages_total = total,
                pages_demand = demand,
                "progress"
            );
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
