//! Putting pages in place: the installer against the bare `UFFDIO_COPY`, by kind of memory and pages at a time.
//!
//! Each iteration fills 4 MiB that hold nothing yet; making that memory, its userfaultfd and its page table is not
//! timed. `minor-stale` is memory whose file holds older pages, which are written over and mapped with
//! `UFFDIO_CONTINUE`; there is no bare ioctl to compare it with.
//!
//! The time is the thread's own CPU time: nothing here waits, and two sides that are compared must not differ by what
//! else the machine does meanwhile.

#![expect(
    clippy::expect_used,
    reason = "a bench that can't go on has nothing to report"
)]
#[allow(dead_code, reason = "each bench uses its part")]
mod random;

use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};
use lazyvm_benches::BareUffd;
use lazyvm_pager::install::{Installer, Registration};
use lazyvm_pager::uffd::Uffd;
use lazyvm_pager::{InstallMode, LazyMemory};
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageRange};
use nix::time::{ClockId, clock_gettime};

use random::Random;

/// Pages that an iteration fills: a whole number of every run.
const PAGES: u64 = 1024;

const RUNS: [u64; 4] = [1, 16, 64, 256];

/// Memory to fill.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Anonymous,
    Memfd,
    Minor,
    MinorStale,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Anonymous, Self::Memfd, Self::Minor, Self::MinorStale];

    fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "install/missing-anonymous",
            Self::Memfd => "install/missing-memfd",
            Self::Minor => "install/minor",
            Self::MinorStale => "install/minor-stale",
        }
    }

    fn memory(self, layout: &Layout) -> LazyMemory {
        let memory = match self {
            Self::Anonymous => LazyMemory::anonymous(layout),
            Self::Memfd => LazyMemory::shared(layout, InstallMode::Missing),
            Self::Minor | Self::MinorStale => LazyMemory::shared(layout, InstallMode::Minor),
        }
        .expect("memory");
        if self == Self::MinorStale {
            let file = memory.file().expect("shared memory has a file");
            let old = vec![1; memory.bytes() as usize];
            file.write_all_at(&old, 0).expect("memory");
        }
        memory
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(700))
        .configure_from_args();
    warm_host_memory();
    for kind in Kind::ALL {
        install(&mut criterion, kind);
    }
    criterion.final_summary();
}

/// Where this machine is a guest itself, the first touch of a page that it never used costs microseconds at its host.
/// Pages that were freed come back first.
fn warm_host_memory() {
    black_box(vec![1_u8; 256 << 20]);
}

fn install(criterion: &mut Criterion, kind: Kind) {
    let layout = Layout::flat(PAGES).expect("a layout");
    let mut group = criterion.benchmark_group(kind.name());
    group.throughput(Throughput::Bytes(layout.bytes()));
    for run in RUNS {
        let data = Random::new(run).bytes(run as usize * PAGE_SIZE);
        if kind != Kind::MinorStale {
            group.bench_function(BenchmarkId::new("bare-ioctl", run), |bencher| {
                bencher.iter_custom(|iterations| {
                    (0..iterations)
                        .map(|_| bare_ioctl(&kind.memory(&layout), &data))
                        .sum()
                });
            });
        }
        group.bench_function(BenchmarkId::new("installer", run), |bencher| {
            bencher.iter_custom(|iterations| {
                (0..iterations)
                    .map(|_| installer(&layout, kind.memory(&layout), &data))
                    .sum()
            });
        });
    }
    group.finish();
}

fn bare_ioctl(memory: &LazyMemory, data: &[u8]) -> Duration {
    let uffd = BareUffd::register(memory).expect("a userfaultfd; does it need root here?");
    let start = cpu_time();
    for offset in (0..memory.bytes()).step_by(data.len()) {
        uffd.copy(offset, data).expect("a page that is not there");
    }
    cpu_time() - start
}

fn installer(layout: &Layout, memory: LazyMemory, data: &[u8]) -> Duration {
    let uffd = Uffd::open(&memory, false).expect("a userfaultfd; does it need root here?");
    let installer = Installer::new(layout, Arc::new(memory), uffd, Registration::Register)
        .expect("memory of the layout");
    let pages = (data.len() / PAGE_SIZE) as u64;
    let start = cpu_time();
    for first in (0..PAGES).step_by(pages as usize) {
        let installed = installer
            .install(PageRange::new(PageIndex(first), pages), data)
            .expect("a page that is not there");
        assert_eq!(installed.pages, pages);
    }
    let time = cpu_time() - start;
    assert_eq!(installer.table().remaining(), 0);
    time
}

/// CPU time that this thread has used so far.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .expect("the clock of this thread")
        .into()
}
