//! What the end-to-end tests share: the programs as a user starts them, and what can be seen of them from outside.
#![allow(dead_code, reason = "each test program uses its own part of it")]
// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

// One pool of huge pages for the whole machine, so one way to take turns with it.
#[path = "../../pager/tests/common/huge.rs"]
#[allow(clippy::expect_used, reason = "Clippy allows these in tests only")]
pub mod huge;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long anything may take on a slow machine; only a test that fails waits for it.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// Tells loudly that a test was not run; fails it where it has to run.
pub fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{test} can't run: {why}");
    eprintln!("SKIPPED {test}: {why}");
}

/// Whether this host has KVM and lets this user use userfaultfd.
pub fn can_move(test: &str) -> bool {
    for device in ["/dev/kvm", "/dev/userfaultfd"] {
        if let Err(error) = File::options().read(true).write(true).open(device) {
            skip(test, &format!("{device} can't be opened: {error}"));
            return false;
        }
    }
    true
}

/// Whether this is root, who may become others and mount over files.
pub fn is_root(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip(test, "only root can make the surroundings that it needs");
    }
    root
}

/// The program.
pub fn lazyvm() -> Command {
    Command::new(env!("CARGO_BIN_EXE_lazyvm"))
}

/// Waits until `found` gives something, and fails with `what` when it never does.
pub fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(start.elapsed() < PATIENCE, "no {what} came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A directory for what the programs make.
pub struct Home(tempfile::TempDir);

impl Home {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Starts a program, its standard error in `name.log`. It is killed when it is dropped.
    pub fn start(&self, name: &str, command: &mut Command) -> Program {
        let log = self.path(&format!("{name}.log"));
        let child = command
            .stdin(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Program {
            name: name.to_owned(),
            child,
            log,
        }
    }

    /// `lazyvm run` with the touch payload: its control socket is `name`, its serial output `name.serial`.
    pub fn run(&self, name: &str, memory: &str, flags: &[&str]) -> Program {
        let program = self.start(
            name,
            lazyvm()
                .args(["run", "--memory", memory, "--control"])
                .arg(self.path(name))
                .arg("--serial")
                .arg(self.path(&format!("{name}.serial")))
                .args(flags),
        );
        program.wait_log("the VM runs");
        program
    }

    /// `lazyvm serve` of the machine `vm`, and the ticket that it prints. Unless the flags say otherwise, memory follows the
    /// machine, which is where most can go wrong.
    pub fn serve(&self, name: &str, vm: &str, flags: &[&str]) -> (Program, String) {
        let mut command = lazyvm();
        command.args(["serve", "--vm"]).arg(self.path(vm));
        if !flags.contains(&"--listen") {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        if !flags.contains(&"--mode") {
            command.args(["--mode", "postcopy"]);
        }
        let mut program = self.start(name, command.args(flags).stdout(Stdio::piped()));
        let mut ticket = String::new();
        BufReader::new(program.child.stdout.take().unwrap())
            .read_line(&mut ticket)
            .unwrap();
        assert!(!ticket.is_empty(), "{}", program.log());
        (program, ticket.trim_end().to_owned())
    }

    /// `lazyvm resume` into the machine `name`, its serial output `name.serial`, its report `name.json`.
    pub fn resume(&self, name: &str, ticket: &str, flags: &[&str]) -> Program {
        self.start(name, &mut self.resume_command(name, ticket, flags))
    }

    /// What [`Home::resume`] starts.
    pub fn resume_command(&self, name: &str, ticket: &str, flags: &[&str]) -> Command {
        let mut command = lazyvm();
        command
            .args(["resume", ticket, "--control"])
            .arg(self.path(name));
        if !flags.contains(&"--serial") {
            command
                .arg("--serial")
                .arg(self.path(&format!("{name}.serial")));
        }
        command
            .arg("--report")
            .arg(self.path(&format!("{name}.json")))
            .args(flags);
        command
    }

    /// The report of the move to the machine `name`. It is there as a whole as soon as it is there.
    pub fn report(&self, name: &str) -> Value {
        let path = self.path(&format!("{name}.json"));
        let bytes = wait_for("report", || fs::read(&path).ok());
        serde_json::from_slice(&bytes).unwrap()
    }

    /// What the machine `name` has written to its serial console here.
    fn output(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.serial"))).unwrap_or_default()
    }

    /// The ticks that the machine `name` has written so far. A pause comes in the middle of a line as well, which then
    /// goes on at the destination, so the first and the last line may be parts.
    pub fn ticks(&self, name: &str) -> Vec<Tick> {
        self.output(name).lines().filter_map(Tick::parse).collect()
    }

    /// That ticks go on from each of these machines to the next, that none is missing or there twice, and that the guest
    /// has seen no error.
    pub fn assert_unbroken(&self, machines: &[impl AsRef<str>]) {
        let outputs: Vec<_> = machines
            .iter()
            .map(|name| self.output(name.as_ref()))
            .collect();
        assert!(
            outputs.iter().all(|output| output.contains("tick")),
            "each machine made progress"
        );
        let whole = outputs.concat();
        let complete = whole.rsplit_once('\n').map_or("", |(complete, _)| complete);
        for (line, number) in complete.lines().zip(1..) {
            assert_eq!(
                Tick::parse(line),
                Some(Tick { number, errors: 0 }),
                "{line:?}"
            );
        }
    }

    /// Waits until the machine `name` has written `more` ticks more, and gives all.
    pub fn wait_ticks(&self, name: &str, more: usize) -> Vec<Tick> {
        let wanted = self.ticks(name).len() + more;
        wait_for("tick", || {
            Some(self.ticks(name)).filter(|ticks| ticks.len() >= wanted)
        })
    }
}

/// A line of the touch payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    pub number: u64,
    pub errors: u64,
}

impl Tick {
    fn parse(line: &str) -> Option<Self> {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["tick", number, "touches", _, "errors", errors] => Some(Self {
                number: number.parse().ok()?,
                errors: errors.parse().ok()?,
            }),
            _ => None,
        }
    }
}

/// A program that was started.
pub struct Program {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Its standard output, where that is a pipe.
    pub fn stdout(&mut self) -> std::process::ChildStdout {
        self.child.stdout.take().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub fn wait_log(&self, text: &str) {
        wait_for(&format!("{text:?} in the log of {}", self.name), || {
            self.log().contains(text).then_some(())
        });
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits for its end and gives its exit code and log.
    pub fn end(&mut self) -> (i32, String) {
        let status = wait_for(&format!("end of {}", self.name), || {
            self.child.try_wait().unwrap()
        });
        let code = status
            .code()
            .unwrap_or_else(|| panic!("{} ended by signal {:?}", self.name, status.signal()));
        (code, self.log())
    }

    /// Waits for its end, which must be with `code`; gives its log.
    pub fn ends_with(&mut self, code: i32) -> String {
        let (found, log) = self.end();
        assert_eq!(found, code, "{}:\n{log}", self.name);
        log
    }

    /// What the kernel knows of its use of memory and threads.
    pub fn footprint(&self) -> Footprint {
        Footprint::of(&format!("/proc/{}", self.child.id()))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    pub descriptors: usize,
    pub threads: u64,
    /// Resident memory of its own: not the guest's, which is in a memfd.
    pub anonymous_kib: u64,
    /// Resident memory of files: the program itself.
    pub file_kib: u64,
    /// Page tables, those of guest memory among them.
    pub page_table_kib: u64,
}

impl Footprint {
    /// Of the process with this directory in `/proc`; all 0 when it is gone.
    pub fn of(proc: &str) -> Self {
        let status = fs::read_to_string(format!("{proc}/status")).unwrap_or_default();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok())
                .unwrap_or(0)
        };
        Self {
            descriptors: fs::read_dir(format!("{proc}/fd")).map_or(0, Iterator::count),
            threads: field("Threads:"),
            anonymous_kib: field("RssAnon:"),
            file_kib: field("RssFile:"),
            page_table_kib: field("VmPTE:"),
        }
    }

    /// The larger of each.
    pub fn peak(self, other: Self) -> Self {
        Self {
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
            anonymous_kib: self.anonymous_kib.max(other.anonymous_kib),
            file_kib: self.file_kib.max(other.file_kib),
            page_table_kib: self.page_table_kib.max(other.page_table_kib),
        }
    }

    /// The smaller of each.
    pub fn least(self, other: Self) -> Self {
        Self {
            descriptors: self.descriptors.min(other.descriptors),
            threads: self.threads.min(other.threads),
            anonymous_kib: self.anonymous_kib.min(other.anonymous_kib),
            file_kib: self.file_kib.min(other.file_kib),
            page_table_kib: self.page_table_kib.min(other.page_table_kib),
        }
    }

    /// That nothing was kept since `early` but a little memory, which allocators do.
    pub fn assert_not_grown_since(self, early: Self) {
        const TOLERANCE_KIB: u64 = 2048;
        assert!(
            self.descriptors <= early.descriptors
                && self.threads <= early.threads
                && self.anonymous_kib <= early.anonymous_kib + TOLERANCE_KIB,
            "{self:?} has grown from {early:?}"
        );
    }
}

/// Makes a FIFO. Who opens it to write, waits for a reader: a way to hold a program up at a known point.
pub fn fifo(path: &Path) {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}
