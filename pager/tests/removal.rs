//! Memory that the guest gives back while pages are on their way: it is zero from then on, and nothing hangs.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use common::{Handler, HugePages, Image, Kind, Random, installer, read_page, serve, sys, until};
use lazyvm_pager::install::{Event, FaultOutcome, Installer};
use lazyvm_pager::table::PageState;
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};
use nix::sys::mman::MmapAdvise::{self, MADV_DONTNEED, MADV_REMOVE};
use nix::unistd::{Pid, gettid};

const ZERO: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
const PAGES: u64 = 2048;

fn setup(test: &str, kind: Kind, pages: u64) -> Option<(Arc<Image>, Arc<Installer>)> {
    let image = Arc::new(Image::new(kind.layout(pages), |page| page % 13 == 7));
    let installer = installer(test, kind, &image.layout, true)?;
    installer.apply_map(&image.map).expect("the page map");
    Some((image, installer))
}

/// A guest discards ranges, a push brings everything, and other threads touch pages, all at once.
fn discarded_while_pushed(test: &str, kind: Kind, pages: u64, advice: MmapAdvise) {
    let Some((image, installer)) = setup(test, kind, pages) else {
        return;
    };
    let handler = Handler::start(&installer, &image);
    let high = image.layout.region_range(1).expect("a region");
    let unit = installer.table().unit_of(high.first).expect("a unit").count;
    let done = AtomicBool::new(false);
    let mut removed = HashSet::new();
    thread::scope(|scope| {
        let (installer, image, done) = (&installer, &image, &done);
        for seed in 1..=2 {
            scope.spawn(move || {
                let mut random = Random::new(seed);
                while !done.load(Ordering::Relaxed) {
                    let page = random.below(image.layout.pages());
                    let content = read_page(installer.memory(), page);
                    // It may be given back while it is read.
                    let each_word_is_from_one_of_both = content
                        .chunks(8)
                        .zip(image.page(page).chunks(8))
                        .all(|(word, source)| word == source || word == [0; 8]);
                    assert!(each_word_is_from_one_of_both, "page {page}");
                }
            });
        }
        scope.spawn(move || {
            // Old data keeps coming for pages that have long been given back.
            while !done.load(Ordering::Relaxed) {
                for run in runs_of(high, 256.max(unit)) {
                    installer.install(run, image.of(run)).expect("an install");
                }
            }
        });
        let mut random = Random::new(77);
        for _ in 0..60 {
            let first = high.first.0 + random.below(high.count / unit) * unit;
            let count = unit * (1 + random.below(6)).min((high.end().0 - first) / unit);
            let range = PageRange::new(PageIndex(first), count);
            sys::advise(installer.memory(), range, advice).expect("madvise");
            removed.extend(range.pages());
        }
        done.store(true, Ordering::Relaxed);
    });
    for page in image.layout.range().pages() {
        let content = read_page(installer.memory(), page.0);
        let expected = if removed.contains(&page) {
            &ZERO[..]
        } else {
            image.page(page.0)
        };
        assert!(
            content == expected,
            "{page}, {}, {:?}",
            removed.contains(&page),
            installer.table().state(page)
        );
    }
    assert!(handler.removed_pages.load(Ordering::Relaxed) <= 60 * 6 * unit);
    // A touch goes on as soon as its page is there; the table learns of it a moment later.
    until("all is here", || installer.table().is_complete());
    assert_eq!(installer.table().remaining(), 0);
    installer.complete().expect("completion");
    handler.stop();
}

fn runs_of(range: PageRange, pages: u64) -> impl Iterator<Item = PageRange> {
    (0..range.count.div_ceil(pages)).map(move |number| {
        let first = range.first.0 + number * pages;
        PageRange::new(PageIndex(first), pages.min(range.end().0 - first))
    })
}

#[test]
fn anonymous_discarded_while_pushed() {
    discarded_while_pushed("anonymous", Kind::Anonymous, PAGES, MADV_DONTNEED);
}

#[test]
fn shared_missing_punched_while_pushed() {
    discarded_while_pushed("shared_missing", Kind::SharedMissing, PAGES, MADV_REMOVE);
}

#[test]
fn shared_minor_punched_while_pushed() {
    discarded_while_pushed("shared_minor", Kind::SharedMinor, PAGES, MADV_REMOVE);
}

/// `MADV_DONTNEED` leaves the bytes in the file, so here the pager has to see to the zeros.
#[test]
fn shared_minor_discarded_while_pushed() {
    discarded_while_pushed("shared_minor", Kind::SharedMinor, PAGES, MADV_DONTNEED);
}

#[test]
fn huge_pages_removed_while_pushed() {
    let test = "huge_pages_removed_while_pushed";
    let Some(_pool) = HugePages::more(test, 16) else {
        return;
    };
    discarded_while_pushed(test, Kind::HugeAnonymous, 16 * 512, MADV_DONTNEED);
    discarded_while_pushed(test, Kind::HugeMissing, 16 * 512, MADV_REMOVE);
    discarded_while_pushed(test, Kind::HugeMinor, 16 * 512, MADV_REMOVE);
    discarded_while_pushed(test, Kind::HugeMinor, 16 * 512, MADV_DONTNEED);
}

/// Nobody reads events here but the install itself, which the kernel answers `EAGAIN` until somebody does.
#[test]
fn an_install_lets_the_removal_in_its_way_through() {
    let test = "an_install_lets_the_removal_in_its_way_through";
    for kind in [Kind::Anonymous, Kind::SharedMissing, Kind::SharedMinor] {
        let Some((image, installer)) = setup(test, kind, PAGES) else {
            return;
        };
        let gone = PageRange::new(PageIndex(100), 50);
        let touched = 700;
        let (tell, threads) = mpsc::channel();
        let tell = || tell.send(gettid()).expect("the test listens");
        thread::scope(|scope| {
            let removal = scope.spawn(|| {
                tell();
                sys::advise(installer.memory(), gone, advice_of(kind)).expect("madvise");
            });
            let touch = scope.spawn(|| {
                tell();
                read_page(installer.memory(), touched)
            });
            for thread in threads.iter().take(2) {
                until("both threads wait", || waits_for_userfaultfd(thread));
            }

            let run = PageRange::new(PageIndex(90), 100);
            let data = image.of(run);
            let done = installer.install(run, data).expect("an install");
            assert!(done.pages <= 50, "{done:?}");
            removal.join().expect("the removal");
            assert_eq!(
                installer.table().state(PageIndex(120)),
                Some(PageState::Removed)
            );

            // The fault that was read on the way comes again, to who reads next.
            let faults = AtomicU64::new(0);
            until("the fault is reported again", || {
                serve(&installer, &image, &faults, &AtomicU64::new(0));
                faults.load(Ordering::Relaxed) > 0
            });
            assert!(touch.join().expect("the touch") == image.page(touched));
        });
        let handler = Handler::start(&installer, &image);
        for page in gone.pages() {
            assert!(read_page(installer.memory(), page.0) == ZERO);
        }
        assert!(read_page(installer.memory(), 99) == image.page(99));
        handler.stop();
    }
}

fn advice_of(kind: Kind) -> MmapAdvise {
    if kind == Kind::Anonymous {
        MADV_DONTNEED
    } else {
        MADV_REMOVE
    }
}

fn waits_for_userfaultfd(thread: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/self/task/{thread}/wchan"))
        .expect("where the thread waits")
        .contains("userfault")
}

/// A thread waits for a page whose data will never be taken, because another one gave the page back.
#[test]
fn who_waits_for_a_page_that_is_given_back_gets_zeros() {
    let test = "who_waits_for_a_page_that_is_given_back_gets_zeros";
    for kind in [Kind::Anonymous, Kind::SharedMissing, Kind::SharedMinor] {
        let Some((image, installer)) = setup(test, kind, PAGES) else {
            return;
        };
        let page = PageIndex(300);
        thread::scope(|scope| {
            let touch = scope.spawn(|| read_page(installer.memory(), page.0));
            let mut events = Vec::new();
            until("the touch is reported", || {
                installer.read_events(&mut events).expect("events") > 0
            });
            assert!(matches!(events[0], Event::Fault { page: at, .. } if at == page));
            assert_eq!(
                installer.fault(page).expect("a fault"),
                FaultOutcome::Request(PageRange::one(page))
            );

            let removal = scope.spawn(|| {
                let range = PageRange::one(page);
                sys::advise(installer.memory(), range, advice_of(kind)).expect("madvise");
            });
            events.clear();
            until("the removal is reported", || {
                installer.read_events(&mut events).expect("events");
                events.contains(&Event::Removed(PageRange::one(page)))
            });
            removal.join().expect("the removal");
            let handler = Handler::start(&installer, &image);
            assert!(touch.join().expect("the touch") == ZERO);
            handler.stop();
        });
        let late = installer
            .install(PageRange::one(page), image.page(page.0))
            .expect("an install");
        assert_eq!((late.pages, late.dropped), (0, 1));
        assert!(read_page(installer.memory(), page.0) == ZERO);
    }
}
