//! A whole move between two machines of this process: page server, QUIC over loopback, pager, userfaultfd, KVM.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use std::fs::File;
use std::sync::Arc;

use common::{Home, Running, Tick, has_kvm, skip};
use lazyvm_pager::{InstallMode, Options};
use lazyvm_server::{Server, SessionConfig};
use lazyvm_vmm_glue::kvm::{
    Destination, DestinationConfig, MachineConfig, Payload, RemoteMachine, SerialTarget,
    TouchConfig,
};
use lazyvm_wire::Backing;
use lazyvm_wire::trust::Identity;

/// Where and how it is moved.
#[derive(Clone, Copy)]
struct Move {
    install: InstallMode,
    backing: Backing,
    cpus: u32,
}

fn has_userfaultfd(test: &str) -> bool {
    let usable = File::open("/dev/userfaultfd");
    if let Err(error) = &usable {
        skip(test, &format!("/dev/userfaultfd cannot be opened: {error}"));
    }
    usable.is_ok()
}

/// Moves it with a push so slow that the guest runs on faults for most of the time.
fn move_lazily(home: &Home, source: &Running, how: Move) -> Running {
    const PUSH_BYTES_A_SECOND: u64 = 8 << 20;
    let server = Server::bind(
        "127.0.0.1:0".parse().unwrap(),
        &Identity::generate().unwrap(),
    )
    .unwrap();
    let remote = RemoteMachine::connect(&source.control).unwrap();
    let session = server
        .add_session(SessionConfig {
            max_bandwidth: Some(PUSH_BYTES_A_SECOND),
            ..SessionConfig::new(Arc::new(remote))
        })
        .unwrap();
    let ticket = server.ticket(&session, vec![server.local_addr().unwrap()]);

    let (serial, control) = (
        SerialTarget::File(home.path("serial")),
        home.path("control"),
    );
    let mut destination = Destination::new(DestinationConfig {
        serial: serial.clone(),
        control: control.clone(),
        install: how.install,
    });
    let options = Options {
        verify: true,
        ..Options::default()
    };
    let offer = lazyvm_pager::connect(&ticket, options).unwrap();
    let filling = lazyvm_pager::resume(offer, &mut destination).unwrap();
    let machine = destination.machine();
    assert!(!machine.get().unwrap().status().memory_complete);
    let report = filling.wait().unwrap();
    machine.get().unwrap().set_memory_complete();
    assert_eq!(report.verified, Some(true), "{report:?}");
    assert!(report.faults > 0, "{report:?}");
    assert_eq!(source.machine().wait().to_string(), "moved away");
    Running::arrived(machine, serial, control)
}

fn moved_without_a_byte_lost(test: &str, how: Move) {
    if !has_kvm(test) || !has_userfaultfd(test) {
        return;
    }
    let _pool = match how.backing {
        Backing::Small => None,
        Backing::Huge2M => {
            let Some(pool) = common::huge::HugePages::more(test, 32) else {
                return;
            };
            Some(pool)
        }
    };
    let home = Home::new();
    let mut machine = home.boot(MachineConfig {
        payload: Payload::Touch(TouchConfig {
            fill_bytes: Some(16 << 20),
            cold_per_million: 200_000,
            ..TouchConfig::default()
        }),
        memory_bytes: 32 << 20,
        backing: how.backing,
        cpus: how.cpus,
        serial: SerialTarget::File(home.path("serial")),
        control: home.path("control"),
    });
    let cpus = u64::from(how.cpus);
    let mut said = String::new();
    // To and fro, so that a machine that arrived lazily is taken as a whole.
    for _ in 0..2 {
        machine.wait_ticks(5, cpus);
        let serial = machine.serial.clone();
        machine = move_lazily(&home, &machine, how);
        let SerialTarget::File(path) = serial else {
            panic!("no file")
        };
        said += &std::fs::read_to_string(path).unwrap();
    }
    machine.wait_ticks(5, cpus);
    machine.machine().pause().unwrap();
    said += &machine.output();
    for cpu in 0..cpus {
        let ticks = said
            .lines()
            .filter_map(Tick::parse)
            .filter(|tick| tick.cpu == cpu);
        for (tick, number) in ticks.zip(1..) {
            assert_eq!(tick.tick, number, "vCPU {cpu} lost or repeated a tick");
            assert_eq!(tick.errors, 0, "{said}");
        }
    }
}

#[test]
fn missing_mode() {
    let how = Move {
        install: InstallMode::Missing,
        backing: Backing::Small,
        cpus: 1,
    };
    moved_without_a_byte_lost("missing_mode", how);
}

#[test]
fn minor_mode_and_two_vcpus() {
    let how = Move {
        install: InstallMode::Minor,
        backing: Backing::Small,
        cpus: 2,
    };
    moved_without_a_byte_lost("minor_mode_and_two_vcpus", how);
}

#[test]
fn huge_pages() {
    let how = Move {
        install: InstallMode::Missing,
        backing: Backing::Huge2M,
        cpus: 1,
    };
    moved_without_a_byte_lost("huge_pages", how);
}
