//! Bytes to messages and back: control messages, headers of frames and requests, page maps, tickets.
//!
//! Page maps count most: one is encoded and decoded while no vCPU runs anywhere.

#![expect(
    clippy::expect_used,
    reason = "a bench that can't go on has nothing to report"
)]
#[allow(dead_code, reason = "each bench uses its part")]
mod random;

use std::fmt::Debug;
use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use lazyvm_wire::control::{
    Decoder, Hello, Lane, SWITCHOVER_MAX, Switchover, ToDestination, ToSource, Welcome, encode,
};
use lazyvm_wire::frame::{FaultRequest, FrameHeader, FrameKind};
use lazyvm_wire::held::HeldRun;
use lazyvm_wire::ledger::SUPPORTED;
use lazyvm_wire::trust::Fingerprint;
use lazyvm_wire::{Layout, MachineOffer, PageIndex, PageMap, PageRange, Secret, SessionId, Ticket};
use serde::Serialize;
use serde::de::DeserializeOwned;

use random::Random;

const GIB_PAGES: u64 = 1 << 18;
const TIB_PAGES: u64 = 1 << 28;

/// As large as the device state of a small virtual machine.
const STATE_BYTES: usize = 320 << 10;

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .configure_from_args();
    control(&mut criterion);
    frames(&mut criterion);
    page_maps(&mut criterion);
    tickets(&mut criterion);
    criterion.final_summary();
}

fn control(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/control");
    let hello = Hello {
        versions: SUPPORTED,
        session: SessionId([7; 16]),
        secret: Secret::from_bytes([9; 32]),
        lane: Lane::Fault,
        verify: true,
    };
    message(&mut group, "hello", &hello);
    message(
        &mut group,
        "progress",
        &ToSource::Progress {
            pages_here: GIB_PAGES,
        },
    );
    let welcome = Welcome {
        version: SUPPORTED.max,
        layout: Layout::flat(4 * GIB_PAGES).expect("a layout"),
        offer: MachineOffer {
            kind: "kvm".to_owned(),
            state_version: 1,
            compatibility: Random::new(1).bytes(4096),
        },
        mode: "postcopy".to_owned(),
    };
    message(
        &mut group,
        "welcome",
        &ToDestination::Welcome(Box::new(welcome)),
    );
    let switchover = Switchover {
        state: Random::new(2).bytes(STATE_BYTES),
        page_map: runs(4 * GIB_PAGES, 1000).encode(),
        held: lazyvm_wire::held::encode(&held_runs(1000)).0,
        wait: false,
    };
    message(
        &mut group,
        "switchover",
        &ToDestination::Switchover(Box::new(switchover)),
    );
    group.finish();
}

/// As many runs of pages that hold, of two rounds.
fn held_runs(count: u64) -> Vec<HeldRun> {
    (0..count)
        .map(|number| HeldRun {
            range: PageRange::new(PageIndex(number * 1000), 300),
            round: 1 + (number % 2) as u8,
        })
        .collect()
}

fn message<M: Serialize + DeserializeOwned + Debug>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    message: &M,
) {
    let bytes = encode(message).expect("a message");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function(BenchmarkId::new("encode", name), |bencher| {
        bencher.iter(|| encode(black_box(message)));
    });
    // One decoder for all, as a control stream has.
    let mut decoder = Decoder::default();
    group.bench_function(BenchmarkId::new("decode", name), |bencher| {
        bencher.iter(|| {
            decoder.push(black_box(&bytes));
            let message: Option<M> = decoder.next(SWITCHOVER_MAX).expect("its own bytes");
            message.expect("all of them")
        });
    });
}

fn frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/frame");
    let range = PageRange::new(PageIndex(GIB_PAGES + 5), 64);
    let header = FrameHeader::new(range, FrameKind::Raw);
    let bytes = header.encode();
    group.bench_function("header/encode", |bencher| {
        bencher.iter(|| black_box(header).encode());
    });
    group.bench_function("header/decode", |bencher| {
        bencher.iter(|| FrameHeader::decode(black_box(&bytes), TIB_PAGES));
    });
    let request = FaultRequest(PageRange::one(range.first));
    let bytes = request.encode();
    group.bench_function("request/encode", |bencher| {
        bencher.iter(|| black_box(request).encode());
    });
    group.bench_function("request/decode", |bencher| {
        bencher.iter(|| FaultRequest::decode(black_box(&bytes), TIB_PAGES));
    });
    group.finish();
}

fn page_maps(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/page_map");
    let pages = 4 * GIB_PAGES;
    let mut dense = PageMap::zeroed(pages);
    dense.set_data(PageRange::new(PageIndex(0), pages));
    let mut alternating = PageMap::zeroed(pages);
    for page in (0..pages).step_by(2) {
        alternating.set_data(PageRange::one(PageIndex(page)));
    }
    for (name, map) in [
        ("4-GiB-dense", dense),
        ("4-GiB-sparse", runs(pages, 1000)),
        ("4-GiB-alternating", alternating),
        ("1-TiB-sparse", runs(TIB_PAGES, 1000)),
    ] {
        let bytes = map.encode();
        let pages = map.bits().len() as u64;
        group.throughput(Throughput::Elements(pages));
        group.bench_function(BenchmarkId::new("encode", name), |bencher| {
            bencher.iter(|| black_box(&map).encode());
        });
        group.bench_function(BenchmarkId::new("decode", name), |bencher| {
            bencher.iter(|| PageMap::decode(black_box(&bytes), pages));
        });
    }
    group.finish();
}

/// A map with so many runs of 64 pages of data, anywhere.
fn runs(pages: u64, count: usize) -> PageMap {
    let mut random = Random::new(3);
    let mut map = PageMap::zeroed(pages);
    for _ in 0..count {
        map.set_data(PageRange::new(PageIndex(random.next() % pages), 64));
    }
    map
}

fn tickets(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/ticket");
    let ticket = Ticket {
        addresses: vec![
            ([192, 0, 2, 7], 4747).into(),
            ([0x2001, 0xdb8, 0, 0, 0, 0, 0, 7], 4747).into(),
        ],
        server: Fingerprint([0x11; 32]),
        session: SessionId([7; 16]),
        secret: Secret::from_bytes([9; 32]),
        expires_at_s: 1_800_000_000,
    };
    let text = ticket.to_text();
    group.bench_function("to_text", |bencher| {
        bencher.iter(|| black_box(&ticket).to_text())
    });
    group.bench_function("parse", |bencher| {
        bencher.iter(|| Ticket::parse(black_box(&text)))
    });
    group.finish();
}
