//! The touch payload, on real KVM: it ticks, and it notices what is not as it left it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{Home, Running, has_kvm};
use lazyvm_vmm_glue::kvm::TouchConfig;
use lazyvm_vmm_glue::kvm::touch::{TouchPlan, pattern};
use nix::unistd::{Whence, lseek};

/// Few pages, so that each of them is touched soon.
fn small() -> TouchConfig {
    TouchConfig {
        fill_bytes: Some(64 << 10),
        hot_bytes: Some(16 << 10),
        cold_per_million: 200_000,
        tick_touches: Some(50),
    }
}

/// Where everything lies in a machine that [`Home::touch`] made of [`small`].
fn plan() -> TouchPlan {
    TouchPlan::new(&small(), 16 << 20, 1).unwrap()
}

/// Does something to a machine that stands still.
fn tamper(machine: &Running, tamper: &mut dyn FnMut(&File)) {
    machine.machine().pause().unwrap();
    tamper(machine.machine().memory_file());
    machine.machine().resume(false).unwrap();
}

/// Does it until the guest has noticed, and gives the line in which it says so.
///
/// More than once, since the guest may stand just between the checks and the writes of a touch of the very page,
/// where it overwrites what was done to it and notices nothing.
fn tamper_until_noticed(machine: &Running, change: &mut dyn FnMut(&File)) -> String {
    for _ in 0..20 {
        let seen = machine.wait_ticks(2, 1).len();
        tamper(machine, change);
        machine.wait_ticks(seen + 5, 1);
        if let Some(line) = machine
            .wait_lines(0, |line| line.starts_with("error "))
            .pop()
        {
            return line;
        }
    }
    panic!("not noticed:\n{}", machine.output());
}

fn read_word(file: &File, offset: u64) -> u64 {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, offset).unwrap();
    u64::from_le_bytes(word)
}

#[test]
fn it_ticks_without_errors() {
    if !has_kvm("it_ticks_without_errors") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, TouchConfig::default());
    let ticks = machine.wait_ticks(50, 1);
    for (pair, number) in ticks.windows(2).zip(1..) {
        assert_eq!(pair[0].tick, number);
        assert!(pair[1].touches > pair[0].touches);
    }
    assert!(
        ticks.iter().all(|tick| tick.errors == 0),
        "{}",
        machine.output()
    );
}

#[test]
fn several_vcpus_tick_each_on_its_own() {
    if !has_kvm("several_vcpus_tick_each_on_its_own") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(3, TouchConfig::default());
    let ticks = machine.wait_ticks(10, 3);
    assert!(
        ticks.iter().all(|tick| tick.errors == 0),
        "{}",
        machine.output()
    );
}

#[test]
fn a_fixed_tick_has_that_many_touches() {
    if !has_kvm("a_fixed_tick_has_that_many_touches") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    for tick in machine.wait_ticks(5, 1) {
        assert_eq!(tick.touches, tick.tick * 50);
    }
}

#[test]
fn every_page_is_touched_in_time_and_no_other() {
    if !has_kvm("every_page_is_touched_in_time_and_no_other") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    machine.wait_ticks(40, 1);
    machine.machine().pause().unwrap();
    let (plan, file) = (plan(), machine.machine().memory_file());
    let mut in_hand = 0;
    for page in 0..plan.fill_pages {
        let version = read_word(file, plan.versions + page * 8);
        assert!(version > 0, "page {page} was never touched");
        let written = read_word(file, plan.fill + page * 4096).wrapping_sub(pattern(page, 0));
        // The guest may stand between writing the one and the other.
        in_hand += version - written;
    }
    assert!(in_hand <= 1, "{in_hand} pages and versions differ");
    let end = plan.fill + plan.fill_pages * 4096;
    let data = lseek(file, end as i64, Whence::SeekData);
    assert_eq!(
        data,
        Err(nix::errno::Errno::ENXIO),
        "something behind the filled pages was written"
    );
}

#[test]
fn a_changed_word_is_reported_with_its_place_and_values() {
    if !has_kvm("a_changed_word_is_reported_with_its_place_and_values") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    let mut version = 0;
    let line = tamper_until_noticed(&machine, &mut |file| {
        version = read_word(file, plan().versions + 3 * 8);
        let word = plan().fill + 3 * 4096 + 255 * 8;
        file.write_all_at(&0xdead_u64.to_le_bytes(), word).unwrap();
    });
    let expected = pattern(3, 255).wrapping_add(version);
    assert_eq!(
        line,
        format!("error page 3 word 255 expected {expected:x} seen dead")
    );
    assert_eq!(
        machine.errors(),
        1,
        "noticed once, and put right by the touch"
    );
}

#[test]
fn a_changed_word_that_no_touch_writes_is_reported() {
    if !has_kvm("a_changed_word_that_no_touch_writes_is_reported") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    let line = tamper_until_noticed(&machine, &mut |file| {
        for word in (2..511).step_by(2) {
            file.write_all_at(&1_u64.to_le_bytes(), plan().fill + 4096 + word * 8)
                .unwrap();
        }
    });
    assert!(
        line.starts_with("error page 1 word ") && line.ends_with(" seen 1"),
        "{line}"
    );
}

#[test]
fn a_lost_page_is_reported() {
    if !has_kvm("a_lost_page_is_reported") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    let line = tamper_until_noticed(&machine, &mut |file| {
        file.write_all_at(&[0; 4096], plan().fill + 2 * 4096)
            .unwrap();
    });
    assert!(
        line.starts_with("error page 2 word ") && line.ends_with(" seen 0"),
        "{line}"
    );
}

#[test]
fn a_page_that_is_out_of_date_is_reported() {
    if !has_kvm("a_page_that_is_out_of_date_is_reported") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    let (place, table) = (plan().fill, plan().versions);
    // Each time, what the last time found is put in place of what is there.
    let mut old: Option<(Vec<u8>, u64)> = None;
    let mut versions = (0, 0);
    let line = tamper_until_noticed(&machine, &mut |file| {
        let version = read_word(file, table);
        if let Some((page, old_version)) = old.take() {
            assert!(version > old_version, "the page was not touched in between");
            versions = (version, old_version);
            file.write_all_at(&page, place).unwrap();
        } else {
            let mut page = vec![0; 4096];
            file.read_exact_at(&mut page, place).unwrap();
            old = Some((page, version));
        }
    });
    // Any of the three words that have the version in them, whichever the guest was to check next.
    assert!(line.starts_with("error page 0 word "), "{line}");
    let hex = |at: usize| u64::from_str_radix(line.split(' ').nth(at).unwrap(), 16).unwrap();
    let (expected, seen) = (hex(6), hex(8));
    // A guest that is stopped between its write to the page and its note of the version is one ahead in the page.
    let apart = (versions.0 - versions.1).abs_diff(expected.wrapping_sub(seen));
    assert!(apart <= 1, "{line}: {versions:?}");
}

#[test]
fn a_version_that_is_out_of_date_is_reported() {
    if !has_kvm("a_version_that_is_out_of_date_is_reported") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    let line = tamper_until_noticed(&machine, &mut |file| {
        file.write_all_at(&[0; 8], plan().versions + 8).unwrap();
    });
    assert!(line.starts_with("error page 1 word "), "{line}");
}

#[test]
fn errors_are_never_forgotten() {
    if !has_kvm("errors_are_never_forgotten") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, small());
    tamper_until_noticed(&machine, &mut |file| {
        file.write_all_at(&[0; 8], plan().fill + 255 * 8).unwrap();
    });
    let seen = machine.wait_ticks(1, 1).len();
    let ticks = machine.wait_ticks(seen + 10, 1);
    assert!(ticks[seen..].iter().all(|tick| tick.errors > 0));
    let lines = machine.wait_lines(1, |line| line.starts_with("error "));
    assert_eq!(lines.len(), 1, "only the first is told in full");
}
