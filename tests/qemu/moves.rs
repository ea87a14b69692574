//! Moves that succeed.

use crate::guest::{Qemus, Shape, can_move};

/// Moves along `names`, and looks at the guest after each move.
fn moves(test: &str, shape: Shape, names: &[&str]) {
    if !can_move(test) {
        return;
    }
    let qemus = Qemus::on_two_hosts(shape, names);
    let mut first = qemus.start(names[0]);
    for pair in names.windows(2) {
        let report = qemus.move_on(pair[0], pair[1]);
        // The guest is not held up by its own size: what is absent comes behind it.
        let ticks = qemus.wait_ticks(pair[1], 5);
        qemus.wait_gone(pair[0]);
        eprintln!(
            "{test}: {} -> {}: downtime {} us, {} faults, tick {}",
            pair[0],
            pair[1],
            report["downtime_us"],
            report["faults"],
            ticks.last().unwrap().number
        );
    }
    first.ends_with(0);
    let mut last = 0;
    for name in names {
        for tick in qemus.ticks(name) {
            assert!(
                tick.number > last && tick.errors == 0,
                "{name}: {tick:?} after {last}"
            );
            last = tick.number;
        }
    }
    qemus.quit(names[names.len() - 1]);
}

#[test]
fn one_cpu_there_and_back_again() {
    let shape = Shape {
        memory_mib: 512,
        cpus: 1,
        fill_mib: 300,
    };
    moves("one_cpu_there_and_back_again", shape, &["a", "b", "c"]);
}

#[test]
fn four_cpus_there_and_back_again() {
    let shape = Shape {
        memory_mib: 512,
        cpus: 4,
        fill_mib: 300,
    };
    moves("four_cpus_there_and_back_again", shape, &["a", "b", "c"]);
}

#[test]
fn two_gibibytes_and_one_cpu() {
    let shape = Shape {
        memory_mib: 2048,
        cpus: 1,
        fill_mib: 512,
    };
    moves("two_gibibytes_and_one_cpu", shape, &["a", "b"]);
}

#[test]
fn two_gibibytes() {
    let shape = Shape {
        memory_mib: 2048,
        cpus: 4,
        fill_mib: 512,
    };
    moves("two_gibibytes", shape, &["a", "b", "c"]);
}

#[test]
fn memory_on_both_sides_of_the_hole_for_devices() {
    // A pc has 3 GiB below, so the backend is in two regions.
    let shape = Shape {
        memory_mib: 4096,
        cpus: 1,
        fill_mib: 64,
    };
    moves(
        "memory_on_both_sides_of_the_hole_for_devices",
        shape,
        &["a", "b"],
    );
}

#[test]
fn twenty_moves_in_a_row() {
    let names: Vec<String> = (0..=20).map(|number| format!("vm{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let shape = Shape {
        memory_mib: 256,
        cpus: 2,
        fill_mib: 64,
    };
    moves("twenty_moves_in_a_row", shape, &names);
}
