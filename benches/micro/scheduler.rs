//! What the push sends next: decisions for an image of 4 GiB.
//!
//! A *dense* image is data throughout; in a *fragmented* one every other page is zero, so that each run is one page.

#![expect(
    clippy::expect_used,
    reason = "a bench that can't go on has nothing to report"
)]
#[allow(dead_code, reason = "each bench uses its part")]
mod random;

use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput};
use lazyvm_server::scheduler::{PushScheduler, Urgency};
use lazyvm_wire::{Layout, PageIndex, PageMap, PageRange};

use random::Random;

/// 4 GiB.
const PAGES: u64 = 1 << 20;

/// What the push takes at a time: 1 MiB.
const BATCH_PAGES: u64 = 256;

const FAULTS: u64 = 4096;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(20)
        .configure_from_args();
    let layout = Layout::flat(PAGES).expect("a layout");
    let mut dense = PageMap::zeroed(PAGES);
    dense.set_data(layout.range());
    let mut fragmented = PageMap::zeroed(PAGES);
    for page in (0..PAGES).step_by(2) {
        fragmented.set_data(PageRange::one(PageIndex(page)));
    }
    for (name, map) in [("dense", &dense), ("fragmented", &fragmented)] {
        let mut group = criterion.benchmark_group(format!("scheduler/{name}"));
        decisions(&mut group, map, &layout);
        group.finish();
    }
    criterion.final_summary();
}

fn decisions(group: &mut BenchmarkGroup<'_, WallTime>, map: &PageMap, layout: &Layout) {
    let scheduler = || PushScheduler::new(map, layout.clone());
    group.throughput(Throughput::Elements(1));
    group.bench_function("new", |bencher| bencher.iter(scheduler));

    let batches = std::iter::repeat_with({
        let mut scheduler = scheduler();
        move || scheduler.next(BATCH_PAGES)
    });
    group.throughput(Throughput::Elements(batches.map_while(|b| b).count() as u64));
    group.bench_function("next", |bencher| {
        bencher.iter_batched_ref(scheduler, take_all, BatchSize::PerIteration);
    });

    // Each a demand fault anywhere, and what the push sends between two of them.
    let faults: Vec<PageRange> = Random::new(1)
        .order(PAGES)
        .into_iter()
        .take(FAULTS as usize)
        .map(|page| PageRange::one(PageIndex(page)))
        .collect();
    group.throughput(Throughput::Elements(FAULTS));
    group.bench_function("fault", |bencher| {
        bencher.iter_batched_ref(
            scheduler,
            |scheduler| {
                faults.iter().for_each(|&fault| scheduler.fault(fault));
            },
            BatchSize::PerIteration,
        );
    });
    group.bench_function("fault-and-next", |bencher| {
        bencher.iter_batched_ref(
            scheduler,
            |scheduler| {
                for &fault in &faults {
                    scheduler.fault(fault);
                    black_box(scheduler.next(BATCH_PAGES));
                }
            },
            BatchSize::PerIteration,
        );
    });
    // 64 vCPUs fault at once, and then the push gets its turn until their windows are sent.
    group.bench_function("64-faults-and-their-windows", |bencher| {
        bencher.iter_batched_ref(
            scheduler,
            |scheduler| {
                for burst in faults.chunks(64) {
                    burst.iter().for_each(|&fault| scheduler.fault(fault));
                    while scheduler
                        .next(BATCH_PAGES)
                        .is_some_and(|batch| batch.urgency == Urgency::Window)
                    {}
                }
            },
            BatchSize::PerIteration,
        );
    });
}

fn take_all(scheduler: &mut PushScheduler) {
    while let Some(batch) = scheduler.next(BATCH_PAGES) {
        black_box(batch);
    }
}
