//! Why pages can't be installed, in words.

use std::io;

use lazyvm_wire::PageRange;
use nix::errno::Errno;

use crate::fill::Cause;
use crate::table::MapLengthError;
use crate::uffd::EventError;

/// Pages that could not be installed. The first part of the range may be in place; the rest is as before.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The range is not in the image, or cuts a huge page.
    #[error("{0} can't be installed: not in the image, or not made of whole pages of the backing")]
    NotWholeUnits(PageRange),
    /// The data is not as long as the range.
    #[error("{range} can't be installed from {got} bytes")]
    Length {
        /// The pages.
        range: PageRange,
        /// Bytes that were given.
        got: usize,
    },
    /// The process whose memory it is has ended, or has unmapped it.
    #[error("{range} can't be installed: the memory's process is gone or has unmapped it")]
    Gone {
        /// The pages.
        range: PageRange,
        /// `ESRCH` or `ENOENT`.
        #[source]
        source: Errno,
    },
    /// The kernel refuses.
    #[error("{range} can't be installed")]
    Kernel {
        /// The pages.
        range: PageRange,
        /// `ENOMEM` when the host's memory is used up.
        #[source]
        source: Errno,
    },
    /// The file can't be written.
    #[error("{range} can't be written to the memory's file")]
    Write {
        /// The pages.
        range: PageRange,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The file can't be read.
    #[error("{range} can't be read from the memory's file")]
    Read {
        /// The pages.
        range: PageRange,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel said for too long that the memory map is changing.
    #[error("{0} can't be installed: the memory map keeps changing")]
    Stuck(PageRange),
    /// An event that had to be read first could not be.
    #[error("an event that holds up installs can't be handled")]
    Event(#[from] EventError),
    /// The page map is of another image.
    #[error(transparent)]
    MapLength(#[from] MapLengthError),
}

impl InstallError {
    pub(super) fn of(range: PageRange, cause: Cause) -> Self {
        match cause {
            Cause::Gone(source) => Self::Gone { range, source },
            Cause::Kernel(source) => Self::Kernel { range, source },
            Cause::Write(source) => Self::Write { range, source },
            Cause::Read(source) => Self::Read { range, source },
            Cause::EventUnread | Cause::Stuck => Self::Stuck(range),
        }
    }
}

/// Memory that can't be let go of yet.
#[derive(Debug, thiserror::Error)]
pub enum CompleteError {
    /// Data of some pages is still to come.
    #[error("{remaining} pages have not arrived, {first} first")]
    Incomplete {
        /// How many.
        remaining: u64,
        /// The first run of them.
        first: PageRange,
    },
    /// Clearing what a zero page left in the file failed, or reading the last events.
    #[error(transparent)]
    Install(#[from] InstallError),
    /// The kernel refuses.
    #[error("region {region} can't be unregistered from userfaultfd")]
    Unregister {
        /// The region's number.
        region: usize,
        /// The system's answer.
        #[source]
        source: Errno,
    },
}
