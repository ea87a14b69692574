//! Page frames: fixed little-endian headers, then pages.
//!
//! A demand fault is a [`FaultRequest`] on a stream of the fault lane that has no other request under way; the
//! answer on the same stream is one frame. On the bulk lane, each stream from the source is a row of frames, complete
//! in itself: streams may arrive in any order.
//!
//! ```text
//! request  0  first page  u64
//!          8  pages       u32, 1 to 512
//!         12  reserved    u32, zero
//!
//! frame    0  first page  u64
//!          8  pages       u32, 1 to 512; zero and digest of zeros to 2^31
//!         12  payload     u32, bytes that follow the header
//!         16  kind        u8: 0 zero, 1 raw, 2 digests, 3 digest of zeros, 4 unreadable, 5 early
//!         17  encoding    u8: 0 plain; of raw and early frames also 1 LZ4 block, 2 Zstandard frame
//!         18  round       u8: of early frames 1 to 255, in which round the pages went; else zero
//!         19  reserved    five bytes, zero
//! ```

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::page::{PAGE_SIZE, PageIndex, PageRange};

/// Most pages with data in a frame: one huge page of 2 MiB.
pub const FRAME_PAGES_MAX: u64 = 512;

/// Most pages in a frame of zeros or of their digests: 8 TiB, a whole number of huge pages.
pub const FRAME_ZERO_PAGES_MAX: u64 = 1 << 31;

/// Largest payload of a frame, in bytes.
pub const FRAME_PAYLOAD_MAX: usize = FRAME_PAGES_MAX as usize * PAGE_SIZE;

/// Bytes of a frame's header.
pub const FRAME_HEADER_LEN: usize = size_of::<RawFrame>();

/// Bytes of a request.
pub const REQUEST_LEN: usize = size_of::<RawRequest>();

const _: () = assert!(FRAME_HEADER_LEN == 24 && REQUEST_LEN == 16);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRequest {
    first: U64,
    count: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFrame {
    first: U64,
    count: U32,
    payload: U32,
    kind: u8,
    encoding: u8,
    round: u8,
    reserved: [u8; 5],
}

/// What a frame says of its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// All zero; no payload.
    Zero,
    /// The payload is their bytes.
    Raw,
    /// The payload is a digest (u64, little-endian) of each as it was at the pause.
    Digests,
    /// All were zero at the pause; no payload.
    ZeroDigests,
    /// The source can't read them. They must not be made up; no payload.
    Unreadable,
    /// The payload is their bytes at some instant before the pause. They count where the switchover says that they did
    /// not change since. A page may come in several rounds, and only what a later one brings counts.
    Early,
}

impl FrameKind {
    /// Most pages in a frame of this kind; who sends more makes several frames of them.
    pub const fn pages_max(self) -> u64 {
        match self {
            Self::Zero | Self::ZeroDigests => FRAME_ZERO_PAGES_MAX,
            Self::Raw | Self::Digests | Self::Unreadable | Self::Early => FRAME_PAGES_MAX,
        }
    }

    /// Bytes of payload for these pages, uncompressed.
    fn plain_len(self, range: PageRange) -> u64 {
        match self {
            Self::Raw | Self::Early => range.bytes(),
            Self::Digests => range.count.saturating_mul(size_of::<u64>() as u64),
            Self::Zero | Self::ZeroDigests | Self::Unreadable => 0,
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::Zero => 0,
            Self::Raw => 1,
            Self::Digests => 2,
            Self::ZeroDigests => 3,
            Self::Unreadable => 4,
            Self::Early => 5,
        }
    }

    fn from_code(code: u8) -> Result<Self, FrameError> {
        Ok(match code {
            0 => Self::Zero,
            1 => Self::Raw,
            2 => Self::Digests,
            3 => Self::ZeroDigests,
            4 => Self::Unreadable,
            5 => Self::Early,
            unknown => return Err(FrameError::Kind(unknown)),
        })
    }
}

/// How the bytes of pages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Plain,
    /// As one LZ4 block, without a length of its own.
    Lz4,
    /// As one Zstandard frame.
    Zstd,
}

impl Encoding {
    const fn code(self) -> u8 {
        match self {
            Self::Plain => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    fn from_code(code: u8) -> Result<Self, FrameError> {
        Ok(match code {
            0 => Self::Plain,
            1 => Self::Lz4,
            2 => Self::Zstd,
            unknown => return Err(FrameError::Encoding(unknown)),
        })
    }
}

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// The pages.
    pub range: PageRange,
    /// What it says of them.
    pub kind: FrameKind,
    /// How the payload is written.
    pub encoding: Encoding,
    /// In which round an early frame's pages went, from 1 on; 0 for all other kinds.
    pub round: u8,
    payload: u32,
}

/// A request or a header that breaks the form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// No page, more than a frame may have, or past the image.
    #[error(
        "a frame of {count} pages from page {first}, which an image of {image} pages does not allow"
    )]
    Range {
        /// First page.
        first: u64,
        /// Pages.
        count: u32,
        /// Pages of the image.
        image: u64,
    },
    /// A payload of another length than kind and pages give.
    #[error("a frame with {found} bytes of payload where its kind has {expected}")]
    Payload {
        /// What the header says, in bytes.
        found: u32,
        /// What it must be, in bytes.
        expected: u64,
    },
    /// An unknown kind.
    #[error("a frame of an unknown kind {0}")]
    Kind(u8),
    /// An unknown encoding, or one that the kind may not have.
    #[error("a frame of an unknown encoding {0}")]
    Encoding(u8),
    /// An early frame without a round, or a round of another kind.
    #[error("a frame of round {0}, which its kind can't have")]
    Round(u8),
    /// A reserved field that is not zero.
    #[error("a frame whose reserved bytes are not zero")]
    Reserved,
}

/// A demand for pages, [`FRAME_PAGES_MAX`] at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultRequest(pub PageRange);

impl FaultRequest {
    /// Its bytes. A range that no request may have gives bytes that no peer accepts.
    pub fn encode(self) -> [u8; REQUEST_LEN] {
        zerocopy::transmute!(RawRequest {
            first: U64::new(self.0.first.0),
            count: U32::new(saturate(self.0.count)),
            reserved: U32::ZERO,
        })
    }

    /// Reads one, for an image of `image_pages`.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn decode(bytes: &[u8; REQUEST_LEN], image_pages: u64) -> Result<Self, FrameError> {
        let raw: RawRequest = zerocopy::transmute!(*bytes);
        if raw.reserved.get() != 0 {
            return Err(FrameError::Reserved);
        }
        check_range(
            raw.first.get(),
            raw.count.get(),
            FRAME_PAGES_MAX,
            image_pages,
        )
        .map(Self)
    }
}

impl FrameHeader {
    /// A header; the pages' count is at most the kind's [`FrameKind::pages_max`].
    pub fn new(range: PageRange, kind: FrameKind) -> Self {
        Self {
            range,
            kind,
            encoding: Encoding::Plain,
            round: u8::from(kind == FrameKind::Early),
            payload: saturate(kind.plain_len(range)),
        }
    }

    /// The header of a compressed [`FrameKind::Raw`] or [`FrameKind::Early`] frame. `payload` is less than the pages.
    pub fn packed(range: PageRange, kind: FrameKind, encoding: Encoding, payload: usize) -> Self {
        Self {
            encoding,
            payload: saturate(payload as u64),
            ..Self::new(range, kind)
        }
    }

    /// The same as part of a round, from 1 on; for [`FrameKind::Early`] alone.
    #[must_use]
    pub fn in_round(self, round: u8) -> Self {
        Self { round, ..self }
    }

    /// Bytes of payload that follow.
    pub fn payload_len(self) -> usize {
        self.payload as usize
    }

    /// Its bytes. A range that the kind may not have gives bytes that no peer accepts.
    pub fn encode(self) -> [u8; FRAME_HEADER_LEN] {
        zerocopy::transmute!(RawFrame {
            first: U64::new(self.range.first.0),
            count: U32::new(saturate(self.range.count)),
            payload: U32::new(self.payload),
            kind: self.kind.code(),
            encoding: self.encoding.code(),
            round: self.round,
            reserved: [0; 5],
        })
    }

    /// Reads one, for an image of `image_pages`.
    ///
    /// # Errors
    /// [`FrameError`]; a header that is accepted asks for [`FRAME_PAYLOAD_MAX`] bytes at most.
    pub fn decode(bytes: &[u8; FRAME_HEADER_LEN], image_pages: u64) -> Result<Self, FrameError> {
        let raw: RawFrame = zerocopy::transmute!(*bytes);
        let kind = FrameKind::from_code(raw.kind)?;
        let encoding = Encoding::from_code(raw.encoding)?;
        if raw.reserved != [0; 5] {
            return Err(FrameError::Reserved);
        }
        if (raw.round != 0) != (kind == FrameKind::Early) {
            return Err(FrameError::Round(raw.round));
        }
        let range = check_range(
            raw.first.get(),
            raw.count.get(),
            kind.pages_max(),
            image_pages,
        )?;
        let plain = kind.plain_len(range);
        let payload = raw.payload.get();
        let allowed = match (encoding, kind) {
            (Encoding::Plain, _) => u64::from(payload) == plain,
            // Who can't make pages smaller sends them as they are.
            (_, FrameKind::Raw | FrameKind::Early) => payload != 0 && u64::from(payload) < plain,
            _ => return Err(FrameError::Encoding(raw.encoding)),
        };
        if !allowed {
            return Err(FrameError::Payload {
                found: payload,
                expected: plain,
            });
        }
        Ok(Self {
            range,
            kind,
            encoding,
            round: raw.round,
            payload,
        })
    }
}

/// `count` as it is, or a count that is past every limit.
fn saturate(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn check_range(
    first: u64,
    count: u32,
    count_max: u64,
    image_pages: u64,
) -> Result<PageRange, FrameError> {
    let pages = u64::from(count);
    let fits = first
        .checked_add(pages)
        .is_some_and(|end| end <= image_pages);
    if pages == 0 || pages > count_max || !fits {
        return Err(FrameError::Range {
            first,
            count,
            image: image_pages,
        });
    }
    Ok(PageRange::new(PageIndex(first), pages))
}
