//! How machines end, and why some never begin.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use std::path::PathBuf;

use common::{Home, has_kvm, payload};
use lazyvm_vmm_glue::kvm::{
    BootError, ExitReason, LoadError, Machine, MachineConfig, Payload, SerialTarget, TouchConfig,
};
use lazyvm_wire::Backing;

fn config(home: &Home) -> MachineConfig {
    MachineConfig {
        payload: Payload::Touch(TouchConfig::default()),
        memory_bytes: 8 << 20,
        backing: Backing::Small,
        cpus: 1,
        serial: SerialTarget::File(home.path("serial")),
        control: home.path("control"),
    }
}

/// An error with all its causes.
fn in_words(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(
        || error.to_string(),
        |source| format!("{error}: {}", in_words(source)),
    )
}

fn refusal(config: &MachineConfig) -> String {
    let error = Machine::boot(config).map(|_| ()).unwrap_err();
    assert!(!config.control.exists(), "a control socket was left behind");
    in_words(&error)
}

#[test]
fn a_crash_ends_the_machine() {
    if !has_kvm("a_crash_ends_the_machine") {
        return;
    }
    let home = Home::new();
    let machine = home.flat(payload::triple_fault());
    assert_eq!(machine.machine().wait(), ExitReason::TripleFault { cpu: 0 });
}

#[test]
fn a_halt_that_nothing_can_end_ends_the_machine() {
    if !has_kvm("a_halt_that_nothing_can_end_ends_the_machine") {
        return;
    }
    let home = Home::new();
    let machine = home.flat(payload::halt());
    assert_eq!(machine.machine().wait(), ExitReason::HaltedForEver);
}

#[test]
fn a_halt_that_an_interrupt_ends_does_not() {
    if !has_kvm("a_halt_that_an_interrupt_ends_does_not") {
        return;
    }
    let home = Home::new();
    let machine = home.flat(payload::clocks());
    // It halts between interrupts, for longer than it takes to ask it twice whether it is asleep.
    machine.wait_lines(25, |line| line == "p");
    machine.machine().quit();
    assert_eq!(machine.machine().wait(), ExitReason::Quit);
}

#[test]
fn a_reset_ends_the_machine() {
    if !has_kvm("a_reset_ends_the_machine") {
        return;
    }
    let home = Home::new();
    let machine = home.flat(payload::reset());
    assert_eq!(machine.machine().wait(), ExitReason::Reset);
}

#[test]
fn a_paused_machine_quits_too() {
    if !has_kvm("a_paused_machine_quits_too") {
        return;
    }
    let home = Home::new();
    let machine = home.touch(2, TouchConfig::default());
    machine.machine().pause().unwrap();
    machine.machine().quit();
    assert_eq!(machine.machine().wait(), ExitReason::Quit);
    assert!(
        machine
            .machine()
            .resume(true)
            .unwrap_err()
            .to_string()
            .contains("has ended")
    );
}

#[test]
fn dropping_a_machine_removes_its_socket() {
    if !has_kvm("dropping_a_machine_removes_its_socket") {
        return;
    }
    let home = Home::new();
    let config = config(&home);
    let machine = Machine::boot(&config).unwrap();
    assert!(config.control.exists());
    drop(machine);
    assert!(!config.control.exists());
}

#[test]
fn a_kernel_that_is_none_is_refused_in_words() {
    if !has_kvm("a_kernel_that_is_none_is_refused_in_words") {
        return;
    }
    let home = Home::new();
    let kernel = |path: PathBuf| Payload::Kernel {
        path,
        initrd: None,
        cmdline: String::new(),
    };
    let missing = MachineConfig {
        payload: kernel(home.path("missing")),
        ..config(&home)
    };
    assert!(
        refusal(&missing).contains("No such file"),
        "{}",
        refusal(&missing)
    );

    let text = home.path("text");
    std::fs::write(&text, "not a kernel").unwrap();
    let none = MachineConfig {
        payload: kernel(text),
        ..config(&home)
    };
    assert!(refusal(&none).contains("neither an x86-64 ELF file nor a bzImage"));
}

#[test]
fn sizes_that_cannot_be_are_refused_in_words() {
    if !has_kvm("sizes_that_cannot_be_are_refused_in_words") {
        return;
    }
    let home = Home::new();
    let with = |change: fn(&mut MachineConfig)| {
        let mut config = config(&home);
        change(&mut config);
        refusal(&config)
    };
    assert!(with(|config| config.memory_bytes = 4096).contains("too small"));
    assert!(with(|config| config.memory_bytes += 1).contains("no whole number of pages"));
    assert!(with(|config| config.cpus = 0).contains("0 vCPUs"));
    assert!(with(|config| config.cpus = 100_000).contains("100000 vCPUs"));
    let words = with(|config| {
        config.payload = Payload::Touch(TouchConfig {
            fill_bytes: Some(1 << 30),
            ..TouchConfig::default()
        });
    });
    assert!(words.contains("has room for"), "{words}");
}

#[test]
fn a_serial_file_that_cannot_be_is_refused() {
    if !has_kvm("a_serial_file_that_cannot_be_is_refused") {
        return;
    }
    let home = Home::new();
    let serial = SerialTarget::File(home.path("none").join("serial"));
    let words = refusal(&MachineConfig {
        serial,
        ..config(&home)
    });
    assert!(words.contains("serial console's output"), "{words}");
}

#[test]
fn a_machine_on_huge_pages_runs() {
    let test = "a_machine_on_huge_pages_runs";
    if !has_kvm(test) {
        return;
    }
    let Some(_pool) = common::huge::HugePages::more(test, 8) else {
        return;
    };
    let home = Home::new();
    let machine = home.boot(MachineConfig {
        backing: Backing::Huge2M,
        memory_bytes: 16 << 20,
        ..config(&home)
    });
    assert!(machine.wait_ticks(5, 1).iter().all(|tick| tick.errors == 0));
    let too_large = MachineConfig {
        backing: Backing::Huge2M,
        memory_bytes: 1 << 40,
        ..config(&home)
    };
    let words = refusal(&too_large);
    assert!(words.contains("huge pages"), "{words}");
}

#[test]
fn errors_keep_their_kind() {
    if !has_kvm("errors_keep_their_kind") {
        return;
    }
    let home = Home::new();
    let payload = Payload::Flat(home.path("missing"));
    let error = Machine::boot(&MachineConfig {
        payload,
        ..config(&home)
    })
    .unwrap_err();
    assert!(matches!(error, BootError::Load(LoadError::Read { .. })));
}
