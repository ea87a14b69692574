//! Installs over what is there already, over what the kernel took away since, and the ways they are refused.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use common::{Handler, HugePages, Image, Kind, installer, read_page, skip, sys, until};
use lazyvm_pager::install::{
    CompleteError, Event, FaultOutcome, InstallError, Installer, Registration,
};
use lazyvm_pager::memory::{InstallMode, LazyMemory};
use lazyvm_pager::table::PageState;
use lazyvm_pager::uffd::{OpenError, RegisterError, Uffd};
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::MmapAdvise::MADV_DONTNEED;
use nix::unistd::gettid;

const PAGES: u64 = 1024;
const OLD: u8 = 0xaa;

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex(first), count)
}

/// Memory into which `before` has put something before the pager came.
fn over(
    test: &str,
    kind: Kind,
    image: &Image,
    before: impl FnOnce(&LazyMemory),
) -> Option<Installer> {
    let memory = Arc::new(kind.memory(&image.layout));
    before(&memory);
    match Uffd::open(&memory, false) {
        Ok(uffd) => Some(
            Installer::new(&image.layout, memory, uffd, Registration::Register)
                .expect("an installer"),
        ),
        Err(error @ (OpenError::Permission(_) | OpenError::NoKernelSupport(_))) => {
            skip(test, &error.to_string());
            None
        }
        Err(error) => panic!("{test}: {error}"),
    }
}

/// Writes to the file behind every page that `which` names, as a pre-copy does.
fn precopy(memory: &LazyMemory, image: &Image, which: impl Fn(u64) -> bool) {
    for page in image.layout.range().pages().filter(|page| which(page.0)) {
        let (region, offset) = image.layout.locate(page).expect("a page");
        let (file, start) = memory.regions()[region].file.as_ref().expect("a file");
        file.write_all_at(&[OLD; PAGE_SIZE], start + offset * PAGE_SIZE as u64)
            .expect("a write");
    }
}

#[test]
fn stale_pages_of_a_precopy_are_written_over() {
    let test = "stale_pages_of_a_precopy_are_written_over";
    let image = Arc::new(Image::new(Kind::SharedMinor.layout(PAGES), |page| {
        page % 10 == 1
    }));
    // Holes and stale pages in all orders, single ones and runs; some of them zero at the source.
    let stale = |page: u64| page % 5 == 1 || page % 64 > 40;
    let Some(installer) = over(test, Kind::SharedMinor, &image, |memory| {
        precopy(memory, &image, stale);
    }) else {
        return;
    };
    let installer = Arc::new(installer);
    installer.apply_map(&image.map).expect("the page map");
    let handler = Handler::start(&installer, &image);
    for page in 600..700 {
        assert!(read_page(installer.memory(), page) == image.page(page));
    }
    for first in (0..image.layout.pages()).step_by(67) {
        let run = range(first, 67).intersect(image.layout.range());
        installer.install(run, image.of(run)).expect("an install");
    }
    let check = || {
        for page in (0..image.layout.pages()).filter(|page| page % 20 != 1) {
            assert!(
                read_page(installer.memory(), page) == image.page(page),
                "page {page}"
            );
        }
    };
    check();
    handler.stop();
    installer.complete().expect("completion");
    check();
    // Zero pages that nobody touched before: their stale bytes are gone from the file too.
    for page in (0..image.layout.pages()).filter(|page| page % 20 == 1) {
        assert!(read_page(installer.memory(), page) == [0; PAGE_SIZE]);
    }
}

#[test]
fn stale_huge_pages_are_written_over() {
    let test = "stale_huge_pages_are_written_over";
    let Some(_pool) = HugePages::more(test, 6) else {
        return;
    };
    // Huge pages 2 and 3 are zero at the source; 1, 3, 4 are stale here.
    let image = Arc::new(Image::new(Kind::HugeMinor.layout(6 * 512), |page| {
        (48 + 1024..48 + 2048).contains(&page)
    }));
    let Some(installer) = over(test, Kind::HugeMinor, &image, |memory| {
        // hugetlbfs can't be written but through a mapping, which leaves the page mapped; so it is unmapped again.
        for unit in [1, 3, 4] {
            let pages = range(48 + unit * 512, 512);
            memory
                .write_at(pages.first.byte_offset(), &[OLD; 4096])
                .expect("a write");
            sys::advise(memory, pages, MADV_DONTNEED).expect("madvise");
        }
    }) else {
        return;
    };
    let installer = Arc::new(installer);
    installer.apply_map(&image.map).expect("the page map");
    let handler = Handler::start(&installer, &image);
    let run = range(48, 2 * 512);
    installer.install(run, image.of(run)).expect("an install");
    for page in (0..image.layout.pages()).filter(|page| !(48 + 1536..48 + 2048).contains(page)) {
        assert!(
            read_page(installer.memory(), page) == image.page(page),
            "page {page}"
        );
    }
    handler.stop();
    installer.complete().expect("completion");
    assert!(read_page(installer.memory(), 48 + 1536) == [0; PAGE_SIZE]);
}

/// `EEXIST`: an earlier pager installed these pages, and the guest has written to them.
#[test]
fn pages_that_are_there_stay_as_they_are() {
    let test = "pages_that_are_there_stay_as_they_are";
    for kind in [Kind::Anonymous, Kind::SharedMissing] {
        let image = Image::new(kind.layout(PAGES), |_| false);
        let there = |page: u64| page.is_multiple_of(3) || page % 50 > 30;
        let Some(installer) = over(test, kind, &image, |memory| {
            for page in (0..image.layout.pages()).filter(|&page| there(page)) {
                memory
                    .write_at(page * PAGE_SIZE as u64, &[OLD; PAGE_SIZE])
                    .expect("a write");
            }
        }) else {
            return;
        };
        let all = image.layout.range();
        let done = installer.install(all, image.of(all)).expect("an install");
        assert_eq!(done.pages, all.count);
        assert!(installer.table().is_complete());
        for page in 0..image.layout.pages() {
            let expected = if there(page) {
                &[OLD; PAGE_SIZE][..]
            } else {
                image.page(page)
            };
            assert!(read_page(installer.memory(), page) == expected);
        }
    }
}

/// The kernel unmaps pages that were installed: to reclaim them, or because the guest discards them unreported.
#[test]
fn pages_that_the_kernel_unmapped_come_back() {
    let test = "pages_that_the_kernel_unmapped_come_back";
    for kind in [Kind::Anonymous, Kind::SharedMissing, Kind::SharedMinor] {
        let image = Arc::new(Image::new(kind.layout(PAGES), |_| false));
        let Some(installer) = installer(test, kind, &image.layout, false) else {
            return;
        };
        let all = image.layout.range();
        installer.install(all, image.of(all)).expect("an install");
        let handler = Handler::start(&installer, &image);
        let memory = installer.memory();

        let unmapped = range(100, 30);
        sys::advise(memory, unmapped, MADV_DONTNEED).expect("madvise");
        for page in unmapped.pages() {
            let expected = match kind {
                Kind::Anonymous => &[0; PAGE_SIZE][..],
                _ => image.page(page.0),
            };
            assert!(read_page(memory, page.0) == expected, "{kind:?} {page}");
        }
        assert!(read_page(memory, 130) == image.page(130));

        if let Some((file, start)) = &memory.regions()[1].file {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let offset = start + 200 * PAGE_SIZE as u64;
            fallocate(file.as_ref(), flags, offset as i64, 10 * PAGE_SIZE as i64)
                .expect("fallocate");
            for page in 48 + 200..48 + 210 {
                assert!(read_page(memory, page) == [0; PAGE_SIZE], "{kind:?} {page}");
            }
        }
        handler.stop();
    }
}

#[test]
fn buffers_in_pieces_are_installed_as_one() {
    let test = "buffers_in_pieces_are_installed_as_one";
    let Some(_pool) = HugePages::more(test, 2) else {
        return;
    };
    for (kind, high) in [
        (Kind::Anonymous, PAGES),
        (Kind::SharedMinor, PAGES),
        (Kind::HugeMissing, 1024),
    ] {
        for piece in [1200, 4096, 5000, 1 << 20] {
            let image = Image::new(kind.layout(high), |_| false);
            let Some(installer) = installer(test, kind, &image.layout, false) else {
                return;
            };
            let all = image.layout.range();
            let mut slices: Vec<_> = image.bytes.chunks(piece).map(IoSlice::new).collect();
            slices.insert(3, IoSlice::new(&[]));
            let done = installer
                .install_vectored(all, &slices)
                .expect("an install");
            assert_eq!((done.pages, done.dropped), (all.count, 0));
            for page in 0..all.count {
                assert!(read_page(installer.memory(), page) == image.page(page));
            }
        }
    }
}

/// An extent of zeros for pages that were to have data: only where somebody waits, something is put in place.
#[test]
fn zeros_that_arrive_are_put_in_place_where_they_are_waited_for() {
    let test = "zeros_that_arrive_are_put_in_place_where_they_are_waited_for";
    for kind in [Kind::Anonymous, Kind::SharedMissing, Kind::SharedMinor] {
        let image = Image::new(kind.layout(PAGES), |_| true);
        let Some(installer) = installer(test, kind, &image.layout, false) else {
            return;
        };
        let page = PageIndex(77);
        assert_eq!(
            installer.fault(page).expect("a fault"),
            FaultOutcome::Request(PageRange::one(page))
        );
        assert_eq!(
            installer.fault(page).expect("a fault"),
            FaultOutcome::Waiting
        );
        installer.install_zeros(range(70, 20)).expect("zeros");
        assert!(read_page(installer.memory(), 77) == [0; PAGE_SIZE]);
        assert_eq!(installer.table().state(page), Some(PageState::Present));
        assert_eq!(
            installer.table().state(PageIndex(78)),
            Some(PageState::Zero)
        );
        assert_eq!(installer.table().remaining(), image.layout.pages() - 20);
        assert_eq!(
            installer.fault(PageIndex(78)).expect("a fault"),
            FaultOutcome::Served
        );
    }
}

#[test]
fn what_is_not_complete_is_not_let_go() {
    let test = "what_is_not_complete_is_not_let_go";
    let image = Arc::new(Image::new(Kind::SharedMinor.layout(PAGES), |page| {
        page < 48
    }));
    let Some(installer) = installer(test, Kind::SharedMinor, &image.layout, false) else {
        return;
    };
    installer.apply_map(&image.map).expect("the page map");
    let most = range(48, PAGES - 3);
    installer.install(most, image.of(most)).expect("an install");
    match installer.complete() {
        Err(CompleteError::Incomplete { remaining, first }) => {
            assert_eq!((remaining, first), (3, range(48 + PAGES - 3, 3)));
        }
        other => panic!("{other:?}"),
    }
    // It still waits for them, rather than read them as zeros.
    let handler = Handler::start(&installer, &image);
    for page in 48 + PAGES - 3..48 + PAGES {
        assert!(read_page(installer.memory(), page) == image.page(page));
    }
    // With the handler, what it was doing has ended.
    handler.stop();
    installer.complete().expect("completion");
    assert!(read_page(installer.memory(), 0) == [0; PAGE_SIZE]);
}

#[test]
fn wrong_installs_are_refused() {
    let test = "wrong_installs_are_refused";
    let Some(_pool) = HugePages::more(test, 2) else {
        return;
    };
    let image = Image::new(Kind::HugeMinor.layout(1024), |_| false);
    let Some(installer) = installer(test, Kind::HugeMinor, &image.layout, false) else {
        return;
    };
    for cut in [
        range(0, 49),
        range(48, 1),
        range(49, 512),
        range(5, 0),
        range(2000, 1),
        range(0, u64::MAX),
    ] {
        let data = vec![0; cut.count.min(600) as usize * PAGE_SIZE];
        let error = installer.install(cut, &data).expect_err("refused");
        assert!(matches!(error, InstallError::NotWholeUnits(_)), "{error}");
        let zeros = installer.install_zeros(cut).expect_err("refused");
        assert!(matches!(zeros, InstallError::NotWholeUnits(_)), "{zeros}");
    }
    let short = installer.install(range(0, 2), &[0; 4096]);
    assert!(matches!(
        short.expect_err("refused"),
        InstallError::Length { got: 4096, .. }
    ));
    assert!(installer.fault(PageIndex(48 + 1024)).is_err());
    assert_eq!(installer.table().remaining(), image.layout.pages());
}

#[test]
fn memory_of_another_layout_is_refused() {
    let test = "memory_of_another_layout_is_refused";
    let layout = Kind::Anonymous.layout(PAGES);
    let memory = Arc::new(
        LazyMemory::shared(&Kind::Anonymous.layout(PAGES / 2), InstallMode::Minor).expect("memory"),
    );
    let uffd = match Uffd::open(&memory, false) {
        Ok(uffd) => uffd,
        Err(error) => return skip(test, &error.to_string()),
    };
    let error = Installer::new(&layout, memory.clone(), uffd, Registration::Register)
        .err()
        .expect("refused");
    assert_eq!(
        error.to_string(),
        "memory sizes that differ: region high has 4 MiB at the source, 2 MiB here"
    );

    // The same memory twice: the first one has it.
    let layout = Kind::Anonymous.layout(PAGES / 2);
    let open = || Uffd::open(&memory, false).expect("userfaultfd");
    let first = Installer::new(&layout, memory.clone(), open(), Registration::Register);
    let second = Installer::new(&layout, memory.clone(), open(), Registration::Register);
    assert!(first.is_ok());
    assert!(matches!(
        second.err(),
        Some(RegisterError::Refused {
            region: 0,
            source: nix::errno::Errno::EBUSY,
            ..
        })
    ));
}

/// Both what waits and what is known of it are told: where, for what, and who.
#[test]
fn faults_tell_who_touched_what_and_how() {
    let test = "faults_tell_who_touched_what_and_how";
    let image = Arc::new(Image::new(Kind::SharedMinor.layout(PAGES), |_| false));
    let Some(installer) = over(test, Kind::SharedMinor, &image, |memory| {
        precopy(memory, &image, |page| page == 501);
    }) else {
        return;
    };
    let memory = installer.memory();
    for (page, write, minor) in [(500, true, false), (501, false, true), (3, false, false)] {
        let (tell, thread) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let touch = scope.spawn(move || {
                tell.send(gettid()).expect("the test listens");
                let offset = page * PAGE_SIZE as u64 + 100;
                if write {
                    memory.write_at(offset, &[1]).expect("a page");
                } else {
                    memory.read_at(offset, &mut [0]).expect("a page");
                }
            });
            let mut events = Vec::new();
            until("the touch is reported", || {
                installer.read_events(&mut events).expect("events") > 0
            });
            let expected = Event::Fault {
                page: PageIndex(page),
                write,
                minor,
                thread: u32::try_from(thread.recv().expect("a thread").as_raw()).ok(),
            };
            assert_eq!(events, [expected]);
            let unit = range(page, 1);
            assert_eq!(
                installer.fault(PageIndex(page)).expect("a fault"),
                FaultOutcome::Request(unit)
            );
            installer.install(unit, image.of(unit)).expect("an install");
            touch.join().expect("the touch");
        });
    }
}
