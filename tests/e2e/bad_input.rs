//! What can't be done is refused in words that say what to change, with an exit code, and before anything is lost.

use std::fs::{self, Permissions};
use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use lazyvm_pager::{LazyMemory, Options};
use lazyvm_server::{EndReason, Phase, Server, SessionConfig};
use lazyvm_vmm_glue::plain::PlainMachine;
use lazyvm_wire::Layout;
use lazyvm_wire::trust::Identity;

use crate::common::{Home, can_move, is_root, lazyvm, skip};

/// Runs a command to its end, which must be with `code`, and gives what it says.
fn says(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{said}");
    said
}

fn assert_says(said: &str, words: &[&str]) {
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
}

/// A copy of the program in a directory that everybody may enter.
fn public_copy(home: &Home) -> PathBuf {
    let program = home.path("lazyvm");
    fs::copy(env!("CARGO_BIN_EXE_lazyvm"), &program).unwrap();
    for path in [program.parent().unwrap(), &program] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    program
}

/// A shell in a mount namespace of its own, where `/dev` is empty but for what `script` makes.
fn with_other_dev(script: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-ec"])
        .arg(format!("mount -t tmpfs none /dev\n{script}"))
        .arg("sh");
    command
}

/// As the user `nobody`.
const AS_NOBODY: &str = "setpriv --reuid=65534 --regid=65534 --clear-groups --";

#[test]
fn a_host_without_kvm() {
    if !is_root("a_host_without_kvm") {
        return;
    }
    let home = Home::new();
    let said = says(
        with_other_dev("exec \"$@\"")
            .arg(env!("CARGO_BIN_EXE_lazyvm"))
            .args(["run", "--control"])
            .arg(home.path("a")),
        8,
    );
    assert_says(&said, &["/dev/kvm", "no KVM"]);
    assert!(!home.path("a").exists());
}

#[test]
fn a_user_who_may_not_use_kvm() {
    if !is_root("a_user_who_may_not_use_kvm") {
        return;
    }
    let home = Home::new();
    let script = format!("mknod -m 600 /dev/kvm c 10 232\nexec {AS_NOBODY} \"$@\"");
    let said = says(
        with_other_dev(&script)
            .arg(public_copy(&home))
            .args(["run", "--control"])
            .arg(home.path("a")),
        8,
    );
    assert_says(&said, &["no permission", "/dev/kvm", "group"]);
}

#[test]
fn a_user_who_may_not_use_userfaultfd() {
    let test = "a_user_who_may_not_use_userfaultfd";
    if !can_move(test) || !is_root(test) {
        return;
    }
    let free = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if free.is_ok_and(|text| text.trim() == "1") {
        return skip(test, "everybody may use userfaultfd on this machine");
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    let script = format!("mknod -m 666 /dev/kvm c 10 232\nexec {AS_NOBODY} \"$@\"");
    let folder = home.path("nobodys");
    let mut command = with_other_dev(&script);
    command
        .arg(public_copy(&home))
        .args(["resume", &ticket, "--control"])
        .arg(folder.join("b"));
    fs::create_dir(&folder).unwrap();
    std::os::unix::fs::chown(&folder, Some(65534), Some(65534)).unwrap();
    let said = says(&mut command, 8);
    assert_says(
        &said,
        &[
            "userfaultfd",
            "/dev/userfaultfd",
            "CAP_SYS_PTRACE",
            "vm.unprivileged_userfaultfd",
        ],
    );
    let log = serve.ends_with(6);
    assert_says(
        &log,
        &["no permission for userfaultfd", "The VM runs on here"],
    );
    home.wait_ticks("a", 2);
    assert!(run.is_running());
}

#[test]
fn a_ticket_that_is_none() {
    let resume = |ticket: &str| says(lazyvm().args(["resume", ticket]), 2);
    let home = Home::new();
    let ticket = whole_ticket();
    assert_says(
        &resume(&ticket[..ticket.len() - 5]),
        &["cut short or mistyped", "copy the whole line"],
    );
    assert_says(&resume("lazyvm-ticket-9.AAAA"), &["version"]);
    assert_says(&resume("what is this"), &["no lazyvm ticket"]);
    let missing = format!("@{}", home.path("none").display());
    assert_says(
        &resume(&missing),
        &["can't read the ticket from", "No such file"],
    );
    fs::write(home.path("cut"), &ticket[..30]).unwrap();
    assert_says(
        &resume(&format!("@{}", home.path("cut").display())),
        &["cut short"],
    );
}

/// A ticket of a server that does not exist.
fn whole_ticket() -> String {
    lazyvm_wire::Ticket {
        addresses: vec!["127.0.0.1:9".parse().unwrap()],
        server: Identity::generate().unwrap().fingerprint(),
        session: lazyvm_wire::SessionId::random().unwrap(),
        secret: lazyvm_wire::Secret::random().unwrap(),
        expires_at_s: u64::MAX,
    }
    .to_text()
}

#[test]
fn nobody_at_the_tickets_address() {
    let said = says(lazyvm().args(["resume", &whole_ticket()]), 4);
    assert_says(
        &said,
        &[
            "no answer from the source at 127.0.0.1:9",
            "does lazyvm serve still run",
        ],
    );
}

#[test]
fn a_port_that_is_taken() {
    if !can_move("a_port_that_is_taken") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "16M", &[]);
    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said = says(
        lazyvm()
            .args(["serve", "--listen", &address, "--vm"])
            .arg(home.path("a")),
        8,
    );
    assert_says(&said, &["can't listen on", &address, "--listen"]);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap().to_string();
    let said = says(
        lazyvm().args(["resume", &whole_ticket(), "--status-addr", &address]),
        8,
    );
    assert_says(&said, &["can't serve metrics at", &address, "another port"]);
}

#[test]
fn metrics_for_all_the_world() {
    let said = says(
        lazyvm().args(["resume", &whole_ticket(), "--status-addr", "0.0.0.0:0"]),
        2,
    );
    assert_says(&said, &["not a loopback address", "127.0.0.1"]);
}

#[test]
fn a_kernel_that_is_missing_or_none() {
    if !can_move("a_kernel_that_is_missing_or_none") {
        return;
    }
    let home = Home::new();
    let run = |kernel: &str| {
        says(
            lazyvm()
                .arg("run")
                .arg("--control")
                .arg(home.path("a"))
                .arg("--kernel")
                .arg(home.path(kernel)),
            2,
        )
    };
    assert_says(&run("none"), &["cannot read the kernel", "No such file"]);
    fs::write(home.path("text"), "#!/bin/sh\necho this is no kernel\n").unwrap();
    assert_says(&run("text"), &["is no kernel", "bzImage"]);
    assert!(!home.path("a").exists());
}

#[test]
fn sizes_that_can_not_be() {
    if !can_move("sizes_that_can_not_be") {
        return;
    }
    let home = Home::new();
    let run = |flags: &[&str]| {
        says(
            lazyvm()
                .arg("run")
                .arg("--control")
                .arg(home.path("a"))
                .args(flags),
            2,
        )
    };
    assert_says(&run(&["--memory", "lots"]), &["--memory", "512M"]);
    assert_says(&run(&["--memory", "1M"]), &["too small"]);
    assert_says(
        &run(&["--memory", "16M", "--fill", "1G"]),
        &["cannot be filled"],
    );
    assert_says(&run(&["--memory", "16M", "--cpus", "0"]), &["vCPUs"]);
}

#[test]
fn no_machine_at_the_socket() {
    let home = Home::new();
    for command in ["serve", "status"] {
        let mut lazyvm = lazyvm();
        lazyvm
            .arg(command)
            .args((command == "serve").then_some("--vm"))
            .arg(home.path("none"));
        assert_says(&says(&mut lazyvm, 8), &["no machine answers at"]);
    }
}

#[test]
fn two_machines_at_one_socket() {
    if !can_move("two_machines_at_one_socket") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "16M", &[]);
    let said = says(
        lazyvm()
            .args(["run", "--memory", "16M", "--control"])
            .arg(home.path("a")),
        8,
    );
    assert_says(&said, &["another machine answers there"]);
}

#[test]
fn a_machine_that_is_gone_before_the_pause() {
    if !can_move("a_machine_that_is_gone_before_the_pause") {
        return;
    }
    let home = Home::new();
    let run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    drop(run);
    let log = home.resume("b", &ticket, &[]).ends_with(4);
    assert_says(
        &log,
        &[
            "the source can't hand the machine over",
            "no machine answers at",
        ],
    );
    let log = serve.ends_with(1);
    assert_says(&log, &["no machine answers at"]);
}

#[test]
fn memory_sizes_that_differ() {
    let test = "memory_sizes_that_differ";
    if !can_move(test) {
        return;
    }
    let home = Home::new();
    let image = fs::File::create_new(home.path("image")).unwrap();
    image.set_len(8 << 20).unwrap();
    let server = Server::bind(
        "127.0.0.1:0".parse().unwrap(),
        &Identity::generate().unwrap(),
    )
    .unwrap();
    let machine = std::sync::Arc::new(PlainMachine::new(image).unwrap());
    let session = server.add_session(SessionConfig::new(machine)).unwrap();
    let ticket = server.ticket(&session, vec![server.local_addr().unwrap()]);
    let offer = lazyvm_pager::connect(&ticket, Options::default()).unwrap();
    let smaller = LazyMemory::anonymous(&Layout::flat(1024).unwrap()).unwrap();
    let error = offer
        .take(std::sync::Arc::new(smaller))
        .map(|_| ())
        .unwrap_err();
    let said = lazyvm_quic::describe(&error);
    assert_says(
        &said,
        &[
            "memory sizes that differ",
            "8 MiB at the source",
            "4 MiB here",
        ],
    );
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let phase = runtime.block_on(session.outcome());
    assert!(
        matches!(&phase, Phase::Ended(EndReason::Refused(reason)) if reason.contains("8 MiB")),
        "{phase:?}"
    );
}

#[test]
fn what_is_not_in_this_release() {
    for line in ["serve --vm s --disk a=b", "resume t --disk a=b"] {
        let said = says(lazyvm().args(line.split_ascii_whitespace()), 2);
        assert_says(&said, &["not in this release"]);
    }
}
