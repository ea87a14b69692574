//! Between the destination's readiness and the pause: memory goes ahead while the machine runs.
//!
//! In post-copy the machine is watched where it has a [`Scout`], and what it will need first goes ahead; in hybrid and
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
use crate::session::{Session, Writes, lock};

/// How long the pause waits for what was sent before it in post-copy, beyond the time of the warm-up.
const ARRIVAL_MAX: Duration = Duration::from_secs(5);

/// When what is written is looked at for the first time while all memory is on its way; the next look comes after twice the
/// time. What is written by then and has not gone waits for the next round. A path has not carried much by the first look.
const GLANCE_FIRST: Duration = Duration::from_millis(500);

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
    let scouting = !session.config.warm_up.is_zero();
    let scout = session.config.machine.scout().filter(|_| scouting);
    if wants_all && early && track(&session).await {
        return send_all(&session, scout).await;
    }
    if mode == Mode::Precopy {
        return Err(
            "which pages the VM writes can't be noted; use --mode hybrid, postcopy or stop"
                .to_owned(),
        );
    }
    match scout {
        // Where all was to go, it is known by now that writes can't be noted.
        Some(scout) => send_hints(&session, scout, early, early && !wants_all).await,
        None => Ok(()),
    }
}

/// All memory goes ahead. Which of it is hot shows by what is written; the scout has no watch, which would cost the machine
/// more and make the start later.
async fn send_all(session: &Arc<Session>, scout: Option<Box<dyn Scout>>) -> Result<(), String> {
    let start = Instant::now();
    let data = blocking(session, |session| session.data_now()).await;
    session.queue_early(data.unwrap_or_else(|| Ok(Vec::new()))?);
    // The first look takes longest: the one at the pause must be short.
    let (looked, sent) = tokio::join!(
        look(session, scout, |scout| scout.look()),
        rounds(session, true, start)
    );
    *lock(&session.scout) = looked.0;
    sent
}

/// What the machine will need first goes ahead, as far as the time of the warm-up lets it show; with `noting`, its writes are
/// noted where they can be.
async fn send_hints(
    session: &Arc<Session>,
    scout: Box<dyn Scout>,
    early: bool,
    noting: bool,
) -> Result<(), String> {
    let start = Instant::now();
    // The watch comes before the tracking: what it drops from the machine's map would be taken for written.
    let (scout, first) = look(session, Some(scout), |scout| {
        scout.watch()?;
        scout.look()
    })
    .await;
    let tracked = noting && scout.is_some() && track(session).await;
    if early {
        // The machine may write to any of it until the pause, to code and page tables least.
        session.queue_early([first.code, first.tables, first.processor].concat());
    }
    if tracked {
        // Until more is known the path carries anything that may hold: it would be idle, and its rate unknown.
        let data = blocking(session, |session| session.data_now()).await;
        session.queue_early(data.unwrap_or_else(|| Ok(Vec::new()))?);
    }
    sleep_until(start + session.config.warm_up).await;
    session.unqueue_early();
    let (scout, second) = look(session, scout, |scout| scout.look()).await;
    if early {
        session.queue_early([second.tables, second.processor, second.code].concat());
        session.queue_early(second.hot.into_iter().rev());
    }
    if tracked {
        rounds(session, false, start).await?;
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
    let mut glance_after = if whole { GLANCE_FIRST } else { Duration::MAX };
    let mut written = Vec::new();
    let mut looked = Instant::now();
    loop {
        let next = Instant::now() + ROUND_MIN;
        let left = limit.map_or(Duration::MAX, |limit| limit.saturating_sub(start.elapsed()));
        let sent = timeout(left.min(glance_after), session.early_sent()).await;
        let Some(writes) = writes(session).await? else {
            return Ok(());
        };
        let since = std::mem::replace(&mut looked, Instant::now()).elapsed();
        judge.saw(writes.pages, since);
        written.extend(writes.stale);
        let more = lock(&session.early).next_round();
        if sent.is_err() && more && left > glance_after {
            glance_after *= 2;
            continue;
        }
        let mut stale = std::mem::take(&mut written);
        stale.sort_unstable();
        let round = Round {
            elapsed: start.elapsed(),
            residual_pages: stale.len() as u64,
            bytes_per_s: path_bytes_s(session),
            more: more && sent.is_ok(),
        };
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

/// What was written since the last time. `None` where that is not known any more, and nothing that went counts.
async fn writes(session: &Arc<Session>) -> Result<Option<Writes>, String> {
    match blocking(session, |session| session.collect_writes()).await {
        Some(Ok(writes)) => Ok(Some(writes)),
        Some(Err(error)) if session.config.mode == Mode::Precopy => Err(error),
        failed => {
            let error = failed.and_then(Result::err);
            tracing::warn!(session = %session.id, ?error, "the VM's writes are not known any more: its memory follows it");
            Ok(None)
        }
    }
}

/// Begins to note the machine's writes.
async fn track(session: &Arc<Session>) -> bool {
    blocking(session, |session| session.track()).await == Some(true)
}

fn path_bytes_s(session: &Session) -> f64 {
    match session.path_bytes_s.load(Ordering::Relaxed) {
        0 => UNKNOWN_PATH,
        known => known as f64,
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
