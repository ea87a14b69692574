//! A move at its last step: the machine runs here, and its memory arrives.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use lazyvm_wire::PageIndex;

use crate::core::Core;
use crate::error::PagerError;
use crate::pager::Move;
use crate::report::{Report, load};
use crate::stage::Stage;

/// A machine that runs here while its memory arrives.
///
/// Dropping it does not stop that: absent pages must not turn into zeros, so the lanes go on for as long as the process.
pub struct Filling {
    inner: Option<Move>,
    core: Arc<Core>,
}

/// How far the memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Pages of the image.
    pub pages_total: u64,
    /// Pages that are here, zero pages among them.
    pub pages_here: u64,
    /// Pages that came in answer to a fault.
    pub pages_demand: u64,
    /// Pages that the push brought.
    pub pages_pushed: u64,
    /// Faults that were answered.
    pub faults: u64,
    /// Pages that the source said it can't read. Who touches one waits.
    pub pages_unreadable: u64,
    /// All is here, and the source has let go.
    pub done: bool,
}

impl Filling {
    pub(crate) fn new(inner: Move, core: Arc<Core>) -> Self {
        Self {
            inner: Some(inner),
            core,
        }
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let statistics = &self.core.statistics;
        let pages_total = self.core.layout.pages();
        Progress {
            pages_total,
            pages_here: pages_total - self.core.installer.table().remaining(),
            pages_demand: statistics.pages_demand.load(Ordering::Relaxed),
            pages_pushed: statistics.pages_pushed.load(Ordering::Relaxed),
            faults: statistics.faults(),
            pages_unreadable: statistics.unreadable.load(Ordering::Relaxed),
            done: self
                .inner
                .as_ref()
                .is_none_or(|inner| matches!(inner.stage.get(), Stage::Done)),
        }
    }

    /// Whether a page is in place, or zero and not touched yet.
    pub fn is_here(&self, page: PageIndex) -> bool {
        self.core
            .installer
            .table()
            .state(page)
            .is_some_and(|state| !state.is_missing())
    }

    /// Waits until the last page is here and the source has let go.
    ///
    /// # Errors
    /// [`PagerError`].
    pub fn wait(mut self) -> Result<Report, PagerError> {
        if let Some(inner) = &self.inner {
            inner
                .stage
                .wait(|stage| matches!(stage, Stage::Done).then_some(()))?;
        }
        let report = self.report();
        // At its end the lanes may end too.
        drop(self.inner.take());
        Ok(report)
    }

    /// The figures so far.
    pub fn report(&self) -> Report {
        let statistics = &self.core.statistics;
        let (session, mode) = self.inner.as_ref().map_or_else(Default::default, |inner| {
            (inner.session.clone(), inner.welcome.mode.clone())
        });
        let (demand, pushed, precopied) = (
            load(&statistics.pages_demand),
            load(&statistics.pages_pushed),
            load(&statistics.pages_precopied),
        );
        let here = self.progress().pages_here;
        Report {
            session,
            mode,
            memory_bytes: self.core.layout.bytes(),
            pages_total: self.core.layout.pages(),
            pages_zero: here.saturating_sub(demand + pushed + precopied),
            pages_precopied: precopied,
            pages_demand: demand,
            pages_pushed: pushed,
            bytes_wire: self.core.bytes_wire(),
            downtime_us: load(&statistics.downtime_us),
            switchover_bytes: load(&statistics.switchover_bytes),
            faults: statistics.faults(),
            fault_us: statistics.fault_us(),
            blocktime_us_total: statistics.blocktime_us(),
            resumed_at_us: load(&statistics.resumed_at_us),
            complete_at_us: load(&statistics.complete_at_us),
            reconnects: load(&statistics.reconnects),
            verified: self.core.verified(),
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        std::mem::forget(self.inner.take());
    }
}
