//! Which pages a machine writes, as KVM's dirty log tells over the control socket: who copies all memory and then what is
//! reported has it byte for byte in the end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use common::{Home, has_kvm};
use lazyvm_server::port::{DirtyTracker, SourceMachine, SourceMemory};
use lazyvm_vmm_glue::kvm::{RemoteMachine, TouchConfig};
use lazyvm_wire::{PageIndex, PageRange};

/// A reader's copy of the memory.
struct Copy {
    memory: Arc<dyn SourceMemory>,
    bytes: Vec<u8>,
}

impl Copy {
    fn of(remote: &RemoteMachine) -> Self {
        let mut copy = Self {
            memory: remote.memory(),
            bytes: vec![0; remote.layout().bytes() as usize],
        };
        copy.read(PageRange::new(PageIndex(0), remote.layout().pages()));
        copy
    }

    fn read(&mut self, range: PageRange) {
        let start = range.first.byte_offset() as usize;
        let part = &mut self.bytes[start..start + range.bytes() as usize];
        self.memory.read(range, part).unwrap();
    }

    /// Copies what is reported; gives how many pages that was.
    fn collect(&mut self, tracker: &mut dyn DirtyTracker) -> u64 {
        let mut ranges = Vec::new();
        tracker.collect(&mut |range| ranges.push(range)).unwrap();
        for &range in &ranges {
            self.read(range);
        }
        ranges.iter().map(|range| range.count).sum()
    }
}

fn follow(cpus: u32) {
    let home = Home::new();
    let running = home.touch(cpus, TouchConfig::default());
    running.wait_ticks(1, cpus.into());
    let remote = RemoteMachine::connect(&running.control).unwrap();
    let pages = remote.layout().pages();
    let mut tracker = remote.tracker().unwrap();
    // A second start begins again.
    for _ in 0..2 {
        tracker.start().unwrap();
        let mut copy = Copy::of(&remote);
        let mut reported = 0;
        for round in 0..10 {
            std::thread::sleep(Duration::from_millis(7 * round));
            reported += copy.collect(&mut *tracker);
        }
        remote.pause().unwrap();
        let last = copy.collect(&mut *tracker);
        let mut now = vec![0; copy.bytes.len()];
        let file = running.machine().memory_file();
        file.read_exact_at(&mut now, 0).unwrap();
        let differ = now.chunks(4096).zip(copy.bytes.chunks(4096)).enumerate();
        let differ: Vec<_> = differ
            .filter(|(_, (now, copied))| now != copied)
            .map(|(page, _)| page)
            .collect();
        assert!(differ.is_empty(), "pages {differ:?} were written unseen");
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
        follow(1);
    }
}

#[test]
fn what_a_tracker_reports_is_all_that_two_vcpus_write() {
    if has_kvm("what_a_tracker_reports_is_all_that_two_vcpus_write") {
        follow(2);
    }
}

/// What one takes, the other would miss.
#[test]
fn a_second_tracker_ends_the_first() {
    if !has_kvm("a_second_tracker_ends_the_first") {
        return;
    }
    let home = Home::new();
    let running = home.touch(1, TouchConfig::default());
    let remote = RemoteMachine::connect(&running.control).unwrap();
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
