//! Pages that come before the machine is handed over.
//!
//! They are written to the memory's file, where nobody sees them: nothing is mapped there yet. The switchover says which
//! of them have not changed at the source since; those are *held*, and a touch maps them. All others are stale, and what
//! comes for them later is written over them.
//!
//! A page comes early once at most, so a copy that is still on its way at the switchover is the right one if the page is
//! held, and is put in place like any other then.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bitvec::field::BitField;
use bitvec::prelude::{BitSlice, BitVec, Lsb0};
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

use super::{InstallError, Installer, block_around};
use crate::fill::Cause;
use crate::memory::InstallMode;
use crate::table::after;

/// Held pages that are mapped at a time.
const MAP_PAGES: u64 = 64;

/// A bit for each page.
type Bits = BitVec<u64, Lsb0>;

#[derive(Default)]
enum State {
    /// Nothing came yet.
    #[default]
    Empty,
    /// These pages are in the file; the switchover is to come.
    Before(Bits),
    /// The switchover was here; these pages hold, and are still on their way.
    After(Bits),
}

#[derive(Default)]
pub(super) struct Early {
    state: Mutex<State>,
    /// Units that the file lost, and nobody has asked the source for yet.
    lost: Mutex<Vec<PageRange>>,
}

impl Early {
    /// Held while the file is written, so that nothing is written over a page of a machine that runs.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Installer {
    /// Whether pages may come before the switchover: only a file can keep them out of the guest's sight.
    pub fn takes_early(&self) -> bool {
        self.memory().mode() == InstallMode::Minor
    }

    /// Takes in pages that the machine had before it was handed over. Those that hold, and come after the switchover
    /// said so, are passed to `late`, to be installed like any other.
    ///
    /// # Errors
    /// As [`Self::install`]; [`InstallError::NotWholeUnits`] too where the memory has no file.
    pub fn keep(
        &self,
        range: PageRange,
        data: &[u8],
        mut late: impl FnMut(PageRange, &[u8]) -> Result<(), InstallError>,
    ) -> Result<(), InstallError> {
        self.check(range, data.len())?;
        if !self.takes_early() {
            return Err(InstallError::NotWholeUnits(range));
        }
        let bits = range.first.as_usize()..range.end().as_usize();
        let mut state = self.early.lock();
        if matches!(*state, State::Empty) {
            *state = State::Before(Bits::repeat(false, self.table.pages() as usize));
        }
        let holding = match &mut *state {
            State::Before(kept) => {
                self.filler
                    .write_aside(range, data)
                    .map_err(|cause| InstallError::of(range, cause))?;
                kept[bits].fill(true);
                return Ok(());
            }
            State::After(late) => late.get(bits).map_or_else(Bits::new, BitSlice::to_bitvec),
            State::Empty => return Ok(()),
        };
        drop(state);
        for run in runs_of(&holding) {
            let start = run.first.as_usize() * PAGE_SIZE;
            let bytes = &data[start..start + run.bytes() as usize];
            late(
                PageRange::new(PageIndex(range.first.0 + run.first.0), run.count),
                bytes,
            )?;
        }
        Ok(())
    }

    /// Takes in which pages hold of those that came early, a bit for each, after [`Self::apply_map`]; gives how many
    /// of them are here.
    ///
    /// # Errors
    /// A page that somebody waits for could not be mapped; it is asked for like any other then.
    pub fn hold(&self, held: &BitSlice<u64, Lsb0>) -> Result<u64, InstallError> {
        let mut state = self.early.lock();
        let kept = match std::mem::take(&mut *state) {
            State::Before(kept) => kept,
            // The machine stands still meanwhile, and most machines send nothing early.
            _ if held.not_any() => Bits::new(),
            _ => Bits::repeat(false, self.table.pages() as usize),
        };
        let (here, late) = split(kept, held);
        *state = State::After(late);
        let _guard = self.guard.install();
        let mut result = Ok(());
        for range in runs_of(&here) {
            for claimed in self.table.mark_held(range) {
                result = result.and(self.map_claimed(claimed));
            }
        }
        result.map_err(|cause| InstallError::of(PageRange::one(PageIndex(0)), cause))?;
        Ok(here.count_ones() as u64)
    }

    /// Maps all held pages, before they are touched.
    ///
    /// # Errors
    /// [`InstallError`]; what is not mapped then is mapped when it is touched.
    pub fn map_held(&self) -> Result<(), InstallError> {
        let mut rest = PageRange::new(PageIndex(0), self.table.pages());
        loop {
            let _guard = self.guard.install();
            let Some(run) = self.table.claim_held_run(rest, MAP_PAGES) else {
                return Ok(());
            };
            self.map_claimed(run)
                .map_err(|cause| InstallError::of(run, cause))?;
            rest = after(rest, run);
        }
    }

    /// Units that were held and are no longer in the file: the source has to be asked for them.
    pub(crate) fn take_lost(&self) -> Vec<PageRange> {
        std::mem::take(&mut self.lock_lost())
    }

    fn lock_lost(&self) -> MutexGuard<'_, Vec<PageRange>> {
        self.early
            .lost
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes the bytes of all held pages on that are not mapped yet, a run of at most 64 at a time.
    ///
    /// # Errors
    /// The file's.
    pub(crate) fn read_held(&self, mut take: impl FnMut(PageRange, &[u8])) -> std::io::Result<()> {
        let mut buffer = Vec::new();
        for run in self
            .table
            .runs(|state| state == crate::table::PageState::Held)
        {
            let mut rest = run;
            while !rest.is_empty() {
                let part = PageRange::new(rest.first, rest.count.min(MAP_PAGES));
                buffer.resize(part.bytes() as usize, 0);
                self.filler.read_file(part, &mut buffer)?;
                take(part, &buffer);
                rest = after(rest, part);
            }
        }
        Ok(())
    }

    /// Maps a touched held unit and its held neighbours; the guard is held.
    pub(super) fn map_around(&self, unit: PageRange) -> Result<(), Cause> {
        let mut rest = block_around(unit);
        while let Some(run) = self.table.claim_held_run(rest, u64::MAX) {
            self.map_claimed(run)?;
            rest = after(rest, run);
        }
        Ok(())
    }

    /// Maps a claimed run of held pages. What the file lost is to be asked for afterwards.
    fn map_claimed(&self, run: PageRange) -> Result<(), Cause> {
        let mut rest = run;
        while !rest.is_empty() {
            let mapped = match self.filler.map_run(rest) {
                Ok(pages) => PageRange::new(rest.first, pages),
                Err(cause) => {
                    self.table.release(rest);
                    self.filler.wake_range(rest)?;
                    return Err(cause);
                }
            };
            self.table.finish(mapped);
            rest = after(rest, mapped);
            if let Some(unit) = self.table.unit_of(rest.first).filter(|_| !rest.is_empty()) {
                tracing::error!(page = %unit.first, "a page that came early is no longer in the memory's file");
                self.table.lose(unit);
                self.lock_lost().push(unit);
                rest = after(rest, unit);
            }
        }
        Ok(())
    }
}

/// Those of `held` that are in `kept`, and those that are not; both as long as `kept`. A word at a time: bits one by one
/// take milliseconds for a large machine.
fn split(kept: Bits, held: &BitSlice<u64, Lsb0>) -> (Bits, Bits) {
    let (mut here, mut late) = (kept.clone(), kept);
    let words = here
        .as_raw_mut_slice()
        .iter_mut()
        .zip(late.as_raw_mut_slice());
    for ((here, late), held) in words.zip(held.chunks(64)) {
        let held: u64 = held.load_le();
        *late = held & !*here;
        *here &= held;
    }
    (here, late)
}

/// The runs of set bits.
fn runs_of(bits: &Bits) -> impl Iterator<Item = PageRange> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = at + bits[at..].first_one()?;
        let count = bits[first..].leading_ones();
        at = first + count;
        Some(PageRange::new(PageIndex(first as u64), count as u64))
    })
}
