//! The property that a move rests on: whoever copies all memory after the start, and then whatever is reported, has all
//! of it in the end.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSlice, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lazyvm_vmm_glue::attach::Process;
use lazyvm_vmm_glue::dirty::WriteWatch;
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::{Pid, Whence, lseek};

use crate::common::huge::HugePages;
use crate::common::skip;
use crate::memory::{HUGE, Kind};
use crate::random::Random;
use crate::writer::transparent_bytes;

const SEEDS: u64 = 4;
const COLLECTS: u64 = 12;

pub fn run() {
    for kind in Kind::ALL {
        let test = format!("the model with {kind:?} memory");
        let _pool = match kind {
            // Those of the memory, and as many again for what is given back and taken anew.
            Kind::Huge | Kind::HugePrivate => {
                match HugePages::more(&test, 2 * (kind.bytes() / HUGE) as u64) {
                    Some(pool) => Some(pool),
                    None => continue,
                }
            }
            _ => None,
        };
        for seed in 0..SEEDS {
            follow(kind, seed, &test);
        }
    }
}

/// One run of the model.
fn follow(kind: Kind, seed: u64, test: &str) {
    let mut written = Written::start(kind, seed);
    if kind == Kind::Transparent && transparent_bytes(written.child.id()) == 0 {
        skip(test, "the kernel gives no transparent huge pages");
    }
    let mut random = Random::new(!seed);
    written.tell("go");
    let process = Process::open(written.child.id() as i32).unwrap();
    let all = [(written.address, kind.bytes() as u64)];
    // Else all but some parts are clean from the start, as where memory holds nothing yet.
    let whole = seed.is_multiple_of(2);
    let parts = all[0].1 / HUGE as u64;
    let some: Vec<_> = (0..parts)
        .map(|part| (written.address + part * HUGE as u64, HUGE as u64))
        .filter(|_| random.below(2) == 0)
        .collect();
    let clean = if whole { all.as_slice() } else { &some };
    let mut watch = WriteWatch::start(&process, &all, clean).unwrap();
    let mut copy = Copy::of(&written);
    let running = AtomicBool::new(true);
    let mut reported = 0;
    std::thread::scope(|scope| {
        let outside = scope.spawn(|| write_from_outside(&written, &running, seed));
        for _ in 0..COLLECTS {
            std::thread::sleep(Duration::from_millis(random.below(12) as u64));
            reported += copy.collect(&mut watch);
        }
        running.store(false, Ordering::Relaxed);
        assert!(
            outside.join().unwrap() > 0,
            "nothing was written from outside"
        );
    });
    written.tell("pause");
    let last = copy.collect(&mut watch);
    let pages = copy.differ();
    assert!(
        pages.is_empty(),
        "{kind:?} with seed {seed}: pages {pages:?} are not what was written"
    );
    let again = copy.collect(&mut watch);
    assert!(!whole || again == 0, "{kind:?}: all is clean");
    let tells_holes = kind.is_shared() && !kind.is_huge();
    assert!(
        !tells_holes || copy.collect_data(&mut watch) == 0,
        "{kind:?} with seed {seed}: whatever holds data is clean"
    );
    assert!(reported > 0, "{kind:?}: nothing was reported");
    println!("dirty: {kind:?} with seed {seed}: {reported} pages while it ran, {last} at the end");
}

/// As a debugger writes, until told otherwise; gives how often.
fn write_from_outside(written: &Written, running: &AtomicBool, seed: u64) -> u64 {
    let (pid, base, bytes) = written.remote();
    let pause = written.kind.pace().max(Duration::from_micros(200));
    let mut random = Random::new(seed ^ 0xffff);
    let mut count = 0;
    while running.load(Ordering::Relaxed) {
        let data = vec![random.next() as u8; 1 + random.below(8192)];
        let to = RemoteIoVec {
            base: base + random.below(bytes - data.len()),
            len: data.len(),
        };
        let done = process_vm_writev(pid, &[IoSlice::new(&data)], &[to]).unwrap();
        assert_eq!(done, data.len());
        count += 1;
        std::thread::sleep(pause);
    }
    count
}

/// The process that is watched.
struct Written {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    kind: Kind,
    address: u64,
    descriptor: i32,
}

impl Written {
    fn start(kind: Kind, seed: u64) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(crate::CHILD, format!("{kind:?} {seed}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = child.stdin.take().unwrap();
        let mut from = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        let (address, descriptor) = line.trim().split_once(' ').unwrap();
        Self {
            kind,
            address: address.parse().unwrap(),
            descriptor: descriptor.parse().unwrap(),
            child,
            to,
            from,
        }
    }

    fn tell(&mut self, what: &str) {
        writeln!(self.to, "{what}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
    }

    fn remote(&self) -> (Pid, usize, usize) {
        let pid = Pid::from_raw(self.child.id() as i32);
        (pid, self.address as usize, self.kind.bytes())
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The reader's copy of the memory. It reads shared memory by its file, as sources do.
struct Copy {
    memory: File,
    kind: Kind,
    /// Of the memory, in that file.
    offset: u64,
    address: u64,
    bytes: Vec<u8>,
}

impl Copy {
    fn of(written: &Written) -> Self {
        let pid = written.child.id();
        let (path, offset) = if written.kind.is_shared() {
            (format!("/proc/{pid}/fd/{}", written.descriptor), 0)
        } else {
            (format!("/proc/{pid}/mem"), written.address)
        };
        let mut copy = Self {
            memory: File::open(path).unwrap(),
            kind: written.kind,
            offset,
            address: written.address,
            bytes: vec![0; written.kind.bytes()],
        };
        copy.read(0, copy.bytes.len());
        copy
    }

    fn read(&mut self, from: usize, to: usize) {
        let part = &mut self.bytes[from..to];
        self.memory
            .read_exact_at(part, self.offset + from as u64)
            .unwrap();
    }

    /// Copies what is reported, and gives how many pages that was.
    fn collect(&mut self, watch: &mut WriteWatch) -> u64 {
        let ranges = self.follow(watch);
        ranges.iter().map(|(start, end)| (end - start) / 4096).sum()
    }

    /// The same, but gives how many bytes of data that was.
    fn collect_data(&mut self, watch: &mut WriteWatch) -> u64 {
        let mut bytes = 0;
        for (start, end) in self.follow(watch) {
            self.data(start, end, &mut |from, to| bytes += to - from)
                .unwrap();
        }
        bytes
    }

    fn follow(&mut self, watch: &mut WriteWatch) -> Vec<(u64, u64)> {
        let mut ranges = Vec::new();
        let mut holding = |start, end, data: &mut dyn FnMut(u64, u64)| self.data(start, end, data);
        watch
            .collect_holding(&mut holding, &mut |start, end| ranges.push((start, end)))
            .unwrap();
        for &(start, end) in &ranges {
            self.read(
                (start - self.address) as usize,
                (end - self.address) as usize,
            );
        }
        ranges
    }

    /// Where the file has data, if it tells.
    fn data(&self, start: u64, end: u64, data: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        if !self.kind.is_shared() || self.kind.is_huge() {
            return Ok(());
        }
        let (mut at, end) = ((start - self.address) as i64, (end - self.address) as i64);
        while at < end {
            let from = match lseek(&self.memory, at, Whence::SeekData) {
                Err(Errno::ENXIO) => break,
                found => found?,
            };
            if from >= end {
                break;
            }
            at = lseek(&self.memory, from, Whence::SeekHole)?.min(end);
            data(self.address + from as u64, self.address + at as u64);
        }
        Ok(())
    }

    /// The pages that are not as in the memory.
    fn differ(&mut self) -> Vec<usize> {
        let mut now = vec![0; self.bytes.len()];
        self.memory.read_exact_at(&mut now, self.offset).unwrap();
        let pages = now.chunks(4096).zip(self.bytes.chunks(4096));
        let differ = pages.enumerate().filter(|(_, (now, copied))| now != copied);
        differ.map(|(page, _)| page).collect()
    }
}
