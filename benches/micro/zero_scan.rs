//! Looking at pages' bytes: whether they are zero, and their digest.
//!
//! A page in the cache first, then 64 MiB that are not. `compare` is the C library's `memcmp` with a page of zeros, for
//! a scale.

#[allow(dead_code, reason = "each bench uses its part")]
mod random;

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use lazyvm_wire::{PAGE_SIZE, is_zero, page_digest};

use random::Random;

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// More than any cache holds.
const MEMORY_BYTES: usize = 64 << 20;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(50)
        .configure_from_args();
    one_page(&mut criterion);
    memory(&mut criterion);
    criterion.final_summary();
}

fn one_page(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero_scan/page");
    group.throughput(Throughput::Bytes(PAGE_SIZE as u64));
    let random = Random::new(1).bytes(PAGE_SIZE);
    let mut last_byte = ZERO_PAGE;
    last_byte[PAGE_SIZE - 1] = 1;
    group.bench_function("zero", |bencher| {
        bencher.iter(|| is_zero(black_box(&ZERO_PAGE)))
    });
    group.bench_function("zero/compare", |bencher| {
        bencher.iter(|| black_box(&ZERO_PAGE[..]) == black_box(&[0; PAGE_SIZE][..]));
    });
    group.bench_function("random", |bencher| {
        bencher.iter(|| is_zero(black_box(&random)))
    });
    group.bench_function("last-byte", |bencher| {
        bencher.iter(|| is_zero(black_box(&last_byte)))
    });
    group.bench_function("digest", |bencher| {
        bencher.iter(|| page_digest(black_box(&random)))
    });
    group.finish();
}

fn memory(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero_scan/64-MiB");
    group
        .throughput(Throughput::Bytes(MEMORY_BYTES as u64))
        .sample_size(10);
    // Written, or all pages would be the kernel's one page of zeros.
    let mut memory = vec![1; MEMORY_BYTES];
    memory.fill(0);
    group.bench_function("zero", |bencher| {
        bencher.iter(|| {
            black_box(&memory)
                .chunks_exact(PAGE_SIZE)
                .filter(|page| is_zero(page))
                .count()
        });
    });
    group.bench_function("digest", |bencher| {
        bencher.iter(|| {
            black_box(&memory)
                .chunks_exact(PAGE_SIZE)
                .fold(0, |sum, page| sum ^ page_digest(page))
        });
    });
    group.finish();
}
