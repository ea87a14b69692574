//! Asking the source for pages that somebody waits for.
//!
//! Each request has a stream to itself, so that a lost packet holds back no fault but its own. A stream is kept and
//! used again when its answer is there: a kept one answers a third faster than a fresh one.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use lazyvm_quic::FAULT_STREAMS_MAX;
use lazyvm_wire::PageRange;
use lazyvm_wire::frame::{
    Encoding, FRAME_HEADER_LEN, FaultRequest, FrameError, FrameHeader, FrameKind,
};
use quinn::{Connection, ConnectionError, ReadExactError, RecvStream, SendStream, WriteError};
use tokio::sync::Notify;

use crate::core::{Core, Origin, Supply};

/// Until a page that could not be read there or not be put in place here is asked for again.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// Units that are to be asked for.
#[derive(Default)]
pub(crate) struct RequestQueue {
    units: Mutex<VecDeque<PageRange>>,
    filled: Notify,
}

impl RequestQueue {
    pub fn push(&self, unit: PageRange) {
        self.units().push_back(unit);
        self.filled.notify_one();
    }

    async fn pop(&self) -> PageRange {
        loop {
            let mut filled = pin!(self.filled.notified());
            filled.as_mut().enable();
            if let Some(unit) = self.units().pop_front() {
                return unit;
            }
            filled.await;
        }
    }

    fn replace(&self, units: impl Iterator<Item = PageRange>) {
        *self.units() = units.collect();
    }

    fn units(&self) -> MutexGuard<'_, VecDeque<PageRange>> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection over which nothing can be asked for any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemandError {
    #[error("the fault lane is lost")]
    Connection(#[from] ConnectionError),
    #[error("the fault lane is lost")]
    Read(#[from] ReadExactError),
    #[error("the fault lane is lost")]
    Write(#[from] WriteError),
    #[error("the source breaks the protocol")]
    Frame(#[from] FrameError),
    #[error("the source answers for {got} where {asked} was asked for")]
    OtherPages { asked: PageRange, got: PageRange },
    #[error("the source answers a fault with a frame of digests")]
    NotPages,
}

/// Asks for what is in the queue, over this connection, until it is lost. What an earlier connection was asked for and
/// did not bring is asked for again.
pub(crate) async fn run(
    core: &Arc<Core>,
    queue: &RequestQueue,
    connection: &Connection,
) -> DemandError {
    match ask(core, queue, connection).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn ask(
    core: &Arc<Core>,
    queue: &RequestQueue,
    connection: &Connection,
) -> Result<Infallible, DemandError> {
    let table = core.installer.table();
    queue.replace(table.requested().flat_map(|range| {
        let mut rest = range;
        std::iter::from_fn(move || {
            let unit = table.unit_of(rest.first).filter(|_| !rest.is_empty())?;
            rest = PageRange::new(unit.end(), rest.count.saturating_sub(unit.count));
            Some(unit)
        })
    }));
    let mut idle: Vec<DemandStream> = Vec::new();
    let mut opened = 0;
    let mut under_way = FuturesUnordered::new();
    loop {
        let may_ask = !idle.is_empty() || opened < FAULT_STREAMS_MAX;
        tokio::select! {
            biased;
            Some(done) = under_way.next(), if !under_way.is_empty() => {
                let stream: Result<DemandStream, DemandError> = done;
                idle.push(stream?);
            }
            unit = queue.pop(), if may_ask => {
                let stream = match idle.pop() {
                    Some(stream) => stream,
                    None => {
                        opened += 1;
                        DemandStream::open(connection).await?
                    }
                };
                under_way.push(stream.fetch(core, unit));
            }
            error = connection.closed() => return Err(error.into()),
        }
    }
}

/// A stream for one request at a time.
struct DemandStream {
    send: SendStream,
    recv: RecvStream,
    buffer: Vec<u8>,
}

impl DemandStream {
    async fn open(connection: &Connection) -> Result<Self, DemandError> {
        let (send, recv) = connection.open_bi().await?;
        Ok(Self {
            send,
            recv,
            buffer: Vec::new(),
        })
    }

    /// Asks for a unit, puts it in place, and gives the stream back.
    async fn fetch(mut self, core: &Arc<Core>, unit: PageRange) -> Result<Self, DemandError> {
        self.send.write_all(&FaultRequest(unit).encode()).await?;
        let mut header = [0; FRAME_HEADER_LEN];
        self.recv.read_exact(&mut header).await?;
        let header = FrameHeader::decode(&header, core.layout.pages())?;
        if header.range != unit {
            return Err(DemandError::OtherPages {
                asked: unit,
                got: header.range,
            });
        }
        let installed = match header.kind {
            FrameKind::Raw if header.encoding == Encoding::Plain => {
                self.buffer.resize(header.payload_len(), 0);
                self.recv.read_exact(&mut self.buffer).await?;
                core.install(unit, &self.buffer, Origin::Demand).map(drop)
            }
            FrameKind::Zero => core.install_zeros(unit),
            FrameKind::Unreadable => {
                core.unreadable(unit);
                ask_again(core, unit);
                Ok(())
            }
            FrameKind::Raw | FrameKind::Early | FrameKind::Digests | FrameKind::ZeroDigests => {
                return Err(DemandError::NotPages);
            }
        };
        if let Err(error) = installed {
            tracing::error!(%unit, error = %lazyvm_quic::describe(&error), "a page can't be put in place; who touched it waits");
            ask_again(core, unit);
        }
        Ok(self)
    }
}

/// Asks for a unit once more after a while.
pub(crate) fn ask_again(core: &Arc<Core>, unit: PageRange) {
    let core = core.clone();
    tokio::spawn(async move {
        tokio::time::sleep(RETRY_AFTER).await;
        if let Supply::Source(queue) = &core.supply {
            queue.push(unit);
        }
    });
}
