//! How far a move is, told from the fault lane to threads that wait.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lazyvm_wire::control::Switchover;

use crate::error::PagerError;

/// How far a move is.
#[derive(Clone, Debug)]
pub(crate) enum Stage {
    /// The source has said what it offers.
    Offered,
    /// State and page map are here, pages are served.
    Switched(Arc<Switchover>),
    /// The source knows that the machine runs here.
    Running,
    /// All is here.
    Done,
    /// It did not work.
    Failed(Arc<PagerError>),
}

/// The stage, with a bell. Waits block, so that they may be called from any thread that is not a lane's.
#[derive(Debug)]
pub(crate) struct StageCell {
    stage: Mutex<Stage>,
    changed: Condvar,
}

impl StageCell {
    pub fn new() -> Self {
        Self {
            stage: Mutex::new(Stage::Offered),
            changed: Condvar::new(),
        }
    }

    pub fn get(&self) -> Stage {
        self.lock().clone()
    }

    /// Goes on to `stage`. What has ended stays ended.
    pub fn set(&self, stage: Stage) {
        let mut current = self.lock();
        if !matches!(*current, Stage::Done | Stage::Failed(_)) {
            *current = stage;
            self.changed.notify_all();
        }
    }

    /// Waits until `found` picks something out of the stage, or the move has failed.
    pub fn wait<T>(
        &self,
        mut found: impl FnMut(&Stage) -> Option<T>,
    ) -> Result<T, Arc<PagerError>> {
        let mut stage = self.lock();
        loop {
            if let Some(found) = found(&stage) {
                return Ok(found);
            }
            if let Stage::Failed(error) = &*stage {
                return Err(error.clone());
            }
            stage = self
                .changed
                .wait(stage)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for so long at most; whether `found` says yes.
    pub fn wait_briefly(
        &self,
        time: Duration,
        found: impl Fn() -> bool,
    ) -> Result<bool, Arc<PagerError>> {
        let stage = self.lock();
        let (stage, _) = self
            .changed
            .wait_timeout_while(stage, time, |stage| {
                !found() && !matches!(stage, Stage::Failed(_))
            })
            .unwrap_or_else(PoisonError::into_inner);
        match &*stage {
            Stage::Failed(error) => Err(error.clone()),
            _ => Ok(found()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
