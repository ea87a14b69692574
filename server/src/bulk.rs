//! The bulk lane: pushes pages, and digests where they are asked for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use lazyvm_wire::frame::{FRAME_PAGES_MAX, FrameKind};
use lazyvm_wire::{PageIndex, PageMap, PageRange};
use quinn::{Connection, ConnectionError, WriteError};

use crate::frames::{READ_PAGES_MAX, header};
use crate::handover::Phase;
use crate::rate::RateLimit;
use crate::scheduler::Urgency;
use crate::session::Session;

/// Most frames on a stream. Streams are short, so that a lost packet holds back little.
const FRAMES_MAX: usize = 64;

/// A push that can't go on over this connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PushError {
    #[error("the bulk lane is lost")]
    Connection(#[from] ConnectionError),
    #[error("the bulk lane is lost")]
    Write(#[from] WriteError),
}

/// Pushes until the session is over or the connection is lost.
pub(crate) async fn push(session: &Arc<Session>, connection: &Connection) -> Result<(), PushError> {
    let mut limit = session
        .config
        .max_bandwidth
        .map(|bytes_per_s| RateLimit::new(bytes_per_s, Instant::now()));
    loop {
        let woken = session.push_wake.notified();
        tokio::pin!(woken);
        // Registered before the look, so that a wake in between is not lost.
        woken.as_mut().enable();
        if session.is_over() {
            return Ok(());
        }
        match next_stream(session).await {
            Some(stream) => send(session, connection, &mut limit, stream).await?,
            None => tokio::select! {
                () = woken => {}
                error = connection.closed() => return Err(error.into()),
            },
        }
    }
}

/// What goes on one stream.
struct PushStream {
    chunks: Vec<Bytes>,
    pages: u64,
    urgency: Urgency,
}

/// Gathers frames until a stream is worth its while. A window goes at once.
async fn next_stream(session: &Session) -> Option<PushStream> {
    let first = session.next_batch(READ_PAGES_MAX)?;
    let mut stream = PushStream {
        chunks: Vec::new(),
        pages: 0,
        urgency: first.urgency,
    };
    let mut raw_pages = 0;
    let mut batch = Some(first);
    while let Some(next) = batch.take() {
        raw_pages += session
            .frames
            .push_frames(next.range, next.whole, &mut stream.chunks)
            .raw_pages;
        stream.pages += next.range.count;
        let room = READ_PAGES_MAX.saturating_sub(raw_pages);
        if stream.urgency == Urgency::Rest && room > 0 && stream.chunks.len() < FRAMES_MAX {
            // Reading and comparing a long row of zeros must not keep the thread from what it sends.
            tokio::task::yield_now().await;
            batch = session.next_batch(room);
        }
    }
    Some(stream)
}

async fn send(
    session: &Session,
    connection: &Connection,
    limit: &mut Option<RateLimit>,
    mut stream: PushStream,
) -> Result<(), PushError> {
    if let Some(limit) = limit {
        let wait = limit.wait(Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        limit.sent(stream.chunks.iter().map(|chunk| chunk.len() as u64).sum());
    }
    let mut send = connection.open_uni().await?;
    let priority = match stream.urgency {
        Urgency::Window => 1,
        Urgency::Rest => 0,
    };
    // Fails only for a stream that is closed; the write says so too.
    let _ = send.set_priority(priority);
    send.write_all_chunks(&mut stream.chunks).await?;
    let _ = send.finish();
    session
        .counters
        .pushed
        .fetch_add(stream.pages, Ordering::Relaxed);
    Ok(())
}

/// Waits for the pause, then sends digests where the destination asked for them.
pub(crate) async fn digests_once_paused(session: Arc<Session>, connection: Connection) {
    if !session.verify.load(Ordering::Relaxed) {
        return;
    }
    let mut phase = session.watch_phase();
    let handed_over = |phase: &Phase| matches!(phase, Phase::HandedOver | Phase::Started);
    if phase.wait_for(handed_over).await.is_err() {
        return;
    }
    if let Some(paused) = session.paused()
        && let Err(error) = send_digests(&session, &connection, paused.map).await
    {
        tracing::info!(session = %session.id, %error, "the digests stop");
    }
}

/// Sends the digest of every page, as the pages were at the pause: the memory does not change after it.
async fn send_digests(
    session: &Arc<Session>,
    connection: &Connection,
    map: Arc<PageMap>,
) -> Result<(), PushError> {
    let mut next = PageIndex(0);
    while next.0 < map.bits().len() as u64 {
        let worker = (session.clone(), map.clone());
        let job = tokio::task::spawn_blocking(move || digest_chunks(&worker.0, &worker.1, next));
        let Ok((mut chunks, behind)) = job.await else {
            return Ok(());
        };
        next = behind;
        let mut send = connection.open_uni().await?;
        let _ = send.set_priority(-1);
        send.write_all_chunks(&mut chunks).await?;
        let _ = send.finish();
    }
    Ok(())
}

/// Digest frames for one stream, and the page behind them.
fn digest_chunks(session: &Session, map: &PageMap, start: PageIndex) -> (Vec<Bytes>, PageIndex) {
    let bits = map.bits();
    let mut chunks = Vec::new();
    let mut page = start.as_usize();
    while page < bits.len() && chunks.len() < 2 * FRAMES_MAX {
        let rest = &bits[page..];
        let zeros = rest.leading_zeros().min(u32::MAX as usize);
        let range = if zeros > 0 {
            let range = PageRange::new(PageIndex(page as u64), zeros as u64);
            chunks.push(header(range, FrameKind::ZeroDigests));
            range
        } else {
            let count = (rest.leading_ones() as u64).min(FRAME_PAGES_MAX);
            let range = PageRange::new(PageIndex(page as u64), count);
            session.frames.digest_frames(range, &mut chunks);
            range
        };
        page = range.end().as_usize();
    }
    (chunks, PageIndex(page as u64))
}
