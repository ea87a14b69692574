//! One machine moved a hundred times.

use nix::sys::signal::Signal;

use crate::common::{Footprint, Home, can_move};

#[test]
fn a_hundred_moves_in_a_row_lose_nothing_and_leave_nothing_behind() {
    if !can_move("a_hundred_moves_in_a_row_lose_nothing_and_leave_nothing_behind") {
        return;
    }
    let home = Home::new();
    let mut running = home.run("vm0", "16M", &[]);
    home.wait_ticks("vm0", 2);
    let (mut early, mut late) = (Vec::new(), Vec::new());
    for number in 1..=100 {
        let (before, here) = (format!("vm{}", number - 1), format!("vm{number}"));
        let install = ["missing", "minor"][number % 2];
        let (mut serve, ticket) = home.serve(&format!("serve{number}"), &before, &[]);
        let resume = home.resume(
            &here,
            &ticket,
            &["--stay", "--verify", "--install", install],
        );
        serve.ends_with(0);
        running.ends_with(0);
        resume.wait_log("all memory is here");
        running = resume;
        home.wait_ticks(&here, 2);
        assert_eq!(home.report(&here)["verified"], true, "move {number}");
        match number {
            1..=10 => early.push(running.footprint()),
            91..=100 => late.push(running.footprint()),
            _ => {}
        }
    }
    // Each machine is a fresh process, and how much of the push it held at once is chance: the least of ten counts.
    let least = |found: Vec<Footprint>| found.into_iter().reduce(Footprint::least).unwrap();
    least(late).assert_not_grown_since(least(early));
    running.signal(Signal::SIGINT);
    running.ends_with(0);
    let machines: Vec<_> = (0..=100).map(|number| format!("vm{number}")).collect();
    home.assert_unbroken(&machines);
}
