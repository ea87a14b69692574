//! What a scout finds of a machine of the built-in monitor: where its processors are, and what it touches while it is
//! watched, which harms no byte of its memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use common::{Home, Running, has_kvm};
use lazyvm_server::port::{Hints, Scout, SourceMachine};
use lazyvm_vmm_glue::kvm::touch::TouchPlan;
use lazyvm_vmm_glue::kvm::{
    ControlClient, MachineConfig, Payload, RemoteMachine, SerialTarget, TouchConfig,
};
use lazyvm_wire::{Backing, PAGE_SHIFT, PageRange};

const MEMORY: u64 = 64 << 20;
const CPUS: u32 = 2;

fn config() -> TouchConfig {
    TouchConfig {
        fill_bytes: Some(48 << 20),
        hot_bytes: Some(1 << 20),
        cold_per_million: 0,
        tick_touches: Some(500),
    }
}

fn boot(home: &Home) -> Running {
    home.boot(MachineConfig {
        payload: Payload::Touch(config()),
        memory_bytes: MEMORY,
        backing: Backing::Small,
        cpus: CPUS,
        serial: SerialTarget::File(home.path("serial")),
        control: home.path("control"),
    })
}

fn pages(ranges: &[PageRange]) -> BTreeSet<u64> {
    let pages = ranges.iter().flat_map(|range| range.pages());
    pages.map(|page| page.0).collect()
}

/// The pages that the payload touches nearly always.
fn hot_pages() -> BTreeSet<u64> {
    let plan = TouchPlan::new(&config(), MEMORY, CPUS).unwrap();
    let first = plan.fill >> PAGE_SHIFT;
    let shares = (0..u64::from(CPUS)).map(|cpu| first + cpu * plan.share_pages);
    shares
        .flat_map(|share| share..share + plan.hot_pages)
        .collect()
}

/// Looks until all of `wanted` shows as hot.
fn look_until(scout: &mut dyn Scout, wanted: &BTreeSet<u64>) -> Hints {
    let start = Instant::now();
    loop {
        let hints = scout.look().unwrap();
        let hot = pages(&hints.hot);
        if hot.is_superset(wanted) {
            return hints;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{} of {} hot pages show",
            hot.intersection(wanted).count(),
            wanted.len()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_a_machine_touches_shows_and_the_rest_does_not() {
    if !has_kvm("what_a_machine_touches_shows_and_the_rest_does_not") {
        return;
    }
    let home = Home::new();
    let running = boot(&home);
    running.wait_ticks(1, CPUS.into());
    let remote = RemoteMachine::connect(&running.control).unwrap();
    let mut scout = remote.scout().unwrap();
    assert!(scout.look().unwrap().hot.is_empty(), "not watched yet");
    let wanted = hot_pages();
    // A second watch begins anew.
    for _ in 0..2 {
        scout.watch().unwrap();
        let hints = look_until(&mut *scout, &wanted);
        let hot = pages(&hints.hot).len();
        let filled = (48 << 20) >> PAGE_SHIFT;
        assert!(
            hot < filled / 2,
            "{hot} pages are said to be hot, of {filled} filled"
        );
        eprintln!("{hot} pages show for {} hot ones", wanted.len());
    }
    assert_eq!(running.errors(), 0);
    remote.pause().unwrap();
    let hints = scout.look_paused().unwrap();
    assert!(pages(&hints.hot).is_superset(&wanted));
    remote.resume().unwrap();
    assert_eq!(running.errors(), 0);
}

#[test]
fn registers_and_what_they_point_to_are_the_same_while_it_runs() {
    if !has_kvm("registers_and_what_they_point_to_are_the_same_while_it_runs") {
        return;
    }
    let home = Home::new();
    let running = boot(&home);
    running.wait_ticks(1, CPUS.into());
    let mut client = ControlClient::connect(&running.control).unwrap();
    let live = client.registers().unwrap();
    client.pause().unwrap();
    let still = client.registers().unwrap();
    assert_eq!((live.len(), still.len()), (CPUS as usize, CPUS as usize));
    for (live, still) in live.iter().zip(&still) {
        // All but the two that change all the time.
        let mut live = *live;
        (live.rip, live.rsp) = (still.rip, still.rsp);
        assert_eq!(live, *still);
        assert!(still.paging().is_some() && still.rip >= 1 << 20);
    }
    let remote = RemoteMachine::connect(&running.control).unwrap();
    let hints = remote.scout().unwrap().look_paused().unwrap();
    let (tables, processor) = (pages(&hints.tables), pages(&hints.processor));
    for vcpu in &still {
        assert!(tables.contains(&(vcpu.cr3 >> PAGE_SHIFT)));
        // The payload's memory is mapped to itself.
        assert!(processor.contains(&(vcpu.rip >> PAGE_SHIFT)));
        assert!(processor.contains(&(vcpu.rsp >> PAGE_SHIFT)));
    }
}

/// Registers are asked for while the machine is paused and let go on all the time.
#[test]
fn a_look_comes_through_whatever_else_is_done() {
    if !has_kvm("a_look_comes_through_whatever_else_is_done") {
        return;
    }
    let home = Home::new();
    let running = boot(&home);
    running.wait_ticks(1, CPUS.into());
    let other = std::thread::spawn({
        let control = running.control.clone();
        move || {
            let mut client = ControlClient::connect(&control).unwrap();
            for _ in 0..200 {
                client.pause().unwrap();
                client.resume(false).unwrap();
            }
        }
    });
    let mut client = ControlClient::connect(&running.control).unwrap();
    let mut looks = 0;
    while !other.is_finished() || looks < 100 {
        assert_eq!(client.registers().unwrap().len(), CPUS as usize);
        looks += 1;
    }
    other.join().unwrap();
    assert_eq!(running.errors(), 0);
}

#[test]
fn a_watch_changes_no_byte() {
    if !has_kvm("a_watch_changes_no_byte") {
        return;
    }
    let home = Home::new();
    let running = boot(&home);
    running.wait_ticks(1, CPUS.into());
    let remote = RemoteMachine::connect(&running.control).unwrap();
    remote.pause().unwrap();
    let image = || {
        let mut bytes = vec![0; MEMORY as usize];
        let file = running.machine().memory_file();
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    let before = image();
    let mut scout = remote.scout().unwrap();
    scout.watch().unwrap();
    let hot = scout.look_paused().unwrap().hot;
    // The monitor itself may look at the guest's memory, on behalf of a clock.
    assert!(pages(&hot).len() < 64, "{hot:?}");
    assert!(before == image());
    remote.resume().unwrap();
    assert_eq!(running.errors(), 0);
}
