//! Control messages: postcard behind a length, on the first stream of a connection.
//!
//! ```text
//! length: u32, little-endian | postcard(message), length bytes
//! ```
//!
//! The order of the messages, and what each side is in between, is in `docs/protocol.md`.

use std::fmt;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::bounded;
use crate::held::HELD_BYTES_MAX;
use crate::layout::Layout;
use crate::ledger::{Version, VersionRange};
use crate::machine::{COMPATIBILITY_MAX, MachineOffer, STATE_MAX};
use crate::map::{PAGE_MAP_BYTES_MAX, page_map_bytes_max};
use crate::page::PageIndex;
use crate::text;
use crate::ticket::{Secret, SessionId};

pub use crate::text::TEXT_MAX;

/// Largest message from a peer that has not shown a ticket yet, in bytes.
pub const HELLO_MAX: usize = 512;

/// Largest message of any other kind but a switchover, in bytes.
pub const CONTROL_MAX: usize = COMPATIBILITY_MAX + 64 * 1024;

/// Largest switchover of any image, packed or not, in bytes.
pub const SWITCHOVER_MAX: usize = STATE_MAX + PAGE_MAP_BYTES_MAX + HELD_BYTES_MAX + 4096;

/// The same of an image of `pages` pages, in bytes.
pub fn switchover_max(pages: u64) -> usize {
    STATE_MAX + page_map_bytes_max(pages) + HELD_BYTES_MAX + 4096
}

/// Most pages of a [`ToSource::Touched`].
pub const TOUCHED_MAX: usize = 8192;

/// Bytes of a page's index at most.
const INDEX_BYTES_MAX: usize = 10;

/// Largest [`ToSource`] of an image of `pages` pages, in bytes.
pub fn to_source_max(pages: u64) -> usize {
    TEXT_MAX.max(TOUCHED_MAX * INDEX_BYTES_MAX) + page_map_bytes_max(pages) + 64
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lane {
    /// Control messages and demand faults.
    Fault,
    /// The background push.
    Bulk,
}

/// The first message of every connection. Its bytes are the same in all versions.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// What the destination speaks.
    pub versions: VersionRange,
    /// The session that the ticket names.
    pub session: SessionId,
    /// The ticket's secret.
    pub secret: Secret,
    /// What the connection is for.
    pub lane: Lane,
    /// Whether the destination compares the digest of every page.
    pub verify: bool,
}

/// From destination to source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSource {
    /// Memory is registered, the machine is made, the bulk lane is open: pause and hand over.
    Ready {
        /// Pages may come before the pause: the memory can keep them where the guest does not see them yet.
        early: bool,
    },
    /// The machine can't be taken: before the switchover its offer, after it its state.
    Refused {
        /// Why, in the destination's words.
        #[serde(with = "text")]
        reason: String,
    },
    /// The vCPUs run here.
    Started,
    /// How far the destination is. Sent a few times a second.
    Progress {
        /// Pages that are here, zero pages among them.
        pages_here: u64,
    },
    /// All pages are here; the source may let go.
    Complete {
        /// Whether every digest was the source's; `None` when not asked.
        verified: Option<bool>,
    },
    /// The first message on a new connection after one was lost, once the machine was handed over. The source pushes
    /// from here on what is missing.
    Rejoin {
        /// The pages whose data must still come, as [`crate::PageMap::encode`] writes them.
        #[serde(
            serialize_with = "bounded::serialize_bytes",
            deserialize_with = "bounded::bytes::<_, PAGE_MAP_BYTES_MAX>"
        )]
        missing: Vec<u8>,
    },
    /// The answer to [`ToDestination::RecordTouches`], once.
    Touched {
        /// Which pages the machine touched first, in that order; [`TOUCHED_MAX`] at most.
        #[serde(deserialize_with = "bounded::vec::<_, _, TOUCHED_MAX>")]
        pages: Vec<PageIndex>,
    },
}

/// The answer to a hello that is accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The version that both speak from here on.
    pub version: Version,
    /// The machine's memory.
    pub layout: Layout,
    /// The machine.
    pub offer: MachineOffer,
    /// How the machine moves, in the command line's words (`postcopy`).
    #[serde(with = "text")]
    pub mode: String,
}

/// State and page map: after this the machine is the destination's.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switchover {
    /// The machine's state, in its monitor's own format where it is not packed; [`STATE_MAX`] bytes at most.
    #[serde(
        serialize_with = "bounded::serialize_bytes",
        deserialize_with = "bounded::bytes::<_, STATE_MAX>"
    )]
    pub state: Vec<u8>,
    /// The pages that hold data, as [`crate::PageMap::encode`] writes them; all others are zero.
    #[serde(
        serialize_with = "bounded::serialize_bytes",
        deserialize_with = "bounded::bytes::<_, PAGE_MAP_BYTES_MAX>"
    )]
    pub page_map: Vec<u8>,
    /// The pages that came early and have not changed since, and in which round, as [`crate::held::encode`] writes them;
    /// each is in the page map too.
    #[serde(
        serialize_with = "bounded::serialize_bytes",
        deserialize_with = "bounded::bytes::<_, HELD_BYTES_MAX>"
    )]
    pub held: Vec<u8>,
    /// The machine is to be started only when all its pages are here.
    pub wait: bool,
}

/// Without the state, which holds the guest's registers and with them its secrets.
impl fmt::Debug for Switchover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switchover")
            .field("state_len", &self.state.len())
            .field("page_map_len", &self.page_map.len())
            .field("held_len", &self.held.len())
            .field("wait", &self.wait)
            .finish()
    }
}

/// Why a source lets nobody in. What it tells depends on what the peer has proved. Its bytes are the same in all
/// versions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Rejection {
    /// No session and secret of this kind: one answer for both, so that nothing is learnt.
    #[error("the source does not know this ticket (wrong session or wrong secret)")]
    WrongSecret,
    /// The right secret, too late.
    #[error("the ticket has expired; start lazyvm serve again for a new one")]
    Expired,
    /// The right secret, from another destination than the first.
    #[error("the ticket has been used by another destination; each ticket serves one")]
    Used,
    /// No version in common.
    #[error("the source speaks protocol versions {} to {}, this lazyvm does not; use matching releases", .0.min.0, .0.max.0)]
    Version(VersionRange),
    /// A message that does not belong here, or limits exceeded.
    #[error("the source saw a breach of protocol: {0}")]
    Protocol(#[serde(with = "text")] String),
    /// The machine could not be paused or read. It runs on at the source.
    #[error("the source can't hand the machine over: {0}")]
    Machine(#[serde(with = "text")] String),
}

/// From source to destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDestination {
    /// The hello is accepted; on the fault lane with all about the machine.
    Welcome(Box<Welcome>),
    /// The hello on the bulk lane is accepted.
    Joined,
    /// Refused, or given up. The machine runs at the source.
    Rejected(Rejection),
    /// The machine is the destination's.
    Switchover(Box<Switchover>),
    /// The answer to [`ToSource::Started`].
    Running {
        /// From the pause until the source heard of the start, less half a round trip: no vCPU ran anywhere.
        downtime_us: u64,
    },
    /// The answer to [`ToSource::Complete`] and the last message: the source has let go.
    Released,
    /// Before the switchover: the source would like to hear which pages the machine touches first.
    RecordTouches,
    /// A [`ToDestination::Switchover`] whose state is one Zstandard frame (RFC 8878), of [`STATE_MAX`] bytes at most when unpacked.
    SwitchoverPacked(Box<Switchover>),
}

/// A breach of the control stream's form. Nothing after it can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Longer than what may come now.
    #[error("a control message of {length} bytes, more than the {limit} allowed here")]
    TooLong {
        /// What its header says, in bytes.
        length: u64,
        /// What is allowed, in bytes.
        limit: usize,
    },
    /// Not a message of the kind that may come now.
    #[error("a control message that cannot be read")]
    Malformed,
}

/// A message with its length ahead of it.
///
/// # Errors
/// [`ControlError::TooLong`] past [`SWITCHOVER_MAX`].
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, ControlError> {
    let mut bytes =
        postcard::to_extend(message, vec![0; HEADER_LEN]).map_err(|_| ControlError::Malformed)?;
    let length = bytes.len() - HEADER_LEN;
    if length > SWITCHOVER_MAX {
        return Err(ControlError::TooLong {
            length: length as u64,
            limit: SWITCHOVER_MAX,
        });
    }
    bytes[..HEADER_LEN].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(bytes)
}

const HEADER_LEN: usize = 4;

const _: () = assert!(SWITCHOVER_MAX <= u32::MAX as usize);

/// Memory that a [`Decoder`] keeps between messages, in bytes.
const BUFFER_KEPT: usize = 64 * 1024;

/// Takes a control stream's bytes as they come and gives its messages.
///
/// It holds what it was given and no message has used up. A caller that asks for all messages after each
/// [`push`](Self::push) thereby holds less than the limit and one push.
///
/// ```
/// use lazyvm_wire::control::{CONTROL_MAX, Decoder, ToSource, encode};
///
/// let mut stream = encode(&ToSource::Ready { early: true })?;
/// stream.extend(encode(&ToSource::Progress { pages_here: 7 })?);
///
/// let mut decoder = Decoder::default();
/// let mut messages = Vec::new();
/// for part in stream.chunks(3) {
///     decoder.push(part);
///     while let Some(message) = decoder.next::<ToSource>(CONTROL_MAX)? {
///         messages.push(message);
///     }
/// }
/// assert_eq!(messages, [ToSource::Ready { early: true }, ToSource::Progress { pages_here: 7 }]);
/// # Ok::<(), lazyvm_wire::control::ControlError>(())
/// ```
#[derive(Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes of the buffer that messages have used up. They go when all have, or at the next push, so that many small
    /// messages in one push don't each move all that follow.
    used: usize,
}

/// Without the bytes: among them may be a hello's secret, or a machine's state.
impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("bytes_held", &(self.buffer.len() - self.used))
            .finish()
    }
}

impl Decoder {
    /// Takes bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.used);
        self.used = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The next message, or `None` until more bytes are there.
    ///
    /// # Errors
    /// [`ControlError`]; as soon as the header shows more than `limit`, however little of the message is there. After
    /// an error the stream's form is lost, and each further call gives it again.
    pub fn next<M: DeserializeOwned>(&mut self, limit: usize) -> Result<Option<M>, ControlError> {
        let Some((header, rest)) = self.buffer[self.used..].split_first_chunk::<HEADER_LEN>()
        else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*header) as usize;
        if length > limit {
            return Err(ControlError::TooLong {
                length: length as u64,
                limit,
            });
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = match postcard::take_from_bytes(body) {
            Ok((message, [])) => message,
            _ => return Err(ControlError::Malformed),
        };
        self.used += HEADER_LEN + length;
        if self.used == self.buffer.len() {
            self.used = 0;
            self.buffer.clear();
            // A switchover comes once, and shall not hold its memory for as long as the pages take.
            self.buffer.shrink_to(BUFFER_KEPT);
        }
        Ok(Some(message))
    }
}

/// `text`, cut to what a message may carry ([`TEXT_MAX`]).
pub fn short_text(text: &str) -> String {
    text::cut(text).to_owned()
}
