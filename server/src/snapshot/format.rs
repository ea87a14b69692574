//! The bytes of a snapshot's files. Pure: no file is touched in here.
//!
//! ```text
//! manifest.lazyvm   magic "lazyvmSN"  version u32  length of the body u32  body (postcard)  XXH3-128 of all before it
//! index-ID          magic "lazyvmIX"  version u32  bytes of an entry u32   ID (16)  entries u64  then the entries
//! memory-ID         magic "lazyvmME"  version u32  zero u32                ID (16)  then chunks, where the index says
//! state-ID          the machine's state as it is
//! profile-ID        magic "lazyvmPR"  version u32  pages u32               ID (16)  pages (u32 each)  XXH3-64 of all before it
//! ```
//!
//! Numbers are little-endian. A chunk is [`CHUNK_PAGES`] pages; the image's last one may be shorter. The index has an entry
//! for each chunk that is not all zeros, ascending. The manifest has the lengths of all files and the digests of index
//! and state, and each entry those of its chunk, so no bit that is used goes unchecked.

mod index;
mod profile;
#[cfg(test)]
mod tests;

use std::fmt;

use lazyvm_wire::{Layout, MachineOffer, PAGE_SIZE, PageIndex, PageRange};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

pub use index::{
    ENTRY_LEN, Entry, INDEX_HEADER_LEN, Place, Stored, decode_index, encode_index, index_bytes,
};
pub use profile::{PROFILE_PAGES_MAX, decode_profile, encode_profile};

/// The version of all files.
pub const VERSION: u32 = 1;

/// Pages in a chunk, the unit that is compressed, checked and read.
pub const CHUNK_PAGES: u64 = 16;

/// Bytes in a whole chunk.
pub const CHUNK_BYTES: usize = CHUNK_PAGES as usize * PAGE_SIZE;

/// Largest manifest, in bytes: an offer and a region table at their largest fit in.
pub const MANIFEST_MAX: usize = 1 << 20;

/// Longest path of a base, in bytes.
pub const BASE_PATH_MAX: usize = 4096;

/// Most snapshots that may stand on each other.
pub const BASES_MAX: usize = 64;

/// Bytes ahead of the chunks, ahead of a profile's pages, and ahead of the index's entries without their count.
pub const HEADER_LEN: usize = 32;

const MANIFEST_MAGIC: &[u8; 8] = b"lazyvmSN";
const MEMORY_MAGIC: &[u8; 8] = b"lazyvmME";

const MANIFEST_HEADER_LEN: usize = 16;
const MANIFEST_DIGEST_LEN: usize = 16;

/// Which snapshot it is, of all that there ever were.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub [u8; 16]);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotId({self})")
    }
}

/// Bytes that are not what they should be, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// They are another file's, or the file's first bytes are damaged.
    #[error("byte 0: it does not begin as such a file does")]
    Magic,
    /// A later release's, or damaged.
    #[error("byte 8: it is of version {0}, and this release knows version {VERSION}")]
    Version(u32),
    /// Too short or too long.
    #[error("it is {found} bytes long, where {expected} are expected")]
    Length {
        /// Found.
        found: u64,
        /// What the file itself, or the manifest, says.
        expected: u64,
    },
    /// The digest is another.
    #[error("bytes 0 to {0}: their checksum is wrong")]
    Digest(u64),
    /// A field can't be.
    #[error("byte {at}: {what}")]
    Field {
        /// Where.
        at: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// It belongs to another snapshot.
    #[error("byte 16: it belongs to snapshot {0}")]
    Foreign(SnapshotId),
}

/// A file's length and digest (XXH3-128).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// In bytes.
    pub bytes: u64,
    /// Of all of it.
    pub digest: u128,
}

impl Part {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            digest: xxh3_128(bytes),
        }
    }

    /// Whether these are the bytes.
    ///
    /// # Errors
    /// [`FormatError::Length`] and [`FormatError::Digest`].
    pub fn check(&self, bytes: &[u8]) -> Result<(), FormatError> {
        check_length(bytes.len() as u64, self.bytes)?;
        if xxh3_128(bytes) != self.digest {
            return Err(FormatError::Digest(self.bytes));
        }
        Ok(())
    }
}

/// The snapshot that another one stands on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its directory, seen from the directory of the one that stands on it where it is relative.
    pub path: String,
    /// Which it is.
    pub id: SnapshotId,
    /// Digest of its manifest.
    pub digest: u128,
}

/// What a snapshot is, and which files are its.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Which it is; the names of its files end with it.
    pub id: SnapshotId,
    /// When, in seconds since 1970.
    pub taken_at_s: u64,
    /// The machine's memory.
    pub layout: Layout,
    /// The machine's kind and what its destinations check.
    pub offer: MachineOffer,
    /// The file `state-ID`.
    pub state: Part,
    /// The file `index-ID`.
    pub index: Part,
    /// Length of the file `memory-ID`.
    pub memory_bytes: u64,
    /// What chunks are looked for in that are not here.
    pub base: Option<Base>,
}

impl Manifest {
    /// As a file's bytes; `None` where a part is larger than it may be.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let body = postcard::to_allocvec(self).ok()?;
        let mut bytes = MANIFEST_MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::try_from(body.len()).ok()?.to_le_bytes());
        bytes.extend(body);
        bytes.extend(xxh3_128(&bytes).to_le_bytes());
        (bytes.len() <= MANIFEST_MAX && self.check().is_ok()).then_some(bytes)
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let length = u64::from(check_head(bytes, MANIFEST_MAGIC)?);
        let found = bytes.len() as u64;
        check_length(
            found,
            length + (MANIFEST_HEADER_LEN + MANIFEST_DIGEST_LEN) as u64,
        )?;
        if bytes.len() > MANIFEST_MAX {
            return Err(FormatError::Length {
                found,
                expected: MANIFEST_MAX as u64,
            });
        }
        let (covered, digest) = bytes.split_at(bytes.len() - MANIFEST_DIGEST_LEN);
        if xxh3_128(covered).to_le_bytes() != digest {
            return Err(FormatError::Digest(covered.len() as u64));
        }
        let body = &covered[MANIFEST_HEADER_LEN..];
        let at = MANIFEST_HEADER_LEN as u64;
        let wrong = |what| FormatError::Field { at, what };
        let (manifest, rest) = postcard::take_from_bytes::<Self>(body)
            .map_err(|_| wrong("the description can't be read"))?;
        if !rest.is_empty() {
            return Err(wrong("something follows the description"));
        }
        manifest.check().map_err(wrong)?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.state.bytes > lazyvm_wire::STATE_MAX as u64 {
            return Err("the state is longer than any");
        }
        if self.index.bytes > index_bytes(chunks(&self.layout)) {
            return Err("the index is longer than this memory's can be");
        }
        if self.memory_bytes < HEADER_LEN as u64 || self.memory_bytes > i64::MAX as u64 {
            return Err("the memory file has a length that it can't have");
        }
        let path_is_wrong =
            |base: &Base| base.path.len() > BASE_PATH_MAX || base.path.contains('\0');
        if self.base.as_ref().is_some_and(path_is_wrong) {
            return Err("the base's path can't be one");
        }
        Ok(())
    }

    /// Pages of a chunk.
    pub fn chunk_range(&self, chunk: u64) -> PageRange {
        chunk_range(&self.layout, chunk)
    }
}

/// Chunks of an image.
pub fn chunks(layout: &Layout) -> u64 {
    layout.pages().div_ceil(CHUNK_PAGES)
}

/// Pages of a chunk of an image.
pub fn chunk_range(layout: &Layout, chunk: u64) -> PageRange {
    let first = PageIndex(chunk.saturating_mul(CHUNK_PAGES));
    PageRange::new(first, CHUNK_PAGES).intersect(layout.range())
}

/// What the memory file begins with.
pub fn memory_header(id: SnapshotId) -> Vec<u8> {
    head(MEMORY_MAGIC, 0, id)
}

/// Checks what a memory file begins with, [`HEADER_LEN`] bytes of it.
///
/// # Errors
/// [`FormatError`].
pub fn check_memory_header(bytes: &[u8], id: SnapshotId) -> Result<(), FormatError> {
    if check_head(bytes, MEMORY_MAGIC)? != 0 {
        return Err(FormatError::Field {
            at: 12,
            what: "something where nothing is",
        });
    }
    check_id(bytes, id)
}

fn head(magic: &[u8; 8], third: u32, id: SnapshotId) -> Vec<u8> {
    let mut bytes = magic.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(third.to_le_bytes());
    bytes.extend(id.0);
    bytes
}

/// Checks magic and version; gives the number behind them.
fn check_head(bytes: &[u8], magic: &[u8; 8]) -> Result<u32, FormatError> {
    let Some((found, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(FormatError::Length {
            found: bytes.len() as u64,
            expected: HEADER_LEN as u64,
        });
    };
    if found != magic {
        return Err(FormatError::Magic);
    }
    let number = |at: usize| {
        let part = rest.get(at..at + 4)?;
        Some(
            part.iter()
                .rev()
                .fold(0_u32, |sum, &byte| sum << 8 | u32::from(byte)),
        )
    };
    let (Some(version), Some(third), Some(_)) = (number(0), number(4), rest.get(8..24)) else {
        return Err(FormatError::Length {
            found: bytes.len() as u64,
            expected: HEADER_LEN as u64,
        });
    };
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    Ok(third)
}

/// Only after [`check_head`], which has seen to the length.
fn check_id(bytes: &[u8], id: SnapshotId) -> Result<(), FormatError> {
    let mut found = SnapshotId([0; 16]);
    found.0.copy_from_slice(&bytes[16..HEADER_LEN]);
    if found != id {
        return Err(FormatError::Foreign(found));
    }
    Ok(())
}

fn check_length(found: u64, expected: u64) -> Result<(), FormatError> {
    if found != expected {
        return Err(FormatError::Length { found, expected });
    }
    Ok(())
}
