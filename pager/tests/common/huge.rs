//! A pool of huge pages for as long as a test needs it.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// One test at a time changes the size of the pool.
static TURN: Mutex<()> = Mutex::new(());

/// Puts the pool back to its size when dropped.
pub struct HugePages {
    before: u64,
    _turn: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Makes the pool larger by `count` huge pages of 2 MiB; `None`, with a loud word, where that can't be.
    pub fn more(test: &str, count: u64) -> Option<Self> {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
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
