//! What resumes of a snapshot waited for goes first in later ones.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::common::{Home, can_move};
use crate::{assert_clean, serve_with, take};

/// Slow enough for the guest to wait for most of its hot pages, if they do not go first.
const RATE: [&str; 2] = ["--max-bandwidth", "200mbit"];

/// Resumes a clone, and ends it; gives how many pages it waited for.
fn clone(home: &Home, name: &str, ticket: &str) -> u64 {
    let mut clone = home.resume(name, ticket, &["--verify", "--stay"]);
    let report = home.report(name);
    assert_eq!(report["verified"], true, "{}", clone.log());
    assert_clean(home, name);
    clone.signal(Signal::SIGTERM);
    clone.ends_with(0);
    report["faults"].as_u64().unwrap()
}

fn profile(home: &Home) -> PathBuf {
    let entries = fs::read_dir(home.path("snap")).unwrap();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    let found = paths.find(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("profile-")
    });
    found.unwrap()
}

#[test]
fn a_profile_is_kept_and_used_and_ignored_when_it_is_damaged() {
    if !can_move("a_profile_is_kept_and_used_and_ignored_when_it_is_damaged") {
        return;
    }
    let home = Home::new();
    // Pages that nobody can foretell, but that are the same for each clone.
    let cold = ["--hot", "64K", "--cold-per-million", "300000"];
    let _run = home.run("a", "64M", &cold);
    home.wait_ticks("a", 3);
    take(&home, "a", "snap", &[]);
    // What it begins with is what the VM has written meanwhile.
    fs::remove_file(profile(&home)).unwrap();

    let (mut server, ticket) = serve_with(&home, "serve", "snap", &RATE);
    let first = clone(&home, "first", &ticket);
    let second = clone(&home, "second", &ticket);
    assert!(second < first, "{second} faults after {first}");
    server.signal(Signal::SIGTERM);
    server.ends_with(0);

    // It is the file that counts, not what the server remembers.
    let (mut server, ticket) = serve_with(&home, "again", "snap", &RATE);
    let third = clone(&home, "third", &ticket);
    assert!(third < first, "{third} faults after {first}");
    server.signal(Signal::SIGTERM);
    assert!(!server.ends_with(0).contains("profile"));

    let path = profile(&home);
    let mut bytes = fs::read(&path).unwrap();
    let half = bytes.len() / 2;
    bytes[half] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let (mut server, ticket) = serve_with(&home, "damaged", "snap", &RATE);
    server.wait_log("the profile of earlier resumes is damaged");
    let fourth = clone(&home, "fourth", &ticket);
    server.signal(Signal::SIGTERM);
    server.ends_with(0);
    // A new one has taken its place.
    assert_ne!(fs::read(&path).unwrap(), bytes);
    let (server, _) = serve_with(&home, "mended", "snap", &RATE);
    assert!(!server.log().contains("damaged"));
    eprintln!("faults: {first} and {fourth} without a profile, {second} and {third} with one");
}
