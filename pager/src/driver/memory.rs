//! What the conversation does to the memory: the page map at the switchover, what came early, and letting go at the end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lazyvm_quic::describe;
use lazyvm_wire::control::{Switchover, ToSource};
use lazyvm_wire::{PageMap, held};
use tokio::task::JoinSet;

use super::lanes::spawn_demand;
use super::{Driver, Lost, PROGRESS_EVERY};
use crate::connect::Link;
use crate::core::Core;
use crate::handover::Event;
use crate::pager::watch as watch_faults;
use crate::stage::Stage;

/// How long is recorded which pages a machine touches, once it runs: until it is as fast as it was before. Each page that has
/// come by then costs it a fault.
const RECORD_FOR: Duration = Duration::from_millis(1500);

impl Driver {
    /// The memory is there.
    pub(super) fn take_core(&mut self, core: Arc<Core>) {
        if self.records {
            core.record_touches();
        }
        self.core = Some(core);
    }

    /// The source would like to hear which pages are touched.
    pub(super) fn record_touches(&mut self) {
        self.records = true;
        if let Some(core) = &self.core {
            core.record_touches();
        }
    }

    /// The machine runs: what came early is mapped, at once or when it is known what was touched of it.
    pub(super) fn started(&mut self) {
        let Some(core) = self.core.clone() else {
            return;
        };
        if core.touches.are_recorded() {
            self.recorded_until = Some(Instant::now() + RECORD_FOR);
        } else {
            self.map_held(&core);
        }
    }

    /// Tells the source which pages were touched first.
    pub(super) async fn end_record(&mut self, link: &mut Link) -> Result<(), Lost> {
        self.recorded_until = None;
        let Some(core) = self.core.clone() else {
            return Ok(());
        };
        if let Some(pages) = core.end_record() {
            self.map_held(&core);
            tracing::debug!(
                pages = pages.len(),
                "what the machine touched first is recorded"
            );
            link.sender.send(&ToSource::Touched { pages }).await?;
        }
        Ok(())
    }

    /// Takes the page map in: what it does not name is zero.
    pub(super) fn take_over(&mut self, core: &Core, switchover: &Switchover) -> Result<(), Lost> {
        let start = Instant::now();
        let map = PageMap::decode(&switchover.page_map, core.layout.pages())?;
        let held = held::decode(&switchover.held, core.layout.pages())?;
        core.installer.apply_map(map.bits())?;
        core.hold(&held)?;
        tracing::debug!(
            us = start.elapsed().as_micros() as u64,
            bytes = switchover.page_map.len(),
            "the page map is taken in"
        );
        if core.verifier.is_some() {
            self.zeros = Some(map);
        }
        let bytes = switchover.state.len() + switchover.page_map.len() + switchover.held.len();
        self.statistics
            .switchover_bytes
            .store(bytes as u64, Ordering::Relaxed);
        core.check_all_here();
        Ok(())
    }

    /// The machine is started when all its pages are here.
    pub(super) fn wait_for_all(&mut self, core: &Arc<Core>, switchover: Arc<Switchover>) {
        self.waiting = Some(switchover);
        // The verifier is among what is waited for.
        self.note_zeros();
        self.map_held(core);
    }

    /// All pages of a machine that waits for them are here: it is started, and its memory is let go of once it runs.
    pub(super) fn stop_waiting(&mut self) {
        if let Some(switchover) = self.waiting.take() {
            self.stage.set(Stage::Switched(switchover));
        }
        if let Some(core) = &self.core {
            core.check_all_here();
        }
    }

    /// Maps the pages that came early, so that the guest need not wait for it. Not before it runs, since that takes a
    /// processor and the locks of the guest's memory.
    pub(super) fn map_held(&self, core: &Arc<Core>) {
        let core = core.clone();
        self.bulk_lane.spawn_blocking(move || {
            if let Err(error) = core.map_held() {
                tracing::error!(error = %describe(&error), "pages that came early can't be mapped");
            }
        });
    }

    /// Tells the verifier of the pages that the map has made zero: only now, when the machine does not stand still any
    /// more, and not on this thread.
    pub(super) fn note_zeros(&mut self) {
        let (Some(core), Some(map)) = (self.core.clone(), self.zeros.take()) else {
            return;
        };
        tokio::task::spawn_blocking(move || {
            if let Some(verifier) = &core.verifier {
                let table = core.installer.table();
                table.zeros_of(map.bits(), |run| verifier.zero(run));
            }
            core.check_all_here();
        });
    }

    /// The machine's memory is there now: takes the map in, and only then looks after its faults.
    pub(super) fn place(
        &mut self,
        core: &Arc<Core>,
        link: &Link,
        lanes: &mut JoinSet<String>,
    ) -> Result<(), Lost> {
        let Some(unplaced) = self.unplaced.take() else {
            return Ok(());
        };
        self.take_core(core.clone());
        core.count_bytes_of(&link.connection);
        if let Some(bulk) = &unplaced.bulk {
            core.count_bytes_of(bulk);
        }
        if let Some(switchover) = unplaced.switchover {
            self.take_over(core, &switchover)?;
            if switchover.wait {
                self.wait_for_all(core, switchover);
            }
        }
        unplaced.memory.send_replace(Some(core.clone()));
        tokio::spawn(watch_faults(core.clone()));
        spawn_demand(core, link, lanes);
        Ok(())
    }

    /// Whether pages may come before the switchover: over this connection none has been lost yet.
    pub(super) fn takes_early(&self) -> bool {
        let never_lost = self.statistics.reconnects.load(Ordering::Relaxed) == 0;
        let takes = match (&self.core, &self.unplaced) {
            (Some(core), _) => core.installer.takes_early(),
            (None, Some(unplaced)) => unplaced.intake.shelf.is_some(),
            (None, None) => false,
        };
        never_lost && takes
    }

    /// The pages that are to be pushed again, as a page map.
    pub(super) fn missing(&self) -> Option<Vec<u8>> {
        if let Some(core) = &self.core {
            let settled = core.installer.table().settled_bits();
            return Some(PageMap::from_bits(!settled).encode());
        }
        let switchover = self.unplaced.as_ref()?.switchover.as_ref()?;
        Some(switchover.page_map.clone())
    }

    /// All pages are here: lets go of the memory.
    pub(super) async fn complete(&self) -> Option<Event> {
        let core = self.core.clone()?;
        let worker = core.clone();
        match tokio::task::spawn_blocking(move || worker.installer.complete()).await {
            Ok(Ok(())) => return Some(Event::AllHere),
            Ok(Err(error)) => {
                tracing::error!(error = %describe(&error), "the memory can't be let go of")
            }
            Err(error) => tracing::error!(%error, "the memory can't be let go of"),
        }
        tokio::time::sleep(PROGRESS_EVERY).await;
        core.check_all_here();
        None
    }
}

pub(super) async fn recorded(core: Option<&Core>, until: Option<Instant>) {
    let (Some(core), Some(until)) = (core, until) else {
        return std::future::pending().await;
    };
    // Either ends it.
    let _ = tokio::time::timeout_at(until.into(), core.touches.full()).await;
}

pub(super) async fn all_here(core: Option<&Core>) {
    let Some(core) = core else {
        return std::future::pending().await;
    };
    while !core.is_all_here() {
        core.all_here.notified().await;
    }
}
