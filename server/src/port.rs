//! What the page server needs of a virtual machine.

use std::error::Error;
use std::io;
use std::sync::Arc;

use lazyvm_wire::{Layout, MachineOffer, PageIndex, PageRange};

/// A failure of the machine's own, told in its own words.
pub type MachineError = Box<dyn Error + Send + Sync>;

/// A machine's memory, as its source reads it. Reads never block on the network and may run on any thread.
pub trait SourceMemory: Send + Sync {
    /// Reads whole pages into `out`, which is `range.bytes()` long.
    ///
    /// # Errors
    /// Any the backing gives. The pages are then not sent; nothing is made up for them.
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()>;

    /// Calls `data` with each run of pages, ascending, that may hold anything but zeros. What it does not name
    /// reads as zero (holes of a sparse file). Must be quick: it runs while the machine stands still.
    ///
    /// # Errors
    /// Any the backing gives.
    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()>;
}

/// A machine at the source. The server calls from one thread at a time, off its fault lane; calls may block.
pub trait SourceMachine: Send + Sync {
    /// The memory's region table. Does not change while the machine is served.
    fn layout(&self) -> &Layout;

    /// What a destination checks before the pause.
    fn offer(&self) -> MachineOffer;

    /// The memory, valid until [`SourceMachine::release`].
    fn memory(&self) -> Arc<dyn SourceMemory>;

    /// Whether it stands still anyway, and pausing it changes nothing (a snapshot): then it is handed over before the
    /// destination says that it is ready, which saves a round trip.
    fn stands_still(&self) -> bool {
        false
    }

    /// What finds out which pages the machine needs first where it goes on; `None` where nobody knows.
    fn scout(&self) -> Option<Box<dyn Scout>> {
        None
    }

    /// What notes which pages the machine writes; `None` where nothing can. One at a time for a machine.
    fn tracker(&self) -> Option<Box<dyn DirtyTracker>> {
        None
    }

    /// What records which pages the machine touches where it runs on here; `None` where nothing can. Nothing is recorded yet.
    fn recorder(&self) -> Option<Box<dyn TouchRecorder>> {
        None
    }

    /// What is known from earlier times of the pages that the machine needs first, for one session; `None` where nothing
    /// is kept.
    fn profile(&self) -> Option<Box<dyn Profile>> {
        None
    }

    /// Everything that a pause needs and that can be done while the machine runs: [`SourceMachine::pause`] follows at
    /// once. On failure the machine runs on.
    ///
    /// # Errors
    /// The machine's own.
    fn prepare_pause(&self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Stops every vCPU and gives the complete state but memory. On failure the machine runs on.
    ///
    /// # Errors
    /// The machine's own.
    fn pause(&self) -> Result<Vec<u8>, MachineError>;

    /// Lets a paused machine run on here: the move failed or was refused.
    ///
    /// # Errors
    /// The machine's own.
    fn resume(&self) -> Result<(), MachineError>;

    /// The destination has everything: frees the machine's memory and ends it.
    ///
    /// # Errors
    /// The machine's own. The move has succeeded all the same.
    fn release(&self) -> Result<(), MachineError>;
}

/// Notes which pages a machine writes, its devices included, while it runs. Calls may block, and come from one thread at a
/// time. Dropping it stops it.
///
/// A write that it misses is a wrong page at the destination: whoever implements this must report a page too often rather
/// than too seldom.
pub trait DirtyTracker: Send {
    /// Begins to note writes; all pages are clean. What a reader of the memory sees after this has returned is older than
    /// no write that goes unreported.
    ///
    /// # Errors
    /// The machine's own. It runs on, and nothing is noted.
    fn start(&mut self) -> Result<(), MachineError>;

    /// Calls `dirty` with each run of pages that was written, or given back to the system, since they were last reported
    /// or since the start; from then on they are clean. Pages that hold nothing may be reported each time. A write that happens meanwhile is reported now or the next time. Once
    /// the machine is paused, one call reports all that is left.
    ///
    /// # Errors
    /// The machine's own. Any page may then have been written.
    fn collect(&mut self, dirty: &mut dyn FnMut(PageRange)) -> Result<(), MachineError>;

    /// Stops noting, so that the machine runs as fast as before.
    ///
    /// # Errors
    /// The machine's own.
    fn stop(&mut self) -> Result<(), MachineError>;
}

/// Which pages a machine needed first wherever it went on, kept from one session to the next. Hints, as a [`Scout`]'s are.
pub trait Profile: Send + Sync {
    /// The pages, the first needed first.
    fn lead(&self) -> Vec<PageRange>;

    /// The destination waited for these pages, when so many of the lead had gone; `None` when all had. Called on the fault
    /// lane: must not block.
    fn demanded(&self, range: PageRange, gone: Option<u64>);

    /// Whether it is worth what it costs this session's destination to record which pages its machine touches. Says so once.
    fn wants_record(&self) -> bool;

    /// The destination has recorded that: these, in this order. May block.
    fn touched(&self, pages: Vec<PageIndex>);

    /// The connection to the destination has ended: if it was to record, what it owes may never come. Must not block.
    fn parted(&self);

    /// The destination has everything: what was heard may be kept. May block.
    fn finished(&self);
}

/// Finds out which pages a machine needs first where it goes on. What it finds are hints: a wrong one costs time, and
/// can't harm the machine. Calls may block, and come from one thread at a time.
pub trait Scout: Send {
    /// Begins to watch the running machine. What it touches from now on is hot at the next look.
    ///
    /// # Errors
    /// The machine's own. It runs on; the move goes on without.
    fn watch(&mut self) -> Result<(), MachineError>;

    /// What the machine uses, as far as it shows while it runs.
    ///
    /// # Errors
    /// As above.
    fn look(&mut self) -> Result<Hints, MachineError>;

    /// The same for a machine that has just been paused. Must be quick: it stands still meanwhile.
    ///
    /// # Errors
    /// As above.
    fn look_paused(&mut self) -> Result<Hints, MachineError>;
}

/// Records which pages a machine touches, each when it is touched first, which holds the machine up at each. Calls may block, and
/// come from one thread at a time. Dropping it stops it.
pub trait TouchRecorder: Send {
    /// Begins with a machine that stands still, after its [`Scout`] has begun to watch. No [`DirtyTracker`] may be noting its writes
    /// meanwhile.
    ///
    /// # Errors
    /// The machine's own. Nothing is recorded, and nothing is held up.
    fn start(&mut self) -> Result<(), MachineError>;

    /// Ends it: the pages that were touched, in this order, some more than once.
    fn stop(&mut self) -> Vec<PageIndex>;
}

/// Pages that a machine needs soon. Lists may overlap and may name pages that hold nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// What the monitor itself reads when it loads the state, and behind that page tables of every address space that was
    /// found; those in use come first.
    pub tables: Vec<PageRange>,
    /// Where registers point: descriptor tables, task state, CPU entry area, per-CPU data, stacks, the code around the
    /// instruction pointer; low memory that firmware and devices use; rings of devices. Behind that, data that words of all
    /// this point to.
    pub processor: Vec<PageRange>,
    /// Mapped executable and accessed: the kernel's first, and of that what its data points to.
    pub code: Vec<PageRange>,
    /// Touched since the watch began, the most recent first.
    pub hot: Vec<PageRange>,
    /// Mapped pages in the order of their guest-virtual addresses, one address space behind the other. Who stands
    /// together here is used together.
    pub virtual_order: Vec<PageIndex>,
}
