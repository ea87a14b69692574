//! Attaching to processes that do this and that, which must not notice.
//!
//! The test program starts itself again for that process. Its first thread, which is the one that is stopped, does one
//! thing over and over and ends with an error when that goes wrong; others do the other things meanwhile.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

mod sys;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_pager::install::{Installer, Registration};
use lazyvm_pager::{InstallMode, LazyMemory, LazyRegion};
use lazyvm_vmm_glue::attach::{AttachError, Process};
use lazyvm_wire::{Backing, Layout, PageIndex, PageRange};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, ftruncate, pipe, read, write};

const PAGES: usize = 64;
const DEED: &str = "LAZYVM_TEST_DEED";
/// What the process says when its memory is as it should be.
const FILLED: &str = "filled";

/// What a thread does once; an error when it was disturbed.
fn deed(name: &str) -> Result<(), Errno> {
    let nap = 3_000_000;
    match name {
        // Of these the kernel starts the first three again by itself, in three different ways.
        "read" => {
            let (from, to) = pipe()?;
            thread::scope(|scope| {
                scope.spawn(move || {
                    thread::sleep(Duration::from_nanos(nap as u64));
                    write(&to, b"x").unwrap();
                });
                read(&from, &mut [0]).map(drop)
            })
        }
        "poll" => {
            let (from, _to) = pipe()?;
            let mut fds = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(5_u8)).map(drop)
        }
        "nanosleep" => {
            let start = Instant::now();
            sys::nanosleep(nap)?;
            assert!(start.elapsed() >= Duration::from_nanos(nap as u64));
            Ok(())
        }
        "compute" => {
            // Every register that matters holds something, and floating point as well.
            let (mut sum, mut product) = (0_u64, 1.0_f64);
            for number in 1..=200_000_u64 {
                sum = sum.rotate_left(7) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                product = product * 1.000_001 + 1.0 / number as f64;
            }
            let first = *ONCE.get_or_init(|| (sum, product));
            assert_eq!((sum, product), first);
            Ok(())
        }
        other => panic!("{other}"),
    }
}

static ONCE: std::sync::OnceLock<(u64, f64)> = std::sync::OnceLock::new();
const DEEDS: [&str; 4] = ["read", "poll", "nanosleep", "compute"];

/// A program of its own in all but name, so that the main thread is free.
fn the_other_process(name: &str) -> ! {
    let file = memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&file, (PAGES * 4096) as i64).unwrap();
    let shared = sys::Shared::map(&file, PAGES);
    sys::handle(libc::SIGUSR1, libc::SA_RESTART);
    // For the main thread alone.
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR1);
    blocked.thread_block().unwrap();
    println!("{}", shared.address());
    // Not the last one: there are two processors only, and this is not about waiting for one.
    for other in &DEEDS[..3] {
        thread::spawn(move || {
            loop {
                deed(other).unwrap();
            }
        });
    }
    let input = thread::spawn(|| std::io::stdin().lock().lines().next());
    blocked.thread_unblock().unwrap();
    while !input.is_finished() {
        if let Err(errno) = deed(name) {
            println!("{name}: {errno}");
            std::process::exit(1);
        }
    }
    for page in 0..PAGES {
        assert_eq!(usize::from(shared.byte(page)), page + 1);
    }
    println!("{FILLED}");
    std::process::exit(0);
}

struct Other {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    memory: LazyMemory,
    layout: Layout,
}

impl Other {
    fn start(deed: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(DEED, deed)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let host: u64 = line.trim().parse().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        let mappings = process.mappings().unwrap();
        let (mapping, offset) = mappings.piece(host, (PAGES * 4096) as u64).unwrap();
        assert!(mapping.shared && mapping.name.contains("memfd:memory"));
        let file = process.open_file_of(mapping, true).unwrap();
        let region = LazyRegion {
            host,
            pages: PAGES as u64,
            backing: Backing::Small,
            file: Some((Arc::new(file), offset)),
        };
        Self {
            child,
            output,
            memory: LazyMemory::in_other_process(vec![region], InstallMode::Minor).unwrap(),
            layout: Layout::flat(PAGES as u64).unwrap(),
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Has it look at its memory, which `uffd` is filled through, and end.
    fn fill_and_end(mut self, uffd: lazyvm_pager::uffd::Uffd) {
        let memory = Arc::new(self.memory);
        let installer = Installer::new(&self.layout, memory, uffd, Registration::Register).unwrap();
        let mut input = self.child.stdin.take().unwrap();
        input.write_all(b"\n").unwrap();
        // It waits for its first page by now.
        thread::sleep(Duration::from_millis(20));
        for page in 0..PAGES {
            let range = PageRange::one(PageIndex(page as u64));
            installer.install(range, &[page as u8 + 1; 4096]).unwrap();
        }
        let mut said = String::new();
        self.output.read_line(&mut said).unwrap();
        assert_eq!(said.trim(), FILLED);
        assert!(self.child.wait().unwrap().success());
    }
}

fn can_attach(test: &str) -> bool {
    let possible = nix::unistd::geteuid().is_root();
    if !possible {
        assert!(std::env::var_os("CI").is_none(), "{test} needs root");
        eprintln!("SKIPPED {test}: it needs root");
    }
    possible
}

fn goes_on_undisturbed(deed: &str) {
    if !can_attach(deed) {
        return;
    }
    let other = Other::start(deed);
    let process = Process::open(other.pid().as_raw()).unwrap();
    let mut stopped: Vec<Duration> = (0..100)
        .map(|number| {
            // A handled signal breaks the two others by itself, with SA_RESTART too.
            if number % 2 == 0 && ["read", "compute"].contains(&deed) {
                kill(other.pid(), Signal::SIGUSR1).unwrap();
            }
            process.userfaultfd(&other.memory, true).unwrap().stopped
        })
        .collect();
    let attached = process.userfaultfd(&other.memory, false).unwrap();
    stopped.sort_unstable();
    eprintln!(
        "{deed}: stopped for {:?} at the median, {:?} at most, of {}",
        stopped[50],
        stopped[99],
        stopped.len()
    );
    assert!(stopped[50] < Duration::from_millis(2));
    other.fill_and_end(attached.uffd);
}

/// Waits until the process's one thread is in `nanosleep` (35) or `clock_nanosleep` (230): a signal that came before it
/// would be none that breaks it.
fn wait_for_nanosleep(pid: i32) {
    loop {
        let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
        if ["35 ", "230 "]
            .iter()
            .any(|number| call.starts_with(number))
        {
            return;
        }
        thread::yield_now();
    }
}

fn a_pending_signal_still_breaks_a_pause() {
    if !can_attach("pause") {
        return;
    }
    // A thread in the middle of a system call that a signal with a handler is to end: attaching must not make it start
    // again, and the signal must not be lost.
    for _ in 0..50 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(DEED, "pause")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let pid = child.id() as i32;
        wait_for_nanosleep(pid);
        let process = Process::open(pid).unwrap();
        let memory = LazyMemory::in_other_process(Vec::new(), InstallMode::Missing).unwrap();
        let signaller = thread::spawn(move || {
            thread::sleep(Duration::from_micros(u64::from(pid as u32 % 7) * 40));
            kill(Pid::from_raw(pid), Signal::SIGUSR2).unwrap();
        });
        match process.userfaultfd(&memory, false) {
            Ok(_) => {}
            // The signal was quicker: the process ended before one step or another of this.
            Err(
                AttachError::Gone { .. }
                | AttachError::Inject { .. }
                | AttachError::Look { .. }
                | AttachError::Maps(_)
                | AttachError::NoInstruction(_)
                | AttachError::Fetch { .. },
            ) => {}
            Err(error) => panic!("{error:?}"),
        }
        signaller.join().unwrap();
        let start = Instant::now();
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status.code(),
                Ok(None) => {}
                // It ended while it was attached to, and its status was told there.
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ECHILD));
                    break Some(0);
                }
            }
            if start.elapsed() > Duration::from_secs(10) {
                child.kill().unwrap();
                panic!("the signal was lost");
            }
            thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(status, Some(0));
    }
}

fn what_can_not_be_attached_to_is_told_in_words() {
    if !can_attach("refusals") {
        return;
    }
    let own = Process::open(std::process::id() as i32).unwrap_err();
    assert!(matches!(own, AttachError::Own(_)), "{own}");
    let mut gone = Command::new("true").spawn().unwrap();
    let pid = gone.id() as i32;
    gone.wait().unwrap();
    let gone = Process::open(pid).unwrap_err();
    assert!(matches!(gone, AttachError::Gone { .. }), "{gone}");
    // Stopped by a signal: refused, and as it was afterwards.
    let mut other = Other::start("nanosleep");
    kill(other.pid(), Signal::SIGSTOP).unwrap();
    thread::sleep(Duration::from_millis(50));
    let process = Process::open(other.pid().as_raw()).unwrap();
    let halted = process.userfaultfd(&other.memory, false).unwrap_err();
    let AttachError::Inject { source, .. } = &halted else {
        panic!("{halted:?}");
    };
    assert!(source.to_string().contains("kill -CONT"), "{source}");
    let state = std::fs::read_to_string(format!("/proc/{}/stat", other.pid())).unwrap();
    assert!(state.contains(") T "), "{state}");
    kill(other.pid(), Signal::SIGCONT).unwrap();
    let attached = process.userfaultfd(&other.memory, false).unwrap();
    drop(attached);
    other.child.kill().unwrap();
    other.child.wait().unwrap();
}

fn main() {
    if let Ok(name) = std::env::var(DEED) {
        if name == "pause" {
            sys::handle(libc::SIGUSR2, 0);
            println!();
            assert_eq!(sys::nanosleep(60_000_000_000), Err(Errno::EINTR));
            std::process::exit(0);
        }
        the_other_process(&name);
    }
    for deed in DEEDS {
        goes_on_undisturbed(deed);
    }
    a_pending_signal_still_breaks_a_pause();
    what_can_not_be_attached_to_is_told_in_words();
    println!("attach: all passed");
}
