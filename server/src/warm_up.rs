//! Between the destination's readiness and the pause: memory goes ahead while the machine runs.
//!
//! In every mode the machine is watched where it has a [`Scout`], and what it will need first goes ahead; in hybrid and
//! pre-copy all its memory does, in rounds ([`crate::rounds`]). It also brings the push's congestion window to the path's
//! size.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use lazyvm_quic::describe;
use lazyvm_wire::{PageIndex, PageRange};
use tokio::time::{Instant, sleep_until, timeout};

use crate::port::{Hints, MachineError, Scout};
use crate::rounds::{Judge, Mode, Round, Verdict};
use crate::session::{Session, lock};

/// How long the pause waits for what was sent before it in post-copy, beyond the time of the warm-up.
const ARRIVAL_MAX: Duration = Duration::from_secs(5);

/// Shortest time between two looks at what was written.
const ROUND_MIN: Duration = Duration::from_millis(10);

/// What a path is taken to carry until it is known, in bytes a second.
const UNKNOWN_PATH: f64 = 125e6;

/// Ends when the machine is to be paused. With `early`, the destination can take pages before the pause.
///
/// # Errors
/// The machine can't be moved in the mode that was asked for; it runs on.
pub(crate) async fn warm_up(session: Arc<Session>, early: bool) -> Result<(), String> {
    let mode = session.config.mode;
    let early = early && session.config.policy.early;
    let wants_all = matches!(mode, Mode::Hybrid | Mode::Precopy);
    if mode == Mode::Stop || (!wants_all && session.config.warm_up.is_zero()) {
        return Ok(());
    }
    if mode == Mode::Precopy && !early {
        return Err(
            "the destination's memory can't take pages before the pause; use --mode hybrid, postcopy or stop"
                .to_owned(),
        );
    }
    let start = Instant::now();
    let scouting = !session.config.warm_up.is_zero();
    let scout = session.config.machine.scout().filter(|_| scouting);
    // The watch comes before the tracking: what it drops from the machine's map would be taken for written.
    let (scout, first) = look(&session, scout, |scout| {
        scout.watch()?;
        scout.look()
    })
    .await;
    let something_goes = early && (wants_all || scout.is_some());
    let tracked =
        something_goes && blocking(&session, |session| session.track()).await == Some(true);
    if mode == Mode::Precopy && !tracked {
        return Err(
            "which pages the VM writes can't be noted; use --mode hybrid, postcopy or stop"
                .to_owned(),
        );
    }
    let whole = wants_all && tracked;
    if scout.is_none() && !whole {
        return Ok(());
    }
    if early {
        // The machine may write to any of it until the pause, to code and page tables least.
        session.queue_early([first.code, first.tables, first.processor].concat());
    }
    if whole {
        let data = blocking(&session, |session| session.data_now()).await;
        session.queue_early(data.unwrap_or_else(|| Ok(Vec::new()))?);
        session.early_sent().await;
    } else {
        sleep_until(start + session.config.warm_up).await;
    }
    let (scout, second) = look(&session, scout, |scout| scout.look()).await;
    if early {
        session.queue_early([second.tables, second.processor, second.code].concat());
        session.queue_early(second.hot.into_iter().rev());
    }
    if tracked {
        rounds(&session, whole, start).await?;
    } else if early {
        // What has not arrived then is sent once more.
        let _ = timeout(ARRIVAL_MAX, session.early_sent()).await;
    }
    *lock(&session.scout) = scout;
    Ok(())
}

/// Sends what was written since it went, again and again, until the judge says that it is enough.
async fn rounds(session: &Arc<Session>, whole: bool, start: Instant) -> Result<(), String> {
    let limit = if whole {
        session.config.precopy_limit
    } else {
        Some(session.config.warm_up + ARRIVAL_MAX)
    };
    let mut judge = Judge::new(session.config.mode, limit, session.config.downtime_limit);
    loop {
        let next = Instant::now() + ROUND_MIN;
        let sent = timeout(limit.unwrap_or(Duration::MAX), session.early_sent()).await;
        let collected = blocking(session, |session| session.collect_writes()).await;
        let stale = match collected {
            Some(Ok(stale)) => stale,
            Some(Err(error)) if session.config.mode == Mode::Precopy => return Err(error),
            failed => {
                let error = failed.and_then(Result::err);
                tracing::warn!(session = %session.id, ?error, "the VM's writes are not known any more: its memory follows it");
                return Ok(());
            }
        };
        let more = lock(&session.early).next_round() && sent.is_ok();
        let round = round(session, &stale, start, more);
        let verdict = judge.after(round);
        tracing::debug!(session = %session.id, ?round, ?verdict, "a round of pre-copy");
        match verdict {
            Verdict::GoOn => {
                session.queue_early(runs(stale));
                sleep_until(next).await;
            }
            Verdict::Pause => {
                session.leave_for_push(stale);
                return Ok(());
            }
            Verdict::GiveUp(why) => return Err(why),
        }
    }
}

fn round(session: &Session, stale: &[PageIndex], start: Instant, more: bool) -> Round {
    let bytes_per_s = match session.path_bytes_s.load(Ordering::Relaxed) {
        0 => UNKNOWN_PATH,
        known => known as f64,
    };
    Round {
        elapsed: start.elapsed(),
        residual_pages: stale.len() as u64,
        bytes_per_s,
        more,
    }
}

/// Pages as runs; they come ascending.
fn runs(pages: Vec<PageIndex>) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(last) if last.end() == page => last.count += 1,
            _ => runs.push(PageRange::one(page)),
        }
    }
    runs
}

/// Calls the scout where it may block; without one there are no hints. One that fails is not asked again.
async fn look(
    session: &Session,
    scout: Option<Box<dyn Scout>>,
    call: impl FnOnce(&mut dyn Scout) -> Result<Hints, MachineError> + Send + 'static,
) -> (Option<Box<dyn Scout>>, Hints) {
    let Some(mut scout) = scout else {
        return (None, Hints::default());
    };
    let job = tokio::task::spawn_blocking(move || {
        let result = call(scout.as_mut());
        (scout, result)
    });
    match job.await {
        Ok((scout, Ok(hints))) => (Some(scout), session.config.policy.keep(hints)),
        Ok((_, Err(error))) => {
            let error = describe(error.as_ref());
            tracing::warn!(session = %session.id, %error, "can't watch what the machine uses");
            (None, Hints::default())
        }
        Err(_) => (None, Hints::default()),
    }
}

/// Runs a call to the machine where it may block; `None` when it ended early.
async fn blocking<T: Send + 'static>(
    session: &Arc<Session>,
    call: impl FnOnce(&Session) -> T + Send + 'static,
) -> Option<T> {
    let session = Arc::clone(session);
    tokio::task::spawn_blocking(move || call(&session))
        .await
        .ok()
}
