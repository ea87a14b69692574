//! Page numbers, ranges and guest-physical addresses, as distinct types.
//!
//! A virtual machine's memory is an *image*: its regions in ascending guest-physical order, end to
//! end. A [`PageIndex`] counts the image's 4 KiB pages; [`crate::Layout`] maps it to a [`Gpa`].

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in a page, the unit in which the image is counted whatever backs it.
pub const PAGE_SIZE: usize = 4096;

/// The same as a shift.
pub const PAGE_SHIFT: u32 = 12;

/// Most pages an image may have: 16 TiB.
pub const IMAGE_PAGES_MAX: u64 = 1 << 32;

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpa({:#x})", self.0)
    }
}

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The number of a 4 KiB page of the image, from 0.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The page that holds this byte of the image.
    pub const fn of_byte(offset: u64) -> Self {
        Self(offset >> PAGE_SHIFT)
    }

    /// Offset of the page's first byte in the image.
    ///
    /// Saturates, so that a page number that was not checked gives an offset past every image, not one inside.
    pub const fn byte_offset(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE as u64)
    }

    /// As an index into an array with an entry a page.
    pub const fn as_usize(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {}", self.0)
    }
}

/// A run of pages that follow each other in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRange {
    /// The first page.
    pub first: PageIndex,
    /// How many, in pages.
    pub count: u64,
}

impl PageRange {
    /// `count` pages from `first`.
    pub const fn new(first: PageIndex, count: u64) -> Self {
        Self { first, count }
    }

    /// One page.
    pub const fn one(page: PageIndex) -> Self {
        Self::new(page, 1)
    }

    /// The page behind the last one.
    ///
    /// Saturates, so that a range from outside may be asked before it is checked.
    pub const fn end(self) -> PageIndex {
        PageIndex(self.first.0.saturating_add(self.count))
    }

    /// The length in bytes. Saturates, as [`PageIndex::byte_offset`] does.
    pub const fn bytes(self) -> u64 {
        self.count.saturating_mul(PAGE_SIZE as u64)
    }

    /// Whether nothing is in it.
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Whether `page` is in it.
    pub const fn contains(self, page: PageIndex) -> bool {
        page.0 >= self.first.0 && page.0 < self.end().0
    }

    /// Each page, in order.
    pub fn pages(self) -> impl ExactSizeIterator<Item = PageIndex> {
        // An exact size needs `usize` bounds; an image page number fits one on every 64-bit target.
        (self.first.as_usize()..self.end().as_usize()).map(|page| PageIndex(page as u64))
    }

    /// The part that both ranges hold; empty when there is none.
    pub fn intersect(self, other: Self) -> Self {
        let first = self.first.max(other.first);
        let end = self.end().min(other.end());
        Self::new(first, end.0.saturating_sub(first.0))
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}..{}", self.first.0, self.end().0)
    }
}
