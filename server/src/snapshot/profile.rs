//! Which pages earlier resumes of a snapshot needed first, in a file beside it.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use lazyvm_wire::{PageIndex, PageRange};

use super::file_name;
use super::format::{self, Manifest, PROFILE_PAGES_MAX, SnapshotId};
use super::merge::{Demand, led, merged, surprises_first};
use crate::port::Profile;
use crate::session::lock;

/// The profile of a snapshot, for all its sessions.
pub struct SnapshotProfile {
    path: PathBuf,
    id: SnapshotId,
    image_pages: u64,
    pages: Mutex<Vec<PageIndex>>,
    /// A resume records what its machine touches, or one has.
    is_recorded: AtomicBool,
    /// Hears of the pages when they have changed.
    hears: Box<Hears>,
}

type Hears = dyn Fn(&[PageIndex]) + Send + Sync;

impl fmt::Debug for SnapshotProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotProfile")
            .field("path", &self.path)
            .field("pages", &lock(&self.pages).len())
            .finish_non_exhaustive()
    }
}

impl SnapshotProfile {
    /// The profile of the snapshot in `directory`. One that can't be read is none, and a warning says so. `hears` is told of
    /// the pages now and whenever they have changed, the first needed first.
    pub fn open(
        directory: &Path,
        manifest: &Manifest,
        hears: impl Fn(&[PageIndex]) + Send + Sync + 'static,
    ) -> Self {
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
        hears(&pages);
        Self {
            path,
            id: manifest.id,
            image_pages: manifest.layout.pages(),
            pages: Mutex::new(pages),
            is_recorded: AtomicBool::new(false),
            hears: Box::new(hears),
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
            led: Mutex::default(),
            demands: Mutex::default(),
            touched: Mutex::default(),
            records: AtomicBool::new(false),
        })
    }

    /// Takes in what a resume's machine touched first, where that was recorded, and what else it waited for. A crash leaves
    /// the file as it was or as it is to be.
    fn learn(&self, touched: &[PageIndex], demands: &[Demand]) -> io::Result<()> {
        let mut pages = lock(&self.pages);
        *pages = led(&pages, touched, PROFILE_PAGES_MAX);
        *pages = merged(&pages, demands, PROFILE_PAGES_MAX);
        (self.hears)(&pages);
        let beside = self.path.with_extension("new");
        let mut file = File::create(&beside)?;
        file.write_all(&format::encode_profile(self.id, &pages))?;
        file.sync_all()?;
        fs::rename(&beside, &self.path)
    }
}

struct SessionProfile {
    shared: Arc<SnapshotProfile>,
    /// The pages that lead this session's push: places in demands are among these.
    led: Mutex<Vec<PageIndex>>,
    demands: Mutex<Vec<Demand>>,
    /// What the destination has recorded.
    touched: Mutex<HashSet<PageIndex>>,
    /// It was asked to.
    records: AtomicBool,
}

impl SessionProfile {
    fn learn(&self, touched: &[PageIndex], demands: &[Demand]) {
        if let Err(error) = self.shared.learn(touched, demands) {
            let path = self.shared.path.display();
            tracing::warn!(%path, %error, "can't write down which pages this resume needed first");
        }
    }
}

impl Profile for SessionProfile {
    fn lead(&self) -> Vec<PageRange> {
        let mut ranges: Vec<PageRange> = Vec::new();
        let pages = self.shared.pages();
        lock(&self.led).clone_from(&pages);
        for page in pages {
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

    fn wants_record(&self) -> bool {
        let wants = !self.shared.is_recorded.swap(true, Ordering::Relaxed);
        self.records.fetch_or(wants, Ordering::Relaxed);
        wants
    }

    fn touched(&self, mut pages: Vec<PageIndex>) {
        pages.retain(|page| page.0 < self.shared.image_pages);
        if pages.is_empty() {
            return;
        }
        self.records.store(false, Ordering::Relaxed);
        // The fault lane waits for nobody who holds the demands.
        let demands = lock(&self.demands).clone();
        let pages = surprises_first(pages, &demands, &lock(&self.led));
        self.learn(&pages, &[]);
        lock(&self.touched).extend(pages);
    }

    fn parted(&self) {
        if self.records.swap(false, Ordering::Relaxed) {
            self.shared.is_recorded.store(false, Ordering::Relaxed);
        }
    }

    fn finished(&self) {
        let touched = lock(&self.touched);
        let mut demands = std::mem::take(&mut *lock(&self.demands));
        // Where those stand among the ones that came in time is known.
        demands.retain(|demand| !touched.contains(&demand.page));
        if !demands.is_empty() {
            self.learn(&[], &demands);
        }
    }
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::{Layout, MachineOffer};

    use super::super::format::Part;
    use super::*;

    fn profile(directory: &Path) -> Arc<SnapshotProfile> {
        let manifest = Manifest {
            id: SnapshotId([7; 16]),
            taken_at_s: 0,
            layout: Layout::flat(64).unwrap(),
            offer: MachineOffer {
                kind: "memory".to_owned(),
                state_version: 1,
                compatibility: Vec::new(),
            },
            state: Part::of(b""),
            index: Part::of(b""),
            memory_bytes: 0,
            base: None,
        };
        Arc::new(SnapshotProfile::open(directory, &manifest, |_| {}))
    }

    #[test]
    fn one_clone_records_and_another_does_where_that_one_parted_before_it_told() {
        let folder = tempfile::tempdir().unwrap();
        let shared = profile(folder.path());
        let (first, second) = (shared.session(), shared.session());
        assert!(first.wants_record() && !second.wants_record());
        first.parted();
        let third = shared.session();
        assert!(third.wants_record());
        // It was not this one's.
        second.parted();
        assert!(!shared.session().wants_record());
        third.demanded(PageRange::one(PageIndex(5)), Some(0));
        third.touched([2, 5, 64].map(PageIndex).to_vec());
        third.parted();
        assert!(!shared.session().wants_record());
        assert_eq!(shared.pages(), [5, 2].map(PageIndex));
        assert_eq!(profile(folder.path()).pages(), shared.pages());
    }
}
