//! What can be wrong with memory, in words.

use std::fmt;

use lazyvm_wire::Backing;
use nix::errno::Errno;

/// Memory that can't be made, or that is not what it has to be.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The system gave no memory.
    #[error("no {bytes} of memory for region {region}", bytes = Size(*.bytes))]
    Map {
        /// The region's name or number.
        region: String,
        /// Its length in bytes.
        bytes: u64,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// The pool of huge pages is too small.
    #[error(
        "no {bytes} of huge pages for region {region}: {pages} free huge pages of 2 MiB are needed, see \
         /proc/sys/vm/nr_hugepages", bytes = Size(*.bytes), pages = .bytes / Backing::Huge2M.bytes()
    )]
    HugePages {
        /// The region's name.
        region: String,
        /// Its length in bytes.
        bytes: u64,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// A region without pages, with an address or an offset that its pages cannot have, or past the address space.
    #[error("region {region} ({bytes} at {host:#x}) is not made of whole pages of its backing", bytes = Size(*.bytes))]
    Unaligned {
        /// The region's number.
        region: usize,
        /// Its address.
        host: u64,
        /// Its length in bytes.
        bytes: u64,
    },
    /// Two regions share addresses.
    #[error("regions {0} and {1} overlap in the host's memory")]
    Overlap(usize, usize),
    /// Minor faults exist for shared memory only.
    #[error(
        "region {0} has no shared file, without which its pages can't be installed in minor mode"
    )]
    NoFile(usize),
    /// The layout has another number of regions.
    #[error("memory layouts that differ: {expected} regions at the source, {got} here")]
    RegionCount {
        /// Regions of the layout.
        expected: usize,
        /// Regions of this memory.
        got: usize,
    },
    /// A region of another size.
    #[error(
        "memory sizes that differ: region {region} has {expected} at the source, {got} here",
        expected = Size(*.expected), got = Size(*.got)
    )]
    RegionSize {
        /// The region's name.
        region: String,
        /// Its bytes in the layout.
        expected: u64,
        /// Its bytes here.
        got: u64,
    },
    /// Memory that was cut into other regions has another size.
    #[error(
        "memory sizes that differ: {expected} at the source, {got} here",
        expected = Size(*.expected), got = Size(*.got)
    )]
    ImageSize {
        /// Bytes at the source.
        expected: u64,
        /// Bytes here.
        got: u64,
    },
    /// A region of other pages.
    #[error(
        "page sizes that differ: region {region} has pages of {expected} at the source, of {got} here",
        expected = Size(.expected.bytes()), got = Size(.got.bytes())
    )]
    RegionBacking {
        /// The region's name.
        region: String,
        /// Its backing in the layout.
        expected: Backing,
        /// Its backing here.
        got: Backing,
    },
}

/// A read or a write of lazy memory that can't be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// Past the end of the image.
    #[error("{length} bytes at {offset:#x} are not all in the image of {image} bytes")]
    OutOfImage {
        /// Offset in the image, in bytes.
        offset: u64,
        /// Bytes that were asked for.
        length: usize,
        /// Bytes in the image.
        image: u64,
    },
    /// The memory is mapped in another process only.
    #[error("the memory is another process's")]
    OtherProcess,
}

/// Bytes in the largest unit that gives a whole number.
pub(crate) struct Size(pub(crate) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units
            .iter()
            .find(|(shift, _)| self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift))
        {
            Some((shift, unit)) => write!(f, "{} {unit}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}
