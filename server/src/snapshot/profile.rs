//! Which pages earlier resumes of a snapshot needed first, in a file beside it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lazyvm_wire::{PageIndex, PageRange};

use super::file_name;
use super::format::{self, Manifest, PROFILE_PAGES_MAX, SnapshotId};
use super::merge::{Demand, merged};
use crate::port::Profile;
use crate::session::lock;

/// The profile of a snapshot, for all its sessions.
#[derive(Debug)]
pub struct SnapshotProfile {
    path: PathBuf,
    id: SnapshotId,
    pages: Mutex<Vec<PageIndex>>,
}

impl SnapshotProfile {
    /// The profile of the snapshot in `directory`. One that can't be read is none, and a warning says so.
    pub fn open(directory: &Path, manifest: &Manifest) -> Self {
        let path = directory.join(file_name("profile-", manifest.id));
        let pages = match fs::read(&path) {
            Ok(bytes) => format::decode_profile(&bytes, manifest).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "the profile of earlier resumes is damaged, and a new one is begun");
                Vec::new()
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "can't read the profile of earlier resumes");
                Vec::new()
            }
        };
        Self {
            path,
            id: manifest.id,
            pages: Mutex::new(pages),
        }
    }

    /// The pages, the first needed first.
    pub fn pages(&self) -> Vec<PageIndex> {
        lock(&self.pages).clone()
    }

    /// What one session adds.
    pub(super) fn session(self: &Arc<Self>) -> Box<dyn Profile> {
        Box::new(SessionProfile {
            shared: Arc::clone(self),
            demands: Mutex::default(),
        })
    }

    /// Takes in what a resume waited for. A crash leaves the file as it was or as it is to be.
    fn learn(&self, demands: &[Demand]) -> io::Result<()> {
        let mut pages = lock(&self.pages);
        *pages = merged(&pages, demands, PROFILE_PAGES_MAX);
        let beside = self.path.with_extension("new");
        let mut file = File::create(&beside)?;
        file.write_all(&format::encode_profile(self.id, &pages))?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)
    }
}

struct SessionProfile {
    shared: Arc<SnapshotProfile>,
    demands: Mutex<Vec<Demand>>,
}

impl Profile for SessionProfile {
    fn lead(&self) -> Vec<PageRange> {
        let mut ranges: Vec<PageRange> = Vec::new();
        for page in self.shared.pages() {
            match ranges.last_mut() {
                Some(last) if last.end() == page => last.count += 1,
                _ => ranges.push(PageRange::one(page)),
            }
        }
        ranges
    }

    fn demanded(&self, range: PageRange, gone: Option<u64>) {
        let mut demands = lock(&self.demands);
        let room = PROFILE_PAGES_MAX.saturating_sub(demands.len());
        let pages = range.pages().take(room);
        demands.extend(pages.map(|page| Demand { page, gone }));
    }

    fn finished(&self) {
        let demands = std::mem::take(&mut *lock(&self.demands));
        if demands.is_empty() {
            return;
        }
        if let Err(error) = self.shared.learn(&demands) {
            let path = self.shared.path.display();
            tracing::warn!(%path, %error, "can't write down which pages this resume needed first");
        }
    }
}
