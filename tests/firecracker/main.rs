//! Firecracker's snapshots into a peer that behaves as Firecracker does, in every way that its releases do.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

mod ahead;
#[path = "../common/mod.rs"]
mod common;
mod peer;
mod refusals;
mod snapshots;
mod source;
mod sys;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::huge::HugePages;
use common::{Home, Program, is_root, lazyvm, wait_for};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::Signal;
use peer::{ROLE, Role};
use source::AT_THE_PAUSE;

const PAGE: u64 = 4096;
const PAGES: u64 = 4096;

#[test]
#[ignore = "the part of Firecracker, which the other tests start"]
fn the_firecracker() {
    let role = std::env::var(ROLE).unwrap();
    peer::play(serde_json::from_str(&role).unwrap());
}

/// A snapshot directory: pages of words that differ, and pages of zeros. As in Firecracker's own, there are no holes.
fn snapshot(home: &Home) {
    fs::create_dir(home.path("snapshot")).unwrap();
    fs::write(home.path("snapshot/vmstate"), [7; 30_000]).unwrap();
    let memory = File::create(home.path("snapshot/memory")).unwrap();
    for page in 0..PAGES {
        let mut bytes = [0; PAGE as usize];
        if page % 7 != 3 && page % 5 != 0 {
            for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&(page * 1_000_003 + at as u64).to_le_bytes());
            }
        }
        memory.write_all_at(&bytes, page * PAGE).unwrap();
    }
    // What Firecracker writes before a VM starts.
    memory.write_all_at(b"_MP_", 0x9fc00).unwrap();
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
    firecracker_for(home, name, version, fault, balloon, "snapshot/memory")
}

/// The same; it expects the memory that is in this file by then.
fn firecracker_for(
    home: &Home,
    name: &str,
    version: &str,
    fault: &str,
    balloon: bool,
    memory: &str,
) -> Vm {
    fs::create_dir(home.path(name)).unwrap();
    let role = Role {
        home: home.path(name),
        version: version.to_owned(),
        fault: fault.to_owned(),
        memory: home.path(memory),
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

#[test]
fn what_may_be_a_diff_snapshot_is_refused_unless_the_user_says_it_is_none() {
    let home = Home::new();
    snapshot(&home);
    let memory = File::options()
        .write(true)
        .open(home.path("snapshot/memory"))
        .unwrap();
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&memory, hole, 3 * PAGE as i64, PAGE as i64).unwrap();
    let mut command = lazyvm();
    let command = command
        .args(["serve", "--snapshot"])
        .arg(home.path("snapshot"));
    let log = home.start("serve", command).ends_with(2);
    assert!(log.contains("has holes"), "{log}");
    assert!(
        log.contains("merge a diff snapshot into its base first"),
        "{log}"
    );
    assert!(log.contains("--memory-is-whole"), "{log}");
    let (_serve, ticket) = serve(&home, &["--memory-is-whole"]);
    let vm = firecracker(&home, "vm", "1.16.0", "", false);
    vm.resume(&home, &ticket).ends_with(0);
    vm.is_well(&home);
}

#[test]
fn huge_pages_are_put_in_place_as_a_whole() {
    let test = "huge_pages_are_put_in_place_as_a_whole";
    if !is_root(test) {
        return;
    }
    let Some(_pages) = HugePages::more(test, 24) else {
        return;
    };
    let home = Home::new();
    snapshot(&home);
    let (_small, ticket) = serve(&home, &[]);
    let vm = firecracker(&home, "wrong", "1.16.0", "huge", false);
    let log = vm.resume(&home, &ticket).ends_with(6);
    assert!(log.contains("page sizes that differ"), "{log}");
    drop(vm);
    fs::remove_file(home.path("ticket")).unwrap();
    let (_serve, ticket) = serve(&home, &["--huge-pages"]);
    for version in ["1.7.0", "1.12.0", "1.20.0"] {
        for balloon in [false, true] {
            let name = format!("{version}-{balloon}");
            let vm = firecracker(&home, &name, version, "huge", balloon);
            vm.resume(&home, &ticket).ends_with(0);
            vm.is_well(&home);
            let report = home.report(&name);
            for pages in ["pages_demand", "pages_pushed"] {
                assert_eq!(report[pages].as_u64().unwrap() % 512, 0, "{report}");
            }
        }
    }
}

/// `lazyvm serve --firecracker` of the VM in `source`, and its ticket.
fn serve_vm(home: &Home, source: &Vm, flags: &[&str]) -> (Program, String) {
    let file = home.path(&format!("{}.ticket", source.name));
    let mut command = lazyvm();
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--firecracker"])
        .arg(home.path(&format!("{}/api", source.name)))
        .arg("--ticket-file")
        .arg(&file)
        .args(flags)
        .stdout(Stdio::piped());
    let program = home.start(&format!("{}-serve", source.name), &mut command);
    let ticket = wait_for("ticket", || fs::read_to_string(&file).ok());
    (program, ticket.trim_end().to_owned())
}

/// A destination for the VM in `source`, which expects what that has when it is paused.
fn destination(home: &Home, source: &Vm, version: &str, fault: &str) -> Vm {
    let memory = format!("{}/{AT_THE_PAUSE}", source.name);
    let name = format!("from-{}{fault}", source.name);
    firecracker_for(home, &name, version, fault, false, &memory)
}

fn is_gone(source: &mut Vm) {
    wait_for("end of the source", || {
        (!source.firecracker.is_running()).then_some(())
    });
}

/// Packets come in while it is paused, and are not to be in what arrives.
#[test]
fn a_running_vm_moves_without_writing_its_memory() {
    if !is_root("a_running_vm_moves_without_writing_its_memory") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    for (version, fault, tracks) in [
        ("1.1.0", "source", "false"),
        ("1.12.0", "source tracks", "true"),
        ("1.16.0", "source tracks", "true"),
    ] {
        let mut source = firecracker(&home, &format!("source{version}"), version, fault, false);
        let (mut serve, ticket) = serve_vm(&home, &source, &[]);
        let vm = destination(&home, &source, version, "");
        vm.resume(&home, &ticket).ends_with(0);
        vm.is_well(&home);
        let told = fs::read_to_string(home.path(&format!("{}/tracks", vm.name))).unwrap();
        assert_eq!(told, tracks);
        let log = serve.ends_with(0);
        assert!(log.contains("is held"), "{log}");
        let wrote_all = home.path(&format!("{}/wrote-all", source.name));
        assert!(!wrote_all.exists(), "{log}");
        is_gone(&mut source);
    }
}

#[test]
fn a_source_that_goes_on_is_not_read_any_more() {
    if !is_root("a_source_that_goes_on_is_not_read_any_more") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    let source = firecracker(&home, "source", "1.16.0", "source", false);
    let (serve, ticket) = serve_vm(&home, &source, &["--max-bandwidth", "1mbit"]);
    // Its guest takes its time, so that there is something left to read when the source ends.
    let vm = destination(&home, &source, "1.16.0", "slow");
    let mut resume = vm.resume(&home, &ticket);
    resume.wait_log("the VM runs in Firecracker");
    source.firecracker.signal(Signal::SIGKILL);
    wait_for("words of the source", || {
        serve
            .log()
            .contains("ended, or was let go, while its memory was served")
            .then_some(())
    });
    assert!(resume.is_running(), "{}", resume.log());
}

#[test]
fn a_running_vm_moves_by_files_too() {
    for (name, fault, kind) in [
        ("plain", "source", "kind=Full"),
        ("tracks", "source tracks", "kind=Diff"),
    ] {
        let home = Home::new();
        snapshot(&home);
        let mut source = firecracker(&home, name, "1.16.0", fault, false);
        let scratch = home.path("scratch");
        fs::create_dir(&scratch).unwrap();
        let flags = ["--scratch", scratch.to_str().unwrap()];
        let (mut serve, ticket) = serve_vm(&home, &source, &flags);
        assert!(source.firecracker.is_running());
        let vm = destination(&home, &source, "1.16.0", "");
        vm.resume(&home, &ticket).ends_with(0);
        vm.is_well(&home);
        let log = serve.ends_with(0);
        assert!(log.contains(kind), "{log}");
        is_gone(&mut source);
    }
}

#[test]
fn a_vm_that_is_refused_runs_on_at_its_source() {
    let home = Home::new();
    snapshot(&home);
    let mut source = firecracker(&home, "source", "1.16.0", "source", false);
    let (mut serve, ticket) = serve_vm(&home, &source, &[]);
    let vm = destination(&home, &source, "1.16.0", "overlap");
    vm.resume(&home, &ticket).ends_with(6);
    let log = serve.ends_with(6);
    assert!(log.contains("The VM runs on here"), "{log}");
    assert!(source.firecracker.is_running());
    // It can be served again, so it is there and runs.
    fs::remove_file(home.path("source.ticket")).unwrap();
    let (_serve, ticket) = serve_vm(&home, &source, &[]);
    let vm = destination(&home, &source, "1.16.0", "");
    vm.resume(&home, &ticket).ends_with(0);
    vm.is_well(&home);
}
