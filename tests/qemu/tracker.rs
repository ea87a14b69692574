//! Which pages a running QEMU writes, as the source's tracker tells: who copies all memory and then what is reported has
//! the RAM byte for byte in the end.

use std::fs::File;
use std::time::Duration;

use lazyvm_server::port::SourceMachine;
use lazyvm_vmm_glue::qemu::Source;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::common::wait_for;
use crate::copy::Copy;
use crate::guest::{Qemus, Shape, can_move};
use crate::load::{PAST_CACHE, THROUGH_CACHE, with_load};
use crate::surroundings::{balloon, set_balloon};

const SHAPE: Shape = Shape {
    memory_mib: 256,
    cpus: 2,
    fill_mib: 64,
};

/// A guest that works on its memory, its disk and its network, while a scout drops QEMU's page-table entries.
#[test]
fn what_a_tracker_reports_is_all_that_is_written() {
    let test = "what_a_tracker_reports_is_all_that_is_written";
    if !can_move(test) {
        return;
    }
    let mut qemus = Qemus::new(SHAPE);
    with_load(&mut qemus, THROUGH_CACHE);
    qemus.devices += &format!(" {}", balloon(&qemus));
    let _qemu = qemus.start("a");
    let source = Source::connect(&qemus.qmp("a")).unwrap();
    let ram = File::open(qemus.ram().join("a")).unwrap();
    let mut tracker = source.tracker().unwrap();
    let mut scout = source.scout().unwrap();
    tracker.start().unwrap();
    let mut copy = Copy::of(&source);
    let mut reported = 0;
    for round in 0..16 {
        if round % 3 == 1 {
            scout.watch().unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
        if round % 3 == 2 {
            // A mark of a clean page is no touch.
            let hot = scout.look().unwrap().hot;
            let hot: u64 = hot.iter().map(|range| range.count).sum();
            let pages = source.layout().pages();
            assert!(hot > 0 && hot < pages / 2, "{hot} of {pages} pages are hot");
        }
        reported += copy.collect(&mut *tracker);
    }
    // What it takes was clean, most of it: a page of zeros is as good as a written one.
    set_balloon(&qemus, "balloon", 208);
    set_balloon(&qemus, "balloon", 256);
    reported += copy.collect(&mut *tracker);
    std::thread::sleep(Duration::from_millis(50));
    source.prepare_pause().unwrap();
    source.pause().unwrap();
    let last = copy.collect(&mut *tracker);
    copy.assert_is(&ram);
    // What the balloon has left as holes is told again.
    // So is what the kernel has mapped around a page that QEMU itself has read meanwhile.
    assert!(
        (0..5).any(|_| copy.collect(&mut *tracker) == 0),
        "nobody writes any more"
    );
    copy.assert_is(&ram);
    assert!(reported > 0 && last < source.layout().pages());
    eprintln!("{test}: {reported} pages reported while the guest ran, {last} after the pause");
    tracker.stop().unwrap();
    assert!(tracker.collect(&mut |_| {}).is_err());
    source.resume().unwrap();
    qemus.wait_ticks("a", 5);
}

/// The kernel's marks of clean pages outlive their pages. Where a guest's balloon takes such a page can't be arranged, so
/// the test punches the holes that QEMU punches for a balloon.
#[test]
fn holes_where_pages_were_clean_are_reported() {
    if !can_move("holes_where_pages_were_clean_are_reported") {
        return;
    }
    let mut qemus = Qemus::new(SHAPE);
    qemus.devices = "-device virtio-balloon-pci".to_owned();
    let _qemu = qemus.start("a");
    let ram = qemus.ram().join("a");
    let file = File::options().read(true).write(true).open(&ram).unwrap();
    let source = Source::connect(&qemus.qmp("a")).unwrap();
    let mut tracker = source.tracker().unwrap();
    tracker.start().unwrap();
    let mut copy = Copy::of(&source);
    source.prepare_pause().unwrap();
    source.pause().unwrap();
    copy.collect(&mut *tracker);
    copy.assert_is(&file);
    // All is clean but what is a hole already.
    copy.collect(&mut *tracker);
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, flags, 0, (SHAPE.memory_mib << 20) as i64).unwrap();
    copy.collect(&mut *tracker);
    copy.assert_is(&file);
}

/// A process that maps the RAM after the start writes unseen.
#[test]
fn a_tracker_ends_when_another_process_maps_the_ram() {
    if !can_move("a_tracker_ends_when_another_process_maps_the_ram") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let _qemu = qemus.start("a");
    let source = Source::connect(&qemus.qmp("a")).unwrap();
    let mut tracker = source.tracker().unwrap();
    tracker.start().unwrap();
    tracker.collect(&mut |_| {}).unwrap();
    let backend = format!(
        "memory-backend-file,id=ram0,mem-path={},share=on,size=256M",
        qemus.ram().join("a").display()
    );
    let other = "qemu-system-x86_64 -S -accel tcg -machine none -nodefaults -display none -object";
    let mut words: Vec<_> = other.split(' ').map(str::to_owned).collect();
    words.push(backend);
    let _other = qemus.launch("other", &words);
    let error = wait_for("refusal", || tracker.collect(&mut |_| {}).err());
    assert!(error.to_string().contains("RAM mapped as well"), "{error}");
    // What was written meanwhile would never be reported.
    assert!(tracker.collect(&mut |_| {}).is_err());
    qemus.wait_ticks("a", 3);
}

/// The kernel may read from such a disk straight into pages that were pinned before.
#[test]
fn a_disk_past_the_page_cache_is_refused_by_a_tracker() {
    if !can_move("a_disk_past_the_page_cache_is_refused_by_a_tracker") {
        return;
    }
    let mut qemus = Qemus::new(SHAPE);
    with_load(&mut qemus, PAST_CACHE);
    let _qemu = qemus.start("a");
    let source = Source::connect(&qemus.qmp("a")).unwrap();
    let mut tracker = source.tracker().unwrap();
    let error = tracker.start().unwrap_err().to_string();
    assert!(error.contains("O_DIRECT"), "{error}");
    qemus.wait_ticks("a", 3);
}
