//! What a user is told who may not use userfaultfd.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{Kind, skip};
use lazyvm_pager::uffd::{OpenError, Uffd};

/// The user `nobody`.
const NOBODY: u32 = 65534;

#[test]
#[ignore = "the part of a process without permission, which the other test starts"]
fn without_permission() {
    let layout = Kind::Anonymous.layout(16);
    let memory = Kind::Anonymous.memory(&layout);
    let error = Uffd::open(&memory, false).expect_err("no permission");
    assert!(matches!(error, OpenError::Permission(_)), "{error}");
    let words = error.to_string();
    for word in [
        "/dev/userfaultfd",
        "CAP_SYS_PTRACE",
        "vm.unprivileged_userfaultfd",
    ] {
        assert!(words.contains(word), "{words}");
    }
}

#[test]
fn the_words_say_what_to_change() {
    let test = "the_words_say_what_to_change";
    if !nix::unistd::geteuid().is_root() {
        return skip(test, "only root can become another user");
    }
    let free = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let device = fs::metadata("/dev/userfaultfd").map(|device| device.permissions().mode());
    if free.is_ok_and(|text| text.trim() == "1") || device.is_ok_and(|mode| mode & 0o006 != 0) {
        return skip(test, "everybody may use userfaultfd on this machine");
    }
    // That user can't reach this program where it lies.
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("program");
    fs::copy(std::env::current_exe().expect("this program"), &program).expect("a copy");
    for path in [directory.path(), &program] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).expect("permissions");
    }
    let status = Command::new(&program)
        .args(["--ignored", "--exact", "without_permission"])
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .status()
        .expect("the other process");
    assert!(status.success());
}
