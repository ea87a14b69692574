//! Between the destination's readiness and the pause: the machine is watched, and what it will need first is sent
//! while it runs. It also brings the push's congestion window to the path's size.

use std::sync::Arc;
use std::time::Duration;

use lazyvm_quic::describe;
use tokio::time::Instant;

use crate::port::{Hints, MachineError, Scout};
use crate::session::{Session, lock};

/// How long the pause waits for what was sent before it, beyond the time of the warm-up.
const ARRIVAL_MAX: Duration = Duration::from_secs(5);

/// Ends when the machine is to be paused. Nothing that fails here ends the move. With `early`, the destination can take
/// pages before the pause.
pub(crate) async fn warm_up(session: Arc<Session>, early: bool) {
    if session.config.warm_up.is_zero() {
        return;
    }
    let end = Instant::now() + session.config.warm_up;
    let Some(mut scout) = session.config.machine.scout() else {
        return;
    };
    let first = look(scout, |scout| {
        scout.watch()?;
        scout.look()
    });
    let looked = match first.await {
        Some((back, Ok(hints))) => {
            if early {
                // The machine may write to any of it until the pause, to code and page tables least.
                session.queue_early([hints.code, hints.tables, hints.processor].concat());
            }
            scout = back;
            tokio::time::sleep_until(end).await;
            look(scout, |scout| scout.look()).await
        }
        other => other,
    };
    match looked {
        Some((scout, Ok(hints))) => {
            if early {
                session.queue_early([hints.tables, hints.processor, hints.code].concat());
                session.queue_early(hints.hot.into_iter().rev());
                // What has not arrived then is sent once more.
                let _ = tokio::time::timeout(ARRIVAL_MAX, session.early_settled()).await;
            }
            *lock(&session.scout) = Some(scout);
        }
        Some((_, Err(error))) => {
            let error = describe(error.as_ref());
            tracing::warn!(session = %session.id, %error, "can't watch what the machine uses; the push goes from front to back");
        }
        None => {}
    }
}

type Looked = (Box<dyn Scout>, Result<Hints, MachineError>);

/// Calls the scout where it may block.
async fn look(
    mut scout: Box<dyn Scout>,
    call: impl FnOnce(&mut dyn Scout) -> Result<Hints, MachineError> + Send + 'static,
) -> Option<Looked> {
    let job = tokio::task::spawn_blocking(move || {
        let result = call(scout.as_mut());
        (scout, result)
    });
    job.await.ok()
}
