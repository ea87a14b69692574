//! Which pages that came before the pause hold, and in which round the copy that holds has come.
//!
//! ```text
//! held := run*
//! run  := gap (varint)     pages between the run before and this one; from page 0 on for the first
//!         count (varint)   pages, from 1 on
//!         round (u8)       from 1 on
//! ```
//!
//! Varints are LEB128 of five bytes at most.

use crate::page::{PageIndex, PageRange};

/// Most bytes of it: about a million runs. What does not fit is left out, and sent again.
pub const HELD_BYTES_MAX: usize = 4 << 20;

/// Most bytes of a run.
const RUN_BYTES_MAX: usize = 11;

/// Pages next to each other whose copies of one round hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldRun {
    /// The pages.
    pub range: PageRange,
    /// Their round, from 1 on.
    pub round: u8,
}

/// Bytes that are not what [`encode`] writes for this image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("held pages that can't be read, from byte {at} on")]
pub struct HeldError {
    /// Where the run starts that is wrong.
    pub at: usize,
}

/// Writes runs, ascending and apart from each other, in at most [`HELD_BYTES_MAX`] bytes. Gives how many of them are in it:
/// those behind are left out.
pub fn encode(runs: &[HeldRun]) -> (Vec<u8>, usize) {
    let mut out = Vec::new();
    let mut end = 0;
    for (number, run) in runs.iter().enumerate() {
        if out.len() + RUN_BYTES_MAX > HELD_BYTES_MAX {
            return (out, number);
        }
        put_varint(&mut out, run.range.first.0 - end);
        put_varint(&mut out, run.range.count);
        out.push(run.round);
        end = run.range.end().0;
    }
    (out, runs.len())
}

/// Reads them, for an image of `image_pages`.
///
/// # Errors
/// [`HeldError`].
pub fn decode(bytes: &[u8], image_pages: u64) -> Result<Vec<HeldRun>, HeldError> {
    let mut runs = Vec::new();
    let mut rest = bytes;
    let mut end = 0_u64;
    while !rest.is_empty() {
        let at = bytes.len() - rest.len();
        let run = take_run(&mut rest, end, image_pages).ok_or(HeldError { at })?;
        end = run.range.end().0;
        runs.push(run);
    }
    Ok(runs)
}

fn take_run(rest: &mut &[u8], end: u64, image_pages: u64) -> Option<HeldRun> {
    let first = end.checked_add(take_varint(rest)?)?;
    let count = take_varint(rest)?;
    let round = take_byte(rest)?;
    let fits = first
        .checked_add(count)
        .is_some_and(|end| end <= image_pages);
    (count > 0 && round > 0 && fits).then_some(HeldRun {
        range: PageRange::new(PageIndex(first), count),
        round,
    })
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..35).step_by(7) {
        let byte = take_byte(rest)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn take_byte(rest: &mut &[u8]) -> Option<u8> {
    let (&byte, behind) = rest.split_first()?;
    *rest = behind;
    Some(byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(first: u64, count: u64, round: u8) -> HeldRun {
        HeldRun {
            range: PageRange::new(PageIndex(first), count),
            round,
        }
    }

    #[test]
    fn golden_bytes() {
        let runs = [run(3, 2, 1), run(5, 1, 2), run(300, 200, 255)];
        let golden = [3, 2, 1, 0, 1, 2, 0xa6, 2, 0xc8, 1, 255];
        assert_eq!(encode(&runs), (golden.to_vec(), 3));
        assert_eq!(decode(&golden, 500).unwrap(), runs);
        assert_eq!(decode(&golden, 499), Err(HeldError { at: 6 }));
        assert_eq!(decode(&golden[..5], 500), Err(HeldError { at: 3 }));
        assert_eq!(decode(&[0, 1, 0], 500), Err(HeldError { at: 0 }));
        assert_eq!(decode(&[0, 0, 1], 500), Err(HeldError { at: 0 }));
        assert!(decode(&[0x80; 9], 500).is_err());
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let runs: Vec<_> = (0..1_500_000).map(|number| run(2 * number, 1, 1)).collect();
        let (bytes, count) = encode(&runs);
        assert!(bytes.len() <= HELD_BYTES_MAX && count < runs.len());
        assert_eq!(decode(&bytes, 3_000_000).unwrap(), runs[..count]);
    }

    proptest! {
        #[test]
        fn any_runs_come_back(steps in proptest::collection::vec((0..1000_u64, 1..1000_u64, 1..=255_u8), 0..50)) {
            let mut end = 0;
            let runs: Vec<_> = steps
                .into_iter()
                .map(|(gap, count, round)| {
                    let run = run(end + gap, count, round);
                    end = run.range.end().0;
                    run
                })
                .collect();
            prop_assert_eq!(decode(&encode(&runs).0, end).unwrap(), runs);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100), pages in 0..5000_u64) {
            for run in decode(&bytes, pages).unwrap_or_default() {
                prop_assert!(run.range.end().0 <= pages && run.range.count > 0 && run.round > 0);
            }
        }
    }
}
