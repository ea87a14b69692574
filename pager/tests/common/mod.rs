//! What the tests of installing share: an image, memory of every kind, and a handler thread that serves faults.

// Each test program uses its own part of this.
#![allow(dead_code, unused_imports)]

pub mod huge;
pub mod sys;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_pager::install::{Event, FaultOutcome, Installer, Registration};
use lazyvm_pager::memory::{InstallMode, LazyMemory};
use lazyvm_pager::uffd::{OpenError, Uffd};
use lazyvm_wire::{Backing, Gpa, Layout, PAGE_SIZE, PageIndex, PageRange, Region};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use huge::HugePages;

/// Tells loudly that a test was not run; fails it where it has to run.
pub fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{test} can't run: {why}");
    eprintln!("SKIPPED {test}: {why}");
}

/// A kind of memory that pages are installed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Anonymous,
    SharedMissing,
    SharedMinor,
    HugeAnonymous,
    HugeMissing,
    HugeMinor,
}

impl Kind {
    pub fn is_huge(self) -> bool {
        matches!(
            self,
            Self::HugeAnonymous | Self::HugeMissing | Self::HugeMinor
        )
    }

    pub fn is_minor(self) -> bool {
        matches!(self, Self::SharedMinor | Self::HugeMinor)
    }

    /// Two regions with a hole between them; of huge pages, one of them is small still.
    pub fn layout(self, pages: u64) -> Layout {
        let backing = if self.is_huge() {
            Backing::Huge2M
        } else {
            Backing::Small
        };
        let low = 48;
        let region = |name: &str, gpa, pages, backing| Region {
            name: name.to_owned(),
            gpa: Some(Gpa(gpa)),
            pages,
            backing,
        };
        Layout::new(vec![
            region("low", 0, low, Backing::Small),
            region("high", 1 << 32, pages, backing),
        ])
        .expect("a layout")
    }

    pub fn memory(self, layout: &Layout) -> LazyMemory {
        match self {
            Self::Anonymous | Self::HugeAnonymous => LazyMemory::anonymous(layout),
            Self::SharedMissing | Self::HugeMissing => {
                LazyMemory::shared(layout, InstallMode::Missing)
            }
            Self::SharedMinor | Self::HugeMinor => LazyMemory::shared(layout, InstallMode::Minor),
        }
        .expect("memory")
    }
}

/// The source's memory.
pub struct Image {
    pub layout: Layout,
    pub bytes: Vec<u8>,
    /// A bit for each page that is not zero.
    pub map: BitVec<u64, Lsb0>,
}

impl Image {
    /// Every page differs from every other, but those in which `zero` finds nothing are zero.
    pub fn new(layout: Layout, zero: impl Fn(u64) -> bool) -> Self {
        let mut bytes = vec![0; layout.bytes() as usize];
        let mut map = BitVec::repeat(false, layout.pages() as usize);
        for (page, content) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
            if zero(page as u64) {
                continue;
            }
            map.set(page, true);
            for (word, to) in content.chunks_exact_mut(8).enumerate() {
                to.copy_from_slice(&pattern(page as u64, word as u64).to_ne_bytes());
            }
        }
        Self { layout, bytes, map }
    }

    pub fn of(&self, range: PageRange) -> &[u8] {
        &self.bytes[range.first.byte_offset() as usize..range.end().byte_offset() as usize]
    }

    pub fn page(&self, page: u64) -> &[u8] {
        self.of(PageRange::one(PageIndex(page)))
    }
}

fn pattern(page: u64, word: u64) -> u64 {
    (page << 16 | word)
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// A pager over fresh memory; `None` (loudly) where the machine has no userfaultfd for us.
pub fn installer(
    test: &str,
    kind: Kind,
    layout: &Layout,
    removals: bool,
) -> Option<Arc<Installer>> {
    let memory = Arc::new(kind.memory(layout));
    let uffd = match Uffd::open(&memory, removals) {
        Ok(uffd) => uffd,
        Err(error @ (OpenError::Permission(_) | OpenError::NoKernelSupport(_))) => {
            skip(test, &error.to_string());
            return None;
        }
        Err(error) => panic!("{test}: {error}"),
    };
    let installer =
        Installer::new(layout, memory, uffd, Registration::Register).expect("an installer");
    Some(Arc::new(installer))
}

/// A thread that serves faults from an image, as the fault lane does from the network.
pub struct Handler {
    stop: Arc<AtomicBool>,
    pub faults: Arc<AtomicU64>,
    pub removed_pages: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Handler {
    pub fn start(installer: &Arc<Installer>, image: &Arc<Image>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let faults = Arc::new(AtomicU64::new(0));
        let removed_pages = Arc::new(AtomicU64::new(0));
        let thread = {
            let (installer, image) = (installer.clone(), image.clone());
            let (stop, faults, removed) = (stop.clone(), faults.clone(), removed_pages.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    serve(&installer, &image, &faults, &removed);
                }
            })
        };
        Self {
            stop,
            faults,
            removed_pages,
            thread: Some(thread),
        }
    }

    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            // A test that waits for a page would never end.
            eprintln!("the handler thread has panicked");
            std::process::abort();
        }
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.join();
    }
}

/// Waits a little for events and serves them.
pub fn serve(installer: &Installer, image: &Image, faults: &AtomicU64, removed: &AtomicU64) {
    let mut waiting = [PollFd::new(installer.uffd().as_fd(), PollFlags::POLLIN)];
    poll(&mut waiting, PollTimeout::from(5_u8)).expect("poll");
    let mut events = Vec::new();
    while installer.read_events(&mut events).expect("events") > 0 {}
    for event in events {
        match event {
            Event::Fault { page, .. } => {
                faults.fetch_add(1, Ordering::Relaxed);
                if let FaultOutcome::Request(unit) = installer.fault(page).expect("a fault") {
                    installer.install(unit, image.of(unit)).expect("an install");
                }
            }
            Event::Removed(range) => {
                removed.fetch_add(range.count, Ordering::Relaxed);
            }
        }
    }
}

/// Numbers that look random, the same ones for the same seed (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % end
    }
}

/// Reads a page through the lazily filled mapping, as a guest would.
pub fn read_page(memory: &LazyMemory, page: u64) -> Vec<u8> {
    let mut content = vec![0; PAGE_SIZE];
    memory
        .read_at(page * PAGE_SIZE as u64, &mut content)
        .expect("a page of the image");
    content
}

/// Waits until `done` holds; a test that waits too long fails, so that it never hangs.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let since = std::time::Instant::now();
    while !done() {
        assert!(since.elapsed().as_secs() < 60, "waited for: {what}");
        std::thread::yield_now();
    }
}
