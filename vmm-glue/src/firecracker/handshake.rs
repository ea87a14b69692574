//! What Firecracker says on the page-fault socket when it has made its memory: a JSON array with an object for each
//! region, and beside its first byte the userfaultfd. Pure logic; the destination brings the bytes.
//!
//! | Firecracker | fields of a region | the socket afterwards |
//! |---|---|---|
//! | 1.1 to 1.6 | `base_host_virt_addr`, `size`, `offset` | closed |
//! | 1.7 to 1.11 | and `page_size_kib`, whose value is in bytes | closed |
//! | from 1.12 on | and `page_size`, with the same value | stays open |
//!
//! The array has neither a length in front nor an end behind it: it is over where its brackets are. Fields that are
//! not known here are passed over, so that a later release may add some.

use lazyvm_pager::{InstallMode, LazyMemory, LazyRegion};
use lazyvm_wire::{Backing, Layout, LayoutError, PAGE_SHIFT, PAGE_SIZE, Region};
use serde::Deserialize;

/// Longest message, in bytes; a region takes about 130 of them.
pub const MESSAGE_MAX: usize = 1 << 20;

/// Most descriptors that come with a message. The first is the userfaultfd; what others are for is not known here.
pub const DESCRIPTORS_MAX: usize = 3;

/// Most regions; as many as a layout may have.
pub const REGIONS_MAX: usize = lazyvm_wire::REGIONS_MAX;

/// A message that is none, or that tells of memory that can't be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// It ends too early.
    #[error(
        "Firecracker closed the page-fault socket after {0} bytes of its message, before the end"
    )]
    CutShort(usize),
    /// It does not end.
    #[error("Firecracker's message on the page-fault socket is longer than {MESSAGE_MAX} bytes")]
    TooLong,
    /// It is something else.
    #[error("what came on the page-fault socket is not Firecracker's list of memory regions: {0}")]
    NotAList(String),
    /// Control data was lost.
    #[error(
        "the descriptors that came on the page-fault socket were cut short; are there too many, or too many open files here?"
    )]
    DescriptorsCut,
    /// None or too many.
    #[error(
        "{0} descriptors came on the page-fault socket; Firecracker sends one, its userfaultfd"
    )]
    Descriptors(usize),
    /// It is a descriptor of something else.
    #[error("the descriptor that came on the page-fault socket is no userfaultfd, but {0}")]
    NotUserfaultfd(String),
    /// None or too many.
    #[error("Firecracker tells of {0} memory regions; from 1 to {REGIONS_MAX} can be served")]
    RegionCount(usize),
    /// A page size that is not served.
    #[error("memory region {region} has pages of {bytes} bytes; 4096 and 2097152 can be served")]
    PageSize {
        /// The region's number.
        region: usize,
        /// Its page size.
        bytes: u64,
    },
    /// Two page sizes for a region.
    #[error(
        "memory region {region} has two page sizes: page_size {page_size}, page_size_kib {page_size_kib}"
    )]
    PageSizes {
        /// The region's number.
        region: usize,
        /// The one.
        page_size: u64,
        /// The other, in bytes in spite of its name.
        page_size_kib: u64,
    },
    /// Address, size or offset is wrong.
    #[error(
        "memory region {region}: {what} {value:#x} is not a whole number of its pages, or out of range"
    )]
    Unaligned {
        /// The region's number.
        region: usize,
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Regions overlap in memory.
    #[error("memory regions {0} and {1} overlap in Firecracker's memory")]
    Overlap(usize, usize),
    /// Regions overlap in the snapshot's memory file, or leave something out.
    #[error(
        "memory region {region} is at {offset:#x} of the memory file, where {expected:#x} comes next"
    )]
    Offset {
        /// The region's number.
        region: usize,
        /// Its offset.
        offset: u64,
        /// Where the regions before it end.
        expected: u64,
    },
    /// No layout.
    #[error("Firecracker's memory regions can't be served")]
    Layout(#[source] LayoutError),
}

/// One region, as Firecracker tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandedRegion {
    /// Its first byte's address in Firecracker.
    pub host: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Where its bytes are in the snapshot's memory file.
    pub offset: u64,
    /// Its pages.
    pub backing: Backing,
}

/// All of the memory, checked: the regions by ascending offset, which follow each other without a gap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handshake {
    regions: Vec<HandedRegion>,
}

impl Handshake {
    /// Reads a whole message.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub fn parse(message: &[u8]) -> Result<Self, HandshakeError> {
        let told: Vec<Told> = serde_json::from_slice(message)
            .map_err(|error| HandshakeError::NotAList(error.to_string()))?;
        if told.is_empty() || told.len() > REGIONS_MAX {
            return Err(HandshakeError::RegionCount(told.len()));
        }
        let mut regions = told
            .iter()
            .enumerate()
            .map(|(number, told)| told.checked(number))
            .collect::<Result<Vec<_>, _>>()?;
        check_overlap(&regions)?;
        let mut by_offset: Vec<usize> = (0..regions.len()).collect();
        by_offset.sort_by_key(|&number| regions[number].offset);
        let mut expected = 0;
        for &number in &by_offset {
            let offset = regions[number].offset;
            if offset != expected {
                return Err(HandshakeError::Offset {
                    region: number,
                    offset,
                    expected,
                });
            }
            expected += regions[number].bytes;
        }
        regions.sort_by_key(|region| region.offset);
        Ok(Self { regions })
    }

    /// The regions, in the order of the memory file.
    pub fn regions(&self) -> &[HandedRegion] {
        &self.regions
    }

    /// Bytes of all regions.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|region| region.bytes).sum()
    }

    /// The region table of this memory.
    ///
    /// # Errors
    /// [`HandshakeError::Layout`] when it is larger than any machine may be.
    pub fn layout(&self) -> Result<Layout, HandshakeError> {
        let region = |(number, region): (usize, &HandedRegion)| Region {
            name: format!("firecracker{number}"),
            gpa: None,
            pages: region.bytes >> PAGE_SHIFT,
            backing: region.backing,
        };
        Layout::new(self.regions.iter().enumerate().map(region).collect())
            .map_err(HandshakeError::Layout)
    }

    /// The memory, for the pager.
    ///
    /// # Errors
    /// None for what [`Self::parse`] gave.
    pub fn memory(&self) -> Result<LazyMemory, lazyvm_pager::memory::MemoryError> {
        let region = |region: &HandedRegion| LazyRegion {
            host: region.host,
            pages: region.bytes >> PAGE_SHIFT,
            backing: region.backing,
            file: None,
        };
        LazyMemory::in_other_process(
            self.regions.iter().map(region).collect(),
            InstallMode::Missing,
        )
    }
}

/// A region in Firecracker's own words (`GuestRegionUffdMapping`).
#[derive(Deserialize)]
struct Told {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

impl Told {
    fn checked(&self, region: usize) -> Result<HandedRegion, HandshakeError> {
        let bytes = match (self.page_size, self.page_size_kib) {
            (Some(page_size), Some(page_size_kib)) if page_size != page_size_kib => {
                return Err(HandshakeError::PageSizes {
                    region,
                    page_size,
                    page_size_kib,
                });
            }
            (Some(bytes), _) | (None, Some(bytes)) => bytes,
            (None, None) => PAGE_SIZE as u64,
        };
        let backing = [Backing::Small, Backing::Huge2M]
            .into_iter()
            .find(|backing| backing.bytes() == bytes)
            .ok_or(HandshakeError::PageSize { region, bytes })?;
        let refuse = |what, value| HandshakeError::Unaligned {
            region,
            what,
            value,
        };
        let whole = |value: u64| value.is_multiple_of(bytes);
        let ends = |start: u64| start.checked_add(self.size).is_some();
        if self.size == 0 || !whole(self.size) {
            return Err(refuse("its size", self.size));
        }
        if !whole(self.base_host_virt_addr) || !ends(self.base_host_virt_addr) {
            return Err(refuse("its address", self.base_host_virt_addr));
        }
        if !whole(self.offset) || !ends(self.offset) {
            return Err(refuse("its offset", self.offset));
        }
        Ok(HandedRegion {
            host: self.base_host_virt_addr,
            bytes: self.size,
            offset: self.offset,
            backing,
        })
    }
}

fn check_overlap(regions: &[HandedRegion]) -> Result<(), HandshakeError> {
    let mut by_host: Vec<usize> = (0..regions.len()).collect();
    by_host.sort_by_key(|&number| regions[number].host);
    for pair in by_host.windows(2) {
        if regions[pair[0]].host + regions[pair[0]].bytes > regions[pair[1]].host {
            return Err(HandshakeError::Overlap(pair[0], pair[1]));
        }
    }
    Ok(())
}

/// Finds the end of the message in a stream of bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    message: Vec<u8>,
    /// Brackets that are open.
    depth: u32,
    in_string: bool,
    escaped: bool,
    begun: bool,
}

impl Decoder {
    /// Takes bytes in; gives the handshake when its last one is among them.
    ///
    /// # Errors
    /// [`HandshakeError`]; the stream is of no use any more.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Handshake>, HandshakeError> {
        for (at, &byte) in bytes.iter().enumerate() {
            if self.message.len() >= MESSAGE_MAX {
                return Err(HandshakeError::TooLong);
            }
            self.message.push(byte);
            if !self.take(byte)? {
                continue;
            }
            if !bytes[at + 1..].iter().all(u8::is_ascii_whitespace) {
                return Err(HandshakeError::NotAList(
                    "more follows behind it".to_owned(),
                ));
            }
            return Handshake::parse(&self.message).map(Some);
        }
        Ok(None)
    }

    /// The stream has ended without the handshake's end.
    pub fn end(&self) -> HandshakeError {
        HandshakeError::CutShort(self.message.len())
    }

    /// Whether this byte is the last one.
    fn take(&mut self, byte: u8) -> Result<bool, HandshakeError> {
        if !self.begun {
            if byte.is_ascii_whitespace() {
                return Ok(false);
            }
            if byte != b'[' {
                return Err(HandshakeError::NotAList(
                    "it does not begin with [".to_owned(),
                ));
            }
            self.begun = true;
        }
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return Ok(false);
        }
        match byte {
            b'"' => self.in_string = true,
            b'[' | b'{' => self.depth += 1,
            b']' | b'}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        Ok(self.depth == 0)
    }
}

#[cfg(test)]
mod tests;
