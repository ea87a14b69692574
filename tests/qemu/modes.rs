//! Moves in every mode, by way of which a guest that writes all the time must not lose a write.

use crate::guest::{Qemus, Shape, can_move};

const SHAPE: Shape = Shape {
    memory_mib: 512,
    cpus: 2,
    fill_mib: 200,
};

/// Moves a guest with these flags of `serve`, there and back again; gives both reports. Each move compares every page, and
/// the guest checks its memory itself.
fn there_and_back(test: &str, flags: &[&str]) -> Option<[serde_json::Value; 2]> {
    if !can_move(test) {
        return None;
    }
    let names = ["a", "b", "c"];
    let qemus = Qemus::on_two_hosts(SHAPE, &names);
    let mut first = qemus.start("a");
    qemus.wait_ticks("a", 10);
    let reports = [("a", "b"), ("b", "c")].map(|(from, to)| {
        let report = qemus.move_with(from, to, &qemus.command(to), flags);
        qemus.wait_ticks(to, 5);
        qemus.wait_gone(from);
        report
    });
    first.ends_with(0);
    let mut last = 0;
    for tick in names.iter().flat_map(|name| qemus.ticks(name)) {
        assert!(
            tick.number > last && tick.errors == 0,
            "{tick:?} after {last}"
        );
        last = tick.number;
    }
    qemus.quit("c");
    Some(reports)
}

#[test]
fn hybrid_brings_memory_before_the_pause() {
    let test = "hybrid_brings_memory_before_the_pause";
    let Some(reports) = there_and_back(test, &["--mode", "hybrid"]) else {
        return;
    };
    for report in reports {
        assert_eq!(report["mode"], "hybrid");
        // How many hold depends on how fast the guest writes.
        assert!(report["pages_precopied"].as_u64() > Some(0), "{report}");
    }
}

#[test]
fn hybrid_without_a_warm_up_and_with_a_limit() {
    let test = "hybrid_without_a_warm_up_and_with_a_limit";
    let flags = [
        "--mode",
        "hybrid",
        "--warm-up",
        "0s",
        "--precopy-limit",
        "200ms",
    ];
    there_and_back(test, &flags);
}

#[test]
fn what_waits_for_its_memory_has_no_fault() {
    let test = "what_waits_for_its_memory_has_no_fault";
    let precopy = ["--mode", "precopy", "--downtime-limit", "10s"];
    for flags in [&precopy[..], &["--mode", "stop"]] {
        for report in there_and_back(test, flags).into_iter().flatten() {
            assert_eq!(report["mode"], flags[1]);
            assert_eq!(report["pages_demand"], 0, "{report}");
        }
    }
}

#[test]
fn pre_copy_that_does_not_come_to_an_end_leaves_the_vm_where_it_is() {
    let test = "pre_copy_that_does_not_come_to_an_end_leaves_the_vm_where_it_is";
    if !can_move(test) {
        return;
    }
    let qemus = Qemus::on_two_hosts(SHAPE, &["a", "b"]);
    let _first = qemus.start("a");
    qemus.wait_ticks("a", 10);
    // Slower than the guest writes.
    let flags = [
        "--mode",
        "precopy",
        "--downtime-limit",
        "1ms",
        "--precopy-limit",
        "2s",
        "--max-bandwidth",
        "100mbit",
    ];
    let (mut serve, ticket) = qemus.serve_with("a", &flags);
    let mut resume = qemus.resume("b", &ticket, &qemus.command("b"));
    let log = serve.ends_with(1);
    assert!(log.contains("--downtime-limit"), "{log}");
    let (code, log) = resume.end();
    assert_ne!(code, 0, "{log}");
    assert!(log.contains("--downtime-limit"), "{log}");
    let ticks = qemus.wait_ticks("a", 10);
    assert!(ticks.iter().all(|tick| tick.errors == 0));
    qemus.quit("a");
}
