//! The process that is watched: threads that write to its memory in every way, until they are told to pause.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, RwLock};

use crate::memory::{Kind, Memory};
use crate::random::Random;

/// Threads that write.
const WRITERS: u64 = 3;

/// `KIND SEED`, as the environment tells it.
pub fn run(words: &str) {
    let (kind, seed) = words.split_once(' ').unwrap();
    let memory = Arc::new(Memory::new(Kind::parse(kind)));
    populate(&memory);
    // Held by each writer for a deed, and by this thread while they are to pause.
    let turn = Arc::new(RwLock::new(()));
    let mut pause = Some(turn.write().unwrap());
    for number in 0..WRITERS {
        let (memory, turn) = (Arc::clone(&memory), Arc::clone(&turn));
        let pace = memory.kind.pace();
        let mut writer = Writer::new(memory, seed.parse::<u64>().unwrap() * WRITERS + number);
        std::thread::spawn(move || {
            loop {
                {
                    let _turn = turn.read().unwrap();
                    writer.do_something();
                }
                std::thread::sleep(pace);
            }
        });
    }
    println!("{} {}", memory.mapped.address(), memory.descriptor());
    for line in std::io::stdin().lines() {
        pause = match line.unwrap().as_str() {
            "go" => None,
            _ => Some(pause.unwrap_or_else(|| turn.write().unwrap())),
        };
        println!("done");
    }
    std::process::exit(0);
}

/// Half of it is there when the watch begins.
fn populate(memory: &Memory) {
    for at in (0..memory.kind.bytes() / 2).step_by(4096) {
        memory.mapped.store(at, at as u64 + 1);
    }
}

struct Writer {
    memory: Arc<Memory>,
    random: Random,
    pipe: (File, File),
    file: File,
}

impl Writer {
    fn new(memory: Arc<Memory>, seed: u64) -> Self {
        let (from, to): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
        let mut random = Random::new(seed);
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..1 << 16).map(|_| random.next() as u8).collect();
        file.write_all(&bytes).unwrap();
        Self {
            memory,
            random,
            pipe: (from.into(), to.into()),
            file,
        }
    }

    fn do_something(&mut self) {
        let Memory { kind, mapped, .. } = &*self.memory;
        let length = 1 + self.random.below(3 * 4096);
        let at = self.random.below(kind.bytes() - length);
        match self.random.below(64) {
            0..40 => mapped.store(at & !7, self.random.next()),
            40..48 => drop(mapped.load(at)),
            48..54 => {
                let data = vec![self.random.next() as u8; length];
                self.pipe.1.write_all(&data).unwrap();
                mapped.read_exactly(&self.pipe.0, None, at, length);
            }
            54..60 => {
                let from = self.random.below((1 << 16) - length);
                mapped.read_exactly(&self.file, Some(from as i64), at, length);
            }
            _ if !kind.is_shared() && !kind.is_huge() => {}
            _ => {
                let unit = kind.unit();
                let units = kind.bytes() / unit;
                let first = self.random.below(units);
                let count = 1 + self.random.below(units - first);
                if kind.is_shared() && self.random.below(2) == 0 {
                    self.memory.unmap(first * unit, count * unit);
                } else if kind.is_huge() {
                    self.give_back(first * unit, count * unit);
                }
            }
        }
    }
}

impl Writer {
    /// Huge pages, of which the next owner writes something.
    fn give_back(&mut self, at: usize, bytes: usize) {
        self.memory.give_back(at, bytes);
        for page in (at..at + bytes).step_by(self.memory.kind.unit()) {
            let word = self.random.below(self.memory.kind.unit() / 8);
            self.memory
                .mapped
                .store(page + 8 * word, self.random.next());
        }
    }
}

/// How many bytes of transparent huge pages are in the process `pid`.
pub fn transparent_bytes(pid: u32) -> u64 {
    let mut text = String::new();
    let mut file = File::open(format!("/proc/{pid}/smaps_rollup")).unwrap();
    file.read_to_string(&mut text).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB");
    kib.trim().parse::<u64>().unwrap() << 10
}
