//! Which pages a machine writes, as KVM's dirty log tells over the control socket: who copies all memory and then what is
//! reported has it byte for byte in the end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use std::time::Duration;

use common::busy::Busy;
use common::copy::Copy;
use common::has_kvm;
use common::huge::HugePages;
use lazyvm_server::port::SourceMachine;
use lazyvm_vmm_glue::kvm::TouchConfig;
use lazyvm_wire::Backing;

fn follow(cpus: u32, backing: Backing) {
    let busy = Busy::start(backing, cpus, TouchConfig::default());
    let Busy {
        remote, running, ..
    } = &busy;
    let pages = remote.layout().pages();
    let mut tracker = remote.tracker().unwrap();
    // A second start begins again.
    for _ in 0..2 {
        tracker.start().unwrap();
        let mut copy = Copy::of(remote);
        let mut reported = 0;
        for round in 0..10 {
            std::thread::sleep(Duration::from_millis(7 * round));
            reported += copy.collect(&mut *tracker);
        }
        remote.pause().unwrap();
        let last = copy.collect(&mut *tracker);
        copy.assert_is(running.machine().memory_file());
        assert_eq!(copy.collect(&mut *tracker), 0, "nobody writes any more");
        assert!(reported > 0 && last < pages, "{reported} {last}");
        eprintln!("{cpus} vCPUs: {reported} pages reported while they ran, {last} after the pause");
        remote.resume().unwrap();
    }
    tracker.stop().unwrap();
    assert!(tracker.collect(&mut |_| {}).is_err());
    assert_eq!(running.errors(), 0);
}

#[test]
fn what_a_tracker_reports_is_all_that_is_written() {
    if has_kvm("what_a_tracker_reports_is_all_that_is_written") {
        follow(1, Backing::Small);
    }
}

#[test]
fn what_a_tracker_reports_is_all_that_two_vcpus_write() {
    if has_kvm("what_a_tracker_reports_is_all_that_two_vcpus_write") {
        follow(2, Backing::Small);
    }
}

#[test]
fn what_a_tracker_reports_is_all_that_is_written_to_huge_pages() {
    let test = "what_a_tracker_reports_is_all_that_is_written_to_huge_pages";
    if has_kvm(test)
        && let Some(_pool) = HugePages::more(test, 8)
    {
        follow(2, Backing::Huge2M);
    }
}

/// What one takes, the other would miss.
#[test]
fn a_second_tracker_ends_the_first() {
    if !has_kvm("a_second_tracker_ends_the_first") {
        return;
    }
    let busy = Busy::start(Backing::Small, 1, TouchConfig::default());
    let Busy {
        remote, running, ..
    } = &busy;
    let (mut first, mut second) = (remote.tracker().unwrap(), remote.tracker().unwrap());
    assert!(first.collect(&mut |_| {}).is_err(), "not started");
    first.start().unwrap();
    first.collect(&mut |_| {}).unwrap();
    second.start().unwrap();
    let error = first.collect(&mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("another one may have begun"), "{error}");
    drop(first);
    second.collect(&mut |_| {}).unwrap();
    running.wait_ticks(1, 1);
}
