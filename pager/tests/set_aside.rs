//! Pages that are set aside until they are touched: each touch is seen, and finds what the source has.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::sync::Arc;
use std::thread;

use common::{Handler, HugePages, Image, Kind, Random, installer, read_page, until};
use lazyvm_pager::install::{Event, FaultOutcome, Installer, Shelf};
use lazyvm_pager::table::PageState;
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

const PAGES: u64 = 4096;
const HUGE: u64 = 8;

/// An image, memory for it that takes pages early, and the huge pages that it takes.
struct Setup {
    image: Arc<Image>,
    installer: Arc<Installer>,
    /// Behind the memory, so that it is dropped after it.
    _pool: Option<HugePages>,
}

fn setup(test: &str, kind: Kind) -> Option<Setup> {
    let (pages, pool) = if kind.is_huge() {
        (HUGE * 512, Some(HugePages::more(test, HUGE)?))
    } else {
        (PAGES, None)
    };
    let image = Arc::new(Image::new(kind.layout(pages), |page| page % 7 == 5));
    let mut installer = installer(test, kind, &image.layout, false)?;
    if !kind.is_minor() {
        let alone = Arc::into_inner(installer).expect("nobody else has it yet");
        let shelf = Shelf::new(image.layout.pages()).expect("a shelf");
        installer = Arc::new(alone.with_shelf(Arc::new(shelf)));
    }
    installer.apply_map(&image.map).expect("a map");
    Some(Setup {
        image,
        installer,
        _pool: pool,
    })
}

/// One after the other for each kind of memory that this machine has, with touches that map one by one.
fn setups(test: &str) -> impl Iterator<Item = Setup> {
    let kinds = [
        Kind::SharedMinor,
        Kind::Anonymous,
        Kind::HugeMinor,
        Kind::HugeAnonymous,
    ];
    kinds
        .into_iter()
        .filter_map(move |kind| setup(test, kind))
        .inspect(|setup| setup.installer.map_one_by_one(true))
}

/// The units of an image, in an order that depends on the seed.
fn shuffled_units(image: &Image, seed: u64) -> Vec<PageRange> {
    let mut units = Vec::new();
    let mut at = PageIndex(0);
    while let Some(unit) = image.layout.unit_of(at) {
        at = unit.end();
        units.push(unit);
    }
    let mut random = Random::new(seed);
    for at in (1..units.len()).rev() {
        units.swap(at, random.below(at as u64 + 1) as usize);
    }
    units
}

/// Answers the next fault; which page it was, and what became of it.
fn next_fault(installer: &Installer) -> (PageIndex, FaultOutcome) {
    let mut events = Vec::new();
    until("a fault", || {
        installer.read_events(&mut events).expect("events") > 0
    });
    let [Event::Fault { page, .. }] = events[..] else {
        panic!("{events:?}");
    };
    (page, installer.fault(page).expect("a fault"))
}

#[test]
fn each_touch_is_seen_in_its_order_and_no_other_page_is_mapped() {
    let test = "each_touch_is_seen_in_its_order_and_no_other_page_is_mapped";
    for setup in setups(test) {
        let (image, installer) = (&setup.image, &setup.installer);
        let mut units = shuffled_units(image, 3);
        units.retain(|unit| image.map[unit.first.as_usize()..unit.end().as_usize()].any());
        for &unit in &units {
            let done = installer
                .set_aside(unit, image.of(unit))
                .expect("set aside");
            assert_eq!(done.pages, unit.count);
        }
        assert_eq!(installer.table().remaining(), 0);
        let touched = &units[..units.len().min(200) / 2];
        thread::scope(|scope| {
            let guest = scope.spawn(|| {
                for unit in touched {
                    let number = unit.first.0;
                    let found = read_page(installer.memory(), number);
                    assert!(found == image.page(number), "page {number}");
                }
            });
            for unit in touched {
                let seen = next_fault(installer);
                assert_eq!(seen, (unit.first, FaultOutcome::Mapped));
            }
            guest.join().expect("the guest");
        });
        for unit in &units[touched.len()..] {
            let state = installer.table().state(unit.first);
            assert_eq!(state, Some(PageState::Held), "{unit}");
        }
        // The rest comes without a touch.
        installer.map_one_by_one(false);
        installer.map_held().expect("mapped");
        let handler = Handler::start(installer, image);
        for number in 0..image.layout.pages() {
            assert!(read_page(installer.memory(), number) == image.page(number));
        }
        handler.stop();
    }
}

/// Some pages are set aside and some installed while others touch and write them, and are asked for again.
#[test]
fn pages_that_are_touched_written_and_set_aside_at_once_are_right() {
    let test = "pages_that_are_touched_written_and_set_aside_at_once_are_right";
    for setup in setups(test) {
        let (image, installer) = (&setup.image, &setup.installer);
        let handler = Handler::start(installer, image);
        let pages = image.layout.pages();
        thread::scope(|scope| {
            for writer in 0..2_u64 {
                scope.spawn(move || {
                    let mut random = Random::new(writer + 1);
                    for _ in 0..1500 {
                        let number = random.below(pages / 2) * 2 + writer;
                        let found = read_page(installer.memory(), number);
                        assert!(found[8..] == image.page(number)[8..], "page {number}");
                        let mark = ((number << 8) | writer).to_ne_bytes();
                        let place = number * PAGE_SIZE as u64;
                        installer.memory().write_at(place, &mark).expect("a page");
                    }
                });
            }
            for seed in 7..9 {
                scope.spawn(move || {
                    for unit in shuffled_units(image, seed) {
                        let data = image.of(unit);
                        let done = if unit.first.0.is_multiple_of(3) {
                            installer.install(unit, data)
                        } else {
                            installer.set_aside(unit, data)
                        };
                        let done = done.expect("pages");
                        assert_eq!(done.pages + done.dropped, unit.count);
                    }
                });
            }
        });
        until("all is here", || installer.table().is_complete());
        installer.complete().expect("completion");
        handler.stop();
        for number in 0..pages {
            let found = read_page(installer.memory(), number);
            assert!(found[8..] == image.page(number)[8..], "page {number}");
            let mark = ((number << 8) | (number % 2)).to_ne_bytes();
            assert!(
                found[..8] == mark || found[..8] == image.page(number)[..8],
                "page {number}"
            );
        }
    }
}
