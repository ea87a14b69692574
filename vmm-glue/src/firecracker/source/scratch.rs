//! Where files go that Firecracker writes for this process.

use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

use super::SourceError;
use crate::firecracker::api::Api;
use crate::firecracker::process::PeerProcess;

/// A directory with room for the memory, which Firecracker sees.
pub(super) fn scratch_in(
    api: &Api,
    process: &PeerProcess,
    scratch: Option<&Path>,
    needed: u64,
) -> Result<PathBuf, SourceError> {
    let beside = match api.path().parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let shm = Path::new("/dev/shm");
    let candidates = match scratch {
        Some(scratch) => vec![scratch],
        None if sees(process, shm) => vec![shm, beside],
        None => vec![beside],
    };
    let mut refused = None;
    for path in candidates {
        let free = free_mib(path);
        if free >= needed + needed / 64 {
            return Ok(path.to_owned());
        }
        refused = Some(SourceError::NoRoom {
            path: path.to_owned(),
            needed,
            free,
        });
    }
    refused.map_or_else(|| Ok(beside.to_owned()), Err)
}

/// Whether this directory is the same one for that process.
fn sees(process: &PeerProcess, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let theirs = process
        .root()
        .and_then(|root| path.strip_prefix("/").ok().map(|path| root.join(path)));
    let Some(theirs) = theirs else {
        return false;
    };
    match (std::fs::metadata(path), std::fs::metadata(theirs)) {
        (Ok(ours), Ok(theirs)) => (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()),
        _ => false,
    }
}

fn free_mib(path: &Path) -> u64 {
    statvfs(path).map_or(0, |found| {
        found
            .blocks_available()
            .saturating_mul(found.fragment_size())
            >> 20
    })
}
