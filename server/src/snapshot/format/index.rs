//! The index: where each chunk is, and what it is known by.

use super::{
    FormatError, HEADER_LEN, Manifest, SnapshotId, check_head, check_id, check_length, head,
};

/// Bytes of an index entry.
pub const ENTRY_LEN: usize = 48;

/// Bytes ahead of the index's entries.
pub const INDEX_HEADER_LEN: usize = HEADER_LEN + 8;

const INDEX_MAGIC: &[u8; 8] = b"lazyvmIX";

/// Length of an index with as many entries.
pub fn index_bytes(entries: u64) -> u64 {
    entries
        .saturating_mul(ENTRY_LEN as u64)
        .saturating_add(INDEX_HEADER_LEN as u64)
}

/// Where a chunk's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the memory file, as they are.
    Raw(Stored),
    /// In the memory file, compressed with zstd.
    Zstd(Stored),
    /// In the base.
    Base,
}

/// Bytes in the memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Where they begin.
    pub offset: u64,
    /// How many, in bytes.
    pub length: u32,
    /// XXH3-64 of them as they are in the file.
    pub digest: u64,
}

/// A chunk that is not all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub chunk: u64,
    /// A bit for each of its pages, lowest first, set where it is not all zeros.
    pub data: u16,
    /// XXH3-128 of its pages.
    pub digest: u128,
    /// Where it is.
    pub place: Place,
}

impl Entry {
    fn encode(&self) -> [u8; ENTRY_LEN] {
        let none = Stored {
            offset: 0,
            length: 0,
            digest: 0,
        };
        let (kind, stored) = match self.place {
            Place::Raw(stored) => (0_u16, stored),
            Place::Zstd(stored) => (1, stored),
            Place::Base => (2, none),
        };
        let mut bytes = [0; ENTRY_LEN];
        bytes[..8].copy_from_slice(&self.chunk.to_le_bytes());
        bytes[8..16].copy_from_slice(&stored.offset.to_le_bytes());
        bytes[16..20].copy_from_slice(&stored.length.to_le_bytes());
        bytes[20..22].copy_from_slice(&kind.to_le_bytes());
        bytes[22..24].copy_from_slice(&self.data.to_le_bytes());
        bytes[24..32].copy_from_slice(&stored.digest.to_le_bytes());
        bytes[32..].copy_from_slice(&self.digest.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], manifest: &Manifest) -> Result<Self, &'static str> {
        let number = |from: usize, length: usize| {
            let mut number = [0; 16];
            number[..length].copy_from_slice(&bytes[from..from + length]);
            u128::from_le_bytes(number)
        };
        let stored = Stored {
            offset: number(8, 8) as u64,
            length: number(16, 4) as u32,
            digest: number(24, 8) as u64,
        };
        let place = match number(20, 2) {
            0 => Place::Raw(stored),
            1 => Place::Zstd(stored),
            2 => Place::Base,
            _ => return Err("a chunk in a place that is not known"),
        };
        let entry = Self {
            chunk: number(0, 8) as u64,
            data: number(22, 2) as u16,
            digest: number(32, 16),
            place,
        };
        entry.check(manifest, stored)?;
        Ok(entry)
    }

    fn check(&self, manifest: &Manifest, stored: Stored) -> Result<(), &'static str> {
        let range = manifest.chunk_range(self.chunk);
        if range.is_empty() {
            return Err("a chunk behind the memory's end");
        }
        if self.data == 0 || u64::from(self.data) >> range.count != 0 {
            return Err("a chunk with data in pages that it does not have");
        }
        let length = u64::from(stored.length);
        match self.place {
            Place::Base if manifest.base.is_none() => Err("a chunk in the base, and there is none"),
            Place::Base if stored.offset != 0 || length != 0 || stored.digest != 0 => {
                Err("a chunk both here and in the base")
            }
            Place::Base => Ok(()),
            Place::Raw(_) if length != range.bytes() => Err("a chunk of another length"),
            Place::Zstd(_) if length == 0 || length >= range.bytes() => {
                Err("a chunk that is longer for being compressed")
            }
            Place::Raw(_) | Place::Zstd(_) => {
                let end = stored.offset.checked_add(length);
                let is_in = stored.offset >= HEADER_LEN as u64
                    && end.is_some_and(|end| end <= manifest.memory_bytes);
                is_in
                    .then_some(())
                    .ok_or("a chunk outside of the memory file")
            }
        }
    }
}

/// The index's bytes. Entries ascend.
pub fn encode_index(id: SnapshotId, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = head(INDEX_MAGIC, ENTRY_LEN as u32, id);
    bytes.extend((entries.len() as u64).to_le_bytes());
    entries
        .iter()
        .for_each(|entry| bytes.extend(entry.encode()));
    bytes
}

/// Reads the index that this manifest names.
///
/// # Errors
/// [`FormatError`].
pub fn decode_index(bytes: &[u8], manifest: &Manifest) -> Result<Vec<Entry>, FormatError> {
    manifest.index.check(bytes)?;
    if check_head(bytes, INDEX_MAGIC)? != ENTRY_LEN as u32 {
        return Err(FormatError::Field {
            at: 12,
            what: "entries of another length",
        });
    }
    check_id(bytes, manifest.id)?;
    let count = bytes.get(HEADER_LEN..INDEX_HEADER_LEN).map_or(0, |count| {
        count
            .iter()
            .rev()
            .fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte))
    });
    check_length(bytes.len() as u64, index_bytes(count))?;
    let mut entries: Vec<Entry> = Vec::with_capacity(bytes.len() / ENTRY_LEN);
    let parts = bytes[INDEX_HEADER_LEN..].chunks_exact(ENTRY_LEN);
    for (number, part) in parts.enumerate() {
        let wrong = |what| FormatError::Field {
            at: index_bytes(number as u64),
            what,
        };
        let entry = Entry::decode(part, manifest).map_err(wrong)?;
        if entries.last().is_some_and(|last| last.chunk >= entry.chunk) {
            return Err(wrong("chunks out of order"));
        }
        entries.push(entry);
    }
    Ok(entries)
}
