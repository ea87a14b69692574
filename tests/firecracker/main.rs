//! Firecracker's snapshots into a peer that behaves as Firecracker does, in every way that its releases do.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod peer;
mod sys;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Home, Program, lazyvm, wait_for};
use nix::sys::signal::Signal;
use peer::{ROLE, Role};

const PAGE: u64 = 4096;
const PAGES: u64 = 4096;

#[test]
#[ignore = "the part of Firecracker, which the other tests start"]
fn the_firecracker() {
    let role = std::env::var(ROLE).unwrap();
    peer::play(serde_json::from_str(&role).unwrap());
}

/// A snapshot directory: pages of words that differ, pages of zeros, and holes.
fn snapshot(home: &Home) {
    fs::create_dir(home.path("snapshot")).unwrap();
    fs::write(home.path("snapshot/vmstate"), [7; 30_000]).unwrap();
    let memory = File::create(home.path("snapshot/memory")).unwrap();
    memory.set_len(PAGES * PAGE).unwrap();
    for page in (0..PAGES).filter(|page| page % 7 != 3) {
        let mut bytes = [0; PAGE as usize];
        if page % 5 != 0 {
            for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&(page * 1_000_003 + at as u64).to_le_bytes());
            }
        }
        memory.write_all_at(&bytes, page * PAGE).unwrap();
    }
}

/// `lazyvm serve --snapshot`, and its ticket.
fn serve(home: &Home, flags: &[&str]) -> (Program, String) {
    let mut command = lazyvm();
    command.args(["serve", "--listen", "127.0.0.1:0", "--snapshot"]);
    command.arg(home.path("snapshot"));
    let file = home.path("ticket");
    let command = command
        .args(flags)
        .arg("--ticket-file")
        .arg(&file)
        .stdout(Stdio::piped());
    let program = home.start("serve", command);
    let ticket = wait_for("ticket", || fs::read_to_string(&file).ok());
    (program, ticket.trim_end().to_owned())
}

struct Vm {
    firecracker: Program,
    name: String,
}

/// A Firecracker that is fresh and idle.
fn firecracker(home: &Home, name: &str, version: &str, fault: &str, balloon: bool) -> Vm {
    fs::create_dir(home.path(name)).unwrap();
    let role = Role {
        home: home.path(name),
        version: version.to_owned(),
        fault: fault.to_owned(),
        memory: home.path("snapshot/memory"),
        state: home.path("snapshot/vmstate"),
        balloon,
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--ignored", "--exact", "the_firecracker", "--nocapture"])
        .env(ROLE, serde_json::to_string(&role).unwrap())
        .stdout(Stdio::null());
    let firecracker = home.start(&format!("{name}-firecracker"), &mut command);
    wait_for("API socket", || {
        home.path(&format!("{name}/api")).exists().then_some(())
    });
    Vm {
        firecracker,
        name: name.to_owned(),
    }
}

impl Vm {
    fn resume(&self, home: &Home, ticket: &str) -> Program {
        let mut command = lazyvm();
        command
            .args(["resume", ticket, "--verify", "--firecracker"])
            .arg(home.path(&format!("{}/api", self.name)))
            .arg("--report")
            .arg(home.path(&format!("{}.json", self.name)));
        home.start(&format!("{}-resume", self.name), &mut command)
    }

    /// What the VM has found in its memory, after the move.
    fn is_well(&self, home: &Home) {
        let path = home.path(&format!("{}/result", self.name));
        let result = wait_for("result", || fs::read_to_string(&path).ok());
        assert_eq!(result, "ok", "{}", self.firecracker.log());
        let report = home.report(&self.name);
        assert_eq!(report["verified"], true, "{report}");
        assert_eq!(report["pages_total"], PAGES);
    }
}

#[test]
fn every_release_gets_every_page() {
    let home = Home::new();
    snapshot(&home);
    let (_serve, ticket) = serve(&home, &[]);
    // 2.0 is told as 1.20: `page_size` alone, and fields that are not known.
    for version in [
        "1.1.0",
        "1.6.0",
        "1.7.0",
        "1.11.0",
        "1.12.0",
        "1.17.0-dev",
        "1.20.0",
    ] {
        for balloon in [false, true] {
            let vm = firecracker(&home, &format!("{version}-{balloon}"), version, "", balloon);
            vm.resume(&home, &ticket).ends_with(0);
            vm.is_well(&home);
        }
    }
}

#[test]
fn a_snapshot_has_as_many_destinations_as_come() {
    let home = Home::new();
    snapshot(&home);
    let (mut serve, ticket) = serve(&home, &["--max-bandwidth", "200mbit"]);
    let names: Vec<String> = (0..4).map(|number| format!("clone{number}")).collect();
    let clones: Vec<Vm> = names
        .iter()
        .map(|name| firecracker(&home, name, "1.14.0", "", false))
        .collect();
    let mut resumes: Vec<Program> = clones.iter().map(|vm| vm.resume(&home, &ticket)).collect();
    for (vm, resume) in clones.iter().zip(&mut resumes) {
        resume.ends_with(0);
        vm.is_well(&home);
    }
    assert!(serve.is_running(), "{}", serve.log());
    serve.signal(Signal::SIGTERM);
    serve.ends_with(0);
}

#[test]
fn three_descriptors_are_one_too_few_to_worry_about() {
    let home = Home::new();
    snapshot(&home);
    let (_serve, ticket) = serve(&home, &[]);
    let vm = firecracker(&home, "vm", "1.12.0", "three descriptors", false);
    vm.resume(&home, &ticket).ends_with(0);
    vm.is_well(&home);
}

#[test]
fn a_wrong_handshake_is_refused_in_words_and_the_snapshot_is_served_on() {
    let home = Home::new();
    snapshot(&home);
    let (_serve, ticket) = serve(&home, &[]);
    for (fault, version, words) in [
        ("overlap", "1.12.0", "overlap in Firecracker's memory"),
        (
            "smaller",
            "1.12.0",
            "memory sizes that differ: 16 MiB at the source, 12 MiB here",
        ),
        ("page size", "1.1.0", "pages of 1234 bytes"),
        (
            "cut",
            "1.1.0",
            "closed the page-fault socket after 20 bytes",
        ),
        (
            "garbage",
            "1.12.0",
            "not Firecracker's list of memory regions",
        ),
        ("no descriptor", "1.7.0", "0 descriptors came"),
        (
            "another descriptor",
            "1.12.0",
            "is no userfaultfd, but /dev/null",
        ),
        ("many descriptors", "1.12.0", "were cut short"),
        (
            "refuses",
            "1.12.0",
            "Load snapshot error: Failed to restore from snapshot: invalid magic",
        ),
    ] {
        let vm = firecracker(&home, &fault.replace(' ', "-"), version, fault, false);
        let start = Instant::now();
        let log = vm.resume(&home, &ticket).ends_with(6);
        assert!(log.contains(words), "{fault}: {log}");
        assert!(!log.contains("panicked"), "{log}");
        assert!(start.elapsed() < Duration::from_secs(30), "{fault}");
    }
    let vm = firecracker(&home, "last", "1.12.0", "", false);
    vm.resume(&home, &ticket).ends_with(0);
    vm.is_well(&home);
}

#[test]
fn a_firecracker_that_dies_is_noticed() {
    for version in ["1.1.0", "1.12.0"] {
        let home = Home::new();
        snapshot(&home);
        let (_serve, ticket) = serve(&home, &["--max-bandwidth", "1mbit"]);
        let vm = firecracker(&home, "vm", version, "", false);
        let mut resume = vm.resume(&home, &ticket);
        resume.wait_log("the VM runs in Firecracker");
        vm.firecracker.signal(Signal::SIGKILL);
        let log = resume.ends_with(5);
        assert!(log.contains("Firecracker ended when"), "{log}");
    }
}

#[test]
fn what_is_no_idle_firecracker_is_refused_before_anything() {
    let home = Home::new();
    snapshot(&home);
    let (_serve, ticket) = serve(&home, &[]);
    let mut nobody = home.start(
        "nobody",
        lazyvm().args(["resume", &ticket, "--firecracker", "/nobody/here"]),
    );
    let log = nobody.ends_with(8);
    assert!(
        log.contains("no Firecracker answers at /nobody/here"),
        "{log}"
    );
    let old = firecracker(&home, "old", "1.0.0", "", false);
    let log = old.resume(&home, &ticket).ends_with(6);
    assert!(log.contains("1.1 is the first that can"), "{log}");
    let busy = firecracker(&home, "busy", "1.12.0", "", false);
    busy.resume(&home, &ticket).ends_with(0);
    let log = busy.resume(&home, &ticket).ends_with(6);
    assert!(log.contains("is not idle (Paused)"), "{log}");
}

#[test]
fn a_directory_that_is_not_clear_is_refused_with_what_to_do() {
    let home = Home::new();
    snapshot(&home);
    fs::write(home.path("snapshot/other.mem"), [0; 4096]).unwrap();
    let mut command = lazyvm();
    let command = command
        .args(["serve", "--snapshot"])
        .arg(home.path("snapshot"));
    let log = home.start("serve", command).ends_with(2);
    assert!(log.contains("name it with --memory-file"), "{log}");
    let mut stdout = home.start(
        "named",
        lazyvm()
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--memory-file",
                "memory",
                "--snapshot",
            ])
            .arg(home.path("snapshot"))
            .stdout(Stdio::piped()),
    );
    let mut lines = BufReader::new(stdout.stdout()).lines();
    assert!(
        lines
            .next()
            .unwrap()
            .unwrap()
            .starts_with("lazyvm-ticket-1.")
    );
    stdout.signal(Signal::SIGTERM);
    assert!(
        lines.next().is_none(),
        "the ticket is alone on standard output"
    );
    stdout.ends_with(0);
}

/// `lazyvm serve --firecracker` of the VM in `source`, and its ticket.
fn serve_vm(home: &Home, source: &Vm) -> (Program, String) {
    let file = home.path(&format!("{}.ticket", source.name));
    let mut command = lazyvm();
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--firecracker"])
        .arg(home.path(&format!("{}/api", source.name)))
        .arg("--ticket-file")
        .arg(&file)
        .stdout(Stdio::piped());
    let program = home.start(&format!("{}-serve", source.name), &mut command);
    let ticket = wait_for("ticket", || fs::read_to_string(&file).ok());
    (program, ticket.trim_end().to_owned())
}

#[test]
fn a_running_vm_moves_and_its_process_ends_when_all_is_there() {
    for (name, fault, kind) in [
        ("plain", "source", "kind=Full"),
        ("tracks", "source tracks", "kind=Diff"),
    ] {
        let home = Home::new();
        snapshot(&home);
        let mut source = firecracker(&home, name, "1.16.0", fault, false);
        let (mut serve, ticket) = serve_vm(&home, &source);
        assert!(source.firecracker.is_running());
        let vm = firecracker(&home, "vm", "1.16.0", "", false);
        vm.resume(&home, &ticket).ends_with(0);
        vm.is_well(&home);
        let log = serve.ends_with(0);
        assert!(log.contains(kind), "{log}");
        wait_for("end of the source", || {
            (!source.firecracker.is_running()).then_some(())
        });
    }
}

#[test]
fn a_vm_that_is_refused_runs_on_at_its_source() {
    let home = Home::new();
    snapshot(&home);
    let mut source = firecracker(&home, "source", "1.16.0", "source", false);
    let (mut serve, ticket) = serve_vm(&home, &source);
    let vm = firecracker(&home, "vm", "1.16.0", "overlap", false);
    vm.resume(&home, &ticket).ends_with(6);
    let log = serve.ends_with(6);
    assert!(log.contains("The VM runs on here"), "{log}");
    assert!(source.firecracker.is_running());
    // It can be served again, so it is there and runs.
    let (_serve, ticket) = serve_vm_again(&home, &source);
    let vm = firecracker(&home, "other", "1.16.0", "", false);
    vm.resume(&home, &ticket).ends_with(0);
    vm.is_well(&home);
}

fn serve_vm_again(home: &Home, source: &Vm) -> (Program, String) {
    fs::remove_file(home.path(&format!("{}.ticket", source.name))).unwrap();
    serve_vm(home, source)
}
