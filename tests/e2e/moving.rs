//! A machine is moved: nothing is lost, and it costs little memory.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::time::Duration;

use crate::common::huge::HugePages;
use crate::common::{Footprint, Home, Program, can_move};

/// Large machines take turns, so that the host's memory is enough for them.
static LARGE: Mutex<()> = Mutex::new(());

/// The report's keys, exactly as documented.
const KEYS: [&str; 18] = [
    "session",
    "mode",
    "memory_bytes",
    "pages_total",
    "pages_zero",
    "pages_precopied",
    "pages_demand",
    "pages_pushed",
    "bytes_wire",
    "downtime_us",
    "switchover_bytes",
    "faults",
    "fault_us",
    "blocktime_us_total",
    "resumed_at_us",
    "complete_at_us",
    "reconnects",
    "verified",
];

#[test]
fn a_small_machine_moves_and_goes_on_where_it_was() {
    if !can_move("a_small_machine_moves_and_goes_on_where_it_was") {
        return;
    }
    let home = Home::new();
    let report = move_verified(&home, "32M", &[], &["--mode", "hybrid"]);
    assert!(
        !home.path("a").exists() && !home.path("b").exists(),
        "the sockets are gone with the machines"
    );

    let object = report.as_object().unwrap();
    assert_eq!(
        object.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        BTreeSet::from(KEYS)
    );
    let percentiles = report["fault_us"].as_object().unwrap();
    assert_eq!(
        percentiles.keys().collect::<Vec<_>>(),
        ["max", "p50", "p90", "p99"]
    );
    let number = |key: &str| report[key].as_u64().unwrap();
    assert_eq!(
        (&report["verified"], &report["mode"]),
        (&true.into(), &"hybrid".into())
    );
    assert_eq!(
        (
            number("memory_bytes"),
            number("pages_total"),
            number("reconnects")
        ),
        (32 << 20, 8192, 0)
    );
    assert_eq!(
        number("pages_zero")
            + number("pages_demand")
            + number("pages_pushed")
            + number("pages_precopied"),
        8192
    );
    assert!(number("downtime_us") > 0 && number("downtime_us") <= number("complete_at_us"));
    assert!(number("resumed_at_us") <= number("complete_at_us"));
    assert!(number("bytes_wire") > (number("pages_demand") + number("pages_pushed")) * 4096);
}

#[test]
fn without_stay_the_machine_ends_with_the_command_which_says_so() {
    if !can_move("without_stay_the_machine_ends_with_the_command_which_says_so") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    let log = home.resume("b", &ticket, &[]).ends_with(0);
    assert!(log.contains("--stay keeps it"), "{log}");
    serve.ends_with(0);
    run.ends_with(0);
    assert_eq!(home.report("b")["verified"], serde_json::Value::Null);
}

#[test]
fn a_report_that_can_not_be_written_does_not_cost_the_machine() {
    if !can_move("a_report_that_can_not_be_written_does_not_cost_the_machine") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    std::fs::create_dir(home.path("b.json")).unwrap();
    let mut resume = home.resume("b", &ticket, &["--stay"]);
    resume.wait_log("can't write the report");
    serve.ends_with(0);
    run.ends_with(0);
    home.wait_ticks("b", 2);
    resume.signal(nix::sys::signal::Signal::SIGTERM);
    let log = resume.ends_with(1);
    assert!(log.contains("lazyvm: can't write the report"), "{log}");
    home.assert_unbroken(&["a", "b"]);
}

/// Moves a machine of `memory` bytes, of which `fill` are filled, and compares every page.
fn move_and_verify(memory: u64, fill: u64, install: &str) {
    let home = Home::new();
    let mut run = home.run("a", &memory.to_string(), &["--fill", &fill.to_string()]);
    home.wait_ticks("a", 5);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    let mut resume = home.resume("b", &ticket, &["--verify", "--stay", "--install", install]);
    let (mut peak_serve, mut peak_resume) = (Footprint::default(), Footprint::default());
    while serve.is_running() && resume.is_running() {
        peak_serve = peak_serve.peak(serve.footprint());
        peak_resume = peak_resume.peak(resume.footprint());
        std::thread::sleep(Duration::from_millis(10));
    }
    serve.ends_with(0);
    run.ends_with(0);
    home.wait_ticks("b", 5);
    home.assert_unbroken(&["a", "b"]);
    let report = home.report("b");
    assert_eq!(report["verified"], true, "{report}");
    let ways = ["pages_precopied", "pages_demand", "pages_pushed"];
    let moved: u64 = ways.map(|way| report[way].as_u64().unwrap()).iter().sum();
    assert!(moved * 4096 >= fill, "{report}");
    assert!(
        moved * 4096 < fill + (fill >> 8) + (8 << 20),
        "zero pages are not sent: {report}"
    );
    assert_small(&serve, peak_serve, memory);
    assert_small(&resume, peak_resume, memory);
}

/// That a program took at most 64 MiB and a thousandth of the guest's memory beyond that memory. Guest memory is
/// shared memory of a memfd; all other resident memory counts, the program's own text and the allocator's reserves too.
fn assert_small(program: &Program, peak: Footprint, memory: u64) {
    let used = peak.anonymous_kib + peak.file_kib;
    let bound = (64 << 10) + memory / 1000 / 1024;
    println!(
        "process {}: at most {used} KiB of {bound} KiB, and {} KiB of page tables; guest memory {} MiB",
        program.pid(),
        peak.page_table_kib,
        memory >> 20,
    );
    assert!(used > 1024, "nothing was measured: {peak:?}");
    assert!(used <= bound, "{peak:?} is more than {bound} KiB");
}

const MIB: u64 = 1 << 20;

#[test]
fn every_page_of_64_mib_is_the_sources() {
    if !can_move("every_page_of_64_mib_is_the_sources") {
        return;
    }
    for install in ["missing", "minor"] {
        move_and_verify(64 * MIB, 60 * MIB, install);
        move_and_verify(64 * MIB, 2 * MIB, install);
    }
}

#[test]
fn every_page_of_1_gib_is_the_sources() {
    if !can_move("every_page_of_1_gib_is_the_sources") {
        return;
    }
    let _turn = LARGE.lock();
    for install in ["missing", "minor"] {
        move_and_verify(1024 * MIB, 1000 * MIB, install);
        move_and_verify(1024 * MIB, 16 * MIB, install);
    }
}

#[test]
fn every_page_of_4_gib_is_the_sources_and_little_else_is_used() {
    if !can_move("every_page_of_4_gib_is_the_sources_and_little_else_is_used") {
        return;
    }
    let _turn = LARGE.lock();
    for install in ["missing", "minor"] {
        move_and_verify(4096 * MIB, 4000 * MIB, install);
        move_and_verify(4096 * MIB, 64 * MIB, install);
    }
}

/// Memory goes ahead in rounds while the guest writes all the time; what waits for all of it has no fault.
#[test]
fn every_page_is_the_sources_in_every_mode() {
    if !can_move("every_page_is_the_sources_in_every_mode") {
        return;
    }
    for mode in ["hybrid", "precopy", "stop"] {
        move_in(mode, &[]);
    }
}

/// The same where a page that is written makes 2 MiB stale.
#[test]
fn every_huge_page_is_the_sources_in_every_mode() {
    let test = "every_huge_page_is_the_sources_in_every_mode";
    if !can_move(test) {
        return;
    }
    // Those of both sides.
    let Some(_pool) = HugePages::more(test, 2 * 64) else {
        return;
    };
    for mode in ["hybrid", "precopy", "stop", "postcopy"] {
        let report = move_in(mode, &["--huge-pages"]);
        for pages in ["pages_precopied", "pages_demand", "pages_pushed"] {
            assert_eq!(report[pages].as_u64().unwrap() % 512, 0, "{report}");
        }
    }
}

/// Moves a machine from `a` to `b`, and ends it there when it has run on for a while; gives the report.
fn move_verified(
    home: &Home,
    memory: &str,
    flags_of_run: &[&str],
    flags_of_serve: &[&str],
) -> serde_json::Value {
    let mut run = home.run("a", memory, flags_of_run);
    home.wait_ticks("a", 5);
    let (mut serve, ticket) = home.serve("serve", "a", flags_of_serve);
    let mut resume = home.resume("b", &ticket, &["--verify", "--stay"]);
    serve.ends_with(0);
    run.ends_with(0);
    home.wait_ticks("b", 20);
    let report = home.report("b");
    resume.signal(nix::sys::signal::Signal::SIGTERM);
    resume.ends_with(0);
    home.assert_unbroken(&["a", "b"]);
    report
}

/// Moves a machine that writes all the time and compares every page; gives the report.
fn move_in(mode: &str, flags_of_run: &[&str]) -> serde_json::Value {
    let home = Home::new();
    let flags = ["--mode", mode, "--downtime-limit", "10s"];
    let report = move_verified(&home, "128M", flags_of_run, &flags);
    assert_eq!(
        (&report["verified"], &report["mode"]),
        (&true.into(), &mode.into())
    );
    let precopied = report["pages_precopied"].as_u64().unwrap();
    match mode {
        "stop" => assert_eq!(precopied, 0, "{report}"),
        // Of the little that goes ahead then, the guest may have written all.
        "postcopy" => {}
        _ => assert!(precopied > 0, "{report}"),
    }
    if mode == "precopy" || mode == "stop" {
        assert_eq!(report["pages_demand"], 0, "{report}");
    }
    report
}
