//! The pager's page table: what each operation costs, alone and with another thread at it.
//!
//! An image of 4 GiB, and for the page map, which is taken in while no vCPU runs anywhere, also one of 1 TiB.

#![expect(
    clippy::expect_used,
    reason = "a bench that can't go on has nothing to report"
)]
#[allow(dead_code, reason = "each bench uses its part")]
mod random;

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use lazyvm_pager::table::PageTable;
use lazyvm_wire::{Layout, PageIndex, PageMap, PageRange};

use random::Random;

/// 4 GiB.
const PAGES: u64 = 1 << 20;

/// 1 TiB.
const TIB_PAGES: u64 = 1 << 28;

/// Pages of a fault's random touches, and of each thread's part in a contest.
const PART: u64 = 1 << 16;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args();
    let mut group = criterion.benchmark_group("page_table");
    faults(&mut group);
    claims(&mut group);
    zeros(&mut group);
    counts(&mut group);
    group.finish();
    page_maps(&mut criterion);
    two_threads(&mut criterion);
    criterion.final_summary();
}

fn table(pages: u64) -> PageTable {
    PageTable::new(&Layout::flat(pages).expect("a layout"))
}

/// Pages anywhere, each once.
fn touches() -> Vec<PageIndex> {
    let order = Random::new(1).order(PAGES);
    order
        .into_iter()
        .take(PART as usize)
        .map(PageIndex)
        .collect()
}

fn faults(group: &mut BenchmarkGroup<'_, WallTime>) {
    let touches = touches();
    group.throughput(Throughput::Elements(PART));
    group.bench_function("fault/absent", |bencher| {
        bencher.iter_batched_ref(
            || table(PAGES),
            |table| {
                for &page in &touches {
                    black_box(table.fault(page));
                }
            },
            BatchSize::PerIteration,
        );
    });
    let table = table(PAGES);
    table.mark_present(PageRange::new(PageIndex(0), PAGES));
    group.bench_function("fault/present", |bencher| {
        bencher.iter(|| {
            for &page in &touches {
                black_box(table.fault(page));
            }
        });
    });
}

/// Claims and finishes all of `range`, so many pages at a time.
fn fill(table: &PageTable, range: PageRange, pages_max: u64) {
    let mut first = range.first;
    while first < range.end() {
        let piece = PageRange::new(first, pages_max.min(range.end().0 - first.0));
        while let Some(run) = table.claim_run(piece, pages_max) {
            table.finish(run);
        }
        first = piece.end();
    }
}

fn claims(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.throughput(Throughput::Elements(PART));
    for run in [1, 64, 256] {
        group.bench_function(BenchmarkId::new("claim-and-finish", run), |bencher| {
            bencher.iter_batched_ref(
                || table(PART),
                |table| fill(table, PageRange::new(PageIndex(0), PART), run),
                BatchSize::PerIteration,
            );
        });
    }
}

fn zeros(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.throughput(Throughput::Elements(PART));
    for run in [1, 64] {
        group.bench_function(BenchmarkId::new("mark-zero", run), |bencher| {
            bencher.iter_batched_ref(
                || table(PART),
                |table| {
                    for first in (0..PART).step_by(run as usize) {
                        let range = PageRange::new(PageIndex(first), run);
                        assert!(table.mark_zero(range).next().is_none(), "nobody waits");
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
}

fn counts(group: &mut BenchmarkGroup<'_, WallTime>) {
    let table = table(PAGES);
    group.throughput(Throughput::Elements(1));
    group.bench_function("remaining", |bencher| {
        bencher.iter(|| black_box(&table).remaining())
    });
    table.mark_present(PageRange::new(PageIndex(0), PAGES));
    group.throughput(Throughput::Elements(PAGES));
    group.bench_function("is_complete", |bencher| {
        bencher.iter(|| black_box(&table).is_complete())
    });
}

fn page_maps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page_table/apply_map");
    group.sample_size(10);
    let mut dense = PageMap::zeroed(PAGES);
    dense.set_data(PageRange::new(PageIndex(0), PAGES));
    let mut alternating = PageMap::zeroed(PAGES);
    for page in (0..PAGES).step_by(2) {
        alternating.set_data(PageRange::one(PageIndex(page)));
    }
    for (name, map) in [
        ("4-GiB-dense", dense),
        ("4-GiB-sparse", sparse(PAGES)),
        ("4-GiB-alternating", alternating),
        ("1-TiB-sparse", sparse(TIB_PAGES)),
    ] {
        let pages = map.bits().len() as u64;
        group.throughput(Throughput::Elements(pages));
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(
                || table(pages),
                |table| {
                    table.apply_map(map.bits(), |run| {
                        black_box(run);
                    })
                },
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// A thousand runs of 64 pages of data, anywhere.
fn sparse(pages: u64) -> PageMap {
    let mut random = Random::new(3);
    let mut map = PageMap::zeroed(pages);
    for _ in 0..1000 {
        map.set_data(PageRange::new(PageIndex(random.next() % pages), 64));
    }
    map
}

/// The same work by one thread and by two at once: what two pay for each other.
fn two_threads(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("page_table/two-threads");
    let all = PageRange::new(PageIndex(0), 2 * PART);
    let half = |number| PageRange::new(PageIndex(number * PART), PART);
    group.throughput(Throughput::Elements(all.count));
    group.bench_function("fill-alone", |bencher| {
        bencher.iter_batched_ref(
            || table(all.count),
            |table| fill(table, all, 16),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("fill-halves", |bencher| {
        bencher.iter_custom(|iterations| {
            at_once(
                iterations,
                |table| fill(table, half(0), 16),
                |table| fill(table, half(1), 16),
            )
        });
    });
    // Each page goes to whoever claims it first; both run through the same words.
    group.bench_function("fill-the-same", |bencher| {
        bencher.iter_custom(|iterations| {
            at_once(
                iterations,
                |table| fill(table, all, 16),
                |table| fill(table, all, 16),
            )
        });
    });
    // The fault lane and the bulk lane: one page at a time, anywhere, while the push goes through from the front.
    let touches: Vec<PageRange> = Random::new(4)
        .order(all.count)
        .into_iter()
        .map(|page| PageRange::one(PageIndex(page)))
        .collect();
    group.bench_function("faults-against-fill", |bencher| {
        bencher.iter_custom(|iterations| {
            at_once(
                iterations,
                |table| {
                    for &touched in &touches {
                        black_box(table.fault(touched.first));
                        fill(table, touched, 1);
                    }
                },
                |table| fill(table, all, 16),
            )
        });
    });
    group.finish();
}

/// Time of both, from the moment at which both have begun until both are done, each time on a fresh table.
fn at_once(
    iterations: u64,
    one: impl Fn(&PageTable) + Sync,
    other: impl Fn(&PageTable) + Sync,
) -> Duration {
    let mut time = Duration::ZERO;
    for _ in 0..iterations {
        let table = table(2 * PART);
        let ready = Barrier::new(2);
        let (table, ready, other) = (&table, &ready, &other);
        time += std::thread::scope(|scope| {
            let second = scope.spawn(move || {
                ready.wait();
                other(table);
                Instant::now()
            });
            ready.wait();
            let start = Instant::now();
            one(table);
            let end = Instant::now();
            second
                .join()
                .map_or(end, |other_end| end.max(other_end))
                .duration_since(start)
        });
        assert_eq!(table.remaining(), 0);
    }
    time
}
