//! The profile: which pages earlier resumes waited for.

use lazyvm_wire::{IMAGE_PAGES_MAX, PageIndex};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    FormatError, HEADER_LEN, Manifest, SnapshotId, check_head, check_id, check_length, head,
};

/// Most pages of a profile: 256 MiB.
pub const PROFILE_PAGES_MAX: usize = 64 * 1024;

const PROFILE_MAGIC: &[u8; 8] = b"lazyvmPR";

/// The profile's bytes: pages in the order in which they are needed.
pub fn encode_profile(id: SnapshotId, pages: &[PageIndex]) -> Vec<u8> {
    let pages = &pages[..pages.len().min(PROFILE_PAGES_MAX)];
    let mut bytes = head(PROFILE_MAGIC, pages.len() as u32, id);
    pages
        .iter()
        .for_each(|page| bytes.extend((page.0 as u32).to_le_bytes()));
    bytes.extend(xxh3_64(&bytes).to_le_bytes());
    bytes
}

/// Reads the profile of this snapshot.
///
/// # Errors
/// [`FormatError`].
pub fn decode_profile(bytes: &[u8], manifest: &Manifest) -> Result<Vec<PageIndex>, FormatError> {
    let count = check_head(bytes, PROFILE_MAGIC)? as usize;
    if count > PROFILE_PAGES_MAX {
        return Err(FormatError::Field {
            at: 12,
            what: "more pages than there may be",
        });
    }
    check_id(bytes, manifest.id)?;
    check_length(bytes.len() as u64, (HEADER_LEN + count * 4 + 8) as u64)?;
    let (covered, digest) = bytes.split_at(bytes.len() - 8);
    if xxh3_64(covered).to_le_bytes() != digest {
        return Err(FormatError::Digest(covered.len() as u64));
    }
    let mut pages = Vec::with_capacity(count);
    for (number, part) in covered[HEADER_LEN..].chunks_exact(4).enumerate() {
        let page = part
            .iter()
            .rev()
            .fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte));
        if page >= manifest.layout.pages() {
            return Err(FormatError::Field {
                at: (HEADER_LEN + number * 4) as u64,
                what: "a page behind the memory's end",
            });
        }
        pages.push(PageIndex(page));
    }
    Ok(pages)
}

const _: () = assert!(
    IMAGE_PAGES_MAX <= 1 << 32,
    "a page's number fits a profile's u32"
);
