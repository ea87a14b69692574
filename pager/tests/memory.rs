//! Lazy memory before any pager: its layout, its addresses, and reading and writing it.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::sync::Arc;

use common::{HugePages, Kind};
use lazyvm_pager::memory::{AccessError, InstallMode, LazyMemory, LazyRegion, MemoryError};
use lazyvm_wire::{Backing, Layout, PAGE_SIZE, PageIndex, PageRange};

#[test]
fn bytes_are_read_back_across_regions_at_any_offset() {
    for kind in [Kind::Anonymous, Kind::SharedMinor] {
        let layout = kind.layout(16);
        let memory = kind.memory(&layout);
        let size = layout.bytes() as usize;
        let written: Vec<u8> = (0..size).map(|byte| (byte * 7 / 3) as u8).collect();
        for (number, piece) in written.chunks(1013).enumerate() {
            memory
                .write_at(number as u64 * 1013, piece)
                .expect("a write");
        }
        for (offset, length) in [
            (0, size),
            (3, 1),
            (4091, 13),
            (48 * 4096 - 5, 4104),
            (size, 0),
        ] {
            let mut read = vec![0; length];
            memory.read_at(offset as u64, &mut read).expect("a read");
            assert!(
                read == written[offset..offset + length],
                "{offset} {length}"
            );
        }
        if let Some(file) = memory.file() {
            let mut read = vec![0; size];
            std::os::unix::fs::FileExt::read_exact_at(file.as_ref(), &mut read, 0)
                .expect("the file");
            assert!(read == written, "the file is the image");
        }
    }
}

#[test]
fn what_is_not_all_in_the_image_is_refused() {
    let memory = LazyMemory::anonymous(&Layout::flat(2).expect("a layout")).expect("memory");
    for offset in [8191, 8193, u64::MAX] {
        let error = memory.read_at(offset, &mut [0; 2]).expect_err("refused");
        assert_eq!(
            error,
            AccessError::OutOfImage {
                offset,
                length: 2,
                image: 8192
            }
        );
        assert!(memory.write_at(offset, &[0; 2]).is_err());
    }
}

#[test]
fn addresses_and_pages_are_each_others() {
    let layout = Kind::Anonymous.layout(100);
    let memory = LazyMemory::anonymous(&layout).expect("memory");
    for page in layout.range().pages() {
        let host = memory.address_of(page).expect("a page of the image");
        for byte in [0, 1, 4095] {
            assert_eq!(memory.page_at(host + byte), Some(page));
        }
    }
    assert_eq!(memory.address_of(PageIndex(148)), None);
    let (low, high) = (&memory.regions()[0], &memory.regions()[1]);
    assert_eq!(memory.page_at(low.host.min(high.host) - 1), None);
    assert_eq!(memory.page_at(0), None);
    assert_eq!(memory.page_at(u64::MAX), None);

    let mut all: Vec<_> = memory.pages_between(0, u64::MAX).collect();
    all.sort_by_key(|range| range.first);
    let range = |first, count| PageRange::new(PageIndex(first), count);
    assert_eq!(all, [range(0, 48), range(48, 100)]);
    let inside: Vec<_> = memory
        .pages_between(low.host + 1, low.host + 3 * 4096 + 4095)
        .collect();
    assert_eq!(inside, [range(1, 2)], "whole pages");
    assert_eq!(
        memory.pages_between(low.host + 5, low.host + 900).count(),
        0
    );
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let region = |host, pages, backing| LazyRegion {
        host,
        pages,
        backing,
        file: None,
    };
    let of = |regions, mode| LazyMemory::in_other_process(regions, mode);
    let missing = InstallMode::Missing;
    let huge = Backing::Huge2M;
    for wrong in [
        region(0x1001, 1, Backing::Small),
        region(0x1000, 0, Backing::Small),
        region(0x1000, 512, huge),
        region(0x20_0000, 511, huge),
        region(u64::MAX - 0xfff, 2, Backing::Small),
        region(0x1000, u64::MAX, Backing::Small),
    ] {
        let error = of(vec![wrong], missing).expect_err("refused");
        assert!(matches!(error, MemoryError::Unaligned { .. }), "{error}");
    }
    let overlapping = vec![
        region(0x8000, 4, Backing::Small),
        region(0x5000, 4, Backing::Small),
    ];
    let error = of(overlapping, missing).expect_err("refused");
    assert!(matches!(error, MemoryError::Overlap(1, 0)), "{error}");
    let error = of(vec![region(0x1000, 1, Backing::Small)], InstallMode::Minor);
    assert!(matches!(error, Err(MemoryError::NoFile(0))));

    let theirs = of(vec![region(0x1000, 1, Backing::Small)], missing).expect("memory");
    assert_eq!(
        theirs.read_at(0, &mut [0; 8]),
        Err(AccessError::OtherProcess)
    );
    assert_eq!(theirs.write_at(0, &[0; 8]), Err(AccessError::OtherProcess));
}

#[test]
fn a_layout_that_differs_is_told_in_words() {
    let memory = LazyMemory::anonymous(&Kind::Anonymous.layout(512)).expect("memory");
    let error = |layout: &Layout| {
        memory
            .check_against(layout)
            .expect_err("differs")
            .to_string()
    };
    memory
        .check_against(&Kind::Anonymous.layout(512))
        .expect("the same");
    assert_eq!(
        error(&Kind::Anonymous.layout(513)),
        "memory sizes that differ: region high has 2052 KiB at the source, 2 MiB here"
    );
    assert_eq!(
        error(&Kind::HugeMissing.layout(512)),
        "page sizes that differ: region high has pages of 2 MiB at the source, of 4 KiB here"
    );
    assert_eq!(
        error(&Layout::flat(48).expect("a layout")),
        "memory layouts that differ: 1 regions at the source, 2 here"
    );
}

#[test]
fn huge_pages_have_a_file_of_their_own() {
    let test = "huge_pages_have_a_file_of_their_own";
    let Some(_pool) = HugePages::more(test, 2) else {
        return;
    };
    let layout = Kind::HugeMissing.layout(1024);
    let memory = LazyMemory::shared(&layout, InstallMode::Missing).expect("memory");
    assert!(memory.file().is_none());
    let file = |number: usize| {
        let region: &LazyRegion = &memory.regions()[number];
        region.file.clone().expect("a file")
    };
    assert!(!Arc::ptr_eq(&file(0).0, &file(1).0));
    assert_eq!((file(0).1, file(1).1), (0, 0));
    assert_eq!(memory.bytes(), (48 + 1024) * PAGE_SIZE as u64);
}

#[test]
fn too_few_huge_pages_are_told_before_anything_runs() {
    let test = "too_few_huge_pages_are_told_before_anything_runs";
    let Some(_pool) = HugePages::more(test, 1) else {
        return;
    };
    let layout = Kind::HugeMissing.layout(512 * 100_000);
    for error in [
        LazyMemory::anonymous(&layout).expect_err("too few"),
        LazyMemory::shared(&layout, InstallMode::Minor).expect_err("too few"),
    ] {
        let words = error.to_string();
        assert!(words.contains("100000 free huge pages"), "{words}");
    }
}
