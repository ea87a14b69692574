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

use lazyvm_server::port::TouchRecorder;
use lazyvm_vmm_glue::attach::Process;
use lazyvm_vmm_glue::dirty::WriteWatch;
use lazyvm_vmm_glue::record::{Piece, Recorder};
use lazyvm_wire::PageIndex;

use common::huge::HugePages;
use memory::{Kind, Memory};

const CHILD: &str = "LAZYVM_TEST_DIRTY";

fn the_other_process(kind: &str) {
    let memory = Memory::new(Kind::parse(kind));
    println!("{}", memory.mapped.address());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let at = |page: &str| page.parse::<usize>().unwrap() * 4096;
        match line.split_once(' ') {
            Some(("write", page)) => memory.mapped.store(at(page), 1),
            Some(("read", page)) => drop(memory.mapped.load(at(page))),
            Some(("give", page)) => memory.give_back(at(page), memory.kind.unit()),
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
    fn start(kind: Kind) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .env(CHILD, format!("{kind:?}"))
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
        let ranges = [(address, kind.bytes() as u64)];
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
        Ok(kind) => return the_other_process(&kind),
        Err(_) => {}
    }
    if !nix::unistd::geteuid().is_root() {
        return common::skip(
            "dirty",
            "only root can watch another process's kernel accesses",
        );
    }
    deed_by_deed();
    what_held_nothing_at_the_start();
    touches_in_order();
    huge_pages_that_are_given_back();
    model::run();
    println!("dirty: ok");
}

fn deed_by_deed() {
    let mut other = Other::start(Kind::Memfd);
    let pages = (Kind::Memfd.bytes() / 4096) as u64;
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
    for page in 0..pages {
        other.tell(&format!("write {page}"));
    }
    other.tell("drop");
    let all: BTreeSet<_> = (0..pages).collect();
    assert_eq!(other.collect(), all, "written, and the entries dropped");
    assert!(other.collect().is_empty());
    other.tell("write 11");
    other.tell("drop");
    other.tell("read 11");
    assert!(other.collect().contains(&11));
    other.watch = None;
    other.tell("write 1");
}

/// No mark outlives an entry that was new: only the file tells that there is something to mark.
fn what_held_nothing_at_the_start() {
    let mut other = Other::start(Kind::Memfd);
    other.watch = None;
    let process = Process::open(other.child.id() as i32).unwrap();
    let range = (other.address, Kind::Memfd.bytes() as u64);
    other.watch = Some(WriteWatch::start(&process, &[range], &[]).unwrap());
    other.tell("write 20");
    other.tell("drop");
    assert!(other.collect().contains(&20));
    assert!(
        other.collect().contains(&20),
        "nothing tells that it holds data"
    );
    let page = (other.address + 20 * 4096, other.address + 21 * 4096);
    let mut asked = false;
    let mut found = Vec::new();
    let watch = other.watch.as_mut().unwrap();
    watch
        .collect_holding(
            &mut |start, end, data| {
                asked |= start <= page.0 && page.1 <= end;
                data(page.0, page.1);
                Ok(())
            },
            &mut |start, end| found.push((start, end)),
        )
        .unwrap();
    assert!(asked, "where nothing has an entry is asked for");
    assert!(
        found.iter().any(|run| run.0 <= page.0 && page.1 <= run.1),
        "it is told once more"
    );
    assert!(!other.collect().contains(&20), "and is clean");
    other.tell("drop");
    assert!(!other.collect().contains(&20));
    other.tell("write 20");
    other.tell("drop");
    assert!(other.collect().contains(&20));
    assert!(!other.collect().contains(&20));
}

/// Touches are told one by one, in their order, without neighbours, and nobody waits longer than until he is heard of.
fn touches_in_order() {
    for kind in [Kind::Memfd, Kind::Tmpfs] {
        let mut other = Other::start(kind);
        other.watch = None;
        for page in 0..64 {
            other.tell(&format!("write {page}"));
        }
        let process = Process::open(other.child.id() as i32).unwrap();
        let piece = Piece {
            host: other.address,
            bytes: kind.bytes() as u64,
            first: PageIndex(1000),
        };
        let mut recorder = Recorder::new(&process, vec![piece]).unwrap();
        assert!(recorder.stop().is_empty(), "not begun");
        for deeds in [
            ["read 3", "write 7", "read 5"],
            ["write 60", "read 0", "write 31"],
        ] {
            other.tell("drop");
            recorder.start().unwrap();
            let mut expected = Vec::new();
            for deed in deeds {
                other.tell(deed);
                let (_, page) = deed.split_once(' ').unwrap();
                expected.push(PageIndex(1000 + page.parse::<u64>().unwrap()));
            }
            // Again, and where nothing is yet.
            other.tell(deeds[0]);
            other.tell("write 100");
            other.tell("give 100");
            assert_eq!(recorder.stop(), expected, "{kind:?}");
            other.tell("write 9");
            assert!(recorder.stop().is_empty(), "{kind:?}: over");
        }
        // Whoever records may go at any time; two can't.
        other.tell("drop");
        recorder.start().unwrap();
        let mut second = Recorder::new(&process, vec![piece]).unwrap();
        assert!(second.start().is_err());
        other.tell("read 12");
        assert_eq!(recorder.stop(), [PageIndex(1012)], "the first one goes on");
        recorder.start().unwrap();
        other.tell("read 13");
        drop(recorder);
        // From here on the kernel maps neighbours.
        other.tell("read 14");
        second.start().unwrap();
        other.tell("read 50");
        assert_eq!(second.stop(), [PageIndex(1050)]);
    }
}

/// The kernel keeps the marks of what was clean, so that only its being away shows.
fn huge_pages_that_are_given_back() {
    let test = "huge_pages_that_are_given_back";
    let unit: BTreeSet<_> = (512..1024).collect();
    for kind in [Kind::Huge, Kind::HugePrivate] {
        let Some(_pool) = HugePages::more(test, (kind.bytes() / memory::HUGE) as u64) else {
            continue;
        };
        let mut other = Other::start(kind);
        for at in (0..kind.bytes()).step_by(memory::HUGE) {
            other.tell(&format!("write {}", at / 4096));
        }
        let range = (other.address, kind.bytes() as u64);
        other.watch = other
            .watch
            .take()
            .map(|watch| watch.reporting_absent(&[range]));
        other.collect();
        assert!(other.collect().is_empty(), "all is there, and clean");
        other.tell("write 700");
        assert_eq!(other.collect(), unit, "a huge page is written as a whole");
        other.tell("give 512");
        assert_eq!(other.collect(), unit, "{kind:?}: one was given back");
        assert_eq!(other.collect(), unit, "for as long as it is away");
        other.tell("write 1000");
        assert_eq!(other.collect(), unit);
        assert!(other.collect().is_empty());
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
