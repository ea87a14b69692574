//! Snapshots that Firecracker itself wrote, served as they are: a state file and a memory file.
//!
//! The state is in a format of each release's own (Versionize up to 1.6, bincode from 1.7, bitcode of late), so it is
//! passed on as it is. Where it is bincode, the memory's size is read from it, to find a memory file that was cut short.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lazyvm_server::port::{MachineError, SourceMachine, SourceMemory};
use lazyvm_wire::{Backing, Layout, LayoutError, MachineOffer, PAGE_SHIFT, PageRange, Region};

use super::KIND;
use crate::plain::FileMemory;

/// Names that users give to state files.
const STATE_NAMES: [&str; 8] = [
    "snapshot_file",
    "snapshot",
    "vmstate",
    "vm.state",
    "snapshot.state",
    "state",
    "state_file",
    "vm_state",
];

/// Endings that users give to state files.
const STATE_ENDINGS: [&str; 4] = ["state", "vmstate", "snap", "snapshot"];

/// Names that users give to memory files.
const MEMORY_NAMES: [&str; 7] = [
    "mem_file",
    "memory",
    "mem",
    "vm.mem",
    "memory_file",
    "guest_memory",
    "memfile",
];

/// Endings that users give to memory files.
const MEMORY_ENDINGS: [&str; 3] = ["mem", "memory", "memfile"];

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
    /// It is too large.
    #[error("this memory can't be served")]
    Layout(#[from] LayoutError),
}

/// Where a snapshot's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFiles {
    /// The state.
    pub state: PathBuf,
    /// The memory.
    pub memory: PathBuf,
}

impl SnapshotFiles {
    /// Finds the two files in a directory, by their names; `state` and `memory` name them instead.
    ///
    /// # Errors
    /// [`SnapshotError::Which`] says what was found and what is looked for.
    pub fn find(
        directory: &Path,
        state: Option<&Path>,
        memory: Option<&Path>,
    ) -> Result<Self, SnapshotError> {
        let unreadable = |source| SnapshotError::Directory {
            path: directory.to_owned(),
            source,
        };
        let mut files = Vec::new();
        for entry in fs::read_dir(directory).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.is_file() {
                files.push(path);
            }
        }
        files.sort();
        let pick = |named: Option<&Path>, what, names: &[&str], endings: &[&str], flag| match named
        {
            Some(named) => Ok(directory.join(named)),
            None => one_of(&files, names, endings).map_err(|found| SnapshotError::Which {
                path: directory.to_owned(),
                what,
                found,
                names: format!("{}, or *.{}", names.join(", "), endings.join(", *.")),
                flag,
            }),
        };
        Ok(Self {
            state: pick(state, "state", &STATE_NAMES, &STATE_ENDINGS, "--state-file")?,
            memory: pick(
                memory,
                "memory",
                &MEMORY_NAMES,
                &MEMORY_ENDINGS,
                "--memory-file",
            )?,
        })
    }
}

fn one_of(files: &[PathBuf], names: &[&str], endings: &[&str]) -> Result<PathBuf, String> {
    let fits = |path: &&PathBuf| {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let ending = path
            .extension()
            .and_then(|ending| ending.to_str())
            .unwrap_or_default();
        names.contains(&name) || endings.contains(&ending)
    };
    let found: Vec<&PathBuf> = files.iter().filter(fits).collect();
    match found[..] {
        [one] => Ok(one.clone()),
        [] => Err("no file".to_owned()),
        _ => {
            let names: Vec<_> = found
                .iter()
                .map(|path| path.file_name().unwrap_or_default().to_string_lossy())
                .collect();
            Err(format!("several files ({})", names.join(", ")))
        }
    }
}

/// A snapshot that is served. It does not run, so any number of destinations may have it.
#[derive(Clone, Debug)]
pub struct SnapshotMachine {
    state: Arc<[u8]>,
    layout: Layout,
    memory: Arc<SnapshotMemory>,
}

impl SnapshotMachine {
    /// Opens a snapshot's files, for reading only. `huge_pages` says that the VM's memory is made of huge pages of
    /// 2 MiB, which the files don't tell.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn open(files: &SnapshotFiles, huge_pages: bool) -> Result<Self, SnapshotError> {
        let state = read_state(&files.state)?;
        let backing = if huge_pages {
            Backing::Huge2M
        } else {
            Backing::Small
        };
        let memory = SnapshotMemory::open(&files.memory)?;
        let bytes = memory.print.bytes;
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
        if memory.has_holes {
            tracing::warn!(
                memory = %files.memory.display(),
                "the memory file has holes, which are served as zeros; a diff snapshot must be merged into its base first"
            );
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

/// What a destination hears of a Firecracker; the release where it is known.
pub(super) fn offer(release: Option<&str>) -> MachineOffer {
    MachineOffer {
        kind: KIND.to_owned(),
        state_version: 1,
        compatibility: release.unwrap_or_default().as_bytes().to_vec(),
    }
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

/// What tells whether a file was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Print {
    bytes: u64,
    modified: (i64, i64),
}

impl Print {
    fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            bytes: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
        })
    }
}

/// A snapshot's memory file, which must stay as it is: a destination that got some of its pages from before a change
/// and some from after it would have memory that never was. So nothing is read from a file that has changed.
#[derive(Debug)]
struct SnapshotMemory {
    file: Arc<File>,
    memory: FileMemory,
    print: Print,
    has_holes: bool,
}

impl SnapshotMemory {
    fn open(path: &Path) -> Result<Self, SnapshotError> {
        let open = || -> io::Result<Self> {
            let file = Arc::new(File::open(path)?);
            let found = file.metadata()?;
            if !found.is_file() {
                return Err(io::Error::other("it is no regular file"));
            }
            let print = Print::of(&file)?;
            Ok(Self {
                memory: FileMemory::new(Arc::clone(&file), print.bytes >> PAGE_SHIFT),
                has_holes: found.blocks().saturating_mul(512) < print.bytes,
                file,
                print,
            })
        };
        open().map_err(|source| SnapshotError::File {
            path: path.to_owned(),
            source,
        })
    }

    fn check(&self) -> io::Result<()> {
        if Print::of(&self.file)? != self.print {
            return Err(io::Error::other(
                "the snapshot's memory file was changed while it was served",
            ));
        }
        Ok(())
    }
}

impl SourceMemory for SnapshotMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        self.memory.read(range, out)?;
        self.check()
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        self.check()?;
        self.memory.data_runs(data)
    }
}

impl SourceMachine for SnapshotMachine {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn offer(&self) -> MachineOffer {
        offer(None)
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        Arc::clone(&self.memory) as _
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
    use lazyvm_wire::{PAGE_SIZE, PageIndex};

    use super::*;

    fn directory(names: &[&str]) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(home.path().join(name), vec![1; PAGE_SIZE]).unwrap();
        }
        home
    }

    #[test]
    fn the_names_that_users_have_are_found() {
        for (state, memory) in [
            ("snapshot_file", "mem_file"),
            ("vmstate", "memory"),
            ("vm.state", "vm.mem"),
            ("a.snap", "a.mem"),
        ] {
            let home = directory(&[state, memory, "README", "firecracker.log"]);
            let files = SnapshotFiles::find(home.path(), None, None).unwrap();
            assert_eq!(files.state, home.path().join(state));
            assert_eq!(files.memory, home.path().join(memory));
        }
    }

    #[test]
    fn what_is_not_clear_is_asked_for() {
        let home = directory(&["a.state", "b.state", "mem"]);
        let error = SnapshotFiles::find(home.path(), None, None).unwrap_err();
        let words = error.to_string();
        assert!(
            words.contains("several files (a.state, b.state)"),
            "{words}"
        );
        assert!(words.contains("--state-file"), "{words}");
        let named = SnapshotFiles::find(home.path(), Some(Path::new("b.state")), None).unwrap();
        assert_eq!(named.state, home.path().join("b.state"));
        let home = directory(&["a.state"]);
        let words = SnapshotFiles::find(home.path(), None, None)
            .unwrap_err()
            .to_string();
        assert!(
            words.contains("no file") && words.contains("--memory-file"),
            "{words}"
        );
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
        SnapshotMachine::open(&files, false).unwrap();
        let words = SnapshotMachine::open(&files, true).unwrap_err().to_string();
        assert!(
            words.contains("not a whole number of huge pages"),
            "{words}"
        );
        fs::write(&files.state, bincode_state(1)).unwrap();
        let words = SnapshotMachine::open(&files, false)
            .unwrap_err()
            .to_string();
        assert!(words.contains("cut short: it has 4096 bytes"), "{words}");
        fs::write(&files.memory, [0; 100]).unwrap();
        let words = SnapshotMachine::open(&files, false)
            .unwrap_err()
            .to_string();
        assert!(words.contains("not a whole number of pages"), "{words}");
        fs::write(&files.state, b"").unwrap();
        let words = SnapshotMachine::open(&files, false)
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
        let machine = SnapshotMachine::open(&files, false).unwrap();
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
