//! Memory images with known content.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use lazyvm_wire::PAGE_SIZE;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

/// Pages written at a time.
const CHUNK_PAGES: u64 = 256;

/// What an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Content {
    /// No page like another, none compressible.
    Random,
    /// Pages of zeros that the source has to find out to be zero: they were written, so no hole tells.
    Zero,
    /// Runs of 64 pages, random and zero in turn.
    Mixed,
}

/// Makes an image of whole pages in a memfd.
pub(crate) fn make(bytes: u64, content: Content) -> io::Result<File> {
    let file = File::from(memfd_create("lazyvm-bench", MFdFlags::MFD_CLOEXEC)?);
    let pages = bytes / PAGE_SIZE as u64;
    file.set_len(pages * PAGE_SIZE as u64)?;
    let mut state = 0x853c_49e6_748f_ea9b_u64;
    let mut chunk = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
    for first in (0..pages).step_by(CHUNK_PAGES as usize) {
        let count = CHUNK_PAGES.min(pages - first);
        let part = &mut chunk[..count as usize * PAGE_SIZE];
        for (offset, page) in (first..).zip(part.chunks_exact_mut(PAGE_SIZE)) {
            let random = match content {
                Content::Random => true,
                Content::Zero => false,
                Content::Mixed => offset / 64 % 2 == 0,
            };
            if random {
                fill_random(page, &mut state)
            } else {
                page.fill(0)
            }
        }
        file.write_all_at(part, first * PAGE_SIZE as u64)?;
    }
    Ok(file)
}

fn fill_random(page: &mut [u8], state: &mut u64) {
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&next_random(state).to_le_bytes());
    }
}

/// The next of a row of pseudo-random numbers (xorshift64*).
pub(crate) fn next_random(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}
