//! A pool of huge pages for as long as a test needs it.

use std::fs::{self, File};

use nix::fcntl::{Flock, FlockArg};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Puts the pool back to its size when dropped, which must be after all that uses it.
///
/// One at a time, in all test programs of the machine.
pub struct HugePages {
    before: u64,
    _turn: Flock<File>,
}

impl HugePages {
    /// Makes the pool larger by `count` huge pages of 2 MiB; `None`, with a loud word, where that can't be.
    pub fn more(test: &str, count: u64) -> Option<Self> {
        let path = std::env::temp_dir().join("lazyvm-tests-hugepages.lock");
        let file = File::create(path).expect("a lock file");
        let turn = Flock::lock(file, FlockArg::LockExclusive).expect("a lock");
        let before = size();
        let pool = Self {
            before,
            _turn: turn,
        };
        if let Err(error) = fs::write(POOL, format!("{}", before + count)) {
            super::skip(test, &format!("{POOL} can't be written: {error}"));
            return None;
        }
        if size() < before + count {
            super::skip(test, &format!("the machine has no {count} huge pages"));
            return None;
        }
        Some(pool)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Err(error) = fs::write(POOL, format!("{}", self.before)) {
            eprintln!("{POOL} could not be set back to {}: {error}", self.before);
        }
    }
}

fn size() -> u64 {
    fs::read_to_string(POOL)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}
