//! Pages that come before the machine is handed over.
//!
//! They are written to the memory's file, where nobody sees them: nothing is mapped there yet. Memory that has no file, or
//! that is not there yet, has a [`Shelf`](super::Shelf) instead, from which they are copied. They come in rounds, each of
//! them with what the machine has written since the one before; streams arrive in any order, so only a later round's copy is
//! written over an earlier one's. The switchover says of which round the copy is that has not changed at the source since.
//! Where that one is here, the page is *held*, and a touch maps it. Where it is still on its way, it is put in place like
//! any other when it comes. All others are stale, and what comes for them later is written over them.
//!
//! A huge page comes, holds and goes stale as a whole: nothing is taken in that has less of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lazyvm_wire::held::HeldRun;
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

use super::{InstallError, Installed, Installer, block_around};
use crate::fill::Cause;
use crate::memory::InstallMode;
use crate::removal::Patience;
use crate::table::after;

/// Held pages that are mapped at a time.
const MAP_PAGES: u64 = 64;

/// A round for each page; 0 for none.
type Rounds = Vec<u8>;

#[derive(Debug, Default)]
enum State {
    /// Nothing came yet.
    #[default]
    Empty,
    /// The file holds the copy of these rounds; the switchover is to come.
    Before(Rounds),
    /// The switchover was here; the copies of these rounds hold, and are still on their way. Empty where none is.
    After(Rounds),
}

/// Hears of held pages and their bytes when they have just been mapped, as they were before anybody could touch them.
pub(super) type Witness = Box<dyn Fn(PageRange, &[u8]) + Send + Sync>;

#[derive(Debug, Default)]
pub(super) struct Early {
    state: Mutex<State>,
    /// Units that the file lost, and nobody has asked the source for yet.
    lost: Mutex<Vec<PageRange>>,
    /// The memory is complete and is being let go of: held pages need not be mapped any more, nor can they be.
    let_go: AtomicBool,
    /// A touch maps its own unit and none around it.
    one_by_one: AtomicBool,
}

/// What became of pages that came early.
pub(super) enum Taken {
    /// They are written, as far as they are newer than what was there.
    Kept,
    /// The switchover was here: these hold and are to be installed, the others are stale.
    Late(Vec<PageRange>),
}

impl Early {
    /// Has `write` called for the runs of an image of `pages` pages that are newer than what is there.
    pub(super) fn take_in<E>(
        &self,
        pages: u64,
        range: PageRange,
        round: u8,
        data: &[u8],
        mut write: impl FnMut(PageRange, &[u8]) -> Result<(), E>,
    ) -> Result<Taken, E> {
        let mut state = self.lock();
        if matches!(*state, State::Empty) {
            *state = State::Before(vec![0; pages as usize]);
        }
        match &mut *state {
            State::Before(kept) => {
                let newer: Vec<_> = runs_where(kept, range, |known| known < round).collect();
                for run in newer {
                    write(run, part_of(range, data, run))?;
                    kept[run.first.as_usize()..run.end().as_usize()].fill(round);
                }
                Ok(Taken::Kept)
            }
            State::After(late) => {
                let holding = runs_where(late, range, |expected| expected == round);
                Ok(Taken::Late(holding.collect()))
            }
            State::Empty => Ok(Taken::Late(Vec::new())),
        }
    }

    /// Held pages are mapped no more.
    pub(super) fn end_mapping(&self) {
        self.let_go.store(true, Ordering::Release);
    }

    /// Held while the file is written, so that nothing is written over a page of a machine that runs.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Installer {
    /// Whether pages may come before the switchover: only a file or a shelf can keep them out of the guest's sight.
    pub fn takes_early(&self) -> bool {
        self.memory().mode() == InstallMode::Minor || self.filler.shelf.is_some()
    }

    /// Takes in pages as the machine had them in a round before it was handed over. Those that hold, and come after the
    /// switchover said so, are passed to `late`, to be installed like any other.
    ///
    /// # Errors
    /// As [`Self::install`]; [`InstallError::NotWholeUnits`] too where the memory has neither a file nor a shelf.
    pub fn keep(
        &self,
        range: PageRange,
        round: u8,
        data: &[u8],
        mut late: impl FnMut(PageRange, &[u8]) -> Result<(), InstallError>,
    ) -> Result<(), InstallError> {
        self.check(range, data.len())?;
        if !self.takes_early() {
            return Err(InstallError::NotWholeUnits(range));
        }
        let write = |run: PageRange, bytes: &[u8]| {
            let written = self.filler.write_aside(run, bytes);
            written.map_err(|cause| InstallError::of(run, cause))
        };
        let pages = self.table.pages();
        match self.early.take_in(pages, range, round, data, write)? {
            Taken::Kept => Ok(()),
            Taken::Late(holding) => holding
                .into_iter()
                .try_for_each(|run| late(run, part_of(range, data, run))),
        }
    }

    /// Takes in which pages hold of those that came early, after [`Self::apply_map`]; gives how many of them are here.
    ///
    /// # Errors
    /// A page that somebody waits for could not be mapped; it is asked for like any other then.
    pub fn hold(&self, held: &[HeldRun]) -> Result<u64, InstallError> {
        let mut state = self.early.lock();
        let kept = match std::mem::take(&mut *state) {
            State::Before(kept) => kept,
            // The machine stands still meanwhile, and some machines send nothing early.
            _ if held.is_empty() => Rounds::new(),
            _ => vec![0; self.table.pages() as usize],
        };
        let (here, late) = split(&kept, held);
        *state = State::After(late);
        let _guard = self.guard.install();
        let mut result = Ok(());
        for &range in &here {
            for claimed in self.table.mark_held(range) {
                result = match self.map_claimed(claimed) {
                    // It is marked as held now, so those who wait only have to touch it again.
                    Err(Cause::EventUnread) => result,
                    mapped => result.and(mapped),
                };
            }
        }
        result.map_err(|cause| InstallError::of(PageRange::one(PageIndex(0)), cause))?;
        Ok(here.iter().map(|range| range.count).sum())
    }

    /// Whether a touch of a held page maps that alone, so that the next touch beside it is seen too.
    pub fn map_one_by_one(&self, alone: bool) {
        self.early.one_by_one.store(alone, Ordering::Relaxed);
    }

    /// Like [`Self::install`], but what nobody waits for is held until it is touched: so each touch is seen. For memory that
    /// [takes pages early](Self::takes_early).
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn set_aside(&self, range: PageRange, data: &[u8]) -> Result<Installed, InstallError> {
        self.check(range, data.len())?;
        let mut pages = 0;
        let mut rest = range;
        loop {
            let _guard = self.guard.install();
            let Some(run) = self.table.claim_run(rest, self.run_max()) else {
                break;
            };
            let written = self.filler.write_aside(run, part_of(range, data, run));
            self.table.release(run);
            if let Err(cause) = written {
                self.wake(run)?;
                return Err(InstallError::of(run, cause));
            }
            for waited_for in self.table.mark_held(run) {
                match self.map_claimed(waited_for) {
                    // It is marked as held now, so those who wait only have to touch it again.
                    Ok(()) | Err(Cause::EventUnread) => {}
                    Err(cause) => return Err(InstallError::of(waited_for, cause)),
                }
            }
            pages += run.count;
            rest = after(rest, run);
        }
        let dropped = range.count - pages;
        if dropped > 0 {
            self.wake(range)?;
        }
        Ok(Installed { pages, dropped })
    }

    /// Maps all held pages, before they are touched.
    ///
    /// # Errors
    /// [`InstallError`]; what is not mapped then is mapped when it is touched.
    pub fn map_held(&self) -> Result<(), InstallError> {
        let mut rest = PageRange::new(PageIndex(0), self.table.pages());
        let mut patience = Patience::new();
        while !self.early.let_go.load(Ordering::Acquire) {
            let guard = self.guard.install();
            let Some(run) = self.table.claim_held_run(rest, MAP_PAGES) else {
                return Ok(());
            };
            match self.map_claimed(run) {
                Ok(()) => {
                    rest = after(rest, run);
                    patience = Patience::new();
                }
                Err(Cause::EventUnread) => {
                    drop(guard);
                    self.make_way(run, &mut patience)?;
                }
                Err(_) if self.early.let_go.load(Ordering::Acquire) => return Ok(()),
                Err(cause) => return Err(InstallError::of(run, cause)),
            }
        }
        Ok(())
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

    /// Has `witness` hear of every held page. The machine stands still while it is told which are held, so they are not read
    /// then.
    pub(crate) fn set_witness(
        &mut self,
        witness: impl Fn(PageRange, &[u8]) + Send + Sync + 'static,
    ) {
        self.witness = Some(Box::new(witness));
    }

    /// Maps a touched held unit and its held neighbours; the guard is held.
    pub(super) fn map_around(&self, unit: PageRange) -> Result<(), Cause> {
        let mut rest = if self.early.one_by_one.load(Ordering::Relaxed) {
            unit
        } else {
            block_around(unit)
        };
        while let Some(run) = self.table.claim_held_run(rest, u64::MAX) {
            self.map_claimed(run)?;
            rest = after(rest, run);
        }
        Ok(())
    }

    /// Maps a claimed run of held pages. What the file lost is to be asked for afterwards.
    fn map_claimed(&self, run: PageRange) -> Result<(), Cause> {
        let mut rest = run;
        let mut before = Vec::new();
        if self.witness.is_some() {
            before.resize(run.bytes() as usize, 0);
            if let Err(source) = self.filler.read_file(run, &mut before) {
                self.table.release(run);
                self.filler.wake_range(run)?;
                return Err(Cause::Read(source));
            }
        }
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
            if let Some(witness) = &self.witness {
                let from = (mapped.first.0 - run.first.0) as usize * PAGE_SIZE;
                witness(mapped, &before[from..from + mapped.bytes() as usize]);
            }
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

/// The bytes of a run within those of a range.
fn part_of(range: PageRange, data: &[u8], run: PageRange) -> &[u8] {
    let start = (run.first.0 - range.first.0) as usize * PAGE_SIZE;
    &data[start..start + run.bytes() as usize]
}

/// The runs whose copy that holds is here, and the rounds of those that are still on their way.
fn split(kept: &[u8], held: &[HeldRun]) -> (Vec<PageRange>, Rounds) {
    let mut here: Vec<PageRange> = Vec::new();
    let mut late = Rounds::new();
    for held in held {
        here.extend(runs_where(kept, held.range, |round| round == held.round));
        for run in runs_where(kept, held.range, |round| round != held.round) {
            late.resize(kept.len(), 0);
            late[run.first.as_usize()..run.end().as_usize()].fill(held.round);
        }
    }
    (here, late)
}

/// The runs of pages of `range` whose round fits; none of what is past the rounds' end.
fn runs_where(
    rounds: &[u8],
    range: PageRange,
    fits: impl Fn(u8) -> bool,
) -> impl Iterator<Item = PageRange> {
    let rounds = rounds
        .get(range.first.as_usize()..range.end().as_usize())
        .unwrap_or_default();
    let mut at = 0;
    std::iter::from_fn(move || {
        let first = at + rounds[at..].iter().position(|&round| fits(round))?;
        let rest = &rounds[first..];
        let count = rest.iter().position(|&round| !fits(round));
        let count = count.unwrap_or(rest.len());
        at = first + count;
        let page = PageIndex(range.first.0 + first as u64);
        Some(PageRange::new(page, count as u64))
    })
}
