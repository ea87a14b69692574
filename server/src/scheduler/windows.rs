//! Windows around faults. Several grow at once, each from a stream of faults that are near each other.
//!
//! The pivots are those of adaptive prepaging, "bubbling" (Hines, Gopalan: Post-Copy Based Live Virtual Machine Migration
//! Using Adaptive Pre-Paging and Dynamic Self-Ballooning, VEE 2009): each fault is a pivot, and what is sent grows
//! outwards from all live ones. How far is by Linux's readahead (`mm/readahead.c`): a window doubles when the next fault
//! comes where it was going, ahead of it in the direction that two faults show.
//!
//! Time is counted in faults: there is no clock here. The sizes are those that did best over all shipped traces, on links of
//! 100 Mbit/s and 1 Gbit/s, 30 to 300 ms (`docs/prepaging.md`).

use std::collections::VecDeque;
use std::ops::Range;

/// Least pages that a window grows by.
pub const GROW_MIN: u64 = 4;

/// Pages of the first window around a fault, half on each side, before anything is known.
pub const GROW_START: u64 = 32;

/// Most pages that a fault lets a window grow by.
pub const GROW_MAX: u64 = 512;

/// Most pages of a window that wait on one side. Those nearer to its first faults than that go with the rest.
pub const WAITING_MAX: u64 = 2 * GROW_MAX;

/// Most windows; the one whose last fault is the oldest makes room.
pub const WINDOWS_MAX: usize = 128;

/// A window is forgotten when so many faults have come since its last.
const EXPIRES_AFTER: u64 = 96;

/// A window halves for each so many faults that came elsewhere.
const HALVES_AFTER: u64 = 16;

/// Pages that a window gives before it is another's turn.
const TURN_PAGES: u64 = 32;

/// What stands beside what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Axis {
    Physical,
    Virtual,
}

/// A part of a window: places on its axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub axis: Axis,
    pub places: Range<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Direction {
    Unknown,
    Up,
    Down,
}

#[derive(Debug)]
struct Window {
    axis: Axis,
    /// All that it has ever held.
    span: Range<u64>,
    /// What waits at its upper and at its lower end.
    above: Range<u64>,
    below: Range<u64>,
    direction: Direction,
    grow: u64,
    /// The first place of its last fault, and which fault that was.
    last: u64,
    fault: u64,
    has_hit: bool,
}

impl Window {
    fn new(axis: Axis, at: &Range<u64>, end: u64, grow: u64, fault: u64) -> Self {
        let half = (grow / 2).max(1);
        let span = at.start.saturating_sub(half)..at.end.saturating_add(half).min(end);
        Self {
            axis,
            above: at.end..span.end,
            below: span.start..at.start,
            span,
            direction: Direction::Unknown,
            grow,
            last: at.start,
            fault,
            has_hit: false,
        }
    }

    fn is_near(&self, at: &Range<u64>) -> bool {
        at.end.saturating_add(self.grow) > self.span.start
            && at.start < self.span.end.saturating_add(self.grow)
    }

    /// The next fault came near it.
    fn hit(&mut self, at: &Range<u64>, end: u64, fault: u64) {
        let halvings = ((fault - self.fault) / HALVES_AFTER).min(16);
        self.grow = ((self.grow * 2) >> halvings).clamp(GROW_MIN, GROW_MAX);
        self.fault = fault;
        self.direction = match at.start.cmp(&self.last) {
            std::cmp::Ordering::Greater => Direction::Up,
            std::cmp::Ordering::Less => Direction::Down,
            std::cmp::Ordering::Equal => self.direction,
        };
        self.last = at.start;
        if self.direction != Direction::Down {
            let edge = at.end.saturating_add(self.grow).min(end);
            let start = if self.above.is_empty() {
                self.span.end
            } else {
                self.above.start
            };
            self.span.end = self.span.end.max(edge);
            let nearest = self.span.end.saturating_sub(WAITING_MAX);
            self.above = start.max(nearest)..self.span.end;
        }
        if self.direction != Direction::Up {
            let edge = at.start.saturating_sub(self.grow);
            let behind = if self.below.is_empty() {
                self.span.start
            } else {
                self.below.end
            };
            self.span.start = self.span.start.min(edge);
            let nearest = self.span.start.saturating_add(WAITING_MAX);
            self.below = self.span.start..behind.min(nearest);
        }
    }

    fn waits(&self) -> bool {
        !self.above.is_empty() || !self.below.is_empty()
    }

    /// What is nearest to its faults; ahead of them, where a direction is known.
    fn piece(&self) -> Range<u64> {
        let up = self.above.start..self.above.end.min(self.above.start + TURN_PAGES);
        let lowest = self.below.end.saturating_sub(TURN_PAGES);
        let down = self.below.start.max(lowest)..self.below.end;
        let down_first = self.direction == Direction::Down;
        if up.is_empty() || (down_first && !down.is_empty()) {
            down
        } else {
            up
        }
    }

    fn exhausted(&mut self, places: &Range<u64>) {
        if self.above.start == places.start && !self.above.is_empty() {
            self.above.start = places.end;
        } else {
            self.below.end = places.start;
        }
    }
}

/// All windows. The first that waits is next.
#[derive(Debug)]
pub(super) struct Windows {
    windows: VecDeque<Window>,
    faults: u64,
    /// Pages of a fresh window, by axis: grows when such windows are hit, shrinks when they expire without.
    start: [u64; 2],
}

impl Default for Windows {
    fn default() -> Self {
        Self {
            windows: VecDeque::new(),
            faults: 0,
            start: [GROW_START; 2],
        }
    }
}

impl Windows {
    /// A fault comes; [`Windows::pivot`] tells where it is on each axis.
    pub fn fault(&mut self) {
        self.faults += 1;
        let now = self.faults;
        let start = &mut self.start;
        self.windows.retain(|window| {
            let lives = now - window.fault <= EXPIRES_AFTER;
            if !lives && !window.has_hit {
                let start = &mut start[window.axis as usize];
                *start = (*start / 2).max(GROW_MIN);
            }
            lives
        });
    }

    /// The fault is at these places of an axis, which has places up to `end`.
    pub fn pivot(&mut self, axis: Axis, at: Range<u64>, end: u64) {
        let near = |window: &Window| window.axis == axis && window.is_near(&at);
        let window = match self.windows.iter().position(near) {
            Some(found) => {
                let Some(mut window) = self.windows.remove(found) else {
                    return;
                };
                window.hit(&at, end, self.faults);
                if !window.has_hit {
                    window.has_hit = true;
                    let start = &mut self.start[axis as usize];
                    *start = (*start * 2).min(GROW_MAX);
                }
                window
            }
            None => {
                self.make_room();
                Window::new(axis, &at, end, self.start[axis as usize], self.faults)
            }
        };
        self.windows.push_front(window);
    }

    fn make_room(&mut self) {
        while self.windows.len() >= WINDOWS_MAX {
            let ages = self.windows.iter().enumerate();
            let oldest = ages.min_by_key(|(_, window)| window.fault);
            let Some((oldest, _)) = oldest else { return };
            self.windows.remove(oldest);
        }
    }

    /// What is to be looked through next.
    pub fn piece(&self) -> Option<Piece> {
        let window = self.windows.iter().find(|window| window.waits())?;
        Some(Piece {
            axis: window.axis,
            places: window.piece(),
        })
    }

    /// Nothing in the piece is to be sent any more.
    pub fn exhausted(&mut self, piece: &Piece) {
        if let Some(window) = self.windows.iter_mut().find(|window| window.waits()) {
            window.exhausted(&piece.places);
        }
    }

    /// The piece has given something: it is another window's turn.
    pub fn had_its_turn(&mut self) {
        if let Some(at) = self.windows.iter().position(Window::waits)
            && let Some(window) = self.windows.remove(at)
        {
            self.windows.push_back(window);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(windows: &mut Windows, place: u64) {
        windows.fault();
        windows.pivot(Axis::Physical, place..place + 1, 1 << 20);
    }

    fn drain(windows: &mut Windows) -> Vec<Range<u64>> {
        let mut pieces = Vec::new();
        while let Some(piece) = windows.piece() {
            windows.exhausted(&piece);
            pieces.push(piece.places);
        }
        pieces
    }

    #[test]
    fn a_stream_upwards_doubles_its_window_and_leaves_what_is_below() {
        let mut windows = Windows::default();
        fault(&mut windows, 1000);
        assert_eq!(drain(&mut windows), [1001..1017, 984..1000]);
        fault(&mut windows, 1017);
        let ahead = [1017..1049, 1049..1081, 1081..1082];
        assert_eq!(drain(&mut windows), ahead);
        fault(&mut windows, 1082);
        let ahead = drain(&mut windows);
        assert_eq!(ahead.first().unwrap().start, 1082);
        assert_eq!(ahead.last().unwrap().end, 1083 + 128);
    }

    #[test]
    fn a_stream_downwards_goes_down_from_its_edge() {
        let mut windows = Windows::default();
        fault(&mut windows, 1000);
        drain(&mut windows);
        fault(&mut windows, 990);
        assert_eq!(drain(&mut windows), [952..984, 926..952]);
    }

    #[test]
    fn growth_is_bounded_and_faults_elsewhere_shrink_it() {
        let mut windows = Windows::default();
        for turn in 0..20 {
            fault(&mut windows, 100_000 + turn * 20);
            let waiting: u64 = drain(&mut windows).iter().map(|p| p.end - p.start).sum();
            assert!(waiting <= 2 * WAITING_MAX);
        }
        let largest = windows.windows[0].grow;
        assert_eq!(largest, GROW_MAX);
        for elsewhere in 0..80 {
            fault(&mut windows, 500_000 + elsewhere * 10_000);
        }
        fault(&mut windows, 100_000 + 20 * 20);
        assert!(windows.windows[0].grow <= GROW_MAX / 8);
    }

    #[test]
    fn windows_expire_and_first_windows_shrink_when_none_is_hit() {
        let mut windows = Windows::default();
        for elsewhere in 0..1000 {
            fault(&mut windows, elsewhere * 1000);
            assert!(windows.windows.len() <= WINDOWS_MAX);
        }
        assert_eq!(windows.start[Axis::Physical as usize], GROW_MIN);
    }

    #[test]
    fn windows_take_turns_and_the_newest_begins() {
        let mut windows = Windows::default();
        for base in [10_000, 20_000] {
            for step in 0..5 {
                fault(&mut windows, base + step * 20);
            }
        }
        let mut turns = Vec::new();
        for _ in 0..4 {
            let piece = windows.piece().unwrap();
            turns.push(piece.places.start / 10_000);
            windows.had_its_turn();
        }
        assert_eq!(turns, [2, 1, 2, 1]);
    }
}
