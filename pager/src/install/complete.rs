//! The end of an install: letting go of memory that is complete.

use lazyvm_wire::{PageIndex, PageRange};

use super::{CompleteError, InstallError, Installer};
use crate::memory::InstallMode;
use crate::removal::Patience;
use crate::table::{PageState, after};

impl Installer {
    /// Lets go of the memory: unregisters it, so that what is not in place now reads as zero natively.
    ///
    /// Refused unless a scan of the states finds that nothing is to come. Afterwards no fault is reported any more,
    /// but a removal may be that began before: events are to be read until the installer is dropped.
    ///
    /// # Errors
    /// [`CompleteError::Incomplete`] changes nothing; after any other, call it again.
    pub fn complete(&self) -> Result<(), CompleteError> {
        self.let_events_through()
            .map_err(|error| CompleteError::Install(error.into()))?;
        let mut patience = Patience::new();
        while let Some(first) = self.next_not_settled()? {
            // With nothing more to come, it is a page that another thread fills right now.
            let remaining = self.table.remaining();
            if remaining > 0 || !patience.wait() {
                return Err(CompleteError::Incomplete { remaining, first });
            }
        }
        if self.memory().mode() == InstallMode::Minor {
            self.clear_zeros()?;
        }
        // What is held is in the file, and a touch finds it there from now on.
        self.early.end_mapping();
        for (number, region) in self.memory().regions().iter().enumerate() {
            self.filler
                .uffd
                .unregister(region.host, region.bytes())
                .map_err(|source| CompleteError::Unregister {
                    region: number,
                    source,
                })?;
        }
        Ok(())
    }

    /// What keeps the memory from being let go of. A page on the shelf does, since it would read as zero: it is put in its
    /// place. One in the memory's own file does not, as long as nobody has to hear what it holds.
    fn next_not_settled(&self) -> Result<Option<PageRange>, InstallError> {
        if self.filler.shelf.is_none() && self.witness.is_none() {
            return Ok(self.table.missing().next());
        }
        self.map_held()?;
        // One whose copy has failed meanwhile is back on the shelf.
        let mut open = self
            .table
            .runs(|state| state.is_missing() || state == PageState::Held);
        Ok(open.next())
    }

    /// Makes holes of pages that are zero and not in place: their file may hold what a pre-copy brought, or what was
    /// there before the guest gave them back.
    fn clear_zeros(&self) -> Result<(), InstallError> {
        let all = PageRange::new(PageIndex(0), self.table.pages());
        let mut rest = all;
        loop {
            let _guard = self.guard.install();
            let Some(run) = self.table.claim_zero_run(rest, u64::MAX) else {
                return Ok(());
            };
            let punched = self.filler.punch(run);
            self.table.release(run);
            // Who touched it meanwhile found it claimed, and waits.
            self.wake(run)?;
            punched.map_err(|cause| InstallError::of(run, cause))?;
            rest = after(rest, run);
        }
    }
}
