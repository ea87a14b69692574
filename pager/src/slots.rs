//! One byte of state a slot, eight to an atomic word: the store under [`crate::table`].
//!
//! A byte holds a state, or the state it had when it was claimed with [`FILLING`] set over it, so that an install that
//! fails can be taken back without losing what was asked for. Every change is one compare-and-swap of a word; a run of
//! slots in one state changes eight at a time.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Not here, and nobody asked for it.
pub(crate) const ABSENT: u8 = 0;
/// Not here; a touch waits for it.
pub(crate) const REQUESTED: u8 = 1;
/// Zero at the source; nothing is installed.
pub(crate) const ZERO: u8 = 2;
/// Given back by the guest: zero from then on; nothing is installed.
pub(crate) const REMOVED: u8 = 3;
/// Here.
pub(crate) const PRESENT: u8 = 4;
/// In the memory's file since before the machine was handed over; not mapped.
pub(crate) const HELD: u8 = 5;
/// Set over one of the above while somebody installs it.
pub(crate) const FILLING: u8 = 0x80;

const SLOTS: u64 = 8;

/// What a change did to the count of slots whose data is still to come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Delta(pub(crate) i64);

const fn splat(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; SLOTS as usize])
}

/// How many of a word's eight slots are pending.
const fn pending(word: u64) -> i64 {
    // `ABSENT` and `REQUESTED` are the two states without a bit in 0x7e. Adding 0x7f to seven bits sets the eighth
    // unless they are all zero, and never carries into the next byte.
    let rest = word & splat(0x7e);
    (!(rest + splat(0x7f)) & splat(0x80)).count_ones() as i64
}

/// The slots of one word that a range covers, and the word's number.
fn word_part(slots: &Range<u64>) -> (usize, Range<usize>) {
    let first = (slots.start % SLOTS) as usize;
    let end = first as u64 + (slots.end - slots.start).min(SLOTS - first as u64);
    ((slots.start / SLOTS) as usize, first..end as usize)
}

/// The atomic bytes.
pub(crate) struct SlotMap {
    words: Box<[AtomicU64]>,
    len: u64,
}

impl SlotMap {
    /// `len` slots, all [`ABSENT`].
    pub(crate) fn new(len: u64) -> Self {
        let words = (0..len.div_ceil(SLOTS)).map(|_| AtomicU64::new(splat(ABSENT)));
        Self {
            words: words.collect(),
            len,
        }
    }

    /// The state of one slot, or `None` past the end.
    pub(crate) fn get(&self, slot: u64) -> Option<u8> {
        if slot >= self.len {
            return None;
        }
        let word = self.words[(slot / SLOTS) as usize].load(Ordering::Acquire);
        Some(word.to_ne_bytes()[(slot % SLOTS) as usize])
    }

    /// Changes one slot, and returns the state it had; `None` past the end. `change` may be called more than once.
    pub(crate) fn change_one(&self, slot: u64, change: impl Fn(u8) -> u8) -> Option<u8> {
        if slot >= self.len {
            return None;
        }
        let word = &self.words[(slot / SLOTS) as usize];
        let at = (slot % SLOTS) as usize;
        let mut old = word.load(Ordering::Acquire);
        loop {
            let mut bytes = old.to_ne_bytes();
            let was = bytes[at];
            bytes[at] = change(was);
            if bytes[at] == was {
                return Some(was);
            }
            match swap(word, old, u64::from_ne_bytes(bytes)) {
                Ok(()) => return Some(was),
                Err(now) => old = now,
            }
        }
    }

    /// Changes every slot of `slots`, which must be in the map. `change` may be called more than once for a slot.
    pub(crate) fn change_all(&self, slots: Range<u64>, change: impl Fn(u8) -> u8) -> Delta {
        let mut rest = slots;
        let mut delta = 0;
        let mut known = None;
        while !rest.is_empty() {
            let (number, part) = word_part(&rest);
            rest.start += part.len() as u64;
            let word = &self.words[number];
            let mut old = word.load(Ordering::Acquire);
            loop {
                let new = match known {
                    // Most words of a long run are alike.
                    Some((same, new)) if same == old && part.len() as u64 == SLOTS => new,
                    _ => change_part(old, part.clone(), &change),
                };
                if part.len() as u64 == SLOTS {
                    known = Some((old, new));
                }
                if new == old {
                    break;
                }
                match swap(word, old, new) {
                    Ok(()) => {
                        delta += pending(new) - pending(old);
                        break;
                    }
                    Err(now) => old = now,
                }
            }
        }
        Delta(delta)
    }

    /// Finds the first slot of `slots` that `change` takes (gives `Some` for), and changes it and those behind it up
    /// to the first that it does not take. What is returned was changed by this call and by no other.
    pub(crate) fn take_run(
        &self,
        slots: Range<u64>,
        change: impl Fn(u8) -> Option<u8>,
    ) -> Option<(Range<u64>, Delta)> {
        let mut rest = slots;
        let mut run: Option<Range<u64>> = None;
        let mut delta = 0;
        while !rest.is_empty() {
            let (number, part) = word_part(&rest);
            let base = rest.start - part.start as u64;
            rest.start = base + part.end as u64;
            let word = &self.words[number];
            let mut old = word.load(Ordering::Acquire);
            let taken = loop {
                let (new, taken) = take_part(old, part.clone(), run.is_some(), &change);
                if taken.is_empty() {
                    break taken;
                }
                match swap(word, old, new) {
                    Ok(()) => {
                        delta += pending(new) - pending(old);
                        break taken;
                    }
                    Err(now) => old = now,
                }
            };
            let begin = run
                .as_ref()
                .map_or(base + taken.start as u64, |run| run.start);
            if !taken.is_empty() {
                run = Some(begin..base + taken.end as u64);
            }
            if run.is_some() && (taken.is_empty() || taken.end != part.end) {
                break;
            }
        }
        run.map(|run| (run, Delta(delta)))
    }

    /// The first slot of `slots` whose state `wanted` accepts.
    pub(crate) fn find(&self, slots: Range<u64>, wanted: impl Fn(u8) -> bool) -> Option<u64> {
        let mut rest = slots;
        while !rest.is_empty() {
            let (number, part) = word_part(&rest);
            let base = rest.start - part.start as u64;
            rest.start = base + part.end as u64;
            let bytes = self.words[number].load(Ordering::Acquire).to_ne_bytes();
            if let Some(at) = part.clone().find(|&at| wanted(bytes[at])) {
                return Some(base + at as u64);
            }
        }
        None
    }

    /// The first run of slots in `slots` whose state `wanted` accepts. A snapshot: others may change it meanwhile.
    pub(crate) fn find_run(
        &self,
        slots: Range<u64>,
        wanted: impl Fn(u8) -> bool,
    ) -> Option<Range<u64>> {
        let mut rest = slots;
        let mut run: Option<Range<u64>> = None;
        while !rest.is_empty() {
            let (number, part) = word_part(&rest);
            let base = rest.start - part.start as u64;
            rest.start = base + part.end as u64;
            let word = self.words[number].load(Ordering::Acquire);
            let (_, found) = take_part(word, part.clone(), run.is_some(), &|state| {
                wanted(state).then_some(state)
            });
            match run.as_mut() {
                Some(run) => run.end = base + found.end as u64,
                None if found.is_empty() => continue,
                None => run = Some(base + found.start as u64..base + found.end as u64),
            }
            if found.end != part.end {
                break;
            }
        }
        run
    }
}

/// Both orderings are the strong ones: a claim must be seen before what the claimant writes, and a finish after it.
fn swap(word: &AtomicU64, old: u64, new: u64) -> Result<(), u64> {
    word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
        .map(drop)
}

fn change_part(old: u64, part: Range<usize>, change: &impl Fn(u8) -> u8) -> u64 {
    let mut bytes = old.to_ne_bytes();
    if part.len() == bytes.len() && old == splat(bytes[0]) {
        return splat(change(bytes[0]));
    }
    for byte in &mut bytes[part] {
        *byte = change(*byte);
    }
    u64::from_ne_bytes(bytes)
}

/// The word after taking the first run in `part`, and that run's place in the word. With `going_on`, the run must start
/// at `part`'s first slot; it is empty (at that slot) where it does not.
fn take_part(
    old: u64,
    part: Range<usize>,
    going_on: bool,
    change: &impl Fn(u8) -> Option<u8>,
) -> (u64, Range<usize>) {
    let mut bytes = old.to_ne_bytes();
    if part.len() == bytes.len() && old == splat(bytes[0]) {
        return match change(bytes[0]) {
            Some(new) => (splat(new), part),
            None => (old, part.start..part.start),
        };
    }
    let mut taken = part.start..part.start;
    for at in part {
        match change(bytes[at]) {
            Some(new) => {
                if taken.is_empty() {
                    taken.start = at;
                }
                bytes[at] = new;
                taken.end = at + 1;
            }
            None if going_on || !taken.is_empty() => break,
            None => {}
        }
    }
    (u64::from_ne_bytes(bytes), taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_pending(state: u8) -> bool {
        state & !FILLING <= REQUESTED
    }

    fn of(states: &[u8]) -> SlotMap {
        let map = SlotMap::new(states.len() as u64);
        for (slot, &state) in states.iter().enumerate() {
            map.change_one(slot as u64, |_| state);
        }
        map
    }

    fn claim(state: u8) -> Option<u8> {
        (state <= REQUESTED).then_some(state | FILLING)
    }

    #[test]
    fn pending_counts_each_state_right() {
        for state in [ABSENT, REQUESTED, ZERO, REMOVED, PRESENT] {
            for filling in [0, FILLING] {
                let byte = state | filling;
                assert_eq!(
                    pending(splat(byte)),
                    if is_pending(byte) { 8 } else { 0 },
                    "{byte:#x}"
                );
                let one = splat(PRESENT) & !0xff_00 | u64::from(byte) << 8;
                assert_eq!(pending(one), i64::from(is_pending(byte)), "{byte:#x}");
            }
        }
    }

    #[test]
    fn a_run_goes_over_words_and_ends_where_it_must() {
        let mut states = vec![ABSENT; 40];
        states[0..3].fill(PRESENT);
        states[30] = ZERO;
        let map = of(&states);
        let (run, delta) = map.take_run(0..40, claim).expect("a run");
        assert_eq!((run, delta), (3..30, Delta(0)));
        assert_eq!(map.take_run(0..40, claim).expect("the rest").0, 31..40);
        assert_eq!(map.take_run(0..40, claim), None);
        assert_eq!(map.get(3), Some(ABSENT | FILLING));
        assert_eq!(map.get(30), Some(ZERO));
        assert_eq!(map.get(40), None);
    }

    #[test]
    fn a_run_that_ends_with_a_word_does_not_skip_on() {
        let mut states = vec![ABSENT; 24];
        states[8] = PRESENT;
        let map = of(&states);
        assert_eq!(map.take_run(0..24, claim).expect("a run").0, 0..8);
        assert_eq!(map.find_run(0..24, |state| state == ABSENT), Some(9..24));
        assert_eq!(
            map.find_run(0..24, |state| state & FILLING != 0),
            Some(0..8)
        );
    }

    #[test]
    fn a_change_reports_what_became_pending_or_not() {
        let map = SlotMap::new(100);
        assert_eq!(map.change_all(5..95, |_| PRESENT), Delta(-90));
        assert_eq!(map.change_all(0..100, |_| PRESENT), Delta(-10));
        assert_eq!(map.change_all(7..9, |_| REQUESTED), Delta(2));
        assert_eq!(map.find_run(0..100, is_pending), Some(7..9));
    }
}
