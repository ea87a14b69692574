//! Snapshots that Firecracker itself wrote, served as they are: a state file and a memory file.
//!
//! The state is in a format of each release's own (Versionize up to 1.6, bincode from 1.7, bitcode of late), so it is
//! passed on as it is. Where it is bincode, the memory's size is read from it, to find a memory file that was cut short.
//!
//! Nothing in the files says whether the memory file is all of the memory or a diff snapshot, which has only what
//! changed since its base, and holes for the rest. Firecracker writes a full one with `write(2)` from end to end, pages
//! that the guest never touched among them, so it has no holes; and what Firecracker itself put into the guest's memory
//! before the start is in it (`marks.rs`). A file that has holes, or that lacks all of that, is refused
//! unless the user says that it is whole.

mod files;
mod memory;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lazyvm_server::port::{MachineError, SourceMachine, SourceMemory};
use lazyvm_wire::{Backing, Layout, LayoutError, MachineOffer, PAGE_SHIFT, Region};

pub use self::files::SnapshotFiles;
use self::memory::SnapshotMemory;
use super::offer;

/// Largest state that Firecracker itself reads; ours is larger.
const STATE_MAX: u64 = lazyvm_wire::STATE_MAX as u64;

/// A snapshot that can't be served.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The directory can't be read.
    #[error("can't read the snapshot's directory {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A file is missing, or there are several.
    #[error(
        "{} holds {found} that could be the snapshot's {what} file ({names}); name it with {flag}", path.display()
    )]
    Which {
        /// Which.
        path: PathBuf,
        /// `state` or `memory`.
        what: &'static str,
        /// `no file` or the names that were found.
        found: String,
        /// What is looked for.
        names: String,
        /// How to name it.
        flag: &'static str,
    },
    /// A file can't be read.
    #[error("can't read the snapshot's file {}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is too long, or empty.
    #[error("{} is {bytes} bytes long, which no Firecracker state is", path.display())]
    StateLength {
        /// Which.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// It is not whole pages.
    #[error("{} is {bytes} bytes long, which is not a whole number of {pages}; is it the memory file, and is it whole?", path.display())]
    MemoryLength {
        /// Which.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// Of which pages.
        pages: &'static str,
    },
    /// It is shorter than the machine's memory.
    #[error(
        "{} is cut short: it has {bytes} bytes, and the snapshot's state says that the VM has {expected} bytes of memory", path.display()
    )]
    CutShort {
        /// Which.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// The state's.
        expected: u64,
    },
    /// It has holes.
    #[error(
        "{} has holes ({mib} MiB of them), as a diff snapshot has, which would be served as zeros; merge a diff \
         snapshot into its base first (Firecracker's snapshot-editor edit-memory rebase). If all of the memory is in \
         this file, say so with --memory-is-whole", path.display()
    )]
    Holes {
        /// Which.
        path: PathBuf,
        /// MiB, rounded up.
        mib: u64,
    },
    /// It lacks what is in every machine.
    #[error(
        "{} has nothing of what Firecracker writes into a VM's memory before it starts: a diff snapshot lacks that, \
         and must be merged into its base first (Firecracker's snapshot-editor edit-memory rebase). If all of the \
         memory is in this file, say so with --memory-is-whole", path.display()
    )]
    NoMark {
        /// Which.
        path: PathBuf,
    },
    /// It is too large.
    #[error("this memory can't be served")]
    Layout(#[from] LayoutError),
}

/// What a snapshot's files don't tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// The VM's memory is made of huge pages of 2 MiB.
    pub huge_pages: bool,
    /// All of the memory is in the memory file, though it does not look so: its holes are zeros.
    pub is_whole: bool,
}

/// A snapshot that is served. It does not run, so any number of destinations may have it.
#[derive(Clone, Debug)]
pub struct SnapshotMachine {
    state: Arc<[u8]>,
    layout: Layout,
    memory: Arc<SnapshotMemory>,
}

impl SnapshotMachine {
    /// Opens a snapshot's files, for reading only.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn open(files: &SnapshotFiles, options: SnapshotOptions) -> Result<Self, SnapshotError> {
        let huge_pages = options.huge_pages;
        let state = read_state(&files.state)?;
        let backing = if huge_pages {
            Backing::Huge2M
        } else {
            Backing::Small
        };
        let memory = SnapshotMemory::open(&files.memory)?;
        let bytes = memory.bytes();
        if bytes == 0 || !bytes.is_multiple_of(backing.bytes()) {
            return Err(SnapshotError::MemoryLength {
                path: files.memory.clone(),
                bytes,
                pages: if huge_pages {
                    "huge pages of 2 MiB"
                } else {
                    "pages of 4 KiB"
                },
            });
        }
        if let Some(expected) = memory_bytes(&state).filter(|&expected| expected > bytes) {
            return Err(SnapshotError::CutShort {
                path: files.memory.clone(),
                bytes,
                expected,
            });
        }
        if !options.is_whole {
            memory.check_whole(&files.memory)?;
        }
        Ok(Self {
            state: state.into(),
            layout: flat(bytes, backing)?,
            memory: Arc::new(memory),
        })
    }
}

/// Firecracker's memory as its memory file has it: the regions end to end.
pub(super) fn flat(bytes: u64, backing: Backing) -> Result<Layout, LayoutError> {
    Layout::new(vec![Region {
        name: "firecracker".to_owned(),
        gpa: None,
        pages: bytes >> PAGE_SHIFT,
        backing,
    }])
}

pub(super) fn read_state(path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let unreadable = |source| SnapshotError::File {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    let mut state = Vec::new();
    file.take(STATE_MAX + 1)
        .read_to_end(&mut state)
        .map_err(unreadable)?;
    let bytes = state.len() as u64;
    if bytes == 0 || bytes > STATE_MAX {
        return Err(SnapshotError::StateLength {
            path: path.to_owned(),
            bytes,
        });
    }
    Ok(state)
}

/// The memory's size, where the state is of Firecracker 1.7 or a later one that writes bincode: a magic number, the
/// version as text with its length in front, and the machine's MiB.
fn memory_bytes(state: &[u8]) -> Option<u64> {
    let word = |at: usize| {
        let bytes = state.get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    const MAGIC: u64 = 0x0710_1984_0000_0000;
    if word(0)? & 0xffff_ffff_0000_0000 != MAGIC {
        return None;
    }
    let length = usize::try_from(word(8)?)
        .ok()
        .filter(|length| (5..=32).contains(length))?;
    let version = state.get(16..16 + length)?;
    if !version
        .iter()
        .all(|byte| byte.is_ascii_digit() || *byte == b'.')
    {
        return None;
    }
    word(16 + length)?.checked_mul(1 << 20)
}

impl SourceMachine for SnapshotMachine {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn offer(&self) -> MachineOffer {
        offer::of_snapshot()
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        Arc::clone(&self.memory) as _
    }

    fn stands_still(&self) -> bool {
        true
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.state.to_vec())
    }

    fn resume(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn release(&self) -> Result<(), MachineError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;

    use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

    use super::*;

    const WHOLE: SnapshotOptions = SnapshotOptions {
        huge_pages: false,
        is_whole: true,
    };
    const HUGE: SnapshotOptions = SnapshotOptions {
        huge_pages: true,
        is_whole: true,
    };

    #[test]
    fn what_may_be_a_diff_is_refused() {
        let home = directory(&["state", "mem"]);
        let files = SnapshotFiles::find(home.path(), None, None).unwrap();
        let open = |options| SnapshotMachine::open(&files, options);
        let refusal = || open(SnapshotOptions::default()).unwrap_err().to_string();
        fs::write(&files.memory, vec![1; 1 << 20]).unwrap();
        let words = refusal();
        assert!(
            words.contains("has nothing of what Firecracker writes"),
            "{words}"
        );
        let memory = File::options().write(true).open(&files.memory).unwrap();
        memory.write_all_at(b"_MP_", 0x9fc00).unwrap();
        open(SnapshotOptions::default()).unwrap();
        memory.set_len(2 << 20).unwrap();
        let words = refusal();
        assert!(words.contains("has holes (1 MiB of them)"), "{words}");
        assert!(
            words.contains("snapshot-editor") && words.contains("--memory-is-whole"),
            "{words}"
        );
        open(WHOLE).unwrap();
        // A hole of one page in the middle.
        fs::write(&files.memory, vec![1; 0xa_0000]).unwrap();
        memory.write_all_at(b"_MP_", 0x9fc00).unwrap();
        memory.set_len(0xa_1000).unwrap();
        memory.write_all_at(&[1; PAGE_SIZE], 0xa_1000).unwrap();
        assert!(refusal().contains("has holes (1 MiB of them)"));
    }

    fn directory(names: &[&str]) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(home.path().join(name), vec![1; PAGE_SIZE]).unwrap();
        }
        home
    }

    fn bincode_state(mib: u64) -> Vec<u8> {
        let mut state = 0x0710_1984_8664_0000_u64.to_le_bytes().to_vec();
        state.extend(5_u64.to_le_bytes());
        state.extend(b"4.0.0");
        state.extend(mib.to_le_bytes());
        state.extend([0; 100]);
        state
    }

    #[test]
    fn a_memory_file_that_does_not_fit_is_refused() {
        let home = directory(&["state", "mem"]);
        let files = SnapshotFiles::find(home.path(), None, None).unwrap();
        SnapshotMachine::open(&files, WHOLE).unwrap();
        let words = SnapshotMachine::open(&files, HUGE).unwrap_err().to_string();
        assert!(
            words.contains("not a whole number of huge pages"),
            "{words}"
        );
        fs::write(&files.state, bincode_state(1)).unwrap();
        let words = SnapshotMachine::open(&files, WHOLE)
            .unwrap_err()
            .to_string();
        assert!(words.contains("cut short: it has 4096 bytes"), "{words}");
        fs::write(&files.memory, [0; 100]).unwrap();
        let words = SnapshotMachine::open(&files, WHOLE)
            .unwrap_err()
            .to_string();
        assert!(words.contains("not a whole number of pages"), "{words}");
        fs::write(&files.state, b"").unwrap();
        let words = SnapshotMachine::open(&files, WHOLE)
            .unwrap_err()
            .to_string();
        assert!(
            words.contains("0 bytes long, which no Firecracker state is"),
            "{words}"
        );
    }

    #[test]
    fn a_file_that_was_changed_is_not_read() {
        let home = directory(&["state", "mem"]);
        let files = SnapshotFiles::find(home.path(), None, None).unwrap();
        let machine = SnapshotMachine::open(&files, WHOLE).unwrap();
        let mut page = vec![0; PAGE_SIZE];
        let memory = machine.memory();
        memory
            .read(PageRange::one(PageIndex(0)), &mut page)
            .unwrap();
        assert_eq!(page, vec![1; PAGE_SIZE]);
        fs::write(&files.memory, vec![2; PAGE_SIZE * 2]).unwrap();
        assert!(
            memory
                .read(PageRange::one(PageIndex(0)), &mut page)
                .is_err()
        );
        assert!(memory.data_runs(&mut |_| ()).is_err());
    }
}
