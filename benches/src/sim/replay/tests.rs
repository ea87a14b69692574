use std::path::Path;

use lazyvm_server::trace::Touch;
use lazyvm_wire::PageIndex;

use super::*;

/// 100 ms, and a page takes 1 ms.
const LINK: Link = Link {
    rtt_ns: 100_000_000,
    rate_bit_s: 4296 * 8 * 1000,
};

const WAN: Link = Link {
    rtt_ns: 100_000_000,
    rate_bit_s: 1_000_000_000,
};

fn trace(touches: &[(u64, u64)]) -> Replay {
    let touch = |&(at_us, page)| Touch {
        at_us,
        page: PageIndex(page),
    };
    Replay::new(Trace {
        pages: 1000,
        data: vec![PageRange::new(PageIndex(0), 1000)],
        touches: touches.iter().map(touch).collect(),
        ..Trace::default()
    })
    .unwrap()
}

fn named(name: &str) -> Policy {
    Policy::named(name).unwrap()
}

#[test]
fn a_page_far_behind_costs_a_round_trip_and_the_next_is_in_its_window() {
    // The guest starts after 50 ms and touches page 500 at once: heard at 100 ms, when the push is in a batch of 32
    // that ends at 128 ms; the answer takes 1 ms and one way.
    let touches = [(0, 500), (0, 501)];
    let linear = trace(&touches).run(named("linear"), LINK);
    assert_eq!((linear.stalls, linear.full_stalls), (2, 2));
    let windows = trace(&touches).run(named("windows-alone"), LINK);
    // Page 501 comes 1 ms after page 500.
    assert_eq!((windows.stalls, windows.full_stalls), (2, 1));
    assert_eq!(windows.first_sign_ms, 180.0);
}

#[test]
fn a_page_on_its_way_is_waited_for_no_longer_than_that() {
    // Page 0 arrives after 1 ms and one way.
    let outcome = trace(&[(0, 0)]).run(named("linear"), LINK);
    assert_eq!((outcome.stalls, outcome.full_stalls), (1, 0));
    assert_eq!(outcome.first_sign_ms, 51.0);
    assert_eq!(outcome.sent_twice, 1);
}

#[test]
fn a_fault_costs_what_most_of_the_times_between_touches_are() {
    let computing = (0..40).map(|n| 300 + n * n * 7);
    let faults = (0..60).map(|n| 150 + n % 10);
    let quick = [20, 30, 40];
    let mut at = 0;
    let times = computing.chain(faults).chain(quick);
    let touches: Vec<_> = times
        .enumerate()
        .map(|(page, time)| {
            at += time;
            (at, page as u64)
        })
        .collect();
    let cost = trace(&touches).fault_cost_us();
    assert!((150..160).contains(&cost), "{cost}");
    // One touch alone, and none.
    assert_eq!(trace(&[(70, 1)]).fault_cost_us(), 0);
    assert_eq!(trace(&[]).fault_cost_us(), 0);
}

fn shipped() -> Vec<(String, Replay)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("traces");
    let mut traces: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let trace = Trace::decode(&std::fs::read(&path).unwrap()).unwrap();
            (path.display().to_string(), Replay::new(trace).unwrap())
        })
        .collect();
    traces.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(!traces.is_empty());
    traces
}

#[test]
fn shipped_traces_are_no_worse_off_with_the_full_policy() {
    for (name, replay) in shipped() {
        let full = replay.run(named("full"), WAN);
        let linear = replay.run(named("linear"), WAN);
        assert!(
            full.freeze_ms <= linear.freeze_ms,
            "{name}: {full:?} {linear:?}"
        );
        assert!(
            full.recovered_ms <= linear.recovered_ms,
            "{name}: {full:?} {linear:?}"
        );
        assert_eq!(full, replay.run(named("full"), WAN), "{name}");
    }
}

#[test]
fn each_page_is_pushed_once_or_asked_for() {
    for (name, replay) in shipped() {
        for policy in Policy::ALL {
            let (outcome, pushed) = replay.run_and_list(policy, WAN);
            let mut seen = BitVec::<u64>::repeat(false, replay.trace.pages as usize);
            for page in pushed.iter().flat_map(|range| range.pages()) {
                assert!(!seen.replace(page.as_usize(), true), "{name}");
            }
            let data: u64 = replay.trace.data.iter().map(|range| range.count).sum();
            let held = replay.held(policy).count_ones() as u64;
            let sent: u64 = replay.trace.held.iter().map(|range| range.count).sum();
            assert!(
                held <= sent
                    && (held == sent)
                        == (policy.early && policy.resume_set && policy.code && policy.hot)
            );
            let asked_only = outcome.stalls - outcome.sent_twice;
            assert_eq!(
                outcome.pushed + asked_only,
                data - held,
                "{name}: {outcome:?}"
            );
        }
    }
}
