//! What holds is what the memory is, whatever was written when.

use std::collections::BTreeSet;
use std::io;

use lazyvm_wire::{Backing, Gpa, Region};
use proptest::prelude::*;

use super::*;

/// 60 small pages, three huge ones, and 40 small ones.
const PAGES: u64 = 60 + 3 * 512 + 40;

fn layout() -> Layout {
    let region = |gpa, pages, backing| Region {
        name: String::new(),
        gpa: Some(Gpa(gpa)),
        pages,
        backing,
    };
    let small = Backing::Small;
    let regions = vec![
        region(0, 60, small),
        region(1 << 30, 3 * 512, Backing::Huge2M),
        region(2 << 30, 40, small),
    ];
    Layout::new(regions).unwrap()
}

/// Few pages of the huge ones, and all small ones: of the others there are enough.
fn place(number: u64) -> PageIndex {
    PageIndex(match number {
        0..60 => number,
        60..120 => 60 + (number - 60) * 511 / 20,
        _ => 60 + 3 * 512 + (number - 120) % 40,
    })
}

fn range(number: u64, count: u64) -> PageRange {
    PageRange::new(place(number), count).intersect(layout().range())
}

fn a_range() -> impl Strategy<Value = PageRange> {
    (0..160_u64, prop_oneof![4 => 1..40_u64, 1 => 1..1500_u64])
        .prop_map(|(number, count)| range(number, count))
}

fn unit(page: PageIndex) -> PageRange {
    layout().unit_of(page).unwrap()
}

/// A word a page, 0 for a page of zeros; page 13 can't be read.
#[derive(Clone)]
struct Memory(Vec<u32>);

impl Memory {
    fn of(value: u32) -> Self {
        Self(vec![value; PAGES as usize])
    }

    fn is_zero(&self, range: PageRange) -> bool {
        range.pages().all(|page| self.0[page.as_usize()] == 0)
    }
}

impl SourceMemory for Memory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        if range.contains(PageIndex(13)) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        for (page, bytes) in range.pages().zip(out.chunks_exact_mut(PAGE_SIZE)) {
            bytes.fill(0);
            bytes[..4].copy_from_slice(&self.0[page.as_usize()].to_le_bytes());
        }
        Ok(())
    }

    fn data_runs(&self, _: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        Ok(())
    }
}

/// What the destination has of each page: the round of the newest copy, and its word.
struct There(Vec<(u8, u32)>);

impl There {
    /// Sends what was taken, as frames do: runs of data, and nothing of zeros. `false` where it can't be read.
    fn take(&mut self, early: &mut Early, memory: &Memory, outgoing: Outgoing) -> bool {
        let Outgoing {
            range,
            round,
            whole,
        } = outgoing;
        let mut bytes = vec![0; range.bytes() as usize];
        if memory.read(range, &mut bytes).is_err() {
            early.not_sent(range);
            return false;
        }
        let parts: Vec<_> = if whole {
            vec![range]
        } else {
            range.pages().map(PageRange::one).collect()
        };
        for (part, bytes) in parts.iter().zip(bytes.chunks(parts[0].bytes() as usize)) {
            if memory.is_zero(*part) {
                early.found_zero(*part);
                continue;
            }
            early.sent(*part, bytes);
            for page in part.pages() {
                self.0[page.as_usize()] = (round, memory.0[page.as_usize()]);
            }
        }
        true
    }

    fn take_all(&mut self, early: &mut Early, memory: &Memory) -> Vec<Outgoing> {
        let mut all = Vec::new();
        while let Some(outgoing) = early.next() {
            if self.take(early, memory, outgoing) {
                all.push(outgoing);
            }
        }
        all
    }
}

fn all_data() -> PageMap {
    let mut map = PageMap::zeroed(PAGES);
    map.set_data(layout().range());
    map
}

proptest! {
    /// Without reports exactly those pages are held that went, whose unit did not change, and are data; each goes once.
    #[test]
    fn what_changed_is_not_held(
        queued in proptest::collection::vec(a_range(), 0..12),
        changed in proptest::collection::vec(0..160_u64, 0..60),
        zero in proptest::collection::vec(0..160_u64, 0..20),
    ) {
        let mut memory = Memory::of(1);
        let mut early = Early::new(&layout(), 7);
        let mut there = There(vec![(0, 0); PAGES as usize]);
        let mut sent = Vec::new();
        for range in queued {
            early.queue([range]);
            let outgoing = there.take_all(&mut early, &memory);
            sent.extend(outgoing.iter().flat_map(|outgoing| outgoing.range.pages()));
        }
        let once: BTreeSet<_> = sent.iter().copied().collect();
        prop_assert_eq!(once.len(), sent.len());
        let mut map = all_data();
        for number in zero {
            map.set_zero(unit(place(number)));
        }
        let changed: BTreeSet<_> = changed.into_iter().map(place).collect();
        for &page in &changed {
            memory.0[page.as_usize()] = 2;
        }
        let changed: BTreeSet<_> = changed.iter().map(|&page| unit(page).first).collect();
        let mut held = vec![false; PAGES as usize];
        for run in early.held(&memory, &mut map) {
            held[run.range.first.as_usize()..run.range.end().as_usize()].fill(true);
        }
        for page in layout().range().pages() {
            let is_held = held[page.as_usize()];
            let is_same = !changed.contains(&unit(page).first);
            prop_assert!(!is_held || is_same, "{} is stale", page);
            // A run of pages next to one that can't be read is read with it, and is not held.
            if page.0 >= 13 + 32 {
                let expected = once.contains(&page) && is_same && map.bits()[page.as_usize()];
                prop_assert_eq!(is_held, expected, "{}", page);
            }
        }
        early.give_up();
        prop_assert!(early.held(&memory, &mut map).is_empty());
    }

    /// A machine that writes between any two steps, and a tracker that reports it some time later, of a huge page any part or
    /// all: what holds at the pause is what the destination has, in the round that is told, in whole units; and what is
    /// called zero is.
    #[test]
    fn what_holds_is_what_went_last(
        steps in proptest::collection::vec((0..10_u8, a_range()), 0..160),
        by_unit in any::<bool>(),
    ) {
        let mut memory = Memory::of(0);
        memory.0[..700].fill(1);
        let mut next_word = 2;
        let mut unreported = BTreeSet::new();
        let mut there = There(vec![(0, 0); PAGES as usize]);
        let mut early = Early::new(&layout(), 7);
        early.writes_are_tracked();
        early.queue([layout().range()]);
        // And the memory as it was read.
        let mut taken: Option<(Outgoing, Option<Memory>)> = None;
        for (step, range) in steps {
            match step {
                0..=2 => for page in range.pages().take(40) {
                    memory.0[page.as_usize()] = if step == 0 { 0 } else { next_word };
                    next_word += 1;
                    unreported.insert(if by_unit { unit(page).first } else { page });
                },
                3 if taken.is_none() => taken = early.next().map(|outgoing| (outgoing, None)),
                4 => if let Some((_, read)) = &mut taken {
                    read.get_or_insert(memory.clone());
                },
                5 => if let Some((outgoing, read)) = taken.take() {
                    let _ = there.take(&mut early, &read.unwrap_or(memory.clone()), outgoing);
                },
                6 if taken.is_none() => drop(there.take_all(&mut early, &memory)),
                7 => {
                    let mut stale = Vec::new();
                    for page in std::mem::take(&mut unreported) {
                        let range = if by_unit { unit(page) } else { PageRange::one(page) };
                        early.written(range, |page| stale.push(PageRange::one(page)));
                    }
                    if early.next_round() {
                        early.queue(stale);
                    }
                }
                8 => early.queue([range]),
                9 if range.count == 1 => early.unqueue(),
                _ => {}
            }
        }
        for page in unreported {
            let _ = early.written(PageRange::one(page), |_| ());
        }
        let mut map = all_data();
        let mut held = vec![false; PAGES as usize];
        for run in early.held(&memory, &mut map) {
            for page in run.range.pages() {
                held[page.as_usize()] = true;
                let expected = (run.round, memory.0[page.as_usize()]);
                prop_assert_eq!(there.0[page.as_usize()], expected, "{}", page);
            }
        }
        for page in layout().range().pages() {
            prop_assert_eq!(held[page.as_usize()], held[unit(page).first.as_usize()]);
            if !map.bits()[page.as_usize()] {
                prop_assert!(memory.is_zero(unit(page)), "{} is not zero", page);
                prop_assert!(!held[page.as_usize()]);
            }
        }
    }
}

#[test]
fn a_huge_page_goes_whole_and_a_write_to_any_part_makes_all_of_it_stale() {
    let memory = Memory::of(1);
    let mut there = There(vec![(0, 0); PAGES as usize]);
    let mut early = Early::new(&layout(), 7);
    early.writes_are_tracked();
    early.queue([PageRange::one(PageIndex(60 + 700))]);
    let huge = PageRange::new(PageIndex(60 + 512), 512);
    let outgoing = there.take_all(&mut early, &memory);
    let expected = Outgoing {
        range: huge,
        round: 1,
        whole: true,
    };
    assert_eq!(outgoing, [expected]);
    let held = |early: &mut Early| -> Vec<_> {
        let held = early.held(&memory, &mut all_data());
        held.into_iter().map(|run| run.range).collect()
    };
    assert_eq!(held(&mut early), [huge]);
    let mut stale = Vec::new();
    early.written(PageRange::one(PageIndex(60 + 1023)), |page| {
        stale.push(page);
    });
    assert_eq!(stale, huge.pages().collect::<Vec<_>>());
    assert_eq!(held(&mut early), []);
}

#[test]
fn zeros_that_are_reported_again_and_again_go_once_more() {
    let memory = Memory::of(0);
    let mut there = There(vec![(0, 0); PAGES as usize]);
    let mut early = Early::new(&layout(), 7);
    early.writes_are_tracked();
    let page = PageRange::one(PageIndex(5));
    early.queue([page]);
    for expected in [1, 0, 0] {
        there.take_all(&mut early, &memory);
        let mut stale = 0;
        early.written(page, |_| stale += 1);
        assert_eq!(stale, expected);
        early.queue((stale > 0).then_some(page));
    }
}

#[test]
fn what_is_being_read_at_the_pause_does_not_hold() {
    let memory = Memory::of(1);
    for tracked in [true, false] {
        let mut early = Early::new(&layout(), 7);
        if tracked {
            early.writes_are_tracked();
        }
        early.queue([PageRange::new(PageIndex(20), 8)]);
        let outgoing = early.next().unwrap();
        let told = PageRange::new(outgoing.range.first, 3);
        let mut bytes = vec![0; told.bytes() as usize];
        memory.read(told, &mut bytes).unwrap();
        early.sent(told, &bytes);
        let held = early.held(&memory, &mut all_data());
        assert_eq!(held.len(), 1);
        assert_eq!(held[0].range, told);
    }
}
