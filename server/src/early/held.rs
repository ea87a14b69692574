//! Which of the pages that went hold at the pause.

use std::collections::HashMap;
use std::ops::Range;

use lazyvm_wire::held::HeldRun;
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageMap, PageRange};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::{NONE, READ_PAGES, ZERO};
use crate::port::SourceMemory;

/// Most threads that compare.
const THREADS_MAX: usize = 4;

/// The first page of `pages` with a mark. Most have none, so that many are looked at in one step.
pub(super) fn first_marked(marks: &[u8], pages: Range<usize>) -> Option<usize> {
    const STEP: usize = 64;
    let mut at = pages.start;
    let part = marks.get(pages)?;
    for step in part.chunks(STEP) {
        if step.iter().fold(0, |any, &mark| any | mark) != NONE {
            return Some(at + step.iter().position(|&mark| mark != NONE)?);
        }
        at += STEP;
    }
    None
}

/// The runs of equal marks, ascending.
fn runs(marks: &[u8]) -> impl Iterator<Item = (PageRange, u8)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = first_marked(marks, at..marks.len())?;
        let mark = marks[first];
        let rest = &marks[first..];
        let count = rest.iter().position(|&other| other != mark);
        let count = count.unwrap_or(rest.len());
        at = first + count;
        let range = PageRange::new(PageIndex(first as u64), count as u64);
        Some((range, mark))
    })
}

/// The runs of equal rounds among the pages that hold data. What was found zero is taken from the map.
pub(super) fn by_round(marks: &[u8], map: &mut PageMap) -> Vec<HeldRun> {
    let mut held: Vec<HeldRun> = Vec::new();
    for (run, round) in runs(marks) {
        if round == ZERO {
            map.set_zero(run);
            continue;
        }
        let bits = map.bits();
        let (mut at, end) = (run.first.as_usize(), run.end().as_usize());
        while let Some(offset) = bits[at..end].first_one() {
            let first = at + offset;
            let count = bits[first..end].leading_ones();
            held.push(HeldRun {
                range: PageRange::new(PageIndex(first as u64), count as u64),
                round,
            });
            at = first + count;
        }
    }
    held
}

/// Those of these pages, ascending, whose whole unit is among them: all went in the first round.
pub(super) fn whole_units(layout: &Layout, pages: &[PageIndex]) -> Vec<HeldRun> {
    let mut held: Vec<HeldRun> = Vec::new();
    let mut rest = pages;
    while let Some((&page, behind)) = rest.split_first() {
        let unit = layout.unit_of(page).unwrap_or(PageRange::one(page));
        let count = unit.count as usize;
        let last = rest.get(count - 1).map(|last| PageIndex(last.0 + 1));
        if page != unit.first || last != Some(unit.end()) {
            rest = behind;
            continue;
        }
        rest = &rest[count..];
        match held.last_mut() {
            Some(last) if last.range.end() == page => last.range.count += unit.count,
            _ => held.push(HeldRun {
                range: unit,
                round: 1,
            }),
        }
    }
    held
}

/// Those of the pages that were sent that are data and the same still, ascending. The machine stands still meanwhile, so
/// several threads look.
pub(super) fn by_digest(
    sent: &HashMap<PageIndex, u128>,
    seed: u64,
    memory: &dyn SourceMemory,
    map: &PageMap,
) -> Vec<PageIndex> {
    let mut pages: Vec<_> = sent.keys().copied().collect();
    pages.sort_unstable();
    pages.retain(|page| map.bits()[page.as_usize()]);
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let part = pages.len().div_ceil(threads.min(THREADS_MAX)).max(1);
    std::thread::scope(|scope| {
        let parts: Vec<_> = pages
            .chunks(part)
            .map(|pages| scope.spawn(|| same(sent, seed, memory, pages)))
            .collect();
        parts
            .into_iter()
            // A part whose thread has panicked is not held.
            .flat_map(|part| part.join().unwrap_or_default())
            .collect()
    })
}

/// Those of these pages, ascending, that are what was sent.
fn same(
    sent: &HashMap<PageIndex, u128>,
    seed: u64,
    memory: &dyn SourceMemory,
    pages: &[PageIndex],
) -> Vec<PageIndex> {
    let mut same = Vec::with_capacity(pages.len());
    let mut buffer = vec![0; READ_PAGES as usize * PAGE_SIZE];
    let mut rest = pages;
    while let Some(&first) = rest.first() {
        let count = rest
            .iter()
            .zip(first.0..first.0 + READ_PAGES)
            .take_while(|(page, expected)| page.0 == *expected)
            .count();
        let range = PageRange::new(first, count as u64);
        rest = &rest[count..];
        let bytes = &mut buffer[..range.bytes() as usize];
        if memory.read(range, bytes).is_err() {
            continue;
        }
        let now = range.pages().zip(bytes.chunks_exact(PAGE_SIZE));
        same.extend(
            now.filter(|(page, bytes)| sent.get(page) == Some(&xxh3_128_with_seed(bytes, seed)))
                .map(|(page, _)| page),
        );
    }
    same
}
