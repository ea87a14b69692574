//! The page map: which pages of the image hold data, and which are zero.
//!
//! Encoded by blocks of [`BLOCK_PAGES`] pages, so that it is small for a sparse image and bounded for any:
//!
//! ```text
//! row     := tag (u8) body
//! tag 0   := blocks of zeros:      count of blocks  (varint)
//! tag 1   := blocks of data:       count of blocks  (varint)
//! tag 2   := one block of runs:    count of runs    (varint), then the runs' lengths (varints), zero pages first;
//!                                  the last run reaches to the block's end
//! tag 3   := one block as it is:   a bit a page, lowest first, 4096 bytes
//! ```
//!
//! Varints are LEB128. A sparse image of 1 TiB with 1,000 runs takes about 10 KB, the worst image 0.003% of its memory.

use bitvec::prelude::{BitSlice, BitVec, Lsb0};

use crate::page::{IMAGE_PAGES_MAX, PageIndex, PageRange};

/// Pages in a block of the encoding: 128 MiB.
pub const BLOCK_PAGES: u64 = 32 * 1024;

const BLOCK_BYTES: usize = BLOCK_PAGES as usize / 8;

/// Largest encoding, in bytes: every block as it is, for the largest image.
pub const PAGE_MAP_BYTES_MAX: usize = page_map_bytes_max(IMAGE_PAGES_MAX);

/// Largest encoding of a map of `pages` pages, in bytes.
pub const fn page_map_bytes_max(pages: u64) -> usize {
    pages.div_ceil(BLOCK_PAGES) as usize * (BLOCK_BYTES + 1)
}

const TAG_ZERO: u8 = 0;
const TAG_DATA: u8 = 1;
const TAG_RUNS: u8 = 2;
const TAG_BITS: u8 = 3;

/// A bit a page: set where the page may hold anything but zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageMap {
    bits: BitVec<u64, Lsb0>,
}

/// Bytes that are no page map of this image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a page map that can't be read at byte {at}")]
pub struct PageMapError {
    /// Where, in the encoding.
    pub at: usize,
}

impl PageMap {
    /// All pages zero.
    pub fn zeroed(pages: u64) -> Self {
        Self {
            bits: BitVec::repeat(false, pages as usize),
        }
    }

    /// Marks pages as data. What is past the image is left out.
    pub fn set_data(&mut self, range: PageRange) {
        let range = range.intersect(PageRange::new(PageIndex(0), self.bits.len() as u64));
        self.bits[range.first.as_usize()..range.end().as_usize()].fill(true);
    }

    /// The bits, one a page.
    pub fn bits(&self) -> &BitSlice<u64, Lsb0> {
        &self.bits
    }

    /// Pages that may hold data.
    pub fn data_pages(&self) -> u64 {
        self.bits.count_ones() as u64
    }

    /// The bytes, in the form above.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut uniform: Option<(bool, u64)> = None;
        for block in self.bits.chunks(BLOCK_PAGES as usize) {
            let value = block.first().is_some_and(|bit| *bit);
            let is_uniform = if value { block.all() } else { block.not_any() };
            match (&mut uniform, is_uniform) {
                (Some((same, count)), true) if *same == value => *count += 1,
                (pending, _) => {
                    flush_uniform(&mut out, pending.take());
                    if is_uniform {
                        *pending = Some((value, 1));
                    } else {
                        encode_mixed(&mut out, block);
                    }
                }
            }
        }
        flush_uniform(&mut out, uniform);
        out
    }

    /// Reads the map of an image of `pages` pages, which the caller has bounded.
    ///
    /// # Errors
    /// [`PageMapError`] unless the bytes are the map of exactly that many pages.
    pub fn decode(bytes: &[u8], pages: u64) -> Result<Self, PageMapError> {
        let mut map = Self::zeroed(pages);
        let mut input = Input { bytes, at: 0 };
        let mut page = 0;
        while page < pages {
            page = map
                .decode_row(&mut input, page)
                .ok_or(PageMapError { at: input.at })?;
        }
        if input.at != bytes.len() {
            return Err(PageMapError { at: input.at });
        }
        Ok(map)
    }

    /// Reads one row at page `start` and gives the page behind it.
    fn decode_row(&mut self, input: &mut Input<'_>, start: u64) -> Option<u64> {
        let pages = self.bits.len() as u64;
        let block = BLOCK_PAGES.min(pages - start);
        match input.byte()? {
            tag @ (TAG_ZERO | TAG_DATA) => {
                let blocks = input.varint()?;
                let left = (pages - start).div_ceil(BLOCK_PAGES);
                if blocks == 0 || blocks > left {
                    return None;
                }
                let end = (start + blocks * BLOCK_PAGES).min(pages);
                if tag == TAG_DATA {
                    self.set_data(PageRange::new(PageIndex(start), end - start));
                }
                Some(end)
            }
            TAG_RUNS => {
                let runs = input.varint()?;
                let mut page = start;
                for run in 0..runs {
                    let length = input.varint()?;
                    // Only the very first run may be empty: it says that the block begins with data.
                    if length > start + block - page || (length == 0 && run != 0) {
                        return None;
                    }
                    if run % 2 == 1 {
                        self.set_data(PageRange::new(PageIndex(page), length));
                    }
                    page += length;
                }
                (page == start + block).then_some(page)
            }
            TAG_BITS => {
                let bytes = input.take((block as usize).div_ceil(8))?;
                let bits = BitSlice::<u8, Lsb0>::from_slice(bytes);
                if bits[block as usize..].any() {
                    return None;
                }
                let target = &mut self.bits[start as usize..(start + block) as usize];
                target.clone_from_bitslice(&BitVec::<u64, Lsb0>::from_iter(
                    bits[..block as usize].iter().by_vals(),
                ));
                Some(start + block)
            }
            _ => None,
        }
    }
}

fn flush_uniform(out: &mut Vec<u8>, uniform: Option<(bool, u64)>) {
    if let Some((value, blocks)) = uniform {
        out.push(if value { TAG_DATA } else { TAG_ZERO });
        put_varint(out, blocks);
    }
}

fn encode_mixed(out: &mut Vec<u8>, block: &BitSlice<u64, Lsb0>) {
    let start = out.len();
    let mut runs = Vec::new();
    let mut rest = block;
    let mut value = false;
    while !rest.is_empty() {
        let length = if value {
            rest.leading_ones()
        } else {
            rest.leading_zeros()
        };
        runs.push(length as u64);
        rest = &rest[length..];
        value = !value;
    }
    out.push(TAG_RUNS);
    put_varint(out, runs.len() as u64);
    for run in runs {
        put_varint(out, run);
    }
    if out.len() - start > block.len().div_ceil(8) {
        out.truncate(start);
        out.push(TAG_BITS);
        let mut bytes = BitVec::<u8, Lsb0>::from_iter(block.iter().by_vals());
        bytes.set_uninitialized(false);
        out.extend_from_slice(bytes.as_raw_slice());
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(length)?)?;
        self.at += length;
        Some(taken)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        // Page counts have 33 bits at most: five groups of seven.
        for shift in (0..35).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
}
