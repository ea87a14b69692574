//! The page table against a plain model of it, operation by operation, and under claims from several threads.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_pager::table::{FaultAction, MapLengthError, PageState, PageTable};
use lazyvm_wire::{Backing, Layout, PageIndex, PageRange, Region};
use proptest::prelude::*;

fn layout(sizes: &[(u64, Backing)]) -> Layout {
    let regions = sizes.iter().map(|&(units, backing)| Region {
        name: "ram".to_owned(),
        gpa: None,
        pages: units * backing.pages(),
        backing,
    });
    Layout::new(regions.collect()).expect("a layout")
}

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex(first), count)
}

/// A unit of the model. What it was before it was claimed is beside the claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Unit {
    range: PageRange,
    state: PageState,
    claimed: bool,
}

struct Model(Vec<Unit>);

impl Model {
    fn new(layout: &Layout) -> Self {
        let mut units = Vec::new();
        let mut page = PageIndex(0);
        while let Some(range) = layout.unit_of(page) {
            units.push(Unit {
                range,
                state: PageState::Absent,
                claimed: false,
            });
            page = range.end();
        }
        Self(units)
    }

    fn within(&mut self, range: PageRange) -> impl Iterator<Item = &mut Unit> {
        self.0
            .iter_mut()
            .filter(move |unit| unit.range.intersect(range) == unit.range)
    }

    fn fault(&mut self, page: u64) -> Option<FaultAction> {
        let unit = self
            .0
            .iter_mut()
            .find(|unit| unit.range.contains(PageIndex(page)))?;
        let was = *unit;
        if was.state == PageState::Absent {
            unit.state = PageState::Requested;
        }
        Some(match was.state {
            _ if was.claimed => FaultAction::AlreadyRequested,
            PageState::Absent => FaultAction::Request(unit.range),
            PageState::Present => FaultAction::Wake,
            PageState::Zero | PageState::Removed => FaultAction::FillZero,
            PageState::Held => FaultAction::Map,
            _ => FaultAction::AlreadyRequested,
        })
    }

    /// Marks the units of `range` for which `wanted` holds as claimed, and returns them.
    fn claim(&mut self, range: PageRange, wanted: impl Fn(PageState) -> bool) -> Vec<PageRange> {
        self.within(range)
            .filter(|unit| !unit.claimed && wanted(unit.state))
            .map(|unit| {
                unit.claimed = true;
                unit.range
            })
            .collect()
    }

    fn each(&mut self, range: PageRange, mut change: impl FnMut(&mut Unit)) {
        self.within(range).for_each(&mut change);
    }

    fn check(&self, table: &PageTable) {
        let missing = |unit: &&Unit| unit.state.is_missing();
        for unit in &self.0 {
            let expected = if unit.claimed {
                PageState::Filling
            } else {
                unit.state
            };
            for page in [unit.range.first.0, unit.range.end().0 - 1] {
                assert_eq!(table.state(PageIndex(page)), Some(expected), "{unit:?}");
            }
        }
        let remaining: u64 = self
            .0
            .iter()
            .filter(missing)
            .map(|unit| unit.range.count)
            .sum();
        assert_eq!(table.remaining(), remaining);
        assert_eq!(
            table.is_complete(),
            !self.0.iter().any(|unit| unit.claimed || missing(&unit))
        );
        let settled = table.settled_bits();
        let requested = bits(table.pages(), table.requested());
        for unit in &self.0 {
            let page = unit.range.first.as_usize();
            assert_eq!(settled[page], !(unit.claimed || missing(&unit)));
            assert_eq!(
                requested[page],
                !unit.claimed && unit.state == PageState::Requested
            );
        }
    }
}

fn bits(pages: u64, runs: impl Iterator<Item = PageRange>) -> BitVec<u64, Lsb0> {
    let mut bits = BitVec::repeat(false, pages as usize);
    for run in runs {
        let slice = &mut bits[run.first.as_usize()..run.end().as_usize()];
        assert!(slice.not_any(), "{run} comes twice");
        slice.fill(true);
    }
    bits
}

#[derive(Clone, Debug)]
enum Op {
    Fault(u64),
    Claim(PageRange),
    ClaimRun(PageRange, u64),
    ClaimZero(PageRange),
    ClaimHeld(PageRange, u64),
    Lose(prop::sample::Index),
    MarkHeld(PageRange),
    Finish(prop::sample::Index),
    Release(prop::sample::Index),
    Remove(PageRange),
    MarkZero(PageRange),
    MarkPresent(PageRange),
}

/// Ranges that begin and end anywhere, also past the image and past the last number.
fn any_range(pages: u64) -> impl Strategy<Value = PageRange> {
    let count = prop_oneof![4 => 1..40_u64, 2 => 1..pages, 1 => Just(0), 1 => Just(u64::MAX)];
    (0..pages + 10, count).prop_map(|(first, count)| range(first, count))
}

fn any_op(pages: u64) -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0..pages + 3).prop_map(Op::Fault),
        3 => any_range(pages).prop_map(Op::Claim),
        3 => (any_range(pages), 1..600_u64).prop_map(|(range, max)| Op::ClaimRun(range, max)),
        2 => any_range(pages).prop_map(Op::ClaimZero),
        2 => (any_range(pages), 1..600_u64).prop_map(|(range, max)| Op::ClaimHeld(range, max)),
        1 => any::<prop::sample::Index>().prop_map(Op::Lose),
        2 => any_range(pages).prop_map(Op::MarkHeld),
        4 => any::<prop::sample::Index>().prop_map(Op::Finish),
        2 => any::<prop::sample::Index>().prop_map(Op::Release),
        1 => any_range(pages).prop_map(Op::Remove),
        1 => any_range(pages).prop_map(Op::MarkZero),
        1 => any_range(pages).prop_map(Op::MarkPresent),
    ]
}

/// Joins units to the runs that the table gives: within one region, one after the other.
fn joined(layout: &Layout, units: Vec<PageRange>) -> Vec<PageRange> {
    let region = |page: PageIndex| layout.locate(page).map(|(region, _)| region);
    let mut runs: Vec<PageRange> = Vec::new();
    for unit in units {
        match runs.last_mut() {
            Some(run) if run.end() == unit.first && region(run.first) == region(unit.first) => {
                run.count += unit.count;
            }
            _ => runs.push(unit),
        }
    }
    runs
}

fn apply(op: Op, layout: &Layout, table: &PageTable, model: &mut Model, held: &mut Vec<PageRange>) {
    match op {
        Op::Fault(page) => assert_eq!(table.fault(PageIndex(page)), model.fault(page)),
        Op::Claim(range) => {
            let runs: Vec<_> = table.claim(range).collect();
            let units = model.claim(range, |state| {
                matches!(state, PageState::Absent | PageState::Requested)
            });
            assert_eq!(runs, joined(layout, units));
            held.extend(runs);
        }
        Op::ClaimRun(range, max) => {
            let run = table.claim_run(range, max);
            let waits = |state| matches!(state, PageState::Absent | PageState::Requested);
            let expected = model
                .within(range)
                .find(|unit| !unit.claimed && waits(unit.state))
                .map(|unit| unit.range.first);
            assert_eq!(run.map(|run| run.first), expected);
            if let Some(run) = run {
                let unit = table.unit_of(run.first).expect("a page of the image");
                assert!(run.count <= max.max(unit.count));
                assert_eq!(
                    joined(layout, model.claim(run, waits)),
                    [run],
                    "all of the run was to be had"
                );
                held.push(run);
            }
        }
        Op::ClaimZero(range) => {
            let mut rest = range;
            let mut runs = Vec::new();
            while let Some(run) = table.claim_zero_run(rest, u64::MAX) {
                runs.push(run);
                rest = PageRange::new(run.end(), rest.end().0 - run.end().0);
            }
            let units = model.claim(range, |state| {
                matches!(state, PageState::Zero | PageState::Removed)
            });
            assert_eq!(runs, joined(layout, units));
            held.extend(runs);
        }
        Op::ClaimHeld(range, max) => {
            if let Some(run) = table.claim_held_run(range, max) {
                let units = model.claim(run, |state| state == PageState::Held);
                assert_eq!(joined(layout, units), [run], "all of the run was to be had");
                held.push(run);
            } else {
                assert!(
                    model
                        .claim(range, |state| state == PageState::Held)
                        .is_empty()
                );
            }
        }
        Op::MarkHeld(range) => {
            let runs: Vec<_> = table.mark_held(range).collect();
            let units = model.claim(range, |state| state == PageState::Requested);
            for unit in &units {
                model.each(*unit, |unit| unit.state = PageState::Held);
            }
            model.each(range, |unit| {
                if unit.state == PageState::Absent && !unit.claimed {
                    unit.state = PageState::Held;
                }
            });
            assert_eq!(runs, joined(layout, units));
            held.extend(runs);
        }
        Op::Finish(_) | Op::Release(_) | Op::Lose(_) if held.is_empty() => {}
        Op::Lose(which) => {
            let at = which.index(held.len());
            let run = held[at];
            table.lose(run);
            let mut lost = false;
            model.each(run, |unit| {
                if unit.state == PageState::Held {
                    lost = true;
                    unit.state = PageState::Requested;
                    unit.claimed = false;
                }
            });
            if lost {
                held.swap_remove(at);
            }
        }
        Op::Finish(which) => {
            let run = held.swap_remove(which.index(held.len()));
            table.finish(run);
            model.each(run, |unit| {
                unit.state = PageState::Present;
                unit.claimed = false;
            });
        }
        Op::Release(which) => {
            let run = held.swap_remove(which.index(held.len()));
            table.release(run);
            model.each(run, |unit| unit.claimed = false);
        }
        Op::Remove(range) => {
            table.remove(range);
            model.each(range, |unit| {
                if !unit.claimed {
                    unit.state = PageState::Removed;
                }
            });
        }
        Op::MarkZero(range) => {
            let runs: Vec<_> = table.mark_zero(range).collect();
            let units = model.claim(range, |state| state == PageState::Requested);
            for unit in &units {
                model.each(*unit, |unit| unit.state = PageState::Zero);
            }
            model.each(range, |unit| {
                if unit.state == PageState::Absent && !unit.claimed {
                    unit.state = PageState::Zero;
                }
            });
            assert_eq!(runs, joined(layout, units));
            held.extend(runs);
        }
        Op::MarkPresent(range) => {
            table.mark_present(range);
            model.each(range, |unit| {
                if unit.state.is_missing() && !unit.claimed {
                    unit.state = PageState::Present;
                }
            });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn does_what_the_model_does(
        small in 1..40_u64,
        huge in 1..4_u64,
        more in 1..20_u64,
        data in proptest::collection::vec(any::<bool>(), 1..64),
        early in proptest::collection::vec(0..60_u64, 0..10),
        ops in proptest::collection::vec(any_op(40 + 3 * 512 + 20), 0..120),
    ) {
        let layout = layout(&[(small, Backing::Small), (huge, Backing::Huge2M), (more, Backing::Small)]);
        let table = PageTable::new(&layout);
        let mut model = Model::new(&layout);
        let mut held = Vec::new();
        for page in early {
            prop_assert_eq!(table.fault(PageIndex(page)), model.fault(page));
        }

        let pages = layout.pages() as usize;
        let map: BitVec<u64, Lsb0> = (0..pages).map(|page| data[page / 9 % data.len()]).collect();
        table.apply_map(&map, |run| held.push(run)).expect("a map of this image");
        let mut waited = Vec::new();
        for unit in &mut model.0 {
            if map[unit.range.first.as_usize()..unit.range.end().as_usize()].not_any() {
                unit.claimed = unit.state == PageState::Requested;
                unit.state = PageState::Zero;
                if unit.claimed {
                    waited.push(unit.range);
                }
            }
        }
        // The map may cut a run in two.
        prop_assert_eq!(joined(&layout, held.clone()), joined(&layout, waited));
        model.check(&table);

        for op in ops {
            apply(op, &layout, &table, &mut model, &mut held);
            model.check(&table);
        }
    }
}

#[test]
fn a_map_of_another_image_changes_nothing() {
    let table = PageTable::new(&Layout::flat(100).expect("a layout"));
    let map = BitVec::<u64, Lsb0>::repeat(false, 99);
    let error = table.apply_map(&map, |_| ()).expect_err("a wrong length");
    assert_eq!(
        error,
        MapLengthError {
            got: 99,
            expected: 100
        }
    );
    assert_eq!(table.remaining(), 100);
}

#[test]
fn whole_units_are_told_from_others() {
    let table = PageTable::new(&layout(&[(8, Backing::Small), (2, Backing::Huge2M)]));
    for whole in [range(0, 1), range(3, 5), range(3, 5 + 512), range(520, 512)] {
        assert!(table.is_whole_units(whole), "{whole}");
    }
    let cut = [
        range(3, 0),
        range(3, 6),
        range(8, 511),
        range(9, 1023),
        range(0, u64::MAX),
    ];
    for cut in cut {
        assert!(!table.is_whole_units(cut), "{cut}");
    }
}

#[test]
fn each_page_is_claimed_by_one_thread() {
    const PAGES: u64 = 10_000;
    let table = PageTable::new(&layout(&[
        (PAGES, Backing::Small),
        (20, Backing::Huge2M),
        (77, Backing::Small),
    ]));
    let claims: Vec<AtomicU64> = (0..table.pages()).map(|_| AtomicU64::new(0)).collect();
    let installed = AtomicU64::new(0);
    thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (table, claims, installed) = (&table, &claims, &installed);
            scope.spawn(move || {
                // All go over the same pages, in strides that meet in the middle of words.
                let stride = 37 + thread * 13;
                for step in 0..3 * table.pages() / stride {
                    let first = (step * stride + thread * 5) % table.pages();
                    if thread == 3 {
                        table.fault(PageIndex(first));
                    }
                    for run in table.claim(range(first, 700)) {
                        for page in run.pages() {
                            claims[page.as_usize()].fetch_add(1, Ordering::Relaxed);
                        }
                        if step % 5 == 4 {
                            for page in run.pages() {
                                claims[page.as_usize()].fetch_sub(1, Ordering::Relaxed);
                            }
                            table.release(run);
                        } else {
                            installed.fetch_add(run.count, Ordering::Relaxed);
                            table.finish(run);
                        }
                    }
                }
            });
        }
    });
    for run in table.claim(range(0, u64::MAX)) {
        installed.fetch_add(run.count, Ordering::Relaxed);
        for page in run.pages() {
            claims[page.as_usize()].fetch_add(1, Ordering::Relaxed);
        }
        table.finish(run);
    }
    assert!(
        claims
            .iter()
            .all(|count| count.load(Ordering::Relaxed) == 1)
    );
    assert_eq!(installed.into_inner(), table.pages());
    assert_eq!(table.remaining(), 0);
    assert!(table.is_complete());
}
