//! `lazyvm snapshot` of a Firecracker's VM.

use std::process::Stdio;

use super::source::AT_THE_PAUSE;
use super::{firecracker, firecracker_for, is_root, snapshot};
use crate::common::{Home, lazyvm, wait_for};

/// Packets come in before and after the pause, and are not to be in what is resumed from it.
#[test]
fn a_vm_goes_on_and_so_does_its_snapshot() {
    if !is_root("a_vm_goes_on_and_so_does_its_snapshot") {
        return;
    }
    for (name, fault) in [("plain", "source"), ("tracks", "source tracks")] {
        let home = Home::new();
        snapshot(&home);
        let mut source = firecracker(&home, name, "1.16.0", fault, false);
        for _ in 0..2 {
            // The second finds a VM that runs, or it could not pause it.
            let mut command = lazyvm();
            command
                .args(["snapshot", "--firecracker"])
                .arg(home.path(&format!("{name}/api")))
                .arg(home.path("taken"));
            home.start("snapshot", &mut command).ends_with(0);
        }
        assert!(source.firecracker.is_running());
        let ticket = home.path("ticket");
        let mut command = lazyvm();
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--snapshot"])
            .arg(home.path("taken"))
            .arg("--ticket-file")
            .arg(&ticket)
            .stdout(Stdio::null());
        let _serve = home.start("serve", &mut command);
        let ticket = wait_for("ticket", || std::fs::read_to_string(&ticket).ok());
        let memory = format!("{name}/{AT_THE_PAUSE}");
        let vm = firecracker_for(&home, "clone", "1.16.0", "", false, &memory);
        vm.resume(&home, ticket.trim_end()).ends_with(0);
        vm.is_well(&home);
    }
}
