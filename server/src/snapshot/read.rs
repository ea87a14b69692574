//! Reading a snapshot: chunks as they are asked for, each checked.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use lazyvm_wire::{Layout, MachineOffer, PAGE_SIZE, PageIndex, PageRange, is_zero};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::format::{
    self, BASES_MAX, CHUNK_BYTES, CHUNK_PAGES, Entry, FormatError, HEADER_LEN, MANIFEST_MAX,
    Manifest, Place, Stored,
};
use super::profile::SnapshotProfile;
use super::ready::Ready;
use super::{MANIFEST, SnapshotError, file_name};
use crate::port::{MachineError, Profile, SourceMachine, SourceMemory};
use crate::session::lock;

/// Chunks in each of the cache's two generations: 32 MiB.
const GENERATION: usize = 512;

/// How often a directory is looked at whose snapshot is being replaced.
const LOOKS: u32 = 3;

/// Whether the directory holds a snapshot of lazyvm's.
pub fn is_snapshot(directory: &Path) -> bool {
    directory.join(MANIFEST).exists()
}

/// An open snapshot, and those that it stands on.
#[derive(Debug)]
pub struct Snapshot {
    directory: PathBuf,
    manifest: Manifest,
    /// Of the manifest.
    digest: u128,
    entries: Vec<Entry>,
    memory: File,
    memory_path: PathBuf,
    base: Option<Box<Snapshot>>,
}

fn read_file(path: &Path, most: u64) -> Result<Vec<u8>, SnapshotError> {
    let failed = |source| SnapshotError::Io {
        doing: "read",
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(most.saturating_add(1)).read_to_end(&mut bytes))
        .map_err(failed)?;
    Ok(bytes)
}

impl Snapshot {
    /// Opens the snapshot in `directory` and all that it stands on. Everything but the chunks is checked.
    ///
    /// # Errors
    /// [`SnapshotError`] names the file and the place.
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let mut looks = 0;
        loop {
            looks += 1;
            match Self::open_at(directory, 0) {
                // Its files may have been replaced between two looks.
                Err(SnapshotError::Io { source, .. })
                    if source.kind() == io::ErrorKind::NotFound && looks < LOOKS => {}
                result => return result,
            }
        }
    }

    fn open_at(directory: &Path, depth: usize) -> Result<Self, SnapshotError> {
        if !is_snapshot(directory) {
            return Err(SnapshotError::None(directory.to_owned()));
        }
        let path = directory.join(MANIFEST);
        let bytes = read_file(&path, MANIFEST_MAX as u64)?;
        let damaged = |path: &Path| {
            let path = path.to_owned();
            move |source| SnapshotError::Damaged { path, source }
        };
        let manifest = Manifest::decode(&bytes).map_err(damaged(&path))?;
        let index_path = directory.join(file_name("index-", manifest.id));
        let index = read_file(&index_path, manifest.index.bytes)?;
        let entries = format::decode_index(&index, &manifest).map_err(damaged(&index_path))?;
        let memory_path = directory.join(file_name("memory-", manifest.id));
        let memory = open_memory(&memory_path, &manifest)?;
        let base = match &manifest.base {
            Some(base) => {
                let path = directory.join(&base.path);
                Some(Box::new(open_base(&path, base, &manifest, depth)?))
            }
            None => None,
        };
        let snapshot = Self {
            directory: directory.to_owned(),
            digest: xxh3_128(&bytes),
            manifest,
            entries,
            memory,
            memory_path,
            base,
        };
        snapshot.state()?;
        Ok(snapshot)
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Digest of the manifest.
    pub(super) fn digest(&self) -> u128 {
        self.digest
    }

    /// The directories of this one and of all that it stands on.
    pub fn directories(&self) -> Vec<&Path> {
        let mut all = vec![self.directory.as_path()];
        let mut base = self.base.as_deref();
        while let Some(snapshot) = base {
            all.push(&snapshot.directory);
            base = snapshot.base.as_deref();
        }
        all
    }

    /// The machine's state.
    ///
    /// # Errors
    /// The file can't be read, or is damaged.
    pub fn state(&self) -> Result<Vec<u8>, SnapshotError> {
        let path = self.directory.join(file_name("state-", self.manifest.id));
        let state = read_file(&path, self.manifest.state.bytes)?;
        self.manifest
            .state
            .check(&state)
            .map_err(|source| SnapshotError::Damaged { path, source })?;
        Ok(state)
    }

    /// The chunks that are not all zeros, ascending.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// A chunk's entry; `None` where it is all zeros.
    pub fn entry(&self, chunk: u64) -> Option<&Entry> {
        let at = self
            .entries
            .binary_search_by_key(&chunk, |entry| entry.chunk);
        self.entries.get(at.ok()?)
    }

    /// A chunk's pages.
    ///
    /// # Errors
    /// [`SnapshotError::Chunk`] where they are not what was written.
    pub fn chunk(&self, chunk: u64) -> Result<Vec<u8>, SnapshotError> {
        let range = self.manifest.chunk_range(chunk);
        let Some(entry) = self.entry(chunk) else {
            return Ok(vec![0; range.bytes() as usize]);
        };
        let (pages, stored) = match (entry.place, &self.base) {
            (Place::Base, Some(base)) => {
                let pages = base.chunk(chunk)?;
                // What the base has was found whole there, so another digest means that it has something else.
                if xxh3_128(&pages) != entry.digest {
                    return Err(SnapshotError::Base {
                        path: base.directory.clone(),
                        what: format!("its {range} are others"),
                    });
                }
                return Ok(pages);
            }
            (Place::Raw(stored), _) => (read_stored(&self.memory, stored), stored),
            (Place::Zstd(stored), _) => {
                let pages = read_stored(&self.memory, stored).and_then(|packed| {
                    zstd::bulk::decompress(&packed, range.bytes() as usize)
                        .map_err(|_| "it can't be decompressed")
                });
                (pages, stored)
            }
            // The index was refused for it.
            (Place::Base, None) => return Err(SnapshotError::None(self.directory.clone())),
        };
        pages
            .and_then(|pages| check_chunk(&pages, entry, range).map(|()| pages))
            .map_err(|what| SnapshotError::Chunk {
                path: self.memory_path.clone(),
                offset: stored.offset,
                length: stored.length.into(),
                first: range.first.0,
                last: range.end().0 - 1,
                what,
            })
    }
}

fn open_memory(path: &Path, manifest: &Manifest) -> Result<File, SnapshotError> {
    let failed = |source| SnapshotError::Io {
        doing: "read",
        path: path.to_owned(),
        source,
    };
    let damaged = |source| SnapshotError::Damaged {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?.len();
    if found != manifest.memory_bytes {
        return Err(damaged(FormatError::Length {
            found,
            expected: manifest.memory_bytes,
        }));
    }
    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0).map_err(failed)?;
    format::check_memory_header(&header, manifest.id).map_err(damaged)?;
    Ok(file)
}

fn open_base(
    path: &Path,
    base: &format::Base,
    manifest: &Manifest,
    depth: usize,
) -> Result<Snapshot, SnapshotError> {
    let other = |what: String| SnapshotError::Base {
        path: path.to_owned(),
        what,
    };
    if depth >= BASES_MAX {
        return Err(other(format!(
            "more than {BASES_MAX} snapshots stand on each other"
        )));
    }
    if !is_snapshot(path) {
        return Err(other("no snapshot is there".to_owned()));
    }
    let found = Snapshot::open_at(path, depth + 1)?;
    if found.manifest.id != base.id || found.digest != base.digest {
        return Err(other("another snapshot is there".to_owned()));
    }
    if found.manifest.layout != manifest.layout {
        return Err(other("it is of other memory".to_owned()));
    }
    Ok(found)
}

/// Bytes of a memory file, if they are those that were written.
pub(super) fn read_stored(file: &File, stored: Stored) -> Result<Vec<u8>, &'static str> {
    let mut bytes = vec![0; stored.length as usize];
    file.read_exact_at(&mut bytes, stored.offset)
        .map_err(|_| "the file can't be read there")?;
    if xxh3_64(&bytes) != stored.digest {
        return Err("its checksum is wrong");
    }
    Ok(bytes)
}

fn check_chunk(pages: &[u8], entry: &Entry, range: PageRange) -> Result<(), &'static str> {
    if pages.len() as u64 != range.bytes() {
        return Err("it has another length");
    }
    if xxh3_128(pages) != entry.digest || data_mask(pages) != entry.data {
        return Err("its pages' checksum is wrong");
    }
    Ok(())
}

/// A bit for each page that is not all zeros.
pub(super) fn data_mask(pages: &[u8]) -> u16 {
    let bits = pages.chunks(PAGE_SIZE).map(|page| !is_zero(page));
    bits.enumerate()
        .fold(0, |mask, (at, data)| mask | u16::from(data) << at)
}

/// Chunks that were read a short while ago, in two generations: when the younger is full, it takes the older's place.
#[derive(Debug, Default)]
struct Cache {
    young: HashMap<u64, Arc<[u8]>>,
    old: HashMap<u64, Arc<[u8]>>,
}

impl Cache {
    fn get(&mut self, chunk: u64) -> Option<Arc<[u8]>> {
        if let Some(pages) = self.young.get(&chunk) {
            return Some(Arc::clone(pages));
        }
        let pages = self.old.remove(&chunk)?;
        self.put(chunk, Arc::clone(&pages));
        Some(pages)
    }

    fn put(&mut self, chunk: u64, pages: Arc<[u8]>) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(chunk, pages);
    }
}

/// A snapshot's memory: at most 64 MiB of it are kept, and 32 MiB of what is needed first.
#[derive(Debug)]
struct SnapshotMemory {
    snapshot: Snapshot,
    cache: Mutex<Cache>,
    ready: Ready,
}

impl SnapshotMemory {
    fn chunk(&self, chunk: u64) -> io::Result<Arc<[u8]>> {
        if let Some(pages) = lock(&self.cache).get(chunk) {
            return Ok(pages);
        }
        let pages: Arc<[u8]> = self.snapshot.chunk(chunk).map_err(io::Error::other)?.into();
        lock(&self.cache).put(chunk, Arc::clone(&pages));
        Ok(pages)
    }

    /// Has a thread read these pages, the first needed first, before they are asked for.
    fn make_ready(self: &Arc<Self>, pages: Vec<PageIndex>) {
        let memory = Arc::clone(self);
        let read = move |range: PageRange, out: &mut [u8]| memory.read_chunks(range, out);
        let memory = Arc::clone(self);
        let name = "snapshot-ready".to_owned();
        let thread = thread::Builder::new().name(name);
        if let Err(error) = thread.spawn(move || memory.ready.keep(&pages, read)) {
            tracing::warn!(%error, "what clones need first is read only when they ask for it: no thread");
        }
    }

    fn read_chunks(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        let mut rest = range;
        let mut out = out;
        while !rest.is_empty() {
            let chunk = rest.first.0 / CHUNK_PAGES;
            let part = rest.intersect(self.snapshot.manifest.chunk_range(chunk));
            let (here, behind) = out.split_at_mut(part.bytes() as usize);
            if self.snapshot.entry(chunk).is_none() {
                here.fill(0);
            } else {
                let pages = self.chunk(chunk)?;
                let start = (part.first.0 % CHUNK_PAGES) as usize * PAGE_SIZE;
                here.copy_from_slice(&pages[start..start + here.len()]);
            }
            out = behind;
            rest = PageRange::new(part.end(), rest.count - part.count);
        }
        Ok(())
    }
}

impl SourceMemory for SnapshotMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        let is_in = self.snapshot.manifest.layout.contains(range);
        if !is_in || out.len() as u64 != range.bytes() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.ready.read(range, out) {
            return Ok(());
        }
        self.read_chunks(range, out)
    }

    /// Of a huge page, all or nothing.
    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        let layout = &self.snapshot.manifest.layout;
        let mut run = PageRange::new(PageIndex(0), 0);
        for entry in &self.snapshot.entries {
            let range = self.snapshot.manifest.chunk_range(entry.chunk);
            for page in range
                .pages()
                .filter(|page| entry.data >> (page.0 - range.first.0) & 1 == 1)
            {
                let unit = layout.unit_of(page).unwrap_or(PageRange::one(page));
                if run.contains(page) {
                    continue;
                }
                if run.end() == unit.first {
                    run.count += unit.count;
                    continue;
                }
                if !run.is_empty() {
                    data(run);
                }
                run = unit;
            }
        }
        if !run.is_empty() {
            data(run);
        }
        Ok(())
    }
}

const _: () = assert!(
    CHUNK_BYTES == 16 * PAGE_SIZE,
    "a chunk's pages fit the bits of a u16"
);

/// A snapshot that is served. It does not run, so any number of destinations may have it.
#[derive(Debug)]
pub struct SnapshotMachine {
    memory: Arc<SnapshotMemory>,
    profile: Arc<SnapshotProfile>,
}

impl SnapshotMachine {
    /// Opens the snapshot in a directory. Only the profile of its resumes is ever written there.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let snapshot = Snapshot::open(directory)?;
        let memory = Arc::new(SnapshotMemory {
            snapshot,
            cache: Mutex::default(),
            ready: Ready::default(),
        });
        let of_profile = Arc::clone(&memory);
        let manifest = memory.snapshot.manifest();
        let profile = SnapshotProfile::open(directory, manifest, move |pages| {
            of_profile.make_ready(pages.to_vec());
        });
        Ok(Self {
            profile: Arc::new(profile),
            memory,
        })
    }

    /// The snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.memory.snapshot
    }
}

impl SourceMachine for SnapshotMachine {
    fn layout(&self) -> &Layout {
        &self.snapshot().manifest.layout
    }

    fn offer(&self) -> MachineOffer {
        self.snapshot().manifest.offer.clone()
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        Arc::clone(&self.memory) as _
    }

    fn stands_still(&self) -> bool {
        true
    }

    fn profile(&self) -> Option<Box<dyn Profile>> {
        Some(self.profile.session())
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.snapshot().state()?)
    }

    fn resume(&self) -> Result<(), MachineError> {
        Ok(())
    }

    fn release(&self) -> Result<(), MachineError> {
        Ok(())
    }
}
