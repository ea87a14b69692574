//! Signals: what is promised to the machine holds, whoever is ended.

use std::fs;

use nix::sys::signal::Signal;

use crate::common::{Home, can_move, fifo};

#[test]
fn serve_ends_before_the_hand_over_and_the_machine_runs_on() {
    if !can_move("serve_ends_before_the_hand_over_and_the_machine_runs_on") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, _) = home.serve("serve", "a", &[]);
    serve.signal(Signal::SIGTERM);
    let log = serve.ends_with(4);
    assert!(log.contains("The VM runs on here"), "{log}");
    home.wait_ticks("a", 2);
    run.signal(Signal::SIGTERM);
    run.ends_with(0);
    assert!(
        !home.path("a").exists(),
        "the control socket is gone with the machine"
    );
    home.assert_unbroken(&["a"]);
}

#[test]
fn serve_does_not_leave_a_machine_without_its_memory_at_the_first_signal() {
    if !can_move("serve_does_not_leave_a_machine_without_its_memory_at_the_first_signal") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &["--max-bandwidth", "40mbit"]);
    let resume = home.resume("b", &ticket, &["--verify", "--stay"]);
    resume.wait_log("the VM runs here");
    serve.signal(Signal::SIGINT);
    serve.wait_log("needs its memory from here");
    resume.signal(Signal::SIGINT);
    resume.wait_log("a second signal ends this command now");
    serve.ends_with(0);
    run.ends_with(0);
    resume.wait_log("all memory is here");
    home.wait_ticks("b", 2);
    assert_eq!(home.report("b")["verified"], true);
    home.assert_unbroken(&["a", "b"]);
}

#[test]
fn a_second_signal_ends_both_sides_and_tells_how_far_they_were() {
    if !can_move("a_second_signal_ends_both_sides_and_tells_how_far_they_were") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "64M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &["--max-bandwidth", "1mbit"]);
    let mut resume = home.resume("b", &ticket, &[]);
    resume.wait_log("the VM runs here");
    for (program, warning) in [
        (&mut resume, "a second signal ends this command now"),
        (&mut serve, "needs its memory from here"),
    ] {
        program.signal(Signal::SIGTERM);
        program.wait_log(warning);
        program.signal(Signal::SIGTERM);
        let log = program.ends_with(5);
        assert!(log.contains("pages had arrived"), "{log}");
    }
    let report = home.report("b");
    let here =
        ["pages_zero", "pages_demand", "pages_pushed"].map(|key| report[key].as_u64().unwrap());
    assert!(
        here.iter().sum::<u64>() < report["pages_total"].as_u64().unwrap(),
        "{report}"
    );
    assert_eq!(report["complete_at_us"], 0);
}

#[test]
fn resume_that_is_killed_before_the_hand_over_leaves_the_machine_where_it_is() {
    if !can_move("resume_that_is_killed_before_the_hand_over_leaves_the_machine_where_it_is") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    let hold = home.path("hold");
    fifo(&hold);
    let resume = home.resume("b", &ticket, &["--serial", hold.to_str().unwrap()]);
    resume.wait_log("connected to the source");
    drop(resume);
    let log = serve.ends_with(4);
    assert!(
        log.contains("lost before the hand-over") && log.contains("The VM runs on here"),
        "{log}"
    );
    home.wait_ticks("a", 2);
    assert!(run.is_running());
    home.assert_unbroken(&["a"]);
}

#[test]
fn resume_that_is_ended_before_the_hand_over_gives_the_machine_back() {
    if !can_move("resume_that_is_ended_before_the_hand_over_gives_the_machine_back") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "16M", &[]);
    let (mut serve, ticket) = home.serve("serve", "a", &[]);
    let hold = home.path("hold");
    fifo(&hold);
    let mut resume = home.resume("b", &ticket, &["--serial", hold.to_str().unwrap()]);
    resume.wait_log("connected to the source");
    resume.signal(Signal::SIGTERM);
    resume.wait_log("giving the VM back");
    let _reader = fs::File::open(&hold).unwrap();
    let log = resume.ends_with(4);
    assert!(log.contains("a signal ended it"), "{log}");
    let log = serve.ends_with(6);
    assert!(
        log.contains("a signal ended it") && log.contains("The VM runs on here"),
        "{log}"
    );
    home.wait_ticks("a", 2);
    assert!(run.is_running());
    home.assert_unbroken(&["a"]);
}
