//! Noting the writes of another process, which drops its page-table entries meanwhile: deed by deed, and by a model.
//!
//! The test program starts itself again for that process: the one that is watched must not be the one that watches.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod memory;
mod model;
#[path = "../../../benches/micro/random.rs"]
#[allow(dead_code, reason = "the benches use the rest")]
mod random;
mod sys;
mod writer;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use lazyvm_vmm_glue::attach::Process;
use lazyvm_vmm_glue::dirty::WriteWatch;

use memory::{Kind, Memory};

const PAGES: u64 = (4 * memory::HUGE / 4096) as u64;
const CHILD: &str = "LAZYVM_TEST_DIRTY";

fn the_other_process() {
    let memory = Memory::new(Kind::Memfd);
    println!("{}", memory.mapped.address());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let at = |page: &str| page.parse::<usize>().unwrap() * 4096;
        match line.split_once(' ') {
            Some(("write", page)) => memory.mapped.store(at(page), 1),
            Some(("read", page)) => drop(memory.mapped.load(at(page))),
            _ => memory.unmap(0, memory.kind.bytes()),
        }
        println!("done");
    }
}

struct Other {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    address: u64,
    watch: Option<WriteWatch>,
}

impl Other {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let to = child.stdin.take().unwrap();
        let mut from = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        let address = line.trim().parse().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        let ranges = [(address, PAGES * 4096)];
        let watch = WriteWatch::start(&process, &ranges, &ranges).unwrap();
        Self {
            child,
            to,
            from,
            address,
            watch: Some(watch),
        }
    }

    fn tell(&mut self, deed: &str) {
        writeln!(self.to, "{deed}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        assert_eq!(line, "done\n");
    }

    fn collect(&mut self) -> BTreeSet<u64> {
        let address = self.address;
        let mut found = BTreeSet::new();
        let watch = self.watch.as_mut().unwrap();
        watch
            .collect(&mut |start, end| {
                found.extend((start - address) / 4096..(end - address) / 4096);
            })
            .unwrap();
        found
    }
}

fn main() {
    match std::env::var(CHILD) {
        Ok(words) if words.contains(' ') => return writer::run(&words),
        Ok(_) => return the_other_process(),
        Err(_) => {}
    }
    if !nix::unistd::geteuid().is_root() {
        return common::skip(
            "dirty",
            "only root can watch another process's kernel accesses",
        );
    }
    deed_by_deed();
    model::run();
    println!("dirty: ok");
}

fn deed_by_deed() {
    let mut other = Other::start();
    assert!(other.collect().is_empty(), "all is clean at the start");
    other.tell("read 3");
    assert!(other.collect().is_empty(), "a read is no write");
    other.tell("write 7");
    other.tell("write 700");
    assert_eq!(other.collect(), BTreeSet::from([7, 700]));
    assert!(other.collect().is_empty(), "what was reported is clean");
    other.tell("drop");
    other.tell("write 9");
    assert!(other.collect().contains(&9), "marks outlive their entries");
    for page in 0..PAGES {
        other.tell(&format!("write {page}"));
    }
    other.tell("drop");
    let all: BTreeSet<_> = (0..PAGES).collect();
    assert_eq!(other.collect(), all, "written, and the entries dropped");
    assert!(other.collect().is_empty());
    other.tell("write 11");
    other.tell("drop");
    other.tell("read 11");
    assert!(other.collect().contains(&11));
    other.watch = None;
    other.tell("write 1");
    other.child.kill().unwrap();
    other.child.wait().unwrap();
}
