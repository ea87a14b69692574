//! Pages that come before the machine is handed over: those that hold are the guest's, those that went stale never are.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::sync::{Arc, Mutex};

use common::{Handler, HugePages, Image, Kind, Random, installer, read_page, sys};
use lazyvm_pager::install::{InstallError, Installer, Shelf};
use lazyvm_pager::table::PageState;
use lazyvm_wire::held::HeldRun;
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};
use nix::sys::mman::MmapAdvise;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;

const PAGES: u64 = 512;

fn page(number: u64) -> PageRange {
    PageRange::one(PageIndex(number))
}

/// Huge pages of an image, the second of which is zero.
const HUGE: u64 = 4;

fn image(kind: Kind) -> Arc<Image> {
    Arc::new(if kind.is_huge() {
        let zero = |page| page < 48 && page % 7 == 3 || (48 + 512..48 + 1024).contains(&page);
        Image::new(kind.layout(HUGE * 512), zero)
    } else {
        Image::new(kind.layout(PAGES), |page| page % 7 == 3)
    })
}

/// The huge pages that memory of this kind takes, if any.
fn pool(test: &str, kind: Kind) -> Option<Option<HugePages>> {
    if kind.is_huge() {
        HugePages::more(test, HUGE).map(Some)
    } else {
        Some(None)
    }
}

/// Memory with a file of its own, or private memory with a shelf.
fn installer_for_early(test: &str, kind: Kind, image: &Image) -> Option<Installer> {
    let installer = Arc::into_inner(installer(test, kind, &image.layout, false)?)
        .expect("nobody else has it yet");
    if kind.is_minor() {
        return Some(installer);
    }
    let shelf = Shelf::new(image.layout.pages()).expect("a shelf");
    Some(installer.with_shelf(Arc::new(shelf)))
}

fn keep(installer: &Installer, range: PageRange, round: u8, data: &[u8]) -> Vec<PageRange> {
    let mut late = Vec::new();
    installer
        .keep(range, round, data, |range, data| {
            late.push(range);
            installer.install(range, data).map(|_| ())
        })
        .expect("an early page");
    late
}

/// A run for each row of pages that hold, as the source tells it.
fn held(rounds: &[u8]) -> Vec<HeldRun> {
    let mut held: Vec<HeldRun> = Vec::new();
    for (number, &round) in (0..).zip(rounds).filter(|(_, round)| **round > 0) {
        match held.last_mut() {
            Some(last) if last.round == round && last.range.end() == PageIndex(number) => {
                last.range.count += 1;
            }
            _ => held.push(HeldRun {
                range: page(number),
                round,
            }),
        }
    }
    held
}

/// The units of a range.
fn units(image: &Image, range: PageRange) -> Vec<PageRange> {
    let mut units = Vec::new();
    let mut at = range.first;
    while at < range.end() {
        let unit = image.layout.unit_of(at).expect("in the image");
        at = unit.end();
        units.push(unit);
    }
    units
}

/// What the guest sees, page for page.
fn assert_is(installer: &Arc<Installer>, image: &Arc<Image>) {
    let handler = Handler::start(installer, image);
    for number in 0..image.layout.pages() {
        assert!(
            read_page(installer.memory(), number) == image.page(number),
            "page {number}, {:?}",
            installer.table().state(PageIndex(number))
        );
    }
    handler.stop();
}

/// What comes early, as first page and count, and what is touched before the switchover.
type Steps = (u64, Vec<(u64, u64)>, Vec<u64>);

fn steps(pages: u64, frames: usize) -> impl Strategy<Value = Steps> {
    (
        any::<u64>(),
        proptest::collection::vec((0..pages + 48, 1..20_u64), 0..frames),
        proptest::collection::vec(0..pages + 48, 0..6),
    )
}

/// Any pages come early, right or stale, before or after the switchover, some are touched before it.
fn the_guest_sees_what_the_source_had(
    kind: Kind,
    (seed, early, touched): Steps,
) -> Result<(), TestCaseError> {
    let image = image(kind);
    let Some(installer) = installer_for_early("early", kind, &image) else {
        return Ok(());
    };
    let mut random = Random::new(seed);
    let pages = image.layout.pages();
    // The last round in which a page went, and that one if its copy was right.
    let mut last = vec![0_u8; pages as usize];
    let mut right = vec![0_u8; pages as usize];
    let mut frames = Vec::new();
    for &number in &touched {
        installer.table().fault(PageIndex(number));
    }
    for (first, count) in early {
        let end = if first < 48 { 48 } else { pages };
        let range = PageRange::new(PageIndex(first), count.min(end - first));
        let units = units(&image, range);
        let first = units[0].first;
        let range = PageRange::new(first, units.len() as u64 * units[0].count);
        let bits = first.as_usize()..range.end().as_usize();
        let round = 1 + last[bits].iter().copied().max().unwrap_or(0) + random.below(3) as u8;
        let mut data = image.of(range).to_vec();
        for (unit, bytes) in units
            .iter()
            .zip(data.chunks_exact_mut(units[0].bytes() as usize))
        {
            let is_right = random.below(3) > 0 && image.map[unit.first.as_usize()];
            let bits = unit.first.as_usize()..unit.end().as_usize();
            last[bits.clone()].fill(round);
            right[bits].fill(if is_right { round } else { 0 });
            if !is_right {
                bytes.fill(random.below(200) as u8 + 1);
            }
        }
        frames.push((range, round, data));
    }
    // Streams arrive in any order, some of them after the switchover.
    for at in (1..frames.len()).rev() {
        frames.swap(at, random.below(at as u64 + 1) as usize);
    }
    let before = random.below(frames.len() as u64 + 1) as usize;
    for (range, round, data) in &frames[..before] {
        prop_assert!(keep(&installer, *range, *round, data).is_empty());
    }
    let held = held(&right);
    installer.apply_map(&image.map).expect("a map");
    let here = installer.hold(&held).expect("held pages");
    prop_assert!(here <= held.iter().map(|run| run.range.count).sum());
    if random.below(2) == 0 {
        installer.map_held().expect("mapped");
    }
    for (range, round, data) in &frames[before..] {
        for part in keep(&installer, *range, *round, data) {
            prop_assert!(part.pages().all(|page| right[page.as_usize()] == *round));
        }
    }
    let installer = Arc::new(installer);
    // Nobody asked for what was touched before the switchover and is not here.
    let asked: Vec<_> = installer.table().requested().collect();
    for range in asked {
        installer
            .install(range, image.of(range))
            .expect("an install");
    }
    assert_is(&installer, &image);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_guest_sees_what_the_source_had_at_the_pause(
        steps in steps(PAGES, 60),
        shared in any::<bool>(),
    ) {
        let kind = if shared { Kind::SharedMinor } else { Kind::Anonymous };
        the_guest_sees_what_the_source_had(kind, steps)?;
    }
}

/// The same of huge pages, in their file and from a shelf.
#[test]
fn the_guest_sees_huge_pages_as_the_source_had_them_at_the_pause() {
    let test = "the_guest_sees_huge_pages_as_the_source_had_them_at_the_pause";
    let Some(_pool) = pool(test, Kind::HugeMinor) else {
        return;
    };
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let cases = (steps(HUGE * 512, 12), any::<bool>());
    let tried = runner.run(&cases, |(steps, shared)| {
        let kind = if shared {
            Kind::HugeMinor
        } else {
            Kind::HugeAnonymous
        };
        the_guest_sees_what_the_source_had(kind, steps)
    });
    if let Err(error) = tried {
        panic!("{error}");
    }
}

/// Nothing shows but a whole one.
#[test]
fn a_part_of_a_huge_page_is_not_taken() {
    let test = "a_part_of_a_huge_page_is_not_taken";
    let Some(_pool) = pool(test, Kind::HugeMinor) else {
        return;
    };
    let image = image(Kind::HugeMinor);
    let Some(installer) = installer_for_early(test, Kind::HugeMinor, &image) else {
        return;
    };
    let part = PageRange::new(PageIndex(48), 511);
    let kept = installer.keep(part, 1, image.of(part), |_, _| Ok(()));
    assert!(matches!(kept, Err(InstallError::NotWholeUnits(_))));
    let whole = PageRange::new(PageIndex(48), 512);
    keep(&installer, whole, 1, image.of(whole));
    installer.apply_map(&image.map).expect("a map");
    let held = HeldRun {
        range: part,
        round: 1,
    };
    installer.hold(&[held]).expect("held pages");
    let state = installer.table().state(PageIndex(48));
    assert_eq!(
        state,
        Some(PageState::Absent),
        "it is not said that all of it holds"
    );
}

#[test]
fn the_rest_is_right_too_when_the_memory_is_let_go() {
    for kind in [
        Kind::SharedMinor,
        Kind::Anonymous,
        Kind::HugeMinor,
        Kind::HugeAnonymous,
    ] {
        let Some(_pool) = pool("early_complete", kind) else {
            continue;
        };
        let image = image(kind);
        if let Some(installer) = installer_for_early("early_complete", kind, &image) {
            let_go(&installer, &image);
        }
    }
}

fn let_go(installer: &Installer, image: &Image) {
    let pages = image.layout.pages();
    let mut rounds = vec![0; pages as usize];
    for (number, unit) in (0..).zip(units(image, image.layout.range())) {
        // Every other unit holds; what is zero at the pause was something else before.
        let right = number % 2 == 0 && image.map[unit.first.as_usize()];
        rounds[unit.first.as_usize()..unit.end().as_usize()].fill(u8::from(right));
        let data = if right {
            image.of(unit).to_vec()
        } else {
            vec![7; unit.bytes() as usize]
        };
        keep(installer, unit, 1, &data);
    }
    installer.apply_map(&image.map).expect("a map");
    installer.hold(&held(&rounds)).expect("held pages");
    assert_eq!(installer.table().state(PageIndex(0)), Some(PageState::Held));
    let missing: Vec<_> = installer.table().missing().collect();
    for range in missing {
        installer
            .install(range, image.of(range))
            .expect("an install");
    }
    installer.complete().expect("complete");
    installer
        .map_held()
        .expect("what the file holds needs no mapping any more");
    for number in 0..pages {
        assert!(
            read_page(installer.memory(), number) == image.page(number),
            "page {number}"
        );
    }
}

#[test]
fn a_page_that_the_file_lost_is_asked_for() {
    use nix::fcntl::{FallocateFlags, fallocate};
    let image = image(Kind::SharedMinor);
    let Some(installer) = installer("early_lost", Kind::SharedMinor, &image.layout, false) else {
        return;
    };
    for number in 0..8 {
        keep(&installer, page(number), 1, image.page(number));
    }
    installer.apply_map(&image.map).expect("a map");
    assert_eq!(installer.hold(&held(&[1, 1, 1])).expect("held pages"), 3);
    let (file, start) = installer.memory().regions()[0]
        .file
        .clone()
        .expect("a file");
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(
        file.as_ref(),
        flags,
        start as i64 + PAGE_SIZE as i64,
        PAGE_SIZE as i64,
    )
    .expect("a hole");
    installer.map_held().expect("mapped");
    let state = |number| installer.table().state(PageIndex(number));
    assert_eq!(
        [state(0), state(1), state(2)],
        [
            Some(PageState::Present),
            Some(PageState::Requested),
            Some(PageState::Present)
        ]
    );
}

#[test]
fn memory_without_a_file_takes_nothing_early() {
    let image = Arc::new(Image::new(Kind::Anonymous.layout(PAGES), |_| false));
    let Some(installer) = installer("early_private", Kind::Anonymous, &image.layout, false) else {
        return;
    };
    assert!(!installer.takes_early());
    let never = Mutex::new(false);
    let refused = installer.keep(page(0), 1, image.page(0), |_, _| {
        *never.lock().expect("unpoisoned") = true;
        Ok(())
    });
    assert!(refused.is_err() && !*never.lock().expect("unpoisoned"));
}

#[test]
fn pages_wait_on_the_shelf_until_there_is_memory() {
    let image = image(Kind::Anonymous);
    let Some(installer) = installer("early_shelf", Kind::Anonymous, &image.layout, false) else {
        return;
    };
    let shelf = Arc::new(Shelf::new(image.layout.pages()).expect("a shelf"));
    for (number, round, byte) in [(1, 1, 7), (2, 2, 9), (2, 1, 8)] {
        let kept = shelf.keep(page(number), round, &[byte; PAGE_SIZE]);
        assert!(kept.expect("room"), "page {number}");
    }
    let installer = Arc::into_inner(installer)
        .expect("nobody else has it yet")
        .with_shelf(shelf.clone());
    assert!(installer.takes_early());
    installer.apply_map(&image.map).expect("a map");
    assert_eq!(installer.hold(&held(&[0, 1, 2])).expect("held pages"), 2);
    let kept = shelf.keep(page(4), 1, &[1; PAGE_SIZE]);
    assert!(!kept.expect("no write"), "the switchover was here");
    installer.map_held().expect("mapped");
    for (number, byte) in [(1, 7), (2, 9)] {
        assert_eq!(read_page(installer.memory(), number), [byte; PAGE_SIZE]);
    }
    let past = PageRange::new(PageIndex(image.layout.pages() - 1), 2);
    assert!(shelf.keep(past, 1, &[0; 2 * PAGE_SIZE]).is_err());
    assert!(shelf.keep(page(0), 1, &[0; 7]).is_err());
}

#[test]
fn what_was_given_back_does_not_come_from_the_shelf() {
    let image = image(Kind::Anonymous);
    let Some(installer) = installer("early_removed", Kind::Anonymous, &image.layout, true) else {
        return;
    };
    let shelf = Arc::new(Shelf::new(image.layout.pages()).expect("a shelf"));
    let all = image.layout.range();
    for part in all.pages() {
        let kept = shelf.keep(PageRange::one(part), 1, image.page(part.0));
        assert!(kept.expect("room"));
    }
    let installer = Arc::into_inner(installer)
        .expect("nobody else has it yet")
        .with_shelf(shelf);
    installer.apply_map(&image.map).expect("a map");
    let rounds: Vec<u8> = all
        .pages()
        .map(|at| image.map[at.as_usize()].into())
        .collect();
    installer.hold(&held(&rounds)).expect("held pages");
    let installer = Arc::new(installer);
    let handler = Handler::start(&installer, &image);
    // Nobody has touched the first pages yet; the others are in place by the time.
    let given_back = PageRange::new(PageIndex(100), 40);
    std::thread::scope(|scope| {
        scope.spawn(|| installer.map_held().expect("mapped"));
        sys::advise(installer.memory(), given_back, MmapAdvise::MADV_DONTNEED).expect("madvise");
    });
    for at in all.pages() {
        let expected = if given_back.contains(at) {
            &[0; PAGE_SIZE][..]
        } else {
            image.page(at.0)
        };
        assert!(read_page(installer.memory(), at.0) == expected, "{at}");
    }
    handler.stop();
}
