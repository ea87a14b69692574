//! A hundred moves in one process, so that whatever one of them left behind is seen. Alone in its program, since it
//! counts the process's descriptors and threads.

mod common;

use std::net::Ipv4Addr;
use std::sync::Arc;

use common::{Footprint, Home, can_move, wait_for};
use lazyvm_pager::{InstallMode, Options};
use lazyvm_server::{Phase, Server, SessionConfig};
use lazyvm_vmm_glue::kvm::{
    ArrivingMachine, Destination, DestinationConfig, Machine, MachineConfig, Payload,
    RemoteMachine, SerialTarget, TouchConfig,
};
use lazyvm_wire::Backing;
use lazyvm_wire::trust::Identity;

enum Running {
    Booted(Machine),
    Arrived(ArrivingMachine),
}

#[test]
fn a_hundred_moves_in_one_process_leave_no_descriptor_and_no_thread() {
    if !can_move("a_hundred_moves_in_one_process_leave_no_descriptor_and_no_thread") {
        return;
    }
    let home = Home::new();
    let serial = |number: usize| SerialTarget::File(home.path(&format!("vm{number}.serial")));
    let mut running = Running::Booted(
        Machine::boot(&MachineConfig {
            payload: Payload::Touch(TouchConfig::default()),
            memory_bytes: 16 << 20,
            backing: Backing::Small,
            cpus: 1,
            serial: serial(0),
            control: home.path("vm0"),
        })
        .unwrap(),
    );
    let server = Server::bind(
        (Ipv4Addr::LOCALHOST, 0).into(),
        &Identity::generate().unwrap(),
    )
    .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let mut early = None;
    for number in 1..=100 {
        home.wait_ticks(&format!("vm{}", number - 1), 1);
        let remote = RemoteMachine::connect(&home.path(&format!("vm{}", number - 1))).unwrap();
        let session = server
            .add_session(SessionConfig::new(Arc::new(remote)))
            .unwrap();
        let ticket = server.ticket(&session, vec![server.local_addr().unwrap()]);
        let mut destination = Destination::new(DestinationConfig {
            serial: serial(number),
            control: home.path(&format!("vm{number}")),
            install: [InstallMode::Missing, InstallMode::Minor][number % 2],
        });
        let offer = lazyvm_pager::connect(
            &ticket,
            Options {
                verify: true,
                removals: false,
            },
        )
        .unwrap();
        let filling = lazyvm_pager::resume(offer, &mut destination).unwrap();
        let report = filling.wait().unwrap();
        assert_eq!(report.verified, Some(true), "move {number}");
        assert_eq!(runtime.block_on(session.outcome()), Phase::Moved);
        server.remove_session(&session);
        let arrived = destination.machine();
        arrived.get().unwrap().set_memory_complete();
        // The one before goes with all that it had.
        match std::mem::replace(&mut running, Running::Arrived(arrived)) {
            Running::Booted(machine) => drop(machine),
            Running::Arrived(machine) => drop(machine),
        }
        match number {
            10 => early = Some(Footprint::of("/proc/self")),
            100 => {
                let early: Footprint = early.unwrap();
                // Threads and connections of the last move take a moment to go.
                wait_for("end of what the last move needed", || {
                    let now = Footprint::of("/proc/self");
                    (now.descriptors <= early.descriptors && now.threads <= early.threads)
                        .then_some(())
                });
            }
            _ => {}
        }
    }
    home.wait_ticks("vm100", 2);
    drop(running);
    let machines: Vec<_> = (0..=100).map(|number| format!("vm{number}")).collect();
    home.assert_unbroken(&machines);
}
