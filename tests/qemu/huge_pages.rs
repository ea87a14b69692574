//! RAM of huge pages, which goes ahead as a whole, and is stale as a whole when any part of it is written.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use lazyvm_server::port::SourceMachine;
use lazyvm_vmm_glue::qemu::Source;
use nix::fcntl::{FallocateFlags, fallocate};
use serde_json::Value;

use crate::common::huge::HugePages;
use crate::common::skip;
use crate::copy::Copy;
use crate::guest::{Qemus, Shape, can_move};
use crate::hosts::end_all_of;
use crate::surroundings::{balloon, set_balloon};

const SHAPE: Shape = Shape {
    memory_mib: 256,
    cpus: 2,
    fill_mib: 64,
};

/// A folder where files are of huge pages, for as long as a test needs it.
struct Mounted {
    folder: PathBuf,
    /// What was started with this in its command has files there.
    home: PathBuf,
    _pool: HugePages,
}

impl Mounted {
    fn at(test: &str, qemus: &Qemus, pages: u64) -> Option<Self> {
        let pool = HugePages::more(test, pages)?;
        let folder = qemus.ram();
        let mounted = Command::new("mount")
            .args(["-t", "hugetlbfs", "-o", "pagesize=2M", "none"])
            .arg(folder)
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            skip(test, "hugetlbfs can't be mounted");
            return None;
        }
        Some(Self {
            folder: folder.to_owned(),
            home: qemus.home.path(""),
            _pool: pool,
        })
    }
}

impl Drop for Mounted {
    /// The pool can be made small again when nobody has its pages any more.
    fn drop(&mut self) {
        end_all_of(&self.home);
        for _ in 0..500 {
            let unmounted = Command::new("umount").arg(&self.folder).output();
            if unmounted.is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Moves a guest there and back again; gives both reports. Each move compares every page, and the guest checks its memory.
fn there_and_back(test: &str, flags: &[&str]) -> Vec<Value> {
    if !can_move(test) {
        return Vec::new();
    }
    let qemus = Qemus::new(SHAPE);
    // Source and destination.
    let Some(_pages) = Mounted::at(test, &qemus, 2 * SHAPE.memory_mib / 2) else {
        return Vec::new();
    };
    let _first = qemus.start("a");
    let moves = [("a", "b"), ("b", "c")].map(|(from, to)| {
        let report = qemus.move_with(from, to, &qemus.command(to), flags);
        qemus.wait_ticks(to, 5);
        qemus.wait_gone(from);
        report
    });
    moves.to_vec()
}

#[test]
fn ram_of_huge_pages_there_and_back_again() {
    let test = "ram_of_huge_pages_there_and_back_again";
    there_and_back(test, &["--mode", "postcopy"]);
}

#[test]
fn huge_pages_go_ahead_in_hybrid() {
    let test = "huge_pages_go_ahead_in_hybrid";
    for report in there_and_back(test, &["--mode", "hybrid"]) {
        let precopied = report["pages_precopied"].as_u64().unwrap();
        assert!(precopied > 0 && precopied.is_multiple_of(512), "{report}");
        // What the guest has never touched is not sent, though its file does not tell.
        assert!(report["pages_zero"].as_u64() > Some(16 << 8), "{report}");
    }
}

#[test]
fn huge_pages_go_ahead_in_pre_copy() {
    let test = "huge_pages_go_ahead_in_pre_copy";
    let flags = ["--mode", "precopy", "--downtime-limit", "10s"];
    for report in there_and_back(test, &flags) {
        assert!(report["pages_precopied"].as_u64() > Some(0), "{report}");
        assert_eq!(report["pages_demand"], 0, "{report}");
    }
}

/// A balloon takes some of them, and the kernel keeps the marks of those that were clean.
#[test]
fn what_a_tracker_reports_is_all_that_is_written_to_huge_pages() {
    let test = "what_a_tracker_reports_is_all_that_is_written_to_huge_pages";
    if !can_move(test) {
        return;
    }
    let mut qemus = Qemus::new(SHAPE);
    let Some(_pages) = Mounted::at(test, &qemus, SHAPE.memory_mib / 2) else {
        return;
    };
    qemus.devices = balloon(&qemus);
    // With it the guest loads its drivers.
    qemus.append = "load=1".to_owned();
    let _qemu = qemus.start("a");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(qemus.ram().join("a"))
        .unwrap();
    let source = Source::connect(&qemus.qmp("a")).unwrap();
    let mut tracker = source.tracker().unwrap();
    tracker.start().unwrap();
    let mut copy = Copy::of(&source);
    let mut reported = 0;
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(50));
        reported += copy.collect(&mut *tracker);
    }
    for mib in [208, 256] {
        set_balloon(&qemus, "balloon", mib);
        reported += copy.collect(&mut *tracker);
    }
    std::thread::sleep(Duration::from_millis(50));
    source.prepare_pause().unwrap();
    source.pause().unwrap();
    let last = copy.collect(&mut *tracker);
    copy.assert_is(&file);
    assert!(reported > 0 && last < source.layout().pages());
    // Where a guest's balloon takes a clean page can't be arranged, so the test punches the holes that QEMU does for one.
    copy.collect(&mut *tracker);
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, flags, 0, (SHAPE.memory_mib << 20) as i64).unwrap();
    copy.collect(&mut *tracker);
    copy.assert_is(&file);
}
