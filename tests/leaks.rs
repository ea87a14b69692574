//! A hundred moves in one process, so that whatever one of them left behind is seen. Alone in its program, since it
//! counts the process's descriptors and threads.

mod common;
#[path = "common/sys.rs"]
mod sys;

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

#[global_allocator]
static MEMORY: sys::Counting = sys::Counting::new();

/// More bytes in use than this, after eighty moves more, are a leak: 75 KiB a move, less than a session with its
/// connections has.
const TOLERANCE: usize = 6 << 20;

enum Running {
    Booted(Machine),
    Arrived(ArrivingMachine),
}

const NAME: &str = "a_hundred_moves_in_one_process_leave_nothing_behind";

#[test]
fn a_hundred_moves_in_one_process_leave_nothing_behind() {
    if !can_move(NAME) {
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
    let mut early = Footprint::default();
    let (mut early_memory, mut late_memory) = (usize::MAX, usize::MAX);
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
            // Buffers come and go with a move's pace, hence the least of ten.
            11..=20 => early_memory = early_memory.min(MEMORY.in_use()),
            91.. => late_memory = late_memory.min(MEMORY.in_use()),
            _ => {}
        }
        match number {
            20 => early = Footprint::of("/proc/self"),
            100 => {
                // Threads and connections of the last move take a moment to go.
                wait_for("end of what the last move needed", || {
                    let now = Footprint::of("/proc/self");
                    (now.descriptors <= early.descriptors && now.threads <= early.threads)
                        .then_some(())
                });
                assert!(
                    late_memory <= early_memory + TOLERANCE,
                    "{late_memory} bytes in use, {early_memory} eighty moves ago"
                );
            }
            _ => {}
        }
    }
    home.wait_ticks("vm100", 2);
    drop(running);
    let machines: Vec<_> = (0..=100).map(|number| format!("vm{number}")).collect();
    home.assert_unbroken(&machines);
}
