//! Whole runs. No time is looked at: that is for a machine that does nothing else.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::common::{Home, can_move, is_root, lazyvm, skip};

/// Whether there is a kernel for the guest; `.ci/set-up test` fetches it, with the programs that it needs.
fn has_kernel(test: &str) -> bool {
    let target = Path::new(env!("CARGO_BIN_EXE_lazyvm")).ancestors().nth(2);
    let there = target.is_some_and(|target| target.join("guest-kernel/vmlinuz").is_file());
    if !there {
        skip(test, "no kernel for the guest; .ci/set-up test fetches it");
    }
    there
}

/// Runs `bench wan` with these flags and gives its JSON.
fn bench(home: &Home, flags: &str) -> Value {
    let json = home.path("wan.json");
    let mut command = lazyvm();
    command
        .args(["bench", "wan", "--rtt", "20ms", "--json"])
        .arg(&json)
        .arg("--html")
        .arg(home.path("wan.html"))
        .arg("--svg")
        .arg(home.path("wan.svg"))
        .args(flags.split_ascii_whitespace());
    home.start("bench", &mut command).ends_with(0);
    serde_json::from_slice(&fs::read(json).unwrap()).unwrap()
}

fn assert_figures(figures: &Value) {
    for name in [
        "freeze_ms",
        "total_ms",
        "downtime_us",
        "bytes_wire",
        "after_pause_ms",
    ] {
        assert!(
            figures[name].as_f64().is_some_and(|n| n > 0.0),
            "{name}: {figures}"
        );
    }
    assert!(
        figures["faults"].is_u64() && figures.get("recovered_ms").is_some(),
        "{figures}"
    );
    // What the guest says of itself is whole.
    assert_eq!(figures["ticks_out_of_order"], 0, "{figures}");
}

#[test]
fn a_payload_over_a_path_with_a_blackout() {
    let test = "a_payload_over_a_path_with_a_blackout";
    if !is_root(test) || !can_move(test) {
        return;
    }
    let home = Home::new();
    let json = bench(
        &home,
        "--memory 64M --blackout-at 300ms --blackout-for 1s --runs 2",
    );
    assert_figures(&json);
    assert!(json["path"]["blackout"].as_u64() > Some(0), "{json}");
    for part in ["p50", "p90", "p99", "max"] {
        assert!(json["fault_us"][part].is_u64(), "{json}");
    }
    assert!(json["peer"].is_null());
    assert_eq!(json["single_runs"].as_array().map(Vec::len), Some(2));
    let page = fs::read_to_string(home.path("wan.html")).unwrap();
    assert!(page.contains("<svg") && !page.contains("src=") && !page.contains("href="));
    let picture = fs::read_to_string(home.path("wan.svg")).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("prefers-color-scheme"));
    assert!(!picture.contains("<script") && !picture.contains("href="));
    assert!(picture.len() < 60_000, "{} bytes", picture.len());
}

#[test]
fn a_snapshot_is_resumed_twice() {
    let test = "a_snapshot_is_resumed_twice";
    if !is_root(test) || !can_move(test) {
        return;
    }
    let home = Home::new();
    let json = bench(&home, "--memory 64M --snapshot");
    assert!(json["snapshot_pause_us"].as_u64() > Some(0), "{json}");
    for figures in [&json, &json["profiled"]] {
        assert_figures(figures);
        assert!(figures["first_sign_ms"].as_f64() > Some(0.0), "{figures}");
    }
}

#[test]
fn a_linux_guest_beside_qemus_own_migration() {
    let test = "a_linux_guest_beside_qemus_own_migration";
    if !is_root(test) || !has_kernel(test) {
        return;
    }
    let home = Home::new();
    let json = bench(&home, "--guest qemu --memory 128M --compare qemu");
    assert_figures(&json);
    assert_figures(&json["peer"]);
    for variant in ["postcopy", "postcopy-preempt"] {
        assert_figures(&json["peers"][variant]);
        assert_eq!(json["peers"][variant]["outcome"], "arrived");
    }
    assert!(json["freeze_ratio"].is_f64(), "{json}");
    assert!(json["tcp_congestion_control"].is_string(), "{json}");
    // A fifth of 100,000 touches a second are writes.
    let dirty = json["dirty_bit_s"].as_f64();
    assert!(dirty.is_some_and(|bits| bits > 0.0 && bits < 20_000.0 * 4096.0 * 8.0 * 1.1));
    assert!(json["copies"].as_f64() > Some(0.0), "{json}");
    // Under emulation this one may lose its guest, which is told then.
    let switched = &json["peers"]["precopy-postcopy"];
    match switched["outcome"].as_str() {
        Some("arrived") => assert_figures(switched),
        _ => assert!(switched["lost"][0]["why"].is_string(), "{switched}"),
    }
}

#[test]
fn a_linux_guest_beside_qemus_own_way_of_each_mode() {
    let test = "a_linux_guest_beside_qemus_own_way_of_each_mode";
    if !is_root(test) || !has_kernel(test) {
        return;
    }
    for (mode, may_lose) in [("stop", false), ("precopy", true)] {
        let home = Home::new();
        let flags = format!("--guest qemu --memory 128M --compare qemu --mode {mode}");
        let json = bench(&home, &flags);
        assert_figures(&json);
        let peer = &json["peer"];
        assert_eq!(peer["variant"], mode);
        match peer["outcome"].as_str() {
            Some("arrived") => assert_figures(peer),
            _ => assert!(may_lose && peer["lost"][0]["why"].is_string(), "{peer}"),
        }
    }
}

#[test]
fn what_does_not_go_together_is_told() {
    for (flags, words) in [
        ("--compare qemu", "--guest qemu"),
        ("--memory 64M --fill 64M", "can fill"),
        ("--memory 64M --hot 1K", "at least 1M"),
        ("--runs 0", "at least one"),
        ("--guest qemu --compare qemu --snapshot", "no snapshot"),
        ("--blackout-at 1s", "--blackout-for"),
    ] {
        let home = Home::new();
        let mut command = lazyvm();
        command.args(["bench", "wan"]).args(flags.split(' '));
        let log = home.start("bench", &mut command).ends_with(2);
        assert!(log.contains(words), "{flags}: {log}");
    }
}
