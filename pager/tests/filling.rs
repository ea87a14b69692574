//! Memory of every kind is filled by faults and by a push at the same time, and is the source's byte for byte.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::{Handler, HugePages, Image, Kind, Random, installer, read_page, until};
use lazyvm_pager::install::Installer;
use lazyvm_pager::table::PageState;
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

/// Image pages of the second region: 8 MiB of small pages, or 8 huge pages.
const SMALL_PAGES: u64 = 2048;
const HUGE_UNITS: u64 = 8;

macro_rules! for_each_kind {
    ($test:ident) => {
        mod $test {
            use super::*;

            #[test]
            fn anonymous() {
                super::$test("anonymous", Kind::Anonymous);
            }

            #[test]
            fn shared_missing() {
                super::$test("shared_missing", Kind::SharedMissing);
            }

            #[test]
            fn shared_minor() {
                super::$test("shared_minor", Kind::SharedMinor);
            }

            #[test]
            fn huge_anonymous() {
                super::$test("huge_anonymous", Kind::HugeAnonymous);
            }

            #[test]
            fn huge_missing() {
                super::$test("huge_missing", Kind::HugeMissing);
            }

            #[test]
            fn huge_minor() {
                super::$test("huge_minor", Kind::HugeMinor);
            }
        }
    };
}

for_each_kind!(touched_and_pushed_at_once);
for_each_kind!(late_duplicates_leave_writes_alone);
for_each_kind!(zero_pages_take_no_memory);

/// An image with zero pages all over, memory for it, and the huge pages that takes.
struct Setup {
    image: Arc<Image>,
    installer: Arc<Installer>,
    /// Behind the memory, so that it is dropped after it.
    _pool: Option<HugePages>,
}

fn setup(test: &str, kind: Kind, zero: impl Fn(u64) -> bool) -> Option<Setup> {
    let (pages, pool) = if kind.is_huge() {
        (HUGE_UNITS * 512, Some(HugePages::more(test, HUGE_UNITS)?))
    } else {
        (SMALL_PAGES, None)
    };
    let image = Arc::new(Image::new(kind.layout(pages), zero));
    let installer = installer(test, kind, &image.layout, false)?;
    Some(Setup {
        image,
        installer,
        _pool: pool,
    })
}

/// Pages 5, 12, 19, … are zero, and a stretch of 700 pages, in which there is a whole huge page.
fn sparse(page: u64) -> bool {
    page % 7 == 5 || (1000..2200).contains(&page)
}

/// Pushes the whole image in runs of `pages`, whole units each, from several threads in different orders.
fn push_all(installer: &Installer, image: &Image, pages: u64, backwards: bool) -> u64 {
    let mut runs = Vec::new();
    for region in 0..image.layout.regions().len() {
        let range = image.layout.region_range(region).expect("a region");
        let unit = image.layout.regions()[region].backing.pages();
        let mut first = range.first.0;
        while first < range.end().0 {
            let count = pages.max(unit).min(range.end().0 - first);
            runs.push(PageRange::new(PageIndex(first), count));
            first += count;
        }
    }
    if backwards {
        runs.reverse();
    }
    runs.into_iter()
        .map(|run| {
            let done = installer.install(run, image.of(run)).expect("an install");
            assert_eq!(done.pages + done.dropped, run.count);
            done.pages
        })
        .sum()
}

fn assert_same(installer: &Installer, image: &Image) {
    for page in 0..image.layout.pages() {
        assert!(
            read_page(installer.memory(), page) == image.page(page),
            "page {page} is not the source's ({:?})",
            installer.table().state(PageIndex(page))
        );
    }
}

fn touched_and_pushed_at_once(test: &str, kind: Kind) {
    let Some(setup) = setup(test, kind, sparse) else {
        return;
    };
    let (image, installer) = (&setup.image, &setup.installer);
    installer.apply_map(&image.map).expect("the page map");
    let to_come = installer.table().remaining();
    let handler = Handler::start(installer, image);
    let pushed = AtomicU64::new(0);
    thread::scope(|scope| {
        for seed in 1..=3 {
            let (installer, image) = (installer, image);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                for _ in 0..1500 {
                    let page = random.below(image.layout.pages());
                    assert!(read_page(installer.memory(), page) == image.page(page));
                }
            });
        }
        for backwards in [false, true] {
            let (installer, image, pushed) = (installer, image, &pushed);
            scope.spawn(move || {
                pushed.fetch_add(push_all(installer, image, 64, backwards), Ordering::Relaxed);
            });
        }
    });
    // A touch goes on as soon as its page is there; the table learns of it a moment later.
    until("all is here", || installer.table().is_complete());
    assert_eq!(installer.table().remaining(), 0);
    assert!(pushed.load(Ordering::Relaxed) <= to_come);
    assert_same(installer, image);
    installer.complete().expect("completion");
    handler.stop();
    assert_same(installer, image);
}

fn late_duplicates_leave_writes_alone(test: &str, kind: Kind) {
    let Some(setup) = setup(test, kind, |_| false) else {
        return;
    };
    let (image, installer) = (&setup.image, &setup.installer);
    let handler = Handler::start(installer, image);
    let memory = installer.memory();
    let pages = image.layout.pages();
    let mark = |writer: u64, page: u64| writer << 32 | page;
    thread::scope(|scope| {
        for writer in 0..3_u64 {
            scope.spawn(move || {
                for page in (0..pages).filter(|page| page % 3 == writer) {
                    let mut word = [0; 8];
                    memory
                        .read_at(page * PAGE_SIZE as u64 + 64, &mut word)
                        .expect("a page");
                    memory
                        .write_at(page * PAGE_SIZE as u64, &mark(writer, page).to_ne_bytes())
                        .expect("a page");
                }
            });
        }
        for pages in [1, 16, 64, 256] {
            let (installer, image) = (installer, image);
            scope.spawn(move || push_all(installer, image, pages, pages == 16));
        }
    });
    assert_eq!(push_all(installer, image, 64, false), 0, "all was here");
    for page in 0..pages {
        let content = read_page(memory, page);
        assert_eq!(content[..8], mark(page % 3, page).to_ne_bytes());
        assert!(content[8..] == image.page(page)[8..]);
    }
    handler.stop();
}

fn zero_pages_take_no_memory(test: &str, kind: Kind) {
    let Some(setup) = setup(test, kind, |page| page >= 48 + 16) else {
        return;
    };
    let (image, installer) = (&setup.image, &setup.installer);
    let handler = Handler::start(installer, image);
    installer.apply_map(&image.map).expect("the page map");
    let high = image.layout.region_range(1).expect("a region");
    let unit = installer.table().unit_of(high.first).expect("a unit").count;
    assert_eq!(
        installer.table().remaining(),
        48 + unit.max(16),
        "a huge page is zero when all of it is"
    );
    let touched = high.end().0 - 3;
    assert!(read_page(installer.memory(), touched) == vec![0; PAGE_SIZE]);
    let here = || installer.table().state(PageIndex(touched)) == Some(PageState::Present);
    until("the touched page is here", here);
    let filled: u64 = installer
        .table()
        .runs(|state| state == PageState::Present)
        .map(|run| run.count)
        .sum();
    assert_eq!(filled, unit.max(16), "its block, or its huge page");
    if let Some((file, _)) = &installer.memory().regions()[1].file {
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("metadata"));
        assert_eq!(blocks * 512, filled * PAGE_SIZE as u64);
    }
    push_all(installer, image, 64, false);
    installer.complete().expect("completion");
    handler.stop();
    assert_same(installer, image);
}
