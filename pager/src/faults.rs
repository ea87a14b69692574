//! Watching the userfaultfd: from a fault to its request without a hop between threads.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::core::Core;
use crate::install::{Event, FaultOutcome};
use crate::sys;
use lazyvm_quic::describe;
use lazyvm_wire::PageIndex;

/// Until a fault that could not be served is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Handles what the userfaultfd reports, for ever.
pub(crate) async fn watch(core: Arc<Core>) -> io::Result<()> {
    let fd = sys::watch(core.clone())?;
    let mut events = Vec::new();
    loop {
        let mut ready = fd.readable().await?;
        loop {
            let read = core.installer.read_events(&mut events);
            let now = Instant::now();
            for event in events.drain(..) {
                match event {
                    Event::Fault { page, .. } => handle(&core, page, now),
                    Event::Removed(range) => {
                        if let Some(verifier) = &core.verifier {
                            verifier.given_back(range);
                        }
                        core.check_all_here();
                    }
                }
            }
            match read {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    tracing::error!(error = %describe(&error), "an event of the userfaultfd can't be handled");
                    // The descriptor stays readable for what could not be read; not at full speed.
                    tokio::time::sleep(RETRY_AFTER).await;
                    break;
                }
            }
        }
        ready.clear_ready();
    }
}

fn handle(core: &Arc<Core>, page: PageIndex, now: Instant) {
    let outcome = core.installer.fault(page);
    // What is zero takes nothing from the source.
    if !matches!(outcome, Ok(FaultOutcome::Served)) {
        core.touches.add(page);
    }
    let result = match outcome {
        Ok(FaultOutcome::Request(unit)) => {
            core.statistics.fault(unit.first, now);
            core.request(unit)
        }
        Ok(FaultOutcome::Waiting) => Ok(()),
        Ok(FaultOutcome::Served | FaultOutcome::Mapped) => core.request_lost(),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = result {
        tracing::error!(%page, error = %describe(&error), "a fault can't be served; who touched the page waits");
        retry(core.clone(), page);
    }
}

fn retry(core: Arc<Core>, page: PageIndex) {
    tokio::spawn(async move {
        tokio::time::sleep(RETRY_AFTER).await;
        // Requested already, so the page table would say that somebody sees to it.
        let again = core
            .installer
            .table()
            .unit_of(page)
            .map(|unit| core.request(unit));
        if let Some(Err(_)) = again {
            retry(core, page);
        }
    });
}
