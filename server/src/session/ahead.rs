//! What goes ahead of the pause: the writes that make it stale, and what is left of it.

use std::sync::atomic::Ordering;

use lazyvm_quic::describe;
use lazyvm_wire::{PageIndex, PageRange};

use super::{Session, lock};
use crate::early::Outgoing;
use crate::handover::Phase;

/// What was written since the last time.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    /// Pages that had gone or were to go.
    pub stale: Vec<PageIndex>,
    /// How many pages that hold data.
    pub pages: u64,
}

impl Session {
    /// Begins to note the machine's writes; `false` where that can't be. Blocks.
    pub fn track(&self) -> bool {
        let Some(mut tracker) = self.config.machine.tracker() else {
            return false;
        };
        if let Err(error) = tracker.start() {
            let error = describe(error.as_ref());
            tracing::warn!(session = %self.id, %error, "the VM's writes can't be noted");
            return false;
        }
        lock(&self.early).writes_are_tracked();
        *lock(&self.tracker) = Some(tracker);
        true
    }

    /// The machine is the destination's, and writes here no more. Blocks.
    pub fn stop_tracking(&self) {
        *lock(&self.tracker) = None;
    }

    /// Hears which pages were written. Nothing that went counts where that fails. Blocks.
    pub fn collect_writes(&self) -> Result<Writes, String> {
        let mut tracker = lock(&self.tracker);
        let mut writes = Writes::default();
        let Some(active) = tracker.as_mut() else {
            return Ok(writes);
        };
        let collected = active.collect(&mut |range| {
            let stale = |page| writes.stale.push(page);
            writes.pages += lock(&self.early).written(range, stale);
        });
        if let Err(error) = collected {
            lock(&self.early).give_up();
            *tracker = None;
            return Err(describe(error.as_ref()));
        }
        Ok(writes)
    }

    /// What was written up to the pause. Blocks.
    pub(super) fn last_writes(&self) {
        match self.collect_writes() {
            Ok(writes) => lock(&self.residual).extend(writes.stale),
            Err(error) => {
                tracing::warn!(session = %self.id, %error, "the VM's last writes are not known: all pages go again");
            }
        }
    }

    /// These pages were written after they had gone, and do not go again before the pause.
    pub fn leave_for_push(&self, stale: Vec<PageIndex>) {
        lock(&self.residual).extend(stale);
    }

    /// What is left of pre-copy, what was written most often first.
    pub(super) fn take_residual(&self) -> Vec<PageRange> {
        let mut pages = std::mem::take(&mut *lock(&self.residual));
        let early = lock(&self.early);
        pages.sort_unstable_by_key(|&page| (std::cmp::Reverse(early.heat(page)), page));
        pages.into_iter().map(PageRange::one).collect()
    }

    /// All pages that hold data while the machine runs. Blocks.
    pub fn data_now(&self) -> Result<Vec<PageRange>, String> {
        let mut runs = Vec::new();
        self.find_data(&mut |range| runs.push(range))?;
        Ok(runs)
    }

    /// These pages are to be sent before the pause.
    pub fn queue_early(&self, ranges: impl IntoIterator<Item = PageRange>) {
        lock(&self.early).queue(ranges);
        self.push_wake.notify_waiters();
    }

    /// What waits to go before the pause does not.
    pub fn unqueue_early(&self) {
        lock(&self.early).unqueue();
    }

    /// The next pages that go before the pause, if any.
    pub fn next_early(&self) -> Option<Outgoing> {
        if self.phase() != Phase::Offered {
            return None;
        }
        lock(&self.early).next()
    }

    /// So many bytes of what goes before the pause have arrived.
    pub fn early_has_arrived(&self, bytes: u64) {
        lock(&self.early).arrived(bytes);
        self.early_moved.notify_waiters();
    }

    /// Waits until all that was queued to go before the pause is on the path, and nothing of it waits here.
    pub async fn early_sent(&self) {
        loop {
            let moved = self.early_moved.notified();
            tokio::pin!(moved);
            moved.as_mut().enable();
            {
                let early = lock(&self.early);
                let window = self.path_window.load(Ordering::Relaxed);
                if early.waiting() == 0 && early.unacked() <= window {
                    return;
                }
            }
            moved.await;
        }
    }
}
