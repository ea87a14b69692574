//! Snapshots of a machine whose writes are tracked by KVM's dirty log: they have its memory of the pause byte for byte.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use common::at_pause::AtPause;
use common::busy::Busy;
use common::has_kvm;
use common::huge::HugePages;
use lazyvm_server::snapshot::{Snapshot, take};
use lazyvm_vmm_glue::kvm::TouchConfig;
use lazyvm_wire::Backing;

/// Takes three snapshots, each on the one before, of a machine that writes to all of its memory.
fn follow(cpus: u32, backing: Backing) {
    let touch = TouchConfig {
        hot_bytes: Some(1 << 20),
        cold_per_million: 50_000,
        ..TouchConfig::default()
    };
    let Busy {
        remote,
        running,
        home,
    } = Busy::start(backing, cpus, touch);
    let machine = AtPause::new(remote);
    let directories = ["one", "two", "three"].map(|name| home.path(name));
    let mut base = None;
    for directory in &directories {
        let taken = take(&machine, directory, base, &mut |_| true).unwrap();
        assert!(taken.tracked, "{taken:?}");
        assert_eq!(taken.manifest.base.is_some(), base.is_some());
        eprintln!("{cpus} vCPUs: {} pages of the pause", taken.pages_paused);
        let snapshot = Snapshot::open(directory).unwrap();
        machine.assert_is_in(&snapshot);
        base = Some(directory.as_path());
        running.wait_ticks(2, cpus.into());
    }
    assert_eq!(running.errors(), 0);
}

#[test]
fn a_tracked_snapshot_is_the_memory_of_its_pause() {
    if has_kvm("a_tracked_snapshot_is_the_memory_of_its_pause") {
        follow(1, Backing::Small);
    }
}

#[test]
fn a_tracked_snapshot_of_two_vcpus_is_the_memory_of_its_pause() {
    if has_kvm("a_tracked_snapshot_of_two_vcpus_is_the_memory_of_its_pause") {
        follow(2, Backing::Small);
    }
}

#[test]
fn a_tracked_snapshot_of_huge_pages_is_the_memory_of_its_pause() {
    let test = "a_tracked_snapshot_of_huge_pages_is_the_memory_of_its_pause";
    if has_kvm(test)
        && let Some(_pool) = HugePages::more(test, 8)
    {
        follow(2, Backing::Huge2M);
    }
}
