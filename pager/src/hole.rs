//! Holes in memory files.

use std::fs::File;
use std::io;

use nix::fcntl::{FallocateFlags, fallocate};

/// Frees `bytes` of a file from `offset` on, which read as zeros from then on; the file stays as long as it is. On tmpfs,
/// memfds and hugetlbfs that takes the pages out of every process that has them mapped.
///
/// # Errors
/// The file system's: not all can. [`io::ErrorKind::InvalidInput`] for what no file has.
pub fn punch_hole(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let checked = |number: u64| i64::try_from(number).map_err(|_| io::ErrorKind::InvalidInput);
    Ok(fallocate(file, flags, checked(offset)?, checked(bytes)?)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use lazyvm_wire::Backing;

    use super::*;

    #[test]
    fn a_hole_reads_as_zeros_and_takes_no_room() {
        let file = crate::sys::memfd("hole", 4 * 4096, Backing::Small).unwrap();
        file.write_all_at(&[7; 4 * 4096], 0).unwrap();
        punch_hole(&file, 4096, 2 * 4096).unwrap();
        let mut bytes = [1; 4 * 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let is_hole = |at: usize| (4096..3 * 4096).contains(&at);
        assert!((0..bytes.len()).all(|at| (bytes[at] == 0) == is_hole(at)));
        let found = file.metadata().unwrap();
        assert_eq!((found.len(), found.blocks() * 512), (4 * 4096, 2 * 4096));
    }

    #[test]
    fn what_no_file_has_is_refused() {
        let file = crate::sys::memfd("hole", 4096, Backing::Small).unwrap();
        let refused = punch_hole(&file, u64::MAX, 1).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
