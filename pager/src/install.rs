//! Installing pages: one interface for all kinds of memory and both modes.
//!
//! An install claims its pages in the [`PageTable`] first, so of several copies of a page the first wins, and nothing
//! is written over what the guest has changed since. It is idempotent, it wakes who waits, and it may be called from
//! any thread, several at a time.
//!
//! In [`InstallMode::Minor`](crate::memory::InstallMode::Minor) a page goes in through `UFFDIO_COPY` too where the file has a hole, which is faster
//! (1.1 µs a page in runs of 64, against 1.25 µs for `pwrite` and `UFFDIO_CONTINUE`, and 1.4 against 1.8 µs for a
//! single page), and puts it into the file and into the map at once. Only where the file holds an older copy is it
//! written through the file and mapped with `UFFDIO_CONTINUE`.

mod complete;
mod early;
mod error;
mod shelf;

use std::io::IoSlice;
use std::sync::Arc;

use bitvec::prelude::{BitSlice, Lsb0};
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageRange};

use self::early::{Early, Witness};
pub use self::error::{CompleteError, InstallError};
pub use self::shelf::Shelf;
use crate::fill::{Cause, Content, Filler, Gather, Stopped};
use crate::memory::LazyMemory;
use crate::removal::{Patience, RemovalGuard};
use crate::table::{FaultAction, PageState, PageTable, after};
use crate::uffd::{EventError, RawEvent, RegisterError, Uffd};

/// Pages that one install puts in place while removals have to wait for it: about 0.1 ms.
const RUN_PAGES_WITH_REMOVALS: u64 = 64;

/// Pages that are joined at a time from buffers in pieces: 256 KiB, which stays in a core's cache.
const GATHER_PAGES: u64 = 64;

/// A touched page that takes nothing from the source brings its neighbours along, those of its aligned block of so many
/// pages that are like it.
const BLOCK_PAGES: u64 = 16;

/// How the installer takes over the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registration {
    /// Registers it with the userfaultfd.
    Register,
    /// It is registered already, by the process that handed the userfaultfd over.
    Done,
}

/// What an install did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Installed {
    /// Pages that this call put in place.
    pub pages: u64,
    /// Pages that were dropped: here before, zero, given back, or being installed by another thread.
    pub dropped: u64,
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// Ask the source for this unit.
    Request(PageRange),
    /// Asked for or being installed already; that wakes the touch.
    Waiting,
    /// Served here and now.
    Served,
    /// Served with what came ahead of the touch.
    Mapped,
}

/// Something that the userfaultfd reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread touched a page that is not mapped, and waits. To be passed to [`Installer::fault`].
    Fault {
        /// The touched page.
        page: PageIndex,
        /// Whether it was to be written.
        write: bool,
        /// Whether the file holds something for it.
        minor: bool,
        /// The thread's kernel id, where the userfaultfd tells it.
        thread: Option<u32>,
    },
    /// These pages were given back. The page table knows already.
    Removed(PageRange),
}

/// Fills memory; shared by the fault lane and the bulk lane.
pub struct Installer {
    filler: Filler,
    table: PageTable,
    guard: RemovalGuard,
    early: Arc<Early>,
    witness: Option<Witness>,
}

impl Installer {
    /// Takes over `memory`, which must be empty, for an image of this layout. With [`Registration::Register`], a touch
    /// of it waits from now on.
    ///
    /// # Errors
    /// The memory is not the layout's, or can't be registered. Nothing is registered then.
    pub fn new(
        layout: &Layout,
        memory: Arc<LazyMemory>,
        uffd: Uffd,
        registration: Registration,
    ) -> Result<Self, RegisterError> {
        memory.check_against(layout)?;
        if memory.place != uffd.place() {
            return Err(RegisterError::OtherProcess);
        }
        let guard = RemovalGuard::new(uffd.reports_removals());
        // An error below drops the descriptor, and with it all registrations.
        let filler = Filler::new(memory, uffd)?;
        if registration == Registration::Register {
            filler.uffd.register(&filler.memory)?;
        }
        Ok(Self {
            filler,
            table: PageTable::new(layout),
            guard,
            early: Arc::default(),
            witness: None,
        })
    }

    /// Has pages that come, or came, before the switchover lie on a shelf, of an image of the same size. No page may have
    /// come to this installer yet.
    #[must_use]
    pub fn with_shelf(mut self, shelf: Arc<Shelf>) -> Self {
        self.early = Arc::clone(&shelf.early);
        self.filler.shelf = Some(shelf);
        self
    }

    /// The state of the pages.
    pub fn table(&self) -> &PageTable {
        &self.table
    }

    /// The memory that is filled.
    pub fn memory(&self) -> &Arc<LazyMemory> {
        &self.filler.memory
    }

    /// The userfaultfd, to be polled for readability; read with [`Self::read_events`].
    pub fn uffd(&self) -> &Uffd {
        &self.filler.uffd
    }

    /// Reads a batch of events without blocking, appends them to `events`, and returns how many there were: 0 when
    /// there are none. Removals have taken effect when it returns.
    ///
    /// # Errors
    /// [`EventError`]; the other events of the batch are in `events`.
    pub fn read_events(&self, events: &mut Vec<Event>) -> Result<usize, EventError> {
        let _alone = self.guard.events();
        self.filler.uffd.read(|event| match event {
            RawEvent::Fault {
                address,
                write,
                minor,
                thread,
            } => {
                let page = self.page_at(address)?;
                events.push(Event::Fault {
                    page,
                    write,
                    minor,
                    thread,
                });
                Ok(())
            }
            RawEvent::Removed { start, end } => {
                self.remove(start, end, |range| events.push(Event::Removed(range)));
                Ok(())
            }
        })
    }

    /// Handles a fault: serves it where that takes nothing from the source, says what to ask for where it does.
    ///
    /// # Errors
    /// [`InstallError`] when it could not be served; the touch waits on.
    pub fn fault(&self, page: PageIndex) -> Result<FaultOutcome, InstallError> {
        let unit = self
            .table
            .unit_of(page)
            .ok_or(InstallError::NotWholeUnits(PageRange::one(page)))?;
        let mut patience = Patience::new();
        loop {
            let guard = self.guard.install();
            let action = self.table.fault(page);
            let served = match action {
                Some(FaultAction::Request(unit)) => return Ok(FaultOutcome::Request(unit)),
                Some(FaultAction::AlreadyRequested) => return Ok(FaultOutcome::Waiting),
                Some(FaultAction::Wake) => self.filler.settle(unit),
                Some(FaultAction::FillZero) => self.zero_around(unit),
                Some(FaultAction::Map) => self.map_around(unit),
                None => return Err(InstallError::NotWholeUnits(unit)),
            };
            match served {
                Ok(()) if action == Some(FaultAction::Map) => return Ok(FaultOutcome::Mapped),
                Ok(()) => return Ok(FaultOutcome::Served),
                Err(Cause::EventUnread) => {
                    drop(guard);
                    self.make_way(unit, &mut patience)?;
                }
                Err(cause) => return Err(InstallError::of(unit, cause)),
            }
        }
    }

    /// Puts the data of `range` in place, as far as it is not there yet, and wakes all who wait for it.
    ///
    /// `range` is made of whole units, `data` is as long.
    ///
    /// # Errors
    /// [`InstallError`]; what is not in place then is as it was, and may be installed again.
    pub fn install(&self, range: PageRange, data: &[u8]) -> Result<Installed, InstallError> {
        self.check(range, data.len())?;
        self.install_checked(range, data)
    }

    /// Like [`Self::install`], from several buffers that follow each other and are as long as `range` together. They
    /// are joined 256 KiB at a time where they do not hold whole pages already.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn install_vectored(
        &self,
        range: PageRange,
        slices: &[IoSlice<'_>],
    ) -> Result<Installed, InstallError> {
        let length = slices.iter().map(|slice| slice.len()).sum();
        self.check(range, length)?;
        let mut gather = Gather::new(slices);
        let mut installed = Installed::default();
        let mut rest = range;
        while let Some(unit) = self.table.unit_of(rest.first).filter(|_| !rest.is_empty()) {
            let piece = PageRange::new(rest.first, unit.count.max(GATHER_PAGES).min(rest.count));
            // A piece that would cut a huge page, past a region's end, is cut back to that unit.
            let piece = if self.table.is_whole_units(piece) {
                piece
            } else {
                unit
            };
            let part = gather.take(piece.bytes() as usize, |data| {
                self.install_checked(piece, data)
            })?;
            installed.pages += part.pages;
            installed.dropped += part.dropped;
            rest = after(rest, piece);
        }
        Ok(installed)
    }

    /// The source says that these pages, which were waiting for data, are zero. Only those that somebody waits for are
    /// put in place, the others when they are touched.
    ///
    /// # Errors
    /// As [`Self::install`].
    pub fn install_zeros(&self, range: PageRange) -> Result<(), InstallError> {
        if !self.table.is_whole_units(range) {
            return Err(InstallError::NotWholeUnits(range));
        }
        let _guard = self.guard.install();
        self.table
            .mark_zero(range)
            .map(|run| self.fill_claimed_zeros(run))
            .fold(Ok(()), Result::and)
    }

    /// Takes in the source's page map, a bit for each page that is not zero.
    ///
    /// # Errors
    /// The map is of another image, or a page that somebody waits for could not be put in place.
    pub fn apply_map(&self, present: &BitSlice<u64, Lsb0>) -> Result<(), InstallError> {
        let _guard = self.guard.install();
        let mut filled = Ok(());
        self.table.apply_map(present, |run| {
            let result = self.fill_claimed_zeros(run);
            if filled.is_ok() {
                filled = result;
            }
        })?;
        filled
    }

    /// Wakes all who wait for a page of `range`. One whose page is not here faults again.
    ///
    /// # Errors
    /// [`InstallError::Gone`] when the memory is gone.
    pub fn wake(&self, range: PageRange) -> Result<(), InstallError> {
        self.filler
            .wake_range(range)
            .map_err(|cause| InstallError::of(range, cause))
    }

    fn check(&self, range: PageRange, length: usize) -> Result<(), InstallError> {
        if !self.table.is_whole_units(range) {
            return Err(InstallError::NotWholeUnits(range));
        }
        if length as u64 != range.bytes() {
            return Err(InstallError::Length { range, got: length });
        }
        Ok(())
    }

    fn install_checked(&self, range: PageRange, data: &[u8]) -> Result<Installed, InstallError> {
        let run_max = self.run_max();
        let mut patience = Patience::new();
        let mut pages = 0;
        let mut rest = range;
        loop {
            let guard = self.guard.install();
            let Some(run) = self.table.claim_run(rest, run_max) else {
                break;
            };
            let offset = (run.first.0 - range.first.0) as usize * PAGE_SIZE;
            let content = Content::Data(&data[offset..offset + run.bytes() as usize]);
            match self.fill_claimed(run, content) {
                Ok(()) => {
                    pages += run.count;
                    rest = after(rest, run);
                }
                Err(Stopped {
                    pages: done,
                    cause: Cause::EventUnread,
                }) => {
                    pages += done;
                    drop(guard);
                    self.make_way(run, &mut patience)?;
                }
                Err(stopped) => return Err(InstallError::of(run, stopped.cause)),
            }
        }
        let dropped = range.count - pages;
        if dropped > 0 {
            self.wake(range)?;
        }
        Ok(Installed { pages, dropped })
    }

    /// Pages that are put in place in one go.
    fn run_max(&self) -> u64 {
        if self.guard.is_on() {
            RUN_PAGES_WITH_REMOVALS
        } else {
            u64::MAX
        }
    }

    /// Fills a claimed run, and gives up the claim on what could not be.
    fn fill_claimed(&self, run: PageRange, content: Content<'_>) -> Result<(), Stopped> {
        let filled = self.filler.fill(run, content);
        let done = match &filled {
            Ok(()) => run.count,
            Err(stopped) => stopped.pages,
        };
        let in_place = PageRange::new(run.first, done);
        self.table.finish(in_place);
        self.table.release(after(run, in_place));
        filled
    }

    /// Fills a touched zero unit, and its zero neighbours; the guard is held.
    fn zero_around(&self, unit: PageRange) -> Result<(), Cause> {
        let mut rest = block_around(unit);
        while let Some(run) = self.table.claim_zero_run(rest, u64::MAX) {
            if let Err(stopped) = self.fill_claimed(run, Content::Zeros) {
                // Who touched the rest meanwhile found it claimed, and waits.
                self.filler.wake_range(run)?;
                return Err(stopped.cause);
            }
            rest = after(rest, run);
        }
        Ok(())
    }

    /// Fills with zeros a run that was claimed as such; the guard is held.
    fn fill_claimed_zeros(&self, run: PageRange) -> Result<(), InstallError> {
        match self.fill_claimed(run, Content::Zeros) {
            Ok(()) => Ok(()),
            // It is marked as zero now, so those who wait only have to touch it again.
            Err(Stopped {
                cause: Cause::EventUnread,
                ..
            }) => self.wake(run),
            Err(stopped) => {
                self.wake(run)?;
                Err(InstallError::of(run, stopped.cause))
            }
        }
    }

    /// Lets the events through that hold up an install; the guard is not held.
    fn make_way(&self, run: PageRange, patience: &mut Patience) -> Result<(), InstallError> {
        self.let_events_through()?;
        if patience.wait() {
            Ok(())
        } else {
            Err(InstallError::Stuck(run))
        }
    }

    /// Reads events outside of the fault lane. A removal takes effect; who faulted is woken to fault once more, so
    /// that the fault lane hears of it.
    fn let_events_through(&self) -> Result<(), EventError> {
        let mut faults = Vec::new();
        let read = {
            let _alone = self.guard.events();
            self.filler.uffd.read(|event| {
                match event {
                    RawEvent::Fault { address, .. } => faults.push(self.page_at(address)?),
                    RawEvent::Removed { start, end } => self.remove(start, end, |_| ()),
                }
                Ok(())
            })
        };
        for page in faults {
            // Only memory that is gone can't be woken, and nobody waits there.
            if let Err(cause) = self.filler.wake_range(PageRange::one(page)) {
                tracing::debug!(%page, ?cause, "a fault could not be passed on");
            }
        }
        read.map(drop)
    }

    /// A removal takes effect; events are being read, alone.
    fn remove(&self, start: u64, end: u64, mut removed: impl FnMut(PageRange)) {
        for range in self.memory().pages_between(start, end) {
            self.table.remove(range);
            debug_assert_eq!(
                self.table
                    .find_run(range, |state| state == PageState::Filling),
                None
            );
            // Who waits for a page that will not come any more touches it again, and gets zeros.
            if let Err(cause) = self.filler.wake_range(range) {
                tracing::debug!(%range, ?cause, "waiters of removed pages could not be woken");
            }
            removed(range);
        }
    }

    fn page_at(&self, address: u64) -> Result<PageIndex, EventError> {
        self.memory()
            .page_at(address)
            .ok_or(EventError::Stray(address))
    }
}

/// A unit with its neighbours.
fn block_around(unit: PageRange) -> PageRange {
    if unit.count > 1 {
        return unit;
    }
    let first = unit.first.0 - unit.first.0 % BLOCK_PAGES;
    PageRange::new(PageIndex(first), BLOCK_PAGES)
}
