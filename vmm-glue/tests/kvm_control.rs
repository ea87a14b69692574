//! The control socket, as other processes find it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use common::{Home, Running, copy, has_kvm};
use lazyvm_pager::InstallMode;
use lazyvm_server::port::SourceMachine;
use lazyvm_vmm_glue::kvm::control::{REQUEST_MAX, RunState};
use lazyvm_vmm_glue::kvm::{
    ControlClient, ControlError, Destination, DestinationConfig, ExitReason, Machine,
    MachineConfig, Payload, RemoteMachine, SerialTarget, TouchConfig,
};
use lazyvm_wire::Backing;

fn machine(home: &Home) -> Running {
    home.touch(1, TouchConfig::default())
}

fn config(home: &Home, control: &Path) -> MachineConfig {
    MachineConfig {
        payload: Payload::Touch(TouchConfig::default()),
        memory_bytes: 8 << 20,
        backing: Backing::Small,
        cpus: 1,
        serial: SerialTarget::File(home.path("serial")),
        control: control.to_owned(),
    }
}

/// Sends a line as it is and gives the reply's.
fn say(stream: &mut UnixStream, line: &[u8]) -> String {
    stream.write_all(line).unwrap();
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).unwrap();
    reply
}

fn refused<T: std::fmt::Debug>(result: Result<T, ControlError>) -> String {
    match result.unwrap_err() {
        ControlError::Refused(words) => words,
        other => panic!("{other}"),
    }
}

#[test]
fn it_tells_and_does_what_is_asked() {
    if !has_kvm("it_tells_and_does_what_is_asked") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let mut client = ControlClient::connect(&machine.control).unwrap();
    let status = client.status().unwrap();
    assert_eq!(
        (status.state, status.cpus, status.memory_bytes),
        (RunState::Running, 1, 16 << 20)
    );
    assert_eq!((&*status.payload, &*status.kind), ("touch", "kvm"));
    assert!(status.memory_complete && !status.handed_out);

    machine.wait_ticks(1, 1);
    assert!(
        client
            .status()
            .unwrap()
            .serial_last_line
            .starts_with("tick ")
    );
    client.pause().unwrap();
    client.pause().unwrap();
    assert_eq!(client.status().unwrap().state, RunState::Paused);
    client.resume(false).unwrap();
    client.resume(false).unwrap();
    assert_eq!(client.status().unwrap().state, RunState::Running);
    client.quit().unwrap();
    assert_eq!(machine.machine().wait(), ExitReason::Quit);
    assert_eq!(client.status().unwrap().state, RunState::Stopped);
    assert!(refused(client.pause()).contains("quit as asked"));
}

#[test]
fn only_its_owner_may_connect() {
    if !has_kvm("only_its_owner_may_connect") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let mode = std::fs::metadata(&machine.control)
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn nonsense_gets_an_answer_and_does_no_harm() {
    if !has_kvm("nonsense_gets_an_answer_and_does_no_harm") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let mut stream = UnixStream::connect(&machine.control).unwrap();
    for line in [
        &b"\n"[..],
        b"hello\n",
        b"{}\n",
        b"{\"v\":1}\n",
        b"{\"v\":99,\"command\":\"quit\"}\n",
        b"{\"v\":1,\"command\":\"quit now\"}\n",
        b"{\"v\":1,\"command\":{\"quit\":1}}\n",
        b"[[[[[[[[[[[[[[[[[[[[[[\n",
        b"\xff\xfe\0\0\n",
        b"\"\\ud800\"\n",
    ] {
        let reply = say(&mut stream, line);
        assert!(reply.starts_with("{\"v\":1,\"reply\":\"error\""), "{reply}");
    }
    let reply = say(&mut stream, b"{\"v\":1,\"command\":\"status\"}\n");
    assert!(
        reply.contains("\"state\":\"running\""),
        "the same conversation goes on: {reply}"
    );
}

#[test]
fn a_request_without_end_is_cut_off() {
    if !has_kvm("a_request_without_end_is_cut_off") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let mut stream = UnixStream::connect(&machine.control).unwrap();
    let reply = say(&mut stream, &vec![b'x'; REQUEST_MAX]);
    assert!(reply.contains("more than 4096 bytes"), "{reply}");
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "and hung up on");
    assert_eq!(machine.status().state, RunState::Running);
}

#[test]
fn one_client_too_many_is_told_so() {
    if !has_kvm("one_client_too_many_is_told_so") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let mut clients: Vec<_> = (0..16)
        .map(|_| ControlClient::connect(&machine.control).unwrap())
        .collect();
    for client in &mut clients {
        assert_eq!(client.status().unwrap().state, RunState::Running);
    }
    let mut reply = String::new();
    let stream = UnixStream::connect(&machine.control).unwrap();
    BufReader::new(stream).read_line(&mut reply).unwrap();
    assert!(reply.contains("16 clients"), "{reply}");
}

#[test]
fn a_client_that_goes_away_does_not_resume_what_it_paused() {
    if !has_kvm("a_client_that_goes_away_does_not_resume_what_it_paused") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let remote = RemoteMachine::connect(&machine.control).unwrap();
    remote.pause().unwrap();
    drop(remote);
    let mut other = ControlClient::connect(&machine.control).unwrap();
    assert_eq!(other.status().unwrap().state, RunState::Paused);
    assert!(other.status().unwrap().handed_out);

    let words = refused(other.resume(false));
    assert!(words.contains("may be running elsewhere"), "{words}");
    assert_eq!(machine.status().state, RunState::Paused);
    other.resume(true).unwrap();
    assert_eq!(machine.status().state, RunState::Running);
    assert!(!machine.status().handed_out);
}

#[test]
fn only_a_paused_machine_is_released() {
    if !has_kvm("only_a_paused_machine_is_released") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let remote = RemoteMachine::connect(&machine.control).unwrap();
    assert!(
        remote
            .release()
            .unwrap_err()
            .to_string()
            .contains("only a paused one")
    );
    remote.pause().unwrap();
    remote.release().unwrap();
    remote.release().unwrap();
    assert_eq!(machine.machine().wait(), ExitReason::Released);
    let control = machine.control.clone();
    drop(machine);
    assert!(!control.exists());
    remote.release().unwrap();
}

#[test]
fn the_memory_that_is_handed_out_cannot_be_written() {
    if !has_kvm("the_memory_that_is_handed_out_cannot_be_written") {
        return;
    }
    let home = Home::new();
    let machine = machine(&home);
    let mut client = ControlClient::connect(&machine.control).unwrap();
    let (info, file) = client.memory().unwrap();
    assert_eq!(info.layout.bytes(), 16 << 20);
    assert!(file.write_at(b"x", 0).is_err());
    let mut page = [0; 4096];
    file.read_exact_at(&mut page, 1 << 20).unwrap();
    assert!(
        page.iter().any(|&byte| byte != 0),
        "the payload's code is there"
    );
}

#[test]
fn a_machine_that_is_arriving_is_not_moved_on() {
    if !has_kvm("a_machine_that_is_arriving_is_not_moved_on") {
        return;
    }
    let home = Home::new();
    let source = machine(&home);
    source.wait_ticks(1, 1);
    let remote = RemoteMachine::connect(&source.control).unwrap();
    let control = home.path("control");
    let mut destination = Destination::new(DestinationConfig {
        serial: SerialTarget::File(home.path("serial")),
        control: control.clone(),
        install: InstallMode::Missing,
    });
    let memory = destination
        .prepare_machine(remote.layout(), &remote.offer())
        .unwrap();
    let mut client = ControlClient::connect(&control).unwrap();
    assert_eq!(client.status().unwrap().state, RunState::Incoming);
    for words in [
        refused(client.memory()),
        refused(client.pause()),
        refused(client.resume(true)),
    ] {
        assert!(words.contains("not arrived yet"), "{words}");
    }

    let state = remote.pause().unwrap();
    copy(&remote.memory(), memory.file().unwrap());
    destination.load_state(&state).unwrap();
    lazyvm_pager::port::DestinationMachine::start(&mut destination).unwrap();
    let status = client.status().unwrap();
    assert_eq!(
        (status.state, status.memory_complete),
        (RunState::Running, false)
    );
    assert_eq!(status.payload, "touch");
    for words in [refused(client.memory()), refused(client.state())] {
        assert!(words.contains("still arriving"), "{words}");
    }
    client.pause().unwrap();
    client.resume(false).unwrap();
    destination.machine().get().unwrap().set_memory_complete();
    client.memory().unwrap();
}

#[test]
fn what_a_dead_process_left_gives_way() {
    if !has_kvm("what_a_dead_process_left_gives_way") {
        return;
    }
    let home = Home::new();
    let path = home.path("control");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let machine = Machine::boot(&config(&home, &path)).unwrap();
    assert_eq!(
        ControlClient::connect(&path).unwrap().status().unwrap().id,
        machine.status().id
    );
}

#[test]
fn a_live_socket_and_other_files_stay() {
    if !has_kvm("a_live_socket_and_other_files_stay") {
        return;
    }
    let home = Home::new();
    let first = machine(&home);
    let boot = |path: &Path| {
        let error = Machine::boot(&config(&home, path)).map(|_| ()).unwrap_err();
        std::iter::successors(Some(&error as &dyn std::error::Error), |error| {
            error.source()
        })
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
    };
    assert!(boot(&first.control).contains("another machine answers"));
    let mut client = ControlClient::connect(&first.control).unwrap();
    assert_eq!(client.status().unwrap().id, first.status().id);

    let file = home.path("precious");
    std::fs::write(&file, "precious").unwrap();
    assert!(boot(&file).contains("no socket"));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[test]
fn another_machine_at_the_same_path_is_not_taken_for_the_first() {
    if !has_kvm("another_machine_at_the_same_path_is_not_taken_for_the_first") {
        return;
    }
    let home = Home::new();
    let path = home.path("control");
    let first = Machine::boot(&config(&home, &path)).unwrap();
    let remote = RemoteMachine::connect(&path).unwrap();
    drop(first);
    let second = Machine::boot(&config(&home, &path)).unwrap();
    let words = remote.pause().unwrap_err().to_string();
    assert!(words.contains("another machine answers"), "{words}");
    remote.release().unwrap();
    assert_eq!(second.status().state, RunState::Running);
}

#[test]
fn nobody_there_is_said_in_words() {
    let home = Home::new();
    let error = ControlClient::connect(&home.path("none")).unwrap_err();
    assert!(error.to_string().contains("no machine answers"));
}
