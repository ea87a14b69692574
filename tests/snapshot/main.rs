//! `lazyvm snapshot`, and its files served.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod crash;
mod damage;
mod profile;
mod serving;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use common::{Home, Program, lazyvm};

/// `lazyvm snapshot` of the machine `vm` into the directory `dir`.
pub fn snapshot(home: &Home, vm: &str, dir: &str, flags: &[&str]) -> Command {
    let mut command = lazyvm();
    command
        .args(["snapshot", "--vm"])
        .arg(home.path(vm))
        .args(flags)
        .arg(home.path(dir));
    command
}

/// Takes a snapshot; it must succeed. Gives the log.
pub fn take(home: &Home, vm: &str, dir: &str, flags: &[&str]) -> String {
    home.start("snapshot", &mut snapshot(home, vm, dir, flags))
        .ends_with(0)
}

/// `lazyvm serve --snapshot`, and the ticket that it prints.
pub fn serve(home: &Home, name: &str, dir: &str) -> (Program, String) {
    serve_with(home, name, dir, &[])
}

/// The same with more flags.
pub fn serve_with(home: &Home, name: &str, dir: &str, flags: &[&str]) -> (Program, String) {
    let mut command = lazyvm();
    command
        .args(["serve", "--listen", "127.0.0.1:0", "--snapshot"])
        .arg(home.path(dir))
        .args(flags);
    let mut program = home.start(name, command.stdout(Stdio::piped()));
    let mut ticket = String::new();
    BufReader::new(program.stdout())
        .read_line(&mut ticket)
        .unwrap();
    assert!(!ticket.is_empty(), "{}", program.log());
    (program, ticket.trim_end().to_owned())
}

/// The lines that a clone has written to its console; the first may be a part of one, and so may the last.
pub fn assert_clean(home: &Home, clone: &str) {
    let ticks = home.wait_ticks(clone, 3);
    assert!(ticks.iter().all(|tick| tick.errors == 0), "{ticks:?}");
    let numbers: Vec<_> = ticks.iter().map(|tick| tick.number).collect();
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{numbers:?}"
    );
}
