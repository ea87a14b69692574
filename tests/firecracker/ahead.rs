//! Memory that goes ahead while the VM at the source runs, and writes.

use std::fs;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::common::huge::HugePages;
use super::common::{Home, is_root, wait_for};
use super::{Vm, destination, firecracker, is_gone, serve_vm, snapshot};

/// Moves a VM, and gives the report.
fn move_by(home: &Home, mode: &str, version: &str, fault: &str, flags: &[&str]) -> (Value, String) {
    move_to(home, mode, version, fault, "", flags)
}

/// The same with a destination that is not as the others.
fn move_to(
    home: &Home,
    mode: &str,
    version: &str,
    fault: &str,
    fault_there: &str,
    flags: &[&str],
) -> (Value, String) {
    let name = format!("{mode}-{version}-{}", fault.replace(' ', "-"));
    let mut source = firecracker(home, &name, version, fault, false);
    let flags = [&["--mode", mode], flags].concat();
    let (mut serve, ticket) = serve_vm(home, &source, &flags);
    let vm = destination(home, &source, version, fault_there);
    vm.resume(home, &ticket).ends_with(0);
    vm.is_well(home);
    let log = serve.ends_with(0);
    is_gone(&mut source);
    let report = home.report(&vm.name);
    assert_eq!(report["mode"], mode);
    (report, log)
}

fn count(report: &Value, what: &str) -> u64 {
    report[what].as_u64().unwrap()
}

/// Guest, devices and balloon write all the time, and one device once more while the state is saved.
#[test]
fn what_is_written_while_memory_goes_ahead_is_as_at_the_pause() {
    if !is_root("what_is_written_while_memory_goes_ahead_is_as_at_the_pause") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    for mode in ["hybrid", "precopy"] {
        for (version, fault) in [("1.1.0", "source busy"), ("1.16.0", "source busy tracks")] {
            // 16 MiB take a second, so that there are rounds in which something was written.
            let flags = ["--max-bandwidth", "160mbit"];
            let (report, log) = move_by(&home, mode, version, fault, &flags);
            assert!(count(&report, "pages_precopied") > 2000, "{report}");
            assert!(!log.contains("can't be noted"), "{log}");
        }
    }
}

/// The same with private huge pages, which lie on a shelf of small ones.
#[test]
fn huge_pages_that_are_written_while_memory_goes_ahead_are_as_at_the_pause() {
    let test = "huge_pages_that_are_written_while_memory_goes_ahead_are_as_at_the_pause";
    if !is_root(test) {
        return;
    }
    // Those of both sides, and what an install holds for a moment.
    let Some(_pool) = HugePages::more(test, 24) else {
        return;
    };
    let home = Home::new();
    snapshot(&home);
    for mode in ["hybrid", "precopy"] {
        for (version, fault) in [
            ("1.7.0", "source busy huge"),
            ("1.16.0", "source busy huge tracks"),
        ] {
            let flags = ["--max-bandwidth", "160mbit", "--downtime-limit", "10s"];
            let (report, log) = move_to(&home, mode, version, fault, "huge", &flags);
            let precopied = count(&report, "pages_precopied");
            assert!(precopied > 0 && precopied.is_multiple_of(512), "{report}");
            assert!(!log.contains("can't be noted"), "{log}");
        }
    }
}

#[test]
fn nothing_goes_ahead_in_post_copy() {
    if !is_root("nothing_goes_ahead_in_post_copy") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    for (version, fault) in [("1.1.0", "source busy"), ("1.16.0", "source busy tracks")] {
        // Nor is it looked who else might write.
        let fault = format!("{fault} shared");
        let (report, log) = move_by(&home, "postcopy", version, &fault, &[]);
        assert_eq!(count(&report, "pages_precopied"), 0, "{report}");
        assert!(!log.contains("can't be noted"), "{log}");
    }
}

#[test]
fn a_vm_that_stops_is_started_when_all_is_there() {
    if !is_root("a_vm_that_stops_is_started_when_all_is_there") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    let (report, _) = move_by(&home, "stop", "1.12.0", "source busy", &[]);
    // What Firecracker touches while it loads, and no page that the guest does.
    assert!(count(&report, "pages_demand") <= 6, "{report}");
    assert_eq!(count(&report, "pages_precopied"), 0, "{report}");
}

#[test]
fn what_writes_too_much_for_pre_copy_runs_on_at_its_source() {
    if !is_root("what_writes_too_much_for_pre_copy_runs_on_at_its_source") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    let mut source = firecracker(&home, "source", "1.16.0", "source busy", false);
    let flags = [
        "--mode",
        "precopy",
        "--downtime-limit",
        "1us",
        "--precopy-limit",
        "1s",
    ];
    let (mut serve, ticket) = serve_vm(&home, &source, &flags);
    let vm = destination(&home, &source, "1.16.0", "");
    let log = vm.resume(&home, &ticket).ends_with(4);
    assert!(log.contains("raise --downtime-limit"), "{log}");
    serve.ends_with(1);
    assert!(source.firecracker.is_running());
    assert!(!home.path("source/told").exists(), "it was paused");
}

/// Such writes would not be seen.
#[test]
fn memory_that_may_be_written_unseen_does_not_go_ahead() {
    if !is_root("memory_that_may_be_written_unseen_does_not_go_ahead") {
        return;
    }
    for (fault, words) in [
        ("source busy shared", "shared with other processes"),
        (
            "source busy direct",
            "disk open, through which memory may be written unseen",
        ),
    ] {
        let home = Home::new();
        snapshot(&home);
        let (report, log) = move_by(&home, "hybrid", "1.16.0", fault, &[]);
        assert_eq!(count(&report, "pages_precopied"), 0, "{report}");
        assert!(log.contains(words), "{log}");
        let mut source = firecracker(&home, "source", "1.16.0", fault, false);
        let (mut serve, ticket) = serve_vm(&home, &source, &["--mode", "precopy"]);
        let vm = destination(&home, &source, "1.16.0", "");
        let log = vm.resume(&home, &ticket).ends_with(4);
        assert!(log.contains("use --mode hybrid, postcopy or stop"), "{log}");
        let log = serve.ends_with(1);
        assert!(log.contains(words), "{log}");
        assert!(source.firecracker.is_running());
    }
}

/// It waits for its memory, so nothing of it runs there yet.
#[test]
fn a_destination_that_dies_while_it_waits_gives_the_vm_back() {
    if !is_root("a_destination_that_dies_while_it_waits_gives_the_vm_back") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    let mut source = firecracker(&home, "source", "1.16.0", "source busy", false);
    let flags = ["--mode", "stop", "--max-bandwidth", "1mbit"];
    let (mut serve, ticket) = serve_vm(&home, &source, &flags);
    let vm: Vm = destination(&home, &source, "1.16.0", "");
    let mut resume = vm.resume(&home, &ticket);
    wait_for("load", || {
        home.path(&format!("{}/loaded", vm.name))
            .exists()
            .then_some(())
    });
    vm.firecracker.signal(Signal::SIGKILL);
    let log = resume.ends_with(6);
    assert!(
        log.contains("Firecracker ended while its memory arrived"),
        "{log}"
    );
    serve.ends_with(6);
    assert!(source.firecracker.is_running());
    assert_eq!(fs::read_to_string(home.path("source/told")).unwrap(), "run");
}
