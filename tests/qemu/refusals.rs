//! Moves that can't be: told in words, before anything is touched, and the VM runs on.

use crate::guest::{Qemus, Shape, can_move};

const SHAPE: Shape = Shape {
    memory_mib: 256,
    cpus: 1,
    fill_mib: 32,
};

/// A destination with these words instead of those is refused with this exit code and message; the VM runs on.
fn is_refused(test: &str, change: impl Fn(&Qemus, &mut Vec<String>), code: i32, message: &str) {
    if !can_move(test) {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let mut source = qemus.start("a");
    let (mut serve, ticket) = qemus.serve("a");
    let mut words = qemus.command("b");
    change(&qemus, &mut words);
    let log = qemus.resume("b", &ticket, &words).ends_with(code);
    assert!(log.contains(message), "{log}");
    serve.ends_with(6);
    qemus.wait_gone("b");
    qemus.wait_ticks("a", 3);
    assert!(source.is_running());
    // And it can be moved all the same.
    qemus.move_on("a", "c");
    qemus.wait_ticks("c", 3);
    qemus.quit("c");
}

fn replace(words: &mut [String], from: &str, to: &str) {
    for word in words {
        *word = word.replace(from, to);
    }
}

#[test]
fn a_qemu_with_other_ram_is_refused() {
    let smaller = |_: &Qemus, words: &mut Vec<String>| replace(words, "256M", "128M");
    is_refused(
        "a_qemu_with_other_ram_is_refused",
        smaller,
        6,
        "-m, -object and -machine",
    );
}

#[test]
fn a_qemu_that_does_not_take_the_state_leaves_the_vm_at_the_source() {
    let test = "a_qemu_that_does_not_take_the_state_leaves_the_vm_at_the_source";
    // A device that the state is for, and that is not there.
    let without_serial = |_: &Qemus, words: &mut Vec<String>| {
        let at = words.iter().position(|word| word == "-serial").unwrap();
        words[at + 1] = "none".to_owned();
    };
    is_refused(test, without_serial, 6, "runs on at the source");
}

#[test]
fn the_sources_own_ram_file_is_never_written_to() {
    let same_file = |qemus: &Qemus, words: &mut Vec<String>| {
        let theirs = qemus.command("a");
        let at = words.iter().position(|word| word == "-object").unwrap();
        words[at + 1] = theirs[at + 1].clone();
    };
    is_refused(
        "the_sources_own_ram_file_is_never_written_to",
        same_file,
        2,
        "in use by process",
    );
}

#[test]
fn a_second_incoming_is_refused() {
    let incoming = |_: &Qemus, words: &mut Vec<String>| {
        words.extend(["-incoming", "defer"].map(str::to_owned));
    };
    is_refused(
        "a_second_incoming_is_refused",
        incoming,
        2,
        "leave -incoming out",
    );
}

#[test]
fn a_command_that_fails_is_told() {
    let nonsense = |_: &Qemus, words: &mut Vec<String>| words.push("-no-such-flag".to_owned());
    is_refused(
        "a_command_that_fails_is_told",
        nonsense,
        6,
        "QEMU ended before the VM was there",
    );
}

#[test]
fn private_ram_is_refused_with_what_to_change() {
    let test = "private_ram_is_refused_with_what_to_change";
    if !can_move(test) {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let words = qemus.command_with_ram("a", "memory-backend-ram,id=ram0,size=256M");
    let mut source = qemus.launch("a", &words);
    qemus.wait_ticks("a", 1);
    let (mut serve, ticket) = qemus.serve("a");
    assert!(ticket.is_empty());
    let log = serve.ends_with(2);
    assert!(
        log.contains("memory-backend-file") && log.contains("share=on"),
        "{log}"
    );
    qemus.wait_ticks("a", 3);
    assert!(source.is_running());
}

#[test]
fn what_is_no_qmp_socket_is_told() {
    if !can_move("what_is_no_qmp_socket_is_told") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let (mut serve, _) = qemus.serve("nobody");
    let log = serve.ends_with(8);
    assert!(log.contains("-qmp unix:"), "{log}");
}
