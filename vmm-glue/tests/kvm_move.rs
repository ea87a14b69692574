//! A machine's state, taken from one KVM machine and loaded into another.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use common::{Home, Running, Tick, has_kvm, open_descriptors, payload};
use lazyvm_pager::InstallMode;
use lazyvm_server::port::SourceMachine;
use lazyvm_vmm_glue::kvm::destination::LoadStateError;
use lazyvm_vmm_glue::kvm::{
    Destination, DestinationConfig, RemoteMachine, SerialTarget, TouchConfig,
};

/// Ticks of one vCPU in what several machines wrote one after the other.
fn ticks(outputs: &[String], cpu: u64) -> Vec<Tick> {
    let output = outputs.concat();
    output
        .lines()
        .filter_map(Tick::parse)
        .filter(|tick| tick.cpu == cpu)
        .collect()
}

/// All that a machine which is gone wrote.
fn written(serial: &SerialTarget) -> String {
    let SerialTarget::File(path) = serial else {
        panic!("no file")
    };
    std::fs::read_to_string(path).unwrap()
}

fn assert_continuous(outputs: &[String], cpus: u64) {
    for cpu in 0..cpus {
        let ticks = ticks(outputs, cpu);
        for (tick, number) in ticks.iter().zip(1..) {
            assert_eq!(tick.tick, number, "vCPU {cpu} lost or repeated a tick");
            assert_eq!(tick.errors, 0, "{}", outputs.concat());
        }
        for pair in ticks.windows(2) {
            assert!(pair[1].touches > pair[0].touches);
        }
    }
}

/// Moves a machine `times` times, each time after some progress on every vCPU, and gives what each one wrote.
fn move_often(home: &Home, mut machine: Running, cpus: u64, times: u32) -> Vec<String> {
    let mut outputs = Vec::new();
    for _ in 0..times {
        machine.wait_ticks(3, cpus);
        // The console's file is complete once the machine is gone.
        let serial = machine.serial.clone();
        machine = home.move_on(machine);
        outputs.push(written(&serial));
    }
    machine.wait_ticks(3, cpus);
    machine.machine().pause().unwrap();
    outputs.push(machine.output());
    outputs
}

#[test]
fn a_moved_machine_goes_on_where_it_was() {
    if !has_kvm("a_moved_machine_goes_on_where_it_was") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, TouchConfig::default());
    assert_continuous(&move_often(&home, machine, 1, 3), 1);
}

#[test]
fn so_does_one_of_two_vcpus() {
    if !has_kvm("so_does_one_of_two_vcpus") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(2, TouchConfig::default());
    assert_continuous(&move_often(&home, machine, 2, 3), 2);
}

#[test]
fn twenty_moves_in_a_row_leave_no_descriptor_behind() {
    if !has_kvm("twenty_moves_in_a_row_leave_no_descriptor_behind") {
        return;
    }
    // Alone in a process of its own, since other tests open descriptors too.
    let name = "twenty_moves_in_a_row_leave_no_descriptor_behind";
    const ALONE: &str = "LAZYVM_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture", "--test-threads=1"])
            .env(ALONE, "1")
            .status()
            .unwrap();
        assert!(status.success());
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, TouchConfig::default());
    machine.wait_ticks(1, 1);
    let before = open_descriptors();
    let mut machine = home.move_on(machine);
    for _ in 1..20 {
        let seen = machine.wait_ticks(1, 1);
        assert!(seen.iter().all(|tick| tick.errors == 0));
        machine = home.move_on(machine);
    }
    machine.wait_ticks(1, 1);
    assert_eq!(open_descriptors(), before);
}

#[test]
fn a_machine_survives_being_paused_all_the_time() {
    if !has_kvm("a_machine_survives_being_paused_all_the_time") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(2, TouchConfig::default());
    for _ in 0..500 {
        machine.machine().pause().unwrap();
        machine.machine().resume(false).unwrap();
    }
    let seen = machine.wait_ticks(1, 2).len();
    machine.wait_ticks(seen + 3, 2);
    machine.machine().pause().unwrap();
    assert_continuous(&[machine.output()], 2);
}

#[test]
fn no_tick_comes_while_it_is_paused() {
    if !has_kvm("no_tick_comes_while_it_is_paused") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(1, TouchConfig::default());
    machine.wait_ticks(3, 1);
    machine.machine().pause().unwrap();
    let written = machine.status().serial_bytes;
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(machine.status().serial_bytes, written);
    assert_eq!(
        machine.output().len() as u64,
        written,
        "nothing is held back"
    );
}

#[test]
fn interrupts_of_the_timer_and_of_the_local_apic_go_on_after_each_move() {
    if !has_kvm("interrupts_of_the_timer_and_of_the_local_apic_go_on_after_each_move") {
        return;
    }
    let home = Home::new();
    let mut machine = home.flat(payload::clocks());
    for _ in 0..6 {
        machine.wait_lines(2, |line| line == "p");
        machine.wait_lines(2, |line| line == "a");
        machine = home.move_on(machine);
    }
    machine.wait_lines(2, |line| line == "p");
    machine.wait_lines(2, |line| line == "a");
}

#[test]
fn port_accesses_happen_once_wherever_a_pause_or_a_move_meets_them() {
    if !has_kvm("port_accesses_happen_once_wherever_a_pause_or_a_move_meets_them") {
        return;
    }
    let home = Home::new();
    let mut machine = home.flat(payload::alphabet());
    let mut said = String::new();
    for _ in 0..20 {
        machine.wait_lines(3, |line| !line.is_empty());
        for _ in 0..20 {
            machine.machine().pause().unwrap();
            machine.machine().resume(false).unwrap();
        }
        let serial = machine.serial.clone();
        machine = home.move_on(machine);
        said += &written(&serial);
    }
    machine.wait_lines(3, |line| !line.is_empty());
    machine.machine().pause().unwrap();
    said += &machine.output();
    let expected = "abcdefghijklmnopqrstuvwxyz\n".repeat(said.len() / 27 + 1);
    let same = said
        .bytes()
        .zip(expected.bytes())
        .take_while(|(said, meant)| said == meant)
        .count();
    let wrong = &said[same.saturating_sub(60)..said.len().min(same + 30)];
    assert_eq!(
        same,
        said.len(),
        "a letter is missing, repeated or misread in {wrong:?}"
    );
}

#[test]
fn the_state_of_another_machine_is_refused() {
    if !has_kvm("the_state_of_another_machine_is_refused") {
        return;
    }
    let home = Home::new();
    let (one, two) = (
        home.touch(1, TouchConfig::default()),
        home.touch(2, TouchConfig::default()),
    );
    let announced = RemoteMachine::connect(&one.control).unwrap();
    let mut destination = Destination::new(DestinationConfig {
        serial: SerialTarget::Nothing,
        control: home.path("control"),
        install: InstallMode::Missing,
    });
    assert!(matches!(
        destination.load_state(&[]),
        Err(LoadStateError::NotPrepared)
    ));
    let _memory = destination
        .prepare_machine(announced.layout(), &announced.offer())
        .unwrap();
    let again = destination.prepare_machine(announced.layout(), &announced.offer());
    assert!(again.is_err(), "one destination makes one machine");

    let other = RemoteMachine::connect(&two.control)
        .unwrap()
        .pause()
        .unwrap();
    let words = destination.load_state(&other).unwrap_err().to_string();
    assert!(
        words.contains("2 vCPUs") && words.contains("1 vCPUs"),
        "{words}"
    );
    let own = announced.pause().unwrap();
    assert!(matches!(
        destination.load_state(&own[..own.len() / 2]),
        Err(LoadStateError::Decode(_))
    ));
    destination.load_state(&own).unwrap();
}
