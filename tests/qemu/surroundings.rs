//! QEMUs that are not started as the others are: other RAM, another user, another mount namespace.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::wait_for;
use crate::guest::{Qemus, Shape, can_move};

const SHAPE: Shape = Shape {
    memory_mib: 256,
    cpus: 2,
    fill_mib: 64,
};

const MIB: u64 = 1 << 20;

fn words(line: &[&str]) -> Vec<String> {
    line.iter().map(|&word| word.to_owned()).collect()
}

fn let_everybody_in(path: &Path) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
}

/// A balloon, and one more socket for [`set_balloon`], called `balloon`: a source has the other one to itself.
pub fn balloon(qemus: &Qemus) -> String {
    format!(
        "-device virtio-balloon-pci -qmp unix:{},server=on,wait=off",
        qemus.qmp("balloon").display()
    )
}

/// The size that QEMU `name`'s guest has left itself once it is `wanted`; it goes there bit by bit.
pub fn set_balloon(qemus: &Qemus, name: &str, mib: u64) {
    let bytes = mib * MIB;
    let command = format!("{{\"execute\":\"balloon\",\"arguments\":{{\"value\":{bytes}}}}}");
    let answer = qemus.qmp_command(name, &command);
    assert!(answer.contains("return"), "{answer}");
    wait_for("size of the guest", || {
        let answer = qemus.qmp_command(name, "{\"execute\":\"query-balloon\"}");
        answer
            .contains(&format!("\"actual\": {bytes}}}"))
            .then_some(())
    });
}

/// What a balloon has taken is a hole at the source; while memory still comes at the destination it takes more, and
/// gives all of it back.
#[test]
fn ram_in_a_memfd_and_a_balloon_in_it() {
    if !can_move("ram_in_a_memfd_and_a_balloon_in_it") {
        return;
    }
    let mut qemus = Qemus::new(SHAPE);
    qemus.devices = "-device virtio-balloon-pci".to_owned();
    qemus.append = "load=1".to_owned();
    let backend = "memory-backend-memfd,id=ram0,share=on,size=256M";
    let _first = qemus.launch("a", &qemus.command_with_ram("a", backend));
    qemus.wait_ticks("a", 3);
    set_balloon(&qemus, "a", 208);
    let report = qemus.move_to("a", "b", &qemus.command_with_ram("b", backend));
    assert!(report["pages_zero"].as_u64().unwrap() > 48 << 8, "{report}");
    qemus.wait_ticks("b", 3);
    let (mut serve, ticket) = qemus.serve("b");
    let mut resume = qemus.resume("c", &ticket, &qemus.command_with_ram("c", backend));
    resume.wait_log("the VM runs in QEMU here");
    set_balloon(&qemus, "c", 192);
    set_balloon(&qemus, "c", 256);
    resume.ends_with(0);
    serve.ends_with(0);
    qemus.wait_ticks("c", 10);
}

/// The source's QEMU is nobody's and has its RAM file on a file system that it alone sees. So has the destination's one,
/// which becomes nobody's only when it is up, as `-runas` has it.
#[test]
fn qemu_of_another_user_in_another_mount_namespace() {
    if !can_move("qemu_of_another_user_in_another_mount_namespace") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let_everybody_in(&qemus.home.path(""));
    let mount = "mount -t tmpfs -o mode=777 none \"$0\" && exec \"$@\"";
    let ram = qemus.ram().display().to_string();
    let apart = words(&["unshare", "--mount", "sh", "-c", mount, &ram]);
    let nobody = words(&[
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ]);
    let source = [apart.clone(), nobody, qemus.command("a")].concat();
    let mut first = qemus.launch("a", &source);
    qemus.wait_ticks("a", 3);
    assert!(!qemus.ram().join("a").exists());
    let destination = [apart, qemus.command("b"), words(&["-runas", "nobody"])].concat();
    qemus.move_to("a", "b", &destination);
    qemus.wait_ticks("b", 5);
    first.ends_with(0);
}

/// Somebody who may speak to QEMU, but not look into its process.
#[test]
fn who_may_not_look_is_told_what_to_change() {
    if !can_move("who_may_not_look_is_told_what_to_change") {
        return;
    }
    let qemus = Qemus::new(SHAPE);
    let_everybody_in(&qemus.home.path(""));
    let mut source = qemus.start("a");
    // Where it is built may be in nobody's reach.
    let program = qemus.home.path("lazyvm");
    fs::copy(env!("CARGO_BIN_EXE_lazyvm"), &program).unwrap();
    for (mode, message) in [
        (0o700, "may not be used by this user"),
        (0o777, "CAP_SYS_PTRACE"),
    ] {
        fs::set_permissions(qemus.qmp("a"), fs::Permissions::from_mode(mode)).unwrap();
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(&program)
            .args(["serve", "--listen", "127.0.0.1:0", "--qemu"])
            .arg(qemus.qmp("a"))
            .arg("--session-dir")
            .arg(qemus.home.path(&format!("session-{mode:o}")))
            .stdout(Stdio::null());
        let log = qemus.home.start("serve", &mut command).ends_with(8);
        assert!(log.contains(message), "{log}");
    }
    qemus.wait_ticks("a", 3);
    assert!(source.is_running());
}
