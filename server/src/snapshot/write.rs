//! Writing a snapshot, so that a crash at any instant leaves the old one or the new one.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use lazyvm_wire::{Layout, MachineOffer, PAGE_SIZE, PageIndex, PageRange, SessionId};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::format::{
    self, BASES_MAX, Base, CHUNK_PAGES, Entry, HEADER_LEN, Manifest, Part, Place, SnapshotId,
    Stored,
};
use super::read::{Snapshot, data_mask, read_stored};
use super::{MANIFEST, SnapshotError, file_name, is_ours};

/// zstd's level: the pass over the memory is to be done soon, since the machine writes meanwhile.
const LEVEL: i32 = 1;

/// A snapshot that is being written. Dropped before its commit, it leaves the directory as it was.
pub(super) struct Writer {
    directory: PathBuf,
    /// Locked for as long as this lives.
    _lock: File,
    id: SnapshotId,
    layout: Layout,
    memory: File,
    end: u64,
    entries: BTreeMap<u64, Entry>,
    base: Option<Snapshot>,
    committed: bool,
}

impl Writer {
    /// Begins a snapshot in `directory`, which is made where it is missing.
    pub fn begin(
        directory: &Path,
        layout: &Layout,
        base: Option<&Path>,
    ) -> Result<Self, SnapshotError> {
        let failed = |doing| {
            let path = directory.to_owned();
            move |source| SnapshotError::Io {
                doing,
                path,
                source,
            }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed("make"))?;
        let lock = File::open(directory).map_err(failed("open"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(SnapshotError::Busy(directory.to_owned()));
            }
            Err(fs::TryLockError::Error(error)) => return Err(failed("lock")(error)),
        }
        check_own(directory)?;
        let base = base
            .map(|base| open_base(base, directory, layout))
            .transpose()?;
        let id = SnapshotId(SessionId::random().map_err(|_| SnapshotError::Random)?.0);
        let path = directory.join(file_name("memory-", id));
        let memory = create(&path)?;
        let header = format::memory_header(id);
        memory
            .write_all_at(&header, 0)
            .map_err(|source| SnapshotError::Io {
                doing: "write",
                path,
                source,
            })?;
        Ok(Self {
            directory: directory.to_owned(),
            _lock: lock,
            id,
            layout: layout.clone(),
            memory,
            end: HEADER_LEN as u64,
            entries: BTreeMap::new(),
            base,
            committed: false,
        })
    }

    /// Which snapshot it will be.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// These are the chunk's pages from here on, whatever they were.
    pub fn put(&mut self, chunk: u64, pages: &[u8]) -> Result<(), SnapshotError> {
        let data = data_mask(pages);
        if data == 0 {
            self.entries.remove(&chunk);
            return Ok(());
        }
        let digest = xxh3_128(pages);
        if self
            .entries
            .get(&chunk)
            .is_some_and(|entry| entry.digest == digest)
        {
            return Ok(());
        }
        let base = self.base.as_ref().and_then(|base| base.entry(chunk));
        let place = if base.is_some_and(|entry| entry.digest == digest) {
            Place::Base
        } else {
            let packed = zstd::bulk::compress(pages, LEVEL)
                .ok()
                .filter(|packed| packed.len() < pages.len());
            match packed {
                Some(packed) => Place::Zstd(self.append(&packed)?),
                None => Place::Raw(self.append(pages)?),
            }
        };
        let entry = Entry {
            chunk,
            data,
            digest,
            place,
        };
        self.entries.insert(chunk, entry);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> Result<Stored, SnapshotError> {
        let stored = Stored {
            offset: self.end,
            length: bytes.len() as u32,
            digest: xxh3_64(bytes),
        };
        self.memory
            .write_all_at(bytes, self.end)
            .map_err(|source| self.failed("write", "memory-", source))?;
        self.end += bytes.len() as u64;
        Ok(stored)
    }

    /// The chunk's pages as they were last put.
    fn chunk(&self, chunk: u64) -> Result<Vec<u8>, SnapshotError> {
        let range = format::chunk_range(&self.layout, chunk);
        let read = |stored| {
            read_stored(&self.memory, stored)
                .map_err(|what| self.failed("read back", "memory-", io::Error::other(what)))
        };
        match self.entries.get(&chunk).map(|entry| entry.place) {
            None => Ok(vec![0; range.bytes() as usize]),
            Some(Place::Raw(stored)) => read(stored),
            Some(Place::Zstd(stored)) => {
                zstd::bulk::decompress(&read(stored)?, range.bytes() as usize)
                    .map_err(|error| self.failed("read back", "memory-", error))
            }
            Some(Place::Base) => match &self.base {
                Some(base) => base.chunk(chunk),
                None => Err(SnapshotError::None(self.directory.clone())),
            },
        }
    }

    /// Writes pages over what was put; `bytes` are those of the ranges, end to end. Ranges ascend.
    pub fn lay_over(&mut self, ranges: &[PageRange], bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut open: Option<(u64, Vec<u8>)> = None;
        let pages = ranges.iter().flat_map(|range| range.pages());
        for (page, bytes) in pages.zip(bytes.chunks_exact(PAGE_SIZE)) {
            let chunk = page.0 / CHUNK_PAGES;
            let mut pages = match open.take() {
                Some((number, pages)) if number == chunk => pages,
                other => {
                    if let Some((number, pages)) = other {
                        self.put(number, &pages)?;
                    }
                    self.chunk(chunk)?
                }
            };
            let start = (page.0 % CHUNK_PAGES) as usize * PAGE_SIZE;
            pages[start..start + PAGE_SIZE].copy_from_slice(bytes);
            open = Some((chunk, pages));
        }
        match open {
            Some((number, pages)) => self.put(number, &pages),
            None => Ok(()),
        }
    }

    /// Makes it the directory's snapshot, with a profile to begin with: the pages that its machine needs first. From the renaming on it is; what fails behind that is logged.
    pub fn commit(
        mut self,
        state: &[u8],
        offer: MachineOffer,
        lead: &[PageIndex],
    ) -> Result<Manifest, SnapshotError> {
        let entries: Vec<_> = self.entries.values().copied().collect();
        let uses_base = entries.iter().any(|entry| entry.place == Place::Base);
        let index = format::encode_index(self.id, &entries);
        let manifest = Manifest {
            id: self.id,
            taken_at_s: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            layout: self.layout.clone(),
            offer,
            state: Part::of(state),
            index: Part::of(&index),
            memory_bytes: self.end,
            base: self.base.as_ref().filter(|_| uses_base).map(|base| Base {
                path: path_between(&self.directory, base.directories()[0]),
                id: base.manifest().id,
                digest: base.digest(),
            }),
        };
        let bytes = manifest.encode().ok_or(SnapshotError::TooLarge)?;
        self.memory
            .sync_all()
            .map_err(|source| self.failed("write", "memory-", source))?;
        self.write("index-", &index)?;
        self.write("state-", state)?;
        if !lead.is_empty() {
            self.write("profile-", &format::encode_profile(self.id, lead))?;
        }
        self.write("manifest-", &bytes)?;
        self.sync_directory()?;
        let beside = self.directory.join(file_name("manifest-", self.id));
        fs::rename(beside, self.directory.join(MANIFEST))
            .map_err(|source| self.failed("rename", "manifest-", source))?;
        self.committed = true;
        self.sync_directory()?;
        remove_others(&self.directory, self.id);
        Ok(manifest)
    }

    fn write(&self, prefix: &str, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut file = create(&self.directory.join(file_name(prefix, self.id)))?;
        file.write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|source| self.failed("write", prefix, source))
    }

    fn sync_directory(&self) -> Result<(), SnapshotError> {
        File::open(&self.directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|source| SnapshotError::Io {
                doing: "sync",
                path: self.directory.clone(),
                source,
            })
    }

    fn failed(&self, doing: &'static str, prefix: &str, source: io::Error) -> SnapshotError {
        SnapshotError::Io {
            doing,
            path: self.directory.join(file_name(prefix, self.id)),
            source,
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.committed {
            for prefix in super::PREFIXES {
                // What can't be removed is removed by the next snapshot.
                let _ = fs::remove_file(self.directory.join(file_name(prefix, self.id)));
            }
        }
    }
}

fn create(path: &Path) -> Result<File, SnapshotError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| SnapshotError::Io {
            doing: "make",
            path: path.to_owned(),
            source,
        })
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Refuses a directory that others use.
fn check_own(directory: &Path) -> Result<(), SnapshotError> {
    let found = names(directory).map_err(|source| SnapshotError::Io {
        doing: "read",
        path: directory.to_owned(),
        source,
    })?;
    let is_known = |name: &String| is_ours(name.strip_suffix(".new").unwrap_or(name));
    match found.into_iter().find(|name| !is_known(name)) {
        Some(found) => Err(SnapshotError::Foreign {
            path: directory.to_owned(),
            found,
        }),
        None => Ok(()),
    }
}

/// Removes the files of earlier snapshots and of those that were never finished.
fn remove_others(directory: &Path, id: SnapshotId) {
    let id = id.to_string();
    for name in names(directory).unwrap_or_default() {
        if name != MANIFEST
            && is_ours(name.strip_suffix(".new").unwrap_or(&name))
            && !name.contains(&id)
            && let Err(error) = fs::remove_file(directory.join(&name))
        {
            tracing::warn!(name, %error, "a file of an earlier snapshot can't be removed");
        }
    }
}

fn open_base(path: &Path, directory: &Path, layout: &Layout) -> Result<Snapshot, SnapshotError> {
    let base = Snapshot::open(path)?;
    let other = |what: &str| SnapshotError::OtherBase {
        path: path.to_owned(),
        what: what.to_owned(),
    };
    if base.manifest().layout != *layout {
        return Err(other("it is a snapshot of a VM with other memory"));
    }
    let target = fs::canonicalize(directory).ok();
    let directories = base.directories();
    if directories.len() >= BASES_MAX {
        return Err(other(
            "too many snapshots stand on each other; take one without a base",
        ));
    }
    if directories
        .iter()
        .any(|found| fs::canonicalize(found).ok() == target)
    {
        return Err(other(
            "it, or one that it stands on, is in the directory that is to be written; name another one",
        ));
    }
    Ok(base)
}

/// The path of `to` as seen from `from`, where both are found; `to` as it is otherwise.
fn path_between(from: &Path, to: &Path) -> String {
    let relative = || -> Option<PathBuf> {
        let (from, to) = (fs::canonicalize(from).ok()?, fs::canonicalize(to).ok()?);
        let common = from
            .components()
            .zip(to.components())
            .take_while(|(a, b)| a == b)
            .count();
        let up = from.components().skip(common).map(|_| "..");
        Some(
            up.map(PathBuf::from)
                .chain(
                    to.components()
                        .skip(common)
                        .map(|part| PathBuf::from(part.as_os_str())),
                )
                .collect(),
        )
    };
    let path = relative().unwrap_or_else(|| to.to_owned());
    path.to_string_lossy().into_owned()
}
