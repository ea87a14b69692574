//! Snapshots of a QEMU that goes on, whose writes are tracked from outside.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use lazyvm_server::snapshot::{Snapshot, take};
use lazyvm_vmm_glue::qemu::Source;

use crate::at_pause::AtPause;
use crate::common::{Program, lazyvm};
use crate::guest::{Qemus, Shape, can_move};
use crate::load::{THROUGH_CACHE, with_load};

const SHAPE: Shape = Shape {
    memory_mib: 256,
    cpus: 2,
    fill_mib: 100,
};

/// A guest that works on its memory, its disk and its network meanwhile.
#[test]
fn a_snapshot_is_the_ram_of_its_pause() {
    let test = "a_snapshot_is_the_ram_of_its_pause";
    if !can_move(test) {
        return;
    }
    let mut qemus = Qemus::new(SHAPE);
    with_load(&mut qemus, THROUGH_CACHE);
    let _qemu = qemus.start("a");
    let directories = ["one", "two", "three"].map(|name| qemus.home.path(name));
    let mut base = None;
    for directory in &directories {
        let machine = AtPause::new(Source::connect(&qemus.qmp("a")).unwrap());
        let taken = take(&machine, directory, base, &mut |_| true).unwrap();
        assert!(taken.tracked, "{taken:?}");
        assert_eq!(taken.manifest.base.is_some(), base.is_some());
        eprintln!("{test}: {} pages of the pause", taken.pages_paused);
        machine.assert_is_in(&Snapshot::open(directory).unwrap());
        base = Some(directory.as_path());
        qemus.wait_ticks("a", 3);
    }
    assert_eq!(qemus.load("a").map(|load| load.errors()), Some(0));
}

/// `lazyvm snapshot --qemu`, which must succeed; gives its log.
fn snapshot(qemus: &Qemus, dir: &str, flags: &[&str]) -> String {
    let mut command = lazyvm();
    command
        .args(["snapshot", "--qemu"])
        .arg(qemus.qmp("a"))
        .args(flags)
        .arg(qemus.home.path(dir));
    qemus.home.start("snapshot", &mut command).ends_with(0)
}

fn serve(qemus: &Qemus, dir: &str) -> (Program, String) {
    let mut command = lazyvm();
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--snapshot"])
        .arg(qemus.home.path(dir))
        .stdout(Stdio::piped());
    let mut serve = qemus.home.start("serve", &mut command);
    let mut ticket = String::new();
    BufReader::new(serve.stdout())
        .read_line(&mut ticket)
        .unwrap();
    (serve, ticket.trim_end().to_owned())
}

/// The VM goes on, and so do two clones of it at once, each of which finds all of its memory as it left it.
#[test]
fn clones_of_a_snapshot_on_a_base_go_on() {
    if !can_move("clones_of_a_snapshot_on_a_base_go_on") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let _qemu = qemus.start("a");
    let log = snapshot(&qemus, "one", &[]);
    assert!(log.contains("tracked=true"), "{log}");
    let before = qemus.wait_ticks("a", 5);
    let base = qemus.home.path("one");
    snapshot(&qemus, "two", &["--base", base.to_str().unwrap()]);
    qemus.wait_ticks("a", 3);
    let (_serve, ticket) = serve(&qemus, "two");
    let names = ["b", "c"];
    let mut resumes = names.map(|name| qemus.resume(name, &ticket, &qemus.command(name)));
    for (name, resume) in names.iter().zip(&mut resumes) {
        resume.ends_with(0);
        let report = qemus.home.report(name);
        assert_eq!(report["verified"], true, "{report}");
        let ticks = qemus.wait_ticks(name, 10);
        assert!(ticks[0].number > before[before.len() - 1].number);
    }
    qemus.wait_ticks("a", 3);
    for name in names {
        qemus.quit(name);
    }
}
