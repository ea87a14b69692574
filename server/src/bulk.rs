//! The bulk lane: pushes pages, and digests where they are asked for.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use lazyvm_wire::frame::{FRAME_PAGES_MAX, FrameKind};
use lazyvm_wire::{PageIndex, PageMap, PageRange};
use quinn::{Connection, ConnectionError, SendStream, WriteError};

use crate::early::Outgoing;
use crate::frames::{Content, READ_PAGES_MAX, header};
use crate::handover::Phase;
use crate::packing::Packer;
use crate::rate::RateLimit;
use crate::scheduler::Urgency;
use crate::session::{Session, lock};

/// A stream is ended when it has taken what the path carries in this time. quinn does not leave a stream that it has begun
/// for another, however urgent: windows and what was lost of earlier streams wait for it.
const STREAM_TIME: Duration = Duration::from_millis(8);

/// Bounds of that. No more than half of what a stream may have under way, so that none ever waits for its own flow control,
/// which would leave a long path empty; and enough for what a stream costs by itself to be lost in it.
const STREAM_BYTES_MIN: usize = 64 << 10;
const STREAM_BYTES_MAX: usize = 4 << 20;

/// Before the pause it must be known what has arrived, which is told by whole streams: a lost packet leaves one open. So many
/// of them fill the window.
const EARLY_STREAMS: u64 = 64;

/// What is under way at least before anything waits for it to arrive.
const WINDOW_MIN: u64 = 64 << 10;

/// Frames of zeros that are gathered before they go: about a packet's worth.
const ZERO_FRAMES: usize = 48;

/// Reads without a look at anything else.
const READS_IN_A_ROW: u64 = 8;

/// Priority of a window's stream. The others' go down from 0, one by one: what was lost of a stream goes ahead of those that
/// came after it, which hold what they have until it is there. Digests are last.
const WINDOW_PRIORITY: i32 = 1;
const DIGEST_PRIORITY: i32 = i32::MIN;

/// Most digest frames on a stream.
const DIGEST_FRAMES: usize = 64;

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
    let limit = session
        .config
        .max_bandwidth
        .map(|bytes_per_s| RateLimit::new(bytes_per_s, Instant::now()));
    let mut pusher = Pusher {
        session,
        connection,
        limit,
        rest: None,
        priority: 0,
        stream_bytes: STREAM_BYTES_MIN,
        early_stream_bytes: STREAM_BYTES_MIN,
        chunks: Vec::new(),
        unacked: 0,
        reads: 0,
        packer: Packer::default(),
    };
    // What goes first is what is waited for, and the path carries least then.
    pusher.look_at_path();
    loop {
        let woken = session.push_wake.notified();
        tokio::pin!(woken);
        // Registered before the look, so that a wake in between is not lost.
        woken.as_mut().enable();
        if session.is_over() {
            return Ok(());
        }
        if pusher.push_next().await? {
            continue;
        }
        pusher.finish_last();
        tokio::select! {
            () = woken => {}
            error = connection.closed() => return Err(error.into()),
        }
    }
}

struct Pusher<'a> {
    session: &'a Arc<Session>,
    connection: &'a Connection,
    limit: Option<RateLimit>,
    /// The stream that pages without urgency go on, and the bytes that it has taken.
    rest: Option<(SendStream, usize)>,
    /// The next such stream's priority.
    priority: i32,
    /// What a stream takes before the next one is begun.
    stream_bytes: usize,
    /// The same before the pause.
    early_stream_bytes: usize,
    /// Frames that are to go.
    chunks: Vec<Bytes>,
    /// Bytes of pages before the pause on the stream `rest`.
    unacked: u64,
    reads: u64,
    packer: Packer,
}

impl Pusher<'_> {
    /// Pushes what goes next; `false` when there is nothing.
    async fn push_next(&mut self) -> Result<bool, PushError> {
        if let Some(outgoing) = self.session.next_early() {
            self.push_early(outgoing).await?;
            return Ok(true);
        }
        let Some(batch) = self.session.next_batch(READ_PAGES_MAX) else {
            self.send_rest().await?;
            return Ok(false);
        };
        let frames = &self.session.frames;
        let stats =
            frames.push_frames(batch.range, batch.whole, &mut self.packer, &mut self.chunks);
        match batch.urgency {
            Urgency::Window => self.send_window().await?,
            // A long row of zeros gathers into one packet.
            Urgency::Rest if stats.raw_pages == 0 && self.chunks.len() < ZERO_FRAMES => {}
            Urgency::Rest | Urgency::Lead => self.send_rest().await?,
        }
        self.session
            .counters
            .pushed
            .fetch_add(batch.range.count, Ordering::Relaxed);
        self.reads += 1;
        if self.reads.is_multiple_of(READS_IN_A_ROW) {
            self.look_at_path();
            // Reading and comparing zeros never waits, and must not keep the thread from what it sends.
            tokio::task::yield_now().await;
        }
        Ok(true)
    }

    /// Sends pages before the pause.
    async fn push_early(&mut self, outgoing: Outgoing) -> Result<(), PushError> {
        let session = self.session;
        session.frames.early_frames(
            outgoing,
            &mut self.packer,
            &mut self.chunks,
            |run, content| {
                let mut early = lock(&session.early);
                match content {
                    Content::Data(bytes) => early.sent(run, bytes),
                    Content::Zero => early.found_zero(run),
                    Content::Unreadable => early.not_sent(run),
                }
            },
        );
        let bytes = self.chunks.iter().map(Bytes::len).sum::<usize>() as u64;
        self.unacked += bytes;
        lock(&session.early).under_way(bytes);
        self.send_rest().await?;
        if self
            .rest
            .as_ref()
            .is_some_and(|(_, taken)| *taken >= self.early_stream_bytes)
        {
            self.finish_rest();
        }
        self.reads += 1;
        if self.reads.is_multiple_of(READS_IN_A_ROW) {
            self.look_at_path();
        }
        Ok(())
    }

    /// What the path carries: a congestion window a round trip.
    fn look_at_path(&mut self) {
        let window = lazyvm_quic::window(self.connection);
        let limit = self.session.config.max_bandwidth.unwrap_or(u64::MAX);
        let carries = window as f64 / self.connection.rtt().as_secs_f64().max(1e-6);
        let carries = carries.min(limit as f64);
        self.packer.path_carries(carries);
        self.stream_bytes = ((carries * STREAM_TIME.as_secs_f64()) as usize)
            .clamp(STREAM_BYTES_MIN, STREAM_BYTES_MAX);
        self.early_stream_bytes =
            ((window / EARLY_STREAMS) as usize).clamp(STREAM_BYTES_MIN, STREAM_BYTES_MAX);
        let session = self.session;
        session
            .path_bytes_s
            .store(carries as u64, Ordering::Relaxed);
        session
            .path_window
            .store(window.max(WINDOW_MIN), Ordering::Relaxed);
    }

    /// A window goes on a stream of its own, ahead of what is waiting to be sent.
    ///
    /// Many faults bring more windows in a round trip than there may be streams. Those beyond go with the rest: waiting for
    /// a stream would leave the path empty.
    async fn send_window(&mut self) -> Result<(), PushError> {
        let Some(stream) = self.connection.open_uni().now_or_never() else {
            return self.send_rest().await;
        };
        let mut stream = stream?;
        self.wait_for_limit().await;
        // Fails only for a stream that is closed; the write says so too. So does the finish.
        let _ = stream.set_priority(WINDOW_PRIORITY);
        stream.write_all_chunks(&mut self.chunks).await?;
        self.chunks.clear();
        let _ = stream.finish();
        Ok(())
    }

    /// Sends the frames that are gathered.
    async fn send_rest(&mut self) -> Result<(), PushError> {
        if self.chunks.is_empty() {
            return Ok(());
        }
        let bytes = self.wait_for_limit().await;
        let (mut stream, taken) = match self.rest.take() {
            Some(rest) => rest,
            None => {
                let stream = self.connection.open_uni().await?;
                // Fails only for a stream that is closed; the write says so too.
                let _ = stream.set_priority(self.priority);
                self.priority = self.priority.saturating_sub(1).max(DIGEST_PRIORITY + 1);
                (stream, 0)
            }
        };
        stream.write_all_chunks(&mut self.chunks).await?;
        self.chunks.clear();
        self.rest = Some((stream, taken + bytes));
        if taken + bytes >= self.stream_bytes {
            self.finish_rest();
        }
        Ok(())
    }

    /// There is nothing to send for now.
    fn finish_last(&mut self) {
        self.look_at_path();
        self.finish_rest();
        self.session.early_moved.notify_waiters();
    }

    /// Ends the stream. Who waits for what went before the pause hears when it has arrived.
    fn finish_rest(&mut self) {
        let Some((mut stream, _)) = self.rest.take() else {
            return;
        };
        let _ = stream.finish();
        let bytes = std::mem::take(&mut self.unacked);
        if bytes > 0 {
            let arrived = stream.stopped();
            let session = self.session.clone();
            tokio::spawn(async move {
                if arrived.await.is_ok() {
                    session.early_has_arrived(bytes);
                }
            });
        }
    }

    /// Waits until the gathered frames may go; gives their bytes.
    async fn wait_for_limit(&mut self) -> usize {
        let bytes = self.chunks.iter().map(Bytes::len).sum();
        if let Some(limit) = &mut self.limit {
            let wait = limit.wait(Instant::now());
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            limit.sent(bytes as u64);
        }
        bytes
    }
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
        && let Some(map) = paused.to_verify
        && let Err(error) = send_digests(&session, &connection, map).await
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
        let _ = send.set_priority(DIGEST_PRIORITY);
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
    while page < bits.len() && chunks.len() < 2 * DIGEST_FRAMES {
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
