//! What the tests of the built-in monitor share.
#![allow(dead_code, reason = "each test file uses its own part of it")]

pub mod at_pause;
pub mod busy;
pub mod copy;
// One pool of huge pages for the whole machine, so one way to take turns with it.
#[path = "../../../pager/tests/common/huge.rs"]
pub mod huge;
pub mod payload;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lazyvm_pager::InstallMode;
use lazyvm_pager::port::DestinationMachine;
use lazyvm_server::port::{SourceMachine, SourceMemory};
use lazyvm_vmm_glue::kvm::{
    ArrivingMachine, Destination, DestinationConfig, Machine, MachineConfig, Payload,
    RemoteMachine, SerialTarget, TouchConfig,
};
use lazyvm_wire::{Backing, PAGE_SIZE, PageRange};

/// How long anything here may take on a slow machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells loudly that a test was not run; fails it where it has to run.
pub fn skip(test: &str, why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{test} can't run: {why}");
    eprintln!("SKIPPED {test}: {why}");
}

/// Whether this host has KVM.
pub fn has_kvm(test: &str) -> bool {
    let usable = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &usable {
        skip(test, &format!("/dev/kvm cannot be opened: {error}"));
    }
    usable.is_ok()
}

/// A folder with a machine's files in it.
pub struct Home {
    folder: tempfile::TempDir,
    count: std::cell::Cell<u32>,
}

impl Home {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            count: std::cell::Cell::new(0),
        }
    }

    /// A new path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.count.set(self.count.get() + 1);
        self.folder
            .path()
            .join(format!("{name}-{}", self.count.get()))
    }

    /// A machine of 16 MiB with the touch payload.
    pub fn touch(&self, cpus: u32, touch: TouchConfig) -> Running {
        self.touch_on(Backing::Small, cpus, touch)
    }

    /// The same with memory of these pages.
    pub fn touch_on(&self, backing: Backing, cpus: u32, touch: TouchConfig) -> Running {
        self.boot(MachineConfig {
            payload: Payload::Touch(touch),
            memory_bytes: 16 << 20,
            backing,
            cpus,
            serial: SerialTarget::File(self.path("serial")),
            control: self.path("control"),
        })
    }

    /// A machine with a flat payload.
    pub fn flat(&self, code: &[u8]) -> Running {
        let path = self.path("flat");
        std::fs::write(&path, code).unwrap();
        self.boot(MachineConfig {
            payload: Payload::Flat(path),
            memory_bytes: 8 << 20,
            backing: Backing::Small,
            cpus: 1,
            serial: SerialTarget::File(self.path("serial")),
            control: self.path("control"),
        })
    }

    pub fn boot(&self, config: MachineConfig) -> Running {
        let machine = Machine::boot(&config).unwrap();
        Running {
            machine: Owned::Booted(machine),
            serial: config.serial,
            control: config.control,
        }
    }

    /// Moves a machine to a new one in this process: the whole protocol but the network and the laziness.
    pub fn move_on(&self, source: Running) -> Running {
        let remote = RemoteMachine::connect(&source.control).unwrap();
        let (serial, control) = (
            SerialTarget::File(self.path("serial")),
            self.path("control"),
        );
        let mut destination = Destination::new(DestinationConfig {
            serial: serial.clone(),
            control: control.clone(),
            install: InstallMode::Minor,
        });
        let memory = destination
            .prepare_machine(remote.layout(), &remote.offer())
            .unwrap();
        let state = remote.pause().unwrap();
        copy(&remote.memory(), memory.file().unwrap());
        destination.load_state(&state).unwrap();
        destination.start().unwrap();
        let machine = destination.machine();
        machine.get().unwrap().set_memory_complete();
        remote.release().unwrap();
        assert_eq!(source.machine().wait().to_string(), "moved away");
        Running {
            machine: Owned::Arrived(machine),
            serial,
            control,
        }
    }
}

pub fn copy(from: &Arc<dyn SourceMemory>, to: &File) {
    let mut runs = Vec::new();
    from.data_runs(&mut |range| runs.push(range)).unwrap();
    let mut buffer = vec![0; 256 * PAGE_SIZE];
    for run in runs {
        let mut first = run.first;
        while first < run.end() {
            let part = PageRange::new(first, 256.min(run.end().0 - first.0));
            let out = &mut buffer[..part.bytes() as usize];
            from.read(part, out).unwrap();
            to.write_all_at(out, first.byte_offset()).unwrap();
            first = part.end();
        }
    }
}

enum Owned {
    Booted(Machine),
    Arrived(ArrivingMachine),
}

/// A machine and its files.
pub struct Running {
    machine: Owned,
    pub serial: SerialTarget,
    pub control: PathBuf,
}

impl Running {
    pub fn arrived(machine: ArrivingMachine, serial: SerialTarget, control: PathBuf) -> Self {
        Self {
            machine: Owned::Arrived(machine),
            serial,
            control,
        }
    }

    pub fn machine(&self) -> &Machine {
        match &self.machine {
            Owned::Booted(machine) => machine,
            Owned::Arrived(machine) => machine.get().unwrap(),
        }
    }

    /// Everything it wrote to its serial console here.
    pub fn output(&self) -> String {
        let SerialTarget::File(path) = &self.serial else {
            panic!("no file")
        };
        String::from_utf8(std::fs::read(path).unwrap()).unwrap()
    }

    /// Waits for `count` complete lines of it for which `wanted` holds, and gives all of them.
    pub fn wait_lines(&self, count: usize, wanted: impl Fn(&str) -> bool) -> Vec<String> {
        let start = Instant::now();
        loop {
            let output = self.output();
            let complete = output
                .rsplit_once('\n')
                .map_or("", |(complete, _)| complete);
            let lines: Vec<_> = complete
                .lines()
                .filter(|line| wanted(line))
                .map(str::to_owned)
                .collect();
            if lines.len() >= count {
                return lines;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{} lines of {count} came; {:?}; output:\n{output}",
                lines.len(),
                self.machine(),
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for `count` ticks of each of `cpus` vCPUs and gives all of them.
    pub fn wait_ticks(&self, count: usize, cpus: u64) -> Vec<Tick> {
        let mut ticks = Vec::new();
        for cpu in 0..cpus {
            let of_cpu = |line: &str| Tick::parse(line).is_some_and(|tick| tick.cpu == cpu);
            let lines = self.wait_lines(count, of_cpu);
            ticks.extend(lines.iter().filter_map(|line| Tick::parse(line)));
        }
        ticks
    }

    /// The errors that it has counted by its next tick.
    pub fn errors(&self) -> u64 {
        let seen = self.wait_ticks(0, 1).len();
        self.wait_ticks(seen + 2, 1).last().unwrap().errors
    }

    pub fn status(&self) -> lazyvm_vmm_glue::kvm::Status {
        self.machine().status()
    }
}

/// A line of the touch payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    pub tick: u64,
    pub touches: u64,
    pub errors: u64,
    pub cpu: u64,
}

impl Tick {
    pub fn parse(line: &str) -> Option<Self> {
        let words: Vec<_> = line.split(' ').collect();
        let number = |at: usize| words.get(at)?.parse().ok();
        if (words.first(), words.get(2), words.get(4))
            != (Some(&"tick"), Some(&"touches"), Some(&"errors"))
        {
            return None;
        }
        let cpu = if words.get(6) == Some(&"cpu") {
            number(7)?
        } else {
            0
        };
        Some(Self {
            tick: number(1)?,
            touches: number(3)?,
            errors: number(5)?,
            cpu,
        })
    }
}

/// Descriptors that this process has open.
pub fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
