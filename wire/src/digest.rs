//! The digest by which both sides compare pages.

use std::sync::OnceLock;

use crate::page::PAGE_SIZE;

/// Digest of one page's 4096 bytes: XXH3 with 64 bits. It finds errors; it is no defence against an attacker,
/// whom the connection's own authentication keeps out.
pub fn page_digest(page: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(page)
}

/// Digest of a page of zeros.
pub fn zero_digest() -> u64 {
    static ZERO: OnceLock<u64> = OnceLock::new();
    *ZERO.get_or_init(|| page_digest(&[0; PAGE_SIZE]))
}

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Blocks of a cache line or more let the compiler use vector instructions, and end early on the first data.
    let mut blocks = bytes.chunks_exact(128);
    blocks
        .by_ref()
        .all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
        && blocks.remainder().iter().all(|&byte| byte == 0)
}
