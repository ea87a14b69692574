//! QEMUs that end in the middle of a move: told in words, with a code, and without a hang.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::wait_for;
use crate::guest::{Qemus, Shape, can_move};

const SHAPE: Shape = Shape {
    memory_mib: 256,
    cpus: 1,
    fill_mib: 32,
};

/// The process of the QEMU `name`, which is not this one's child.
fn process(qemus: &Qemus, name: &str) -> Pid {
    let serial = format!(
        "file:{}",
        qemus.home.path(&format!("{name}.serial")).display()
    );
    let pid = wait_for("QEMU", || {
        let entries = fs::read_dir("/proc").unwrap();
        entries.flatten().find_map(|entry| {
            let words = fs::read_to_string(entry.path().join("cmdline")).ok()?;
            let mut words = words.split('\0');
            let is_qemu = words.next()?.ends_with("qemu-system-x86_64");
            (is_qemu && words.any(|word| word == serial))
                .then(|| entry.file_name().to_str()?.parse().ok())?
        })
    });
    Pid::from_raw(pid)
}

#[test]
fn a_source_that_is_killed_before_the_pause_is_told_at_both_ends() {
    if !can_move("a_source_that_is_killed_before_the_pause_is_told_at_both_ends") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let source = qemus.start("a");
    // Long enough that the pause is not there yet when QEMU is killed.
    let (mut serve, ticket) = qemus.serve_with("a", &["--warm-up", "5s"]);
    let mut resume = qemus.resume("b", &ticket, &qemus.command("b"));
    resume.wait_log("attached");
    assert!(!serve.log().contains("the VM is paused"), "{}", serve.log());
    source.signal(Signal::SIGKILL);
    for (log, at) in [
        (resume.ends_with(4), "resume"),
        (serve.ends_with(1), "serve"),
    ] {
        assert!(
            log.contains("the connection to QEMU was lost"),
            "{at}: {log}"
        );
        assert!(log.contains("it has ended"), "{at}: {log}");
        assert!(!log.contains("runs on"), "{at}: {log}");
    }
    qemus.wait_gone("b");
}

#[test]
fn a_destination_that_is_killed_before_the_hand_over_leaves_the_vm_at_the_source() {
    if !can_move("a_destination_that_is_killed_before_the_hand_over_leaves_the_vm_at_the_source") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let _source = qemus.start("a");
    let (mut serve, ticket) = qemus.serve("a");
    let mut resume = qemus.resume("b", &ticket, &qemus.command("b"));
    kill(process(&qemus, "b"), Signal::SIGKILL).unwrap();
    // In whichever of its steps that finds it.
    let log = resume.ends_with(6);
    assert!(
        log.contains("QEMU ended before the VM was there") || log.contains("was lost"),
        "{log}"
    );
    assert!(log.contains("runs on at the source"), "{log}");
    let log = serve.ends_with(6);
    assert!(log.contains("The VM runs on here"), "{log}");
    qemus.wait_ticks("a", 3);
    // And it can be moved all the same.
    qemus.move_on("a", "c");
    qemus.quit("c");
}

#[test]
fn a_destination_that_is_killed_while_its_memory_arrives_is_told() {
    if !can_move("a_destination_that_is_killed_while_its_memory_arrives_is_told") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let _source = qemus.start("a");
    // Slowly, so that some is still to come.
    let (mut serve, ticket) =
        qemus.serve_with("a", &["--warm-up", "0s", "--max-bandwidth", "10mbit"]);
    let mut resume = qemus.resume("b", &ticket, &qemus.command("b"));
    resume.wait_log("the VM runs in QEMU here");
    kill(process(&qemus, "b"), Signal::SIGKILL).unwrap();
    let log = resume.ends_with(5);
    assert!(
        log.contains("QEMU ended") && log.contains("pages had arrived"),
        "{log}"
    );
    // What it has is all that is left of the VM: it is the operator's to end it.
    assert!(serve.is_running(), "{}", serve.log());
}
