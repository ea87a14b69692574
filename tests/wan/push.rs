//! The push's connection over a path that changes, loses, or has others on it. What is looked at is what arrived over some
//! seconds beside what the path carries in them, with wide margins: other tests run beside these.

use std::thread::sleep;
use std::time::{Duration, Instant};

use lazyvm_benches::wan::emulator::Emulator;
use lazyvm_benches::wan::flows::{Push, Tcp};
use lazyvm_benches::wan::queue::PathConfig;
use lazyvm_quic::Rival;

use crate::common::is_root;

const SECOND: Duration = Duration::from_secs(1);

fn path(mbit_s: u64, rtt_ms: u64) -> PathConfig {
    PathConfig {
        rtt: Duration::from_millis(rtt_ms),
        rate_bit_s: mbit_s * 1_000_000,
        ..PathConfig::default()
    }
}

/// What arrives of each within `time`, as a share of what the path carries.
fn shares<const N: usize>(
    path: PathConfig,
    time: Duration,
    arrived: impl Fn() -> [u64; N],
) -> [f64; N] {
    let (start, before) = (Instant::now(), arrived());
    sleep(time);
    let carried = path.rate_bit_s as f64 / 8.0 * start.elapsed().as_secs_f64();
    let after = arrived();
    std::array::from_fn(|flow| (after[flow] - before[flow]) as f64 / carried)
}

fn share(path: PathConfig, time: Duration, push: &Push) -> f64 {
    let [share] = shares(path, time, || [push.arrived()]);
    assert_eq!(push.ended(), None);
    share
}

#[test]
fn a_push_fills_a_path_that_loses_packets() {
    if !is_root("a_push_fills_a_path_that_loses_packets") {
        return;
    }
    for loss in [0.01, 0.03] {
        let path = PathConfig {
            loss,
            ..path(100, 100)
        };
        let emulator = Emulator::start(path).unwrap();
        let push = Push::start(&emulator, Rival::Share).unwrap();
        sleep(3 * SECOND);
        let share = share(path, 5 * SECOND, &push);
        assert!(share > 0.6 && share < 1.0, "{loss}: {share}");
        assert!(emulator.traffic().totals.lost > 100);
    }
}

#[test]
fn a_push_follows_a_rate_that_drops_to_a_tenth_and_comes_back() {
    if !is_root("a_push_follows_a_rate_that_drops_to_a_tenth_and_comes_back") {
        return;
    }
    let (wide, narrow) = (path(200, 50), path(20, 50));
    let emulator = Emulator::start(wide).unwrap();
    let push = Push::start(&emulator, Rival::Share).unwrap();
    sleep(2 * SECOND);
    let before = share(wide, 3 * SECOND, &push);
    emulator.change(narrow);
    sleep(4 * SECOND);
    let meanwhile = share(narrow, 4 * SECOND, &push);
    emulator.change(wide);
    sleep(5 * SECOND);
    let after = share(wide, 4 * SECOND, &push);
    let all = [before, meanwhile, after];
    assert!(
        all.iter().all(|&share| share > 0.5 && share < 1.1),
        "{all:?}"
    );
}

#[test]
fn a_push_goes_on_over_a_longer_route_and_back_over_a_shorter_one() {
    if !is_root("a_push_goes_on_over_a_longer_route_and_back_over_a_shorter_one") {
        return;
    }
    let (short, long) = (path(100, 50), path(100, 150));
    let emulator = Emulator::start(short).unwrap();
    let push = Push::start(&emulator, Rival::Share).unwrap();
    sleep(3 * SECOND);
    let before = share(short, 2 * SECOND, &push);
    emulator.change(long);
    sleep(2 * SECOND);
    // The old round trip counts for a while: what is more than it may be another's queue.
    let soon = share(long, 8 * SECOND, &push);
    sleep(8 * SECOND);
    let late = share(long, 4 * SECOND, &push);
    emulator.change(short);
    // What overtakes on the shorter route makes what is on the longer one look lost; the rate is found anew.
    sleep(6 * SECOND);
    let after = share(short, 3 * SECOND, &push);
    let all = [before, soon, late, after];
    assert!(soon > 0.3 && before.min(late).min(after) > 0.6, "{all:?}");
}

#[test]
fn a_push_goes_on_after_seconds_in_the_dark() {
    if !is_root("a_push_goes_on_after_seconds_in_the_dark") {
        return;
    }
    let path = path(100, 100);
    let emulator = Emulator::start(path).unwrap();
    let push = Push::start(&emulator, Rival::Share).unwrap();
    sleep(2 * SECOND);
    assert!(share(path, 2 * SECOND, &push) > 0.5);
    emulator.black_out(Instant::now(), 4 * SECOND);
    sleep(SECOND);
    let dark = share(path, 2 * SECOND, &push);
    // QUIC's probes are up to eight times as far apart as the dark has lasted when it ends.
    sleep(9 * SECOND);
    let after = share(path, 3 * SECOND, &push);
    assert!(dark < 0.01 && after > 0.6, "{dark} {after}");
}

/// Shares of a push and of CUBIC's TCP that came later, and of the push when that is over.
fn beside_tcp(rival: Rival) -> [f64; 3] {
    let path = path(50, 40);
    let emulator = Emulator::start(path).unwrap();
    let push = Push::start(&emulator, rival).unwrap();
    sleep(3 * SECOND);
    let tcp = Tcp::start(&emulator).unwrap();
    sleep(10 * SECOND);
    let both = shares(path, 25 * SECOND, || [push.arrived(), tcp.arrived()]);
    drop(tcp);
    sleep(12 * SECOND);
    [both[0], both[1], share(path, 3 * SECOND, &push)]
}

#[test]
fn a_push_shares_a_path_with_tcp() {
    if !is_root("a_push_shares_a_path_with_tcp") {
        return;
    }
    let all @ [push, tcp, alone] = beside_tcp(Rival::Share);
    assert!(push > 0.15 && tcp > 0.15 && push + tcp > 0.7, "{all:?}");
    assert!(alone > 0.6, "{all:?}");
}

#[test]
fn a_push_that_yields_leaves_the_path_to_tcp() {
    if !is_root("a_push_that_yields_leaves_the_path_to_tcp") {
        return;
    }
    let all @ [push, tcp, alone] = beside_tcp(Rival::Yield);
    assert!(push < 0.35 && tcp > 0.5, "{all:?}");
    assert!(alone > 0.6, "{all:?}");
}
