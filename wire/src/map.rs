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
//! The last block of an image has the pages that are left, and as tag 3 the bytes that these need, with zeros behind
//! the last page. Varints are LEB128 of five bytes at most. A sparse image of 1 TiB with 1,000 runs takes about
//! 10 KB, the worst image 0.003% of its memory.
//!
//! The map is encoded while no vCPU runs anywhere. So both directions work on words of 64 pages: even the worst 1 TiB
//! image takes tens of milliseconds, where bit by bit it takes seconds.

use bitvec::prelude::{BitSlice, BitVec, Lsb0};

use crate::layout::{Backing, Layout};
use crate::page::{IMAGE_PAGES_MAX, PageIndex, PageRange};

/// Pages in a block of the encoding: 128 MiB.
pub const BLOCK_PAGES: u64 = 32 * 1024;

const WORD_PAGES: u64 = u64::BITS as u64;
const BLOCK_WORDS: usize = (BLOCK_PAGES / WORD_PAGES) as usize;
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
///
/// ```
/// use lazyvm_wire::{PageIndex, PageMap, PageRange};
///
/// // 1 TiB, of which 16 MiB hold data.
/// let pages = 1 << 28;
/// let mut map = PageMap::zeroed(pages);
/// map.set_data(PageRange::new(PageIndex(1 << 20), 4096));
///
/// let bytes = map.encode();
/// assert!(bytes.len() < 32);
/// assert_eq!(PageMap::decode(&bytes, pages)?, map);
/// # Ok::<(), lazyvm_wire::PageMapError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct PageMap {
    // The bits of the last word that are past the image are always zero.
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
    /// All pages zero. Takes a bit a page of memory, so `pages` is one that the caller has bounded.
    pub fn zeroed(pages: u64) -> Self {
        Self {
            bits: BitVec::repeat(false, pages as usize),
        }
    }

    /// One with these bits.
    pub fn from_bits(mut bits: BitVec<u64, Lsb0>) -> Self {
        // A bit vector may begin or end within a word; the encoding goes by whole words.
        bits.force_align();
        bits.set_uninitialized(false);
        Self { bits }
    }

    /// Marks pages as data. What is past the image is left out.
    pub fn set_data(&mut self, range: PageRange) {
        let range = range.intersect(PageRange::new(PageIndex(0), self.pages()));
        if !range.is_empty() {
            self.bits[range.first.as_usize()..range.end().as_usize()].fill(true);
        }
    }

    /// Marks pages as zero. What is past the image is left out.
    pub fn set_zero(&mut self, range: PageRange) {
        let range = range.intersect(PageRange::new(PageIndex(0), self.pages()));
        if !range.is_empty() {
            self.bits[range.first.as_usize()..range.end().as_usize()].fill(false);
        }
    }

    /// Marks a huge page as data where any of its pages is: it is sent and put in place as a whole. The map is one of this
    /// layout's image.
    pub fn round_to_units(&mut self, layout: &Layout) {
        for (number, region) in layout.regions().iter().enumerate() {
            let huge = region.backing != Backing::Small;
            let range = layout.region_range(number).filter(|_| huge);
            let bits = range.and_then(|range| {
                let bits = range.first.as_usize()..range.end().as_usize();
                self.bits.get_mut(bits)
            });
            for unit in bits
                .into_iter()
                .flat_map(|bits| bits.chunks_mut(region.backing.pages() as usize))
            {
                let any = unit.any();
                unit.fill(any);
            }
        }
    }

    /// The bits, one a page.
    pub fn bits(&self) -> &BitSlice<u64, Lsb0> {
        &self.bits
    }

    /// Pages that may hold data.
    pub fn data_pages(&self) -> u64 {
        self.bits.count_ones() as u64
    }

    fn pages(&self) -> u64 {
        self.bits.len() as u64
    }

    /// The bytes, in the form above; [`PAGE_MAP_BYTES_MAX`] at most for any image that a layout allows.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut uniform: Option<(u8, u64)> = None;
        let mut pages_left = self.pages();
        for words in self.bits.as_raw_slice().chunks(BLOCK_WORDS) {
            let block = Block {
                words,
                pages: BLOCK_PAGES.min(pages_left),
            };
            pages_left -= block.pages;
            match (&mut uniform, block.uniform_tag()) {
                (Some((same, count)), Some(tag)) if *same == tag => *count += 1,
                (pending, tag) => {
                    put_uniform(&mut out, pending.take());
                    match tag {
                        Some(tag) => *pending = Some((tag, 1)),
                        None => block.put_mixed(&mut out),
                    }
                }
            }
        }
        put_uniform(&mut out, uniform);
        out
    }

    /// Reads the map of an image of `pages` pages, as many as the layout has. Takes a bit a page of memory.
    ///
    /// # Errors
    /// [`PageMapError`] unless the bytes are the map of exactly that many pages.
    pub fn decode(bytes: &[u8], pages: u64) -> Result<Self, PageMapError> {
        if pages > IMAGE_PAGES_MAX {
            return Err(PageMapError { at: 0 });
        }
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

    /// Reads one row at page `start`, a block's first, and gives the page behind the row.
    fn decode_row(&mut self, input: &mut Input<'_>, start: u64) -> Option<u64> {
        let pages = self.pages();
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
            TAG_RUNS => self.decode_runs(input, PageRange::new(PageIndex(start), block)),
            TAG_BITS => self.decode_bits(input, PageRange::new(PageIndex(start), block)),
            _ => None,
        }
    }

    fn decode_runs(&mut self, input: &mut Input<'_>, block: PageRange) -> Option<u64> {
        let runs = input.varint()?;
        let end = block.end().0;
        let mut page = block.first.0;
        for run in 0..runs {
            let length = input.varint()?;
            // Only the very first run may be empty: it says that the block begins with data.
            if length > end - page || (length == 0 && run != 0) {
                return None;
            }
            if run % 2 == 1 {
                self.set_data(PageRange::new(PageIndex(page), length));
            }
            page += length;
        }
        (page == end).then_some(end)
    }

    fn decode_bits(&mut self, input: &mut Input<'_>, block: PageRange) -> Option<u64> {
        let bytes = input.take(block.count.div_ceil(8) as usize)?;
        let past_the_end = block.count % 8;
        if past_the_end != 0 && bytes.last()? >> past_the_end != 0 {
            return None;
        }
        let first_word = (block.first.0 / WORD_PAGES) as usize;
        let words = &mut self.bits.as_raw_mut_slice()[first_word..];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks(size_of::<u64>())) {
            let mut whole = [0; size_of::<u64>()];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(whole);
        }
        Some(block.end().0)
    }
}

impl std::fmt::Debug for PageMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageMap")
            .field("pages", &self.pages())
            .field("data_pages", &self.data_pages())
            .finish()
    }
}

/// The pages of one block, or of what is left for the last one.
struct Block<'a> {
    words: &'a [u64],
    pages: u64,
}

impl Block<'_> {
    /// The tag for a block that is all zeros or all data.
    fn uniform_tag(&self) -> Option<u8> {
        match self.words.first()? {
            0 => self.words.iter().all(|&word| word == 0).then_some(TAG_ZERO),
            _ => {
                let data: u64 = self
                    .words
                    .iter()
                    .map(|word| u64::from(word.count_ones()))
                    .sum();
                (data == self.pages).then_some(TAG_DATA)
            }
        }
    }

    fn put_mixed(&self, out: &mut Vec<u8>) {
        let bits_len = self.pages.div_ceil(8) as usize;
        let start = out.len();
        // A run takes a byte at least: with too many of them there is no need to look at each.
        let run_count = self
            .edges()
            .map(|word| word.count_ones() as usize)
            .sum::<usize>()
            + 1;
        if run_count < bits_len {
            self.put_runs(out, run_count as u64);
            if out.len() - start <= bits_len {
                return;
            }
            out.truncate(start);
        }
        out.push(TAG_BITS);
        out.extend(self.words.iter().flat_map(|word| word.to_le_bytes()));
        out.truncate(start + 1 + bits_len);
    }

    fn put_runs(&self, out: &mut Vec<u8>, run_count: u64) {
        out.push(TAG_RUNS);
        put_varint(out, run_count);
        let mut run_start = 0;
        for (number, mut word) in self.edges().enumerate() {
            while word != 0 {
                let edge = number as u64 * WORD_PAGES + u64::from(word.trailing_zeros());
                put_varint(out, edge - run_start);
                run_start = edge;
                word &= word - 1;
            }
        }
        put_varint(out, self.pages - run_start);
    }

    /// A bit a page, set where the page differs from the one ahead of it; ahead of the first is a zero page.
    fn edges(&self) -> impl Iterator<Item = u64> {
        let mut before = 0;
        let mut pages_left = self.pages;
        self.words.iter().map(move |&word| {
            let edges = word ^ (word << 1 | before);
            before = word >> (WORD_PAGES - 1);
            let pages = pages_left.min(WORD_PAGES);
            pages_left -= pages;
            // Behind the last page there is no edge.
            edges & (u64::MAX >> (WORD_PAGES - pages))
        })
    }
}

fn put_uniform(out: &mut Vec<u8>, uniform: Option<(u8, u64)>) {
    if let Some((tag, blocks)) = uniform {
        out.push(tag);
        put_varint(out, blocks);
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
