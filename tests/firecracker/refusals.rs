//! What of a running Firecracker can't be served, and one that does not run.

use std::fs;

use super::common::{Home, is_root, lazyvm};
use super::{destination, firecracker, is_gone, serve_vm, snapshot};

#[test]
fn devices_that_can_not_be_moved_are_named_before_anything_is_touched() {
    let home = Home::new();
    snapshot(&home);
    for (fault, words) in [
        (
            "source vhost-user",
            "it has a vhost-user drive, which Firecracker can't snapshot",
        ),
        (
            "source hotplug",
            "it has hotpluggable memory; make a snapshot yourself",
        ),
    ] {
        let name = fault.replace(' ', "-");
        let mut source = firecracker(&home, &name, "1.16.0", fault, false);
        let mut command = lazyvm();
        let api = home.path(&format!("{name}/api"));
        let command = command.args(["serve", "--firecracker"]).arg(api);
        let log = home.start("serve", command).ends_with(2);
        assert!(log.contains(words), "{log}");
        assert!(source.firecracker.is_running());
        assert!(
            !home.path(&format!("{name}/told")).exists(),
            "it was paused"
        );
    }
}

#[test]
fn what_is_no_running_vm_is_refused() {
    let home = Home::new();
    snapshot(&home);
    let _idle = firecracker(&home, "idle", "1.16.0", "", false);
    for (api, code, words) in [
        ("idle/api", 2, "runs no VM (it says: Not started)"),
        ("nobody", 8, "no Firecracker answers at"),
    ] {
        let mut command = lazyvm();
        let command = command.args(["serve", "--firecracker"]).arg(home.path(api));
        let log = home.start("serve", command).ends_with(code);
        assert!(log.contains(words), "{log}");
    }
}

/// One that the user has paused is moved as it is; where it is refused, it stays as it was.
#[test]
fn a_vm_that_was_paused_stays_paused_when_it_is_refused() {
    if !is_root("a_vm_that_was_paused_stays_paused_when_it_is_refused") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    let mut source = firecracker(&home, "source", "1.16.0", "source paused", false);
    let (mut serve, ticket) = serve_vm(&home, &source, &[]);
    let vm = destination(&home, &source, "1.16.0", "overlap");
    vm.resume(&home, &ticket).ends_with(6);
    serve.ends_with(6);
    let told = fs::read_to_string(home.path("source/told")).unwrap();
    assert_eq!(told, "pause");
    fs::remove_file(home.path("source.ticket")).unwrap();
    let (mut serve, ticket) = serve_vm(&home, &source, &[]);
    let vm = destination(&home, &source, "1.16.0", "");
    vm.resume(&home, &ticket).ends_with(0);
    vm.is_well(&home);
    serve.ends_with(0);
    is_gone(&mut source);
}

/// One that does not wait at the FIFO can't be held. Its own snapshot is not used then.
#[test]
fn a_vm_that_can_not_be_held_runs_on() {
    if !is_root("a_vm_that_can_not_be_held_runs_on") {
        return;
    }
    let home = Home::new();
    snapshot(&home);
    let mut source = firecracker(&home, "source", "1.16.0", "source hasty", false);
    let (mut serve, ticket) = serve_vm(&home, &source, &[]);
    let vm = destination(&home, &source, "1.16.0", "");
    vm.resume(&home, &ticket).ends_with(4);
    let log = serve.ends_with(1);
    assert!(
        log.contains("Firecracker can't be held while its memory is read"),
        "{log}"
    );
    assert!(
        log.contains("a snapshot of its own where it was to wait"),
        "{log}"
    );
    assert!(source.firecracker.is_running());
    assert_eq!(fs::read_to_string(home.path("source/told")).unwrap(), "run");
}
