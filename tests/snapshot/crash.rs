//! `lazyvm snapshot` is killed at any instant.

use lazyvm_server::snapshot::Snapshot;
use nix::sys::signal::Signal;

use crate::common::{Home, can_move};
use crate::{snapshot, take};

const KILLS: u64 = 200;

#[test]
fn killed_at_any_instant_it_leaves_the_old_one_or_the_new_one() {
    if !can_move("killed_at_any_instant_it_leaves_the_old_one_or_the_new_one") {
        return;
    }
    let home = Home::new();
    let _run = home.run("a", "8M", &["--fill", "2M", "--hot", "64K"]);
    home.wait_ticks("a", 2);
    let start = std::time::Instant::now();
    take(&home, "a", "snap", &[]);
    let whole = start.elapsed();
    let mut last = Snapshot::open(&home.path("snap")).unwrap().manifest().id;
    let (mut replaced, mut seed) = (0, 0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..KILLS {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let program = home.start("snapshot", &mut snapshot(&home, "a", "snap", &[]));
        // Up to the time that a whole one takes, and somewhat more.
        let part = (seed >> 32) as f64 / f64::from(u32::MAX);
        std::thread::sleep(whole.mul_f64(part * 1.25));
        program.signal(Signal::SIGKILL);
        drop(program);
        let found = Snapshot::open(&home.path("snap")).unwrap();
        for entry in found.entries() {
            found.chunk(entry.chunk).unwrap();
        }
        replaced += u64::from(found.manifest().id != last);
        last = found.manifest().id;
    }
    eprintln!("{replaced} of {KILLS} snapshots were complete before they were killed");
    // The next one removes what the others left, and lets a machine run on that was left standing.
    take(&home, "a", "snap", &[]);
    assert_eq!(std::fs::read_dir(home.path("snap")).unwrap().count(), 5);
    home.wait_ticks("a", 3);
    home.assert_unbroken(&["a"]);
}
