//! The bulk lane: takes the push in and puts its pages in place.
//!
//! Memory that is not there yet has a shelf for what comes early. All else waits for the memory in its stream, which holds
//! the source up by its flow-control window.

use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use lazyvm_wire::PageRange;
use lazyvm_wire::frame::{Encoding, FRAME_HEADER_LEN, FrameError, FrameHeader, FrameKind};
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex};
use quinn::{Connection, ConnectionError, ReadError, RecvStream};
use tokio::sync::watch;

use crate::core::{Core, Origin};
use crate::install::{InstallError, Shelf};
use crate::table::after;

/// Pages that are put in place at a time: 64 KiB. More no longer makes a page cheaper, and leaves the cache.
const INSTALL_PAGES: u64 = 16;

/// Most bytes taken from a stream at a time.
const READ_MAX: usize = 64 * PAGE_SIZE;

/// A push that can't be taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PushError {
    #[error("the bulk lane is lost")]
    Connection(#[from] ConnectionError),
    #[error("the bulk lane is lost")]
    Read(#[from] ReadError),
    #[error("the source breaks the protocol")]
    Frame(#[from] FrameError),
    #[error("the source sends pages that can't be decompressed")]
    Packed,
    #[error("the source ends a stream within a frame")]
    CutShort,
    #[error("pushed pages can't be put in place")]
    Install(#[from] InstallError),
    #[error("the memory's huge pages can't be put in place in parts")]
    Parts,
    #[error("pages that come early can't be kept")]
    Keep(#[from] std::io::Error),
    #[error("pages came early, and there is no place for them")]
    NoShelf,
    #[error("the machine was given up")]
    GivenUp,
}

/// Where pages go.
#[derive(Clone)]
pub(crate) struct Intake {
    /// The source's.
    pub layout: Layout,
    /// For what comes early while there is no memory.
    pub shelf: Option<Arc<Shelf>>,
    /// The memory, once it is there.
    pub core: watch::Receiver<Option<Arc<Core>>>,
}

impl Intake {
    /// Into memory that is there.
    pub fn of(core: &Arc<Core>) -> Self {
        Self {
            layout: core.layout.clone(),
            shelf: None,
            core: watch::Sender::new(Some(Arc::clone(core))).subscribe(),
        }
    }

    async fn memory(&self) -> Result<Arc<Core>, PushError> {
        let mut core = self.core.clone();
        let there = core.wait_for(Option::is_some).await;
        let there = there.map_err(|_| PushError::GivenUp)?;
        there.clone().ok_or(PushError::GivenUp)
    }

    /// Takes pages of one region in as they were in a round before the pause.
    async fn keep(&self, part: PageRange, round: u8, data: &[u8]) -> Result<(), PushError> {
        let there = self.core.borrow().clone();
        let core = match (there, &self.shelf) {
            (Some(core), _) => core,
            (None, Some(shelf)) if shelf.keep(part, round, data)? => return Ok(()),
            (None, Some(_)) => self.memory().await?,
            (None, None) => return Err(PushError::NoShelf),
        };
        Ok(core.keep_early(part, round, data)?)
    }
}

/// Takes streams in until the connection is lost or one of them is wrong.
pub(crate) async fn run(intake: Intake, connection: Connection) -> PushError {
    let mut streams = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            stream = connection.accept_uni() => match stream {
                Ok(stream) => drop(streams.spawn(take_in(intake.clone(), stream))),
                Err(error) => return error.into(),
            },
            Some(done) = streams.join_next(), if !streams.is_empty() => {
                // A task that panicked has lost its stream; a new connection brings its pages.
                if let Err(error) = done.unwrap_or(Err(PushError::CutShort)) {
                    return error;
                }
            }
        }
    }
}

/// Takes one stream's frames in.
async fn take_in(intake: Intake, stream: RecvStream) -> Result<(), PushError> {
    let mut input = Input {
        stream,
        pending: Bytes::new(),
        joined: BytesMut::new(),
    };
    while let Some(head) = input.header().await? {
        let header = FrameHeader::decode(&head, intake.layout.pages())?;
        match header.kind {
            // Before there is memory, maybe; all others wait for it.
            FrameKind::Early => input.keep(&intake, header).await?,
            FrameKind::Raw => {
                let core = intake.memory().await?;
                input.install(&core, header).await?;
            }
            FrameKind::Zero => {
                let core = intake.memory().await?;
                each_region(&core, header.range, |part| core.install_zeros(part))?;
            }
            FrameKind::Unreadable => intake.memory().await?.unreadable(header.range),
            FrameKind::Digests => {
                let core = intake.memory().await?;
                let digests = input.take(header.payload_len()).await?;
                if let Some(verifier) = &core.verifier {
                    let (digests, _) = digests.as_chunks::<8>();
                    verifier.expected(header.range, digests.iter().map(|d| u64::from_le_bytes(*d)));
                    core.check_all_here();
                }
            }
            FrameKind::ZeroDigests => {
                let core = intake.memory().await?;
                if let Some(verifier) = &core.verifier {
                    verifier.expected_zero(header.range);
                    core.check_all_here();
                }
            }
        }
    }
    Ok(())
}

/// Calls `act` with the part of `range` in each region: an install takes one region at a time.
fn each_region<E>(
    core: &Core,
    range: PageRange,
    mut act: impl FnMut(PageRange) -> Result<(), E>,
) -> Result<(), E> {
    (0..core.layout.regions().len())
        .filter_map(|region| core.layout.region_range(region))
        .map(|region| region.intersect(range))
        .filter(|part| !part.is_empty())
        .try_for_each(&mut act)
}

/// A stream's bytes, joined where a piece that is wanted lies in several packets.
struct Input {
    stream: RecvStream,
    pending: Bytes,
    joined: BytesMut,
}

impl Input {
    /// The next frame's header, or `None` where the stream ends in good order.
    async fn header(&mut self) -> Result<Option<[u8; FRAME_HEADER_LEN]>, PushError> {
        if self.pending.is_empty() && !self.read().await? {
            return Ok(None);
        }
        let bytes = self.take(FRAME_HEADER_LEN).await?;
        let mut header = [0; FRAME_HEADER_LEN];
        header.copy_from_slice(bytes);
        Ok(Some(header))
    }

    /// Puts the pages of a frame in place, a part at a time.
    async fn install(&mut self, core: &Core, header: FrameHeader) -> Result<(), PushError> {
        let mut parts = Parts::of(&core.layout, header);
        let unpacked = self.unpacked(header).await?;
        while let Some((part, bytes)) = parts.next()? {
            let data = match &unpacked {
                Some(pages) => &pages[bytes],
                None => self.take(bytes.len()).await?,
            };
            core.install(part, data, Origin::Push)?;
        }
        Ok(())
    }

    /// The same for pages that come before the pause.
    async fn keep(&mut self, intake: &Intake, header: FrameHeader) -> Result<(), PushError> {
        // The memory may cut the image otherwise than the source does; huge pages come whole either way.
        let there = intake.core.borrow().clone();
        let layout = there.as_ref().map_or(&intake.layout, |core| &core.layout);
        let mut parts = Parts::of(layout, header);
        let unpacked = self.unpacked(header).await?;
        while let Some((part, bytes)) = parts.next()? {
            let data = match &unpacked {
                Some(pages) => &pages[bytes],
                None => self.take(bytes.len()).await?,
            };
            intake.keep(part, header.round, data).await?;
        }
        Ok(())
    }

    /// The pages of a frame that is compressed.
    async fn unpacked(&mut self, header: FrameHeader) -> Result<Option<Vec<u8>>, PushError> {
        if header.encoding == Encoding::Plain {
            return Ok(None);
        }
        let packed = self.take(header.payload_len()).await?;
        let mut pages = vec![0; header.range.bytes() as usize];
        unpack(header.encoding, packed, &mut pages)?;
        Ok(Some(pages))
    }

    /// The next `length` bytes.
    async fn take(&mut self, length: usize) -> Result<&[u8], PushError> {
        self.joined.clear();
        while self.joined.len() < length {
            if self.pending.is_empty() && !self.read().await? {
                return Err(PushError::CutShort);
            }
            let wanted = (length - self.joined.len()).min(self.pending.len());
            self.joined
                .extend_from_slice(&self.pending.split_to(wanted));
        }
        Ok(&self.joined)
    }

    async fn read(&mut self) -> Result<bool, PushError> {
        match self.stream.read_chunk(READ_MAX, true).await? {
            Some(chunk) => self.pending = chunk.bytes,
            None => return Ok(false),
        }
        Ok(true)
    }
}

/// Decompresses a payload, which must give as many bytes as `pages` takes.
fn unpack(encoding: Encoding, packed: &[u8], pages: &mut [u8]) -> Result<(), PushError> {
    let length = match encoding {
        Encoding::Plain => None,
        Encoding::Lz4 => lz4_flex::block::decompress_into(packed, pages).ok(),
        Encoding::Zstd => zstd::bulk::decompress_to_buffer(packed, pages).ok(),
    };
    match length {
        Some(length) if length == pages.len() => Ok(()),
        _ => Err(PushError::Packed),
    }
}

/// The pages of a frame in parts that can be installed at a time.
struct Parts<'a> {
    layout: &'a Layout,
    range: PageRange,
    rest: PageRange,
}

impl<'a> Parts<'a> {
    fn of(layout: &'a Layout, header: FrameHeader) -> Self {
        Self {
            layout,
            range: header.range,
            rest: header.range,
        }
    }

    /// The next part, and where its bytes are among the frame's.
    fn next(&mut self) -> Result<Option<(PageRange, Range<usize>)>, PushError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let part = install_part(self.layout, self.rest).ok_or(PushError::Parts)?;
        let start = (part.first.0 - self.range.first.0) as usize * PAGE_SIZE;
        self.rest = after(self.rest, part);
        Ok(Some((part, start..start + part.bytes() as usize)))
    }
}

/// The first pages of `rest` that can be installed at a time: whole units of one region.
fn install_part(layout: &Layout, rest: PageRange) -> Option<PageRange> {
    let unit = layout.unit_of(rest.first)?;
    let (region, _) = layout.locate(rest.first)?;
    let rest = rest.intersect(layout.region_range(region)?);
    let count = INSTALL_PAGES.max(unit.count).min(rest.count);
    (unit.first == rest.first && count >= unit.count)
        .then_some(PageRange::new(PageIndex(rest.first.0), count))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Any payload gives an error or as many bytes as were asked for, and no panic.
        #[test]
        fn any_payload_is_taken_or_refused(
            payload in proptest::collection::vec(any::<u8>(), 0..3000),
            pages in 1..4_usize,
            zstd in any::<bool>(),
        ) {
            let encoding = if zstd { Encoding::Zstd } else { Encoding::Lz4 };
            let _ = unpack(encoding, &payload, &mut vec![0; pages * PAGE_SIZE]);
        }

        #[test]
        fn what_was_compressed_comes_back_and_nothing_of_another_length(
            pattern in proptest::collection::vec(any::<u8>(), 1..200),
            pages in 1..4_usize,
        ) {
            let plain: Vec<u8> = pattern.iter().copied().cycle().take(pages * PAGE_SIZE).collect();
            let lz4 = lz4_flex::block::compress(&plain);
            let zstd = zstd::bulk::compress(&plain, 1)?;
            for (encoding, packed) in [(Encoding::Lz4, lz4), (Encoding::Zstd, zstd)] {
                let mut out = vec![0; plain.len()];
                prop_assert!(unpack(encoding, &packed, &mut out).is_ok());
                prop_assert_eq!(&out, &plain);
                let mut more = vec![0; plain.len() + PAGE_SIZE];
                prop_assert!(unpack(encoding, &packed, &mut more).is_err());
            }
        }
    }
}
