//! Files that are not what was written.

use std::fs;
use std::path::PathBuf;

use lazyvm_server::snapshot::{Snapshot, SnapshotError};

use crate::common::{Home, can_move};
use crate::{serve, take};

fn files(home: &Home) -> Vec<PathBuf> {
    let entries = fs::read_dir(home.path("snap")).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Opens the snapshot and reads all of it.
fn read_all(home: &Home) -> Result<(), SnapshotError> {
    let snapshot = Snapshot::open(&home.path("snap"))?;
    snapshot
        .entries()
        .iter()
        .try_for_each(|entry| snapshot.chunk(entry.chunk).map(drop))
}

#[test]
fn every_file_flipped_and_cut_anywhere_is_refused_by_name() {
    if !can_move("every_file_flipped_and_cut_anywhere_is_refused_by_name") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "8M", &["--fill", "1M", "--hot", "64K"]);
    home.wait_ticks("a", 2);
    take(&home, "a", "snap", &[]);
    run.signal(nix::sys::signal::Signal::SIGTERM);
    run.end();
    read_all(&home).unwrap();
    let snapshot = Snapshot::open(&home.path("snap")).unwrap();
    // Damaged profiles are ignored.
    let is_needed = |path: &PathBuf| {
        !path
            .file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("profile-")
    };
    for path in files(&home).into_iter().filter(is_needed) {
        let whole = fs::read(&path).unwrap();
        let step = (whole.len() / 97).max(1);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        for at in (0..whole.len()).step_by(step).chain([whole.len() - 1]) {
            // A chunk that the VM wrote again lies behind its first copy, whose bytes nobody reads any more.
            let is_used = !name.starts_with("memory-")
                || at < 32
                || snapshot.entries().iter().any(|entry| {
                    use lazyvm_server::snapshot::format::Place;
                    match entry.place {
                        Place::Raw(stored) | Place::Zstd(stored) => {
                            let end = stored.offset + u64::from(stored.length);
                            (stored.offset..end).contains(&(at as u64))
                        }
                        Place::Base => false,
                    }
                });
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            fs::write(&path, &damaged).unwrap();
            let flipped = read_all(&home);
            if !is_used {
                flipped.unwrap();
            } else {
                let error = flipped.unwrap_err().to_string();
                assert!(
                    error.contains(&name) && error.contains("damaged"),
                    "{error}"
                );
            }
            fs::write(&path, &whole[..at]).unwrap();
            let error = read_all(&home).unwrap_err().to_string();
            assert!(error.contains(&name), "{error}");
        }
        fs::write(&path, &whole).unwrap();
    }
    read_all(&home).unwrap();
}

/// What is damaged after the start of the server does not arrive, and is told on both sides.
#[test]
fn a_chunk_damaged_while_it_is_served_is_never_a_wrong_page() {
    if !can_move("a_chunk_damaged_while_it_is_served_is_never_a_wrong_page") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "16M", &[]);
    home.wait_ticks("a", 3);
    take(&home, "a", "snap", &[]);
    let (server, ticket) = serve(&home, "serve", "snap");
    let memory = files(&home).into_iter().find(|path| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("memory-")
    });
    let memory = memory.unwrap();
    let mut bytes = fs::read(&memory).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].iter_mut().for_each(|byte| *byte ^= 0xff);
    fs::write(&memory, bytes).unwrap();
    let resume = home.resume("b", &ticket, &["--stay"]);
    server.wait_log("its checksum is wrong");
    resume.wait_log("the VM runs here");
    assert!(home.ticks("b").iter().all(|tick| tick.errors == 0));
}
