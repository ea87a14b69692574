//! Clones of a machine that goes on.

use nix::sys::signal::Signal;

use crate::common::{Home, Program, can_move};
use crate::{assert_clean, serve, snapshot, take};

fn clones(home: &Home, ticket: &str, names: &[String]) {
    let mut running: Vec<(Program, &String)> = names
        .iter()
        .map(|name| (home.resume(name, ticket, &["--verify", "--stay"]), name))
        .collect();
    for (clone, name) in &mut running {
        assert_eq!(home.report(name)["verified"], true, "{}", clone.log());
        assert_clean(home, name);
        clone.signal(Signal::SIGTERM);
        clone.ends_with(0);
    }
}

fn named(what: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{what}{number}")).collect()
}

#[test]
fn a_machine_goes_on_and_two_and_ten_clones_of_it_run() {
    if !can_move("a_machine_goes_on_and_two_and_ten_clones_of_it_run") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "32M", &[]);
    home.wait_ticks("a", 3);
    let log = take(&home, "a", "snap", &[]);
    assert!(log.contains("tracked=true"), "{log}");
    home.wait_ticks("a", 3);
    home.assert_unbroken(&["a"]);
    let (mut server, ticket) = serve(&home, "serve", "snap");
    clones(&home, &ticket, &named("two", 2));
    clones(&home, &ticket, &named("ten", 10));
    server.signal(Signal::SIGTERM);
    server.ends_with(0);
}

#[test]
fn a_snapshot_on_a_base_has_what_changed_and_needs_the_base() {
    if !can_move("a_snapshot_on_a_base_has_what_changed_and_needs_the_base") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "32M", &["--hot", "1M", "--cold-per-million", "0"]);
    home.wait_ticks("a", 3);
    take(&home, "a", "one", &[]);
    home.wait_ticks("a", 3);
    let base = |name: &str| home.path(name).to_str().unwrap().to_owned();
    take(&home, "a", "two", &["--base", &base("one")]);
    take(&home, "a", "three", &["--base", &base("two")]);
    let bytes = |dir: &str| -> u64 {
        let entries = std::fs::read_dir(home.path(dir)).unwrap();
        let entries = entries.map(|entry| entry.unwrap());
        entries
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("memory-"))
            .map(|entry| entry.metadata().unwrap().len())
            .sum()
    };
    assert!(
        bytes("two") < bytes("one") / 2,
        "{} {}",
        bytes("two"),
        bytes("one")
    );
    let (server, ticket) = serve(&home, "serve", "three");
    clones(&home, &ticket, &named("clone", 1));
    drop(server);

    let own = home.start(
        "own",
        &mut snapshot(&home, "a", "one", &["--base", &base("three")]),
    );
    assert!({ own }.ends_with(2).contains("name another one"));
    take(&home, "a", "two", &[]);
    let mut refused = home.start(
        "refused",
        crate::common::lazyvm()
            .args(["serve", "--snapshot"])
            .arg(home.path("three")),
    );
    assert!(
        refused
            .ends_with(2)
            .contains("is not that base any more: another snapshot is there")
    );
    home.assert_unbroken(&["a"]);
}
