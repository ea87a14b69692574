//! Snapshots: a machine in files, taken while it runs, and served from there to any number of destinations.
//!
//! A directory holds one snapshot: the manifest, and the files that it names (`format.rs`). Replacing the manifest is the
//! one step that replaces the snapshot, so a crash leaves the old one or the new one. Files that no manifest names are
//! left-overs, which the next snapshot removes.

mod compare;
pub mod format;
mod known;
mod lead;
mod merge;
mod profile;
mod read;
mod ready;
mod take;
mod write;

use std::io;
use std::path::PathBuf;

pub use profile::SnapshotProfile;
pub use read::{Snapshot, SnapshotMachine, is_snapshot};
pub use take::{Progress, TakeError, Taken, take};

use format::{FormatError, SnapshotId};

/// Name of the manifest.
pub const MANIFEST: &str = "manifest.lazyvm";

/// What the other files' names begin with; the snapshot's ID follows.
const PREFIXES: [&str; 5] = ["memory-", "index-", "state-", "profile-", "manifest-"];

/// A snapshot that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file or the directory.
    #[error("can't {doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file is not what was written.
    #[error("{} is damaged, and the snapshot can't be used", path.display())]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Where in it.
        #[source]
        source: FormatError,
    },
    /// A chunk is not what was written.
    #[error(
        "{} is damaged at bytes {} to {}, which hold pages {first} to {last} of the memory: {what}", path.display(), offset, offset + length
    )]
    Chunk {
        /// The memory file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// Its first page.
        first: u64,
        /// Its last page.
        last: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// There is no manifest.
    #[error("{} holds no snapshot of lazyvm's", .0.display())]
    None(PathBuf),
    /// The base is gone or another one.
    #[error(
        "this snapshot has only what changed since its base, and {} is not that base any more: {what}; without it the \
         snapshot can't be used", path.display()
    )]
    Base {
        /// Where the base was.
        path: PathBuf,
        /// What is there.
        what: String,
    },
    /// The base is of another machine.
    #[error("{} can't be the base: {what}", path.display())]
    OtherBase {
        /// Where.
        path: PathBuf,
        /// Why not.
        what: String,
    },
    /// Other files are in the directory.
    #[error(
        "{} holds {found}, which is no file of a snapshot; name an empty or a new directory", path.display()
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// Somebody else is writing there.
    #[error("another lazyvm snapshot is writing to {}", .0.display())]
    Busy(PathBuf),
    /// No random bytes.
    #[error("the system gives no random bytes")]
    Random,
    /// What the machine says of itself is too long.
    #[error("the machine's description is longer than a snapshot's can be")]
    TooLarge,
}

fn file_name(prefix: &str, id: SnapshotId) -> String {
    format!("{prefix}{id}")
}

/// Whether a name is one that a snapshot's file has.
fn is_ours(name: &str) -> bool {
    let is_id = |rest: &str| rest.len() == 32 && rest.bytes().all(|byte| byte.is_ascii_hexdigit());
    name == MANIFEST
        || PREFIXES
            .iter()
            .any(|prefix| name.strip_prefix(prefix).is_some_and(is_id))
}
