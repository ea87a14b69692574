//! The connections of the conversation: the bulk lane, what is asked for over the fault lane, and the way back to a source
//! that was lost.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use lazyvm_quic::describe;
use tokio::task::JoinSet;

use super::{BACKOFF_MAX, BACKOFF_MIN, Driver, GIVE_UP_AFTER, Lost};
use crate::connect::{ConnectError, Link, connect_bulk, connect_fault};
use crate::core::{Core, Supply};
use crate::handover::{Event, Phase};
use crate::push::Intake;
use crate::{demand, push};

impl Driver {
    pub(super) async fn connect_bulk(&mut self) -> Result<Link, Lost> {
        // An older source turns away one that comes before the fault lane.
        if let Some(ahead) = self.bulk_ahead.take()
            && let Ok(Ok(link)) = ahead.await
            && link.connection.close_reason().is_none()
        {
            return Ok(link);
        }
        let connecting = self.bulk_lane.spawn(connect_bulk(self.credentials.clone()));
        connecting
            .await
            .map_err(|error| Lost::Lane(error.to_string()))?
            .map_err(Lost::Bulk)
    }

    /// Opens the bulk lane and takes in what comes on it.
    pub(super) async fn open_bulk(
        &mut self,
        core: &Arc<Core>,
        lanes: &mut JoinSet<String>,
    ) -> Result<(), Lost> {
        let link = self.connect_bulk().await?;
        core.count_bytes_of(&link.connection);
        self.run_bulk(Intake::of(core), link, lanes);
        Ok(())
    }

    /// The same where there is no memory yet.
    pub(super) async fn open_bulk_unplaced(
        &mut self,
        lanes: &mut JoinSet<String>,
    ) -> Result<(), Lost> {
        let link = self.connect_bulk().await?;
        if let Some(unplaced) = &mut self.unplaced {
            unplaced.bulk = Some(link.connection.clone());
            let intake = unplaced.intake.clone();
            self.run_bulk(intake, link, lanes);
        }
        Ok(())
    }

    pub(super) fn run_bulk(&self, intake: Intake, link: Link, lanes: &mut JoinSet<String>) {
        let task = async move {
            let end = push::run(intake, link.connection.clone()).await;
            describe(&end)
        };
        lanes.spawn_on(task, &self.bulk_lane);
    }

    pub(super) async fn reconnect(&mut self) -> Result<Link, Event> {
        let lost_at = Instant::now();
        let mut backoff = BACKOFF_MIN;
        loop {
            match connect_fault(&self.credentials).await {
                Ok((link, _)) => {
                    self.statistics.reconnects.fetch_add(1, Ordering::Relaxed);
                    tracing::info!("connected to the source again");
                    return Ok(link);
                }
                Err(ConnectError::Rejected(rejection))
                    if matches!(self.handover.phase(), Phase::Asking | Phase::Refusing(_)) =>
                {
                    self.rejection = Some(rejection);
                    return Err(Event::Rejected);
                }
                Err(error) => {
                    tracing::warn!(error = %describe(&error), "the source is not there yet")
                }
            }
            let needed = matches!(self.handover.phase(), Phase::Loading | Phase::Running);
            if !needed && lost_at.elapsed() > GIVE_UP_AFTER {
                return Err(Event::GaveUp);
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Whether pages are still to come.
    pub(super) fn needs_lanes(&self) -> bool {
        !matches!(
            self.handover.phase(),
            Phase::Completing | Phase::Refusing(_)
        )
    }
}

pub(super) fn spawn_demand(core: &Arc<Core>, link: &Link, lanes: &mut JoinSet<String>) {
    let core = core.clone();
    let connection = link.connection.clone();
    lanes.spawn(async move {
        match &core.supply {
            Supply::Source(queue) => describe(&demand::run(&core, queue, &connection).await),
            Supply::Local(_) => "the pages are here".to_owned(),
        }
    });
}
