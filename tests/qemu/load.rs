//! A guest that works on its disk and its network while it is moved: devices' state and rings survive.

use std::fs;
use std::path::PathBuf;

use crate::common::wait_for;
use crate::guest::{Load, Qemus, Shape, can_move};

const DISK_BYTES: u64 = 16 << 20;

/// How a disk is read and written: past the host's page cache, as QEMU's documentation asks of one that is shared for a
/// migration, or through it, as tracking of writes needs it.
pub const PAST_CACHE: &str = "none";
pub const THROUGH_CACHE: &str = "writeback";

/// Has the guests work on their memory, on a disk, and on a network card on QEMU's own user-mode network. Gives the disk.
pub fn with_load(qemus: &mut Qemus, cache: &str) -> PathBuf {
    let disk = qemus.home.path("disk");
    fs::File::create(&disk)
        .unwrap()
        .set_len(DISK_BYTES)
        .unwrap();
    qemus.devices = format!(
        "-drive file={},format=raw,if=none,id=disk,cache={cache} -device virtio-blk-pci,drive=disk \
         -netdev user,id=net,restrict=on -device virtio-net-pci,netdev=net,romfile=",
        disk.display()
    );
    qemus.append = "load=1".to_owned();
    disk
}

/// Waits until each part of the load has gone on so much; nothing may be wrong.
fn wait_load(qemus: &Qemus, name: &str, since: Load, turns: u64) -> Load {
    wait_for("progress of the load", || {
        let load = qemus.load(name)?;
        assert_eq!(load.errors(), 0, "{name}: {load:?}");
        load.has_gone_on(&since, turns).then_some(load)
    })
}

#[test]
fn disk_and_network_go_on() {
    let test = "disk_and_network_go_on";
    if !can_move(test) {
        return;
    }
    let shape = Shape {
        memory_mib: 512,
        cpus: 2,
        fill_mib: 64,
    };
    let names = ["a", "b", "c"];
    let mut qemus = Qemus::on_two_hosts(shape, &names);
    let disk = with_load(&mut qemus, PAST_CACHE);
    let _first = qemus.start("a");
    let mut load = Load {
        disk: (0, 0),
        tcp: (0, 0),
        net: (0, 0),
    };
    load = wait_load(&qemus, "a", load, 100);
    for pair in names.windows(2) {
        qemus.move_on(pair[0], pair[1]);
        qemus.wait_gone(pair[0]);
        // What it had done when it was paused: its counts go on from there.
        let before = qemus.load(pair[0]).unwrap();
        assert!(before.has_gone_on(&load, 0));
        load = wait_load(&qemus, pair[1], before, 100);
        qemus.wait_ticks(pair[1], 3);
        eprintln!(
            "{test}: {} -> {}: {before:?}, then {load:?}",
            pair[0], pair[1]
        );
    }
    // And the guest would have noticed: it reads what is on the disk, not what it remembers.
    fs::write(&disk, vec![0xa5; DISK_BYTES as usize]).unwrap();
    wait_for("a wrong block", || {
        (qemus.load("c")?.disk.1 > 0).then_some(())
    });
    assert_eq!(
        qemus.load("c").map(|load| (load.tcp.1, load.net.1)),
        Some((0, 0))
    );
}
