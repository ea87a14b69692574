//! What the lanes of one move share.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use lazyvm_wire::held::HeldRun;
use lazyvm_wire::{Layout, PageIndex, PageRange};
use quinn::Connection;
use tokio::sync::Notify;

use crate::demand::RequestQueue;
use crate::install::{InstallError, Installed, Installer};
use crate::report::Statistics;
use crate::touches::Touches;
use crate::verify::Verifier;

/// A unit that can't be brought now.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("the page can't be read")]
    Read(#[from] io::Error),
    #[error("the page can't be put in place")]
    Install(#[from] InstallError),
}

/// Which lane a page came on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Demand,
    Push,
    /// Before the pause.
    Early,
}

/// Reads a unit's bytes, which are at hand; [`fill_locally`](crate::fill_locally) takes one.
pub type LocalReader = dyn Fn(PageRange, &mut [u8]) -> io::Result<()> + Send + Sync;

/// Where a unit comes from that somebody waits for.
pub(crate) enum Supply {
    /// The source is asked.
    Source(RequestQueue),
    /// It is here.
    Local(Box<LocalReader>),
}

pub(crate) struct Core {
    pub layout: Layout,
    pub installer: Installer,
    pub statistics: Arc<Statistics>,
    pub verifier: Option<Arc<Verifier>>,
    pub supply: Supply,
    pub touches: Touches,
    /// Something may have been the last that was missing or not compared.
    pub all_here: Arc<Notify>,
    connections: Mutex<Vec<Connection>>,
}

impl Core {
    pub fn new(
        layout: Layout,
        mut installer: Installer,
        statistics: Arc<Statistics>,
        supply: Supply,
        verify: bool,
    ) -> Self {
        let verifier = verify.then(|| Arc::new(Verifier::new(layout.pages())));
        let all_here = Arc::new(Notify::new());
        if let Some(verifier) = verifier.clone() {
            let all_here = all_here.clone();
            installer.set_witness(move |range, data| {
                verifier.installed(range, data);
                if verifier.open() == 0 {
                    all_here.notify_one();
                }
            });
        }
        Self {
            layout,
            installer,
            statistics,
            verifier,
            supply,
            touches: Touches::default(),
            all_here,
            connections: Mutex::default(),
        }
    }

    /// Has a unit brought that somebody waits for.
    pub fn request(&self, unit: PageRange) -> Result<(), RequestError> {
        match &self.supply {
            Supply::Source(queue) => queue.push(unit),
            Supply::Local(read) => {
                let mut data = vec![0; unit.bytes() as usize];
                read(unit, &mut data)?;
                self.install(unit, &data, Origin::Demand)?;
            }
        }
        Ok(())
    }

    /// Puts pages in place that came with their bytes.
    pub fn install(
        &self,
        range: PageRange,
        data: &[u8],
        origin: Origin,
    ) -> Result<Installed, InstallError> {
        let installed = if origin == Origin::Push && self.touches.are_recorded() {
            self.installer.set_aside(range, data)?
        } else {
            self.installer.install(range, data)?
        };
        // What came is compared even where it is not needed any more: nothing else will come for pages given back.
        if let Some(verifier) = &self.verifier {
            verifier.installed(range, data);
        }
        if installed.pages > 0 {
            self.pages_counter(origin)
                .fetch_add(installed.pages, Ordering::Relaxed);
        }
        self.arrived(range);
        Ok(installed)
    }

    /// Takes in pages as they were at some instant before the pause.
    pub fn keep_early(&self, range: PageRange, round: u8, data: &[u8]) -> Result<(), InstallError> {
        self.installer.keep(range, round, data, |range, data| {
            self.install(range, data, Origin::Early).map(|_| ())
        })
    }

    /// Takes in which of them are still the same; how many of those are here.
    pub fn hold(&self, held: &[HeldRun]) -> Result<u64, InstallError> {
        let pages = self.installer.hold(held)?;
        self.statistics
            .pages_precopied
            .fetch_add(pages, Ordering::Relaxed);
        self.check_all_here();
        Ok(pages)
    }

    /// Maps the pages that came early, so that the guest need not wait for it.
    pub fn map_held(&self) -> Result<(), RequestError> {
        self.installer.map_held()?;
        self.request_lost()
    }

    /// Records which pages are touched from now on, where a touch of what has come already can be seen.
    pub fn record_touches(&self) {
        if self.installer.takes_early() {
            self.installer.map_one_by_one(true);
            self.touches.begin();
        }
    }

    /// Ends that; gives them where they were recorded. Pages that were not touched are to be mapped.
    pub fn end_record(&self) -> Option<Vec<PageIndex>> {
        let touched = self.touches.end()?;
        self.installer.map_one_by_one(false);
        Some(touched)
    }

    /// Asks for pages that were here and are lost.
    pub fn request_lost(&self) -> Result<(), RequestError> {
        self.installer
            .take_lost()
            .into_iter()
            .try_for_each(|unit| self.request(unit))
    }

    /// Takes in that pages which were to come are zero.
    pub fn install_zeros(&self, range: PageRange) -> Result<(), InstallError> {
        self.installer.install_zeros(range)?;
        if let Some(verifier) = &self.verifier {
            verifier.zero(range);
        }
        self.arrived(range);
        Ok(())
    }

    /// The source can't read these pages. They are never made up: who touches one waits.
    pub fn unreadable(&self, range: PageRange) {
        self.statistics
            .unreadable
            .fetch_add(range.count, Ordering::Relaxed);
        tracing::error!(%range, "the source can't read these pages; who touches one waits until it can");
    }

    /// Whether nothing is to come any more.
    pub fn is_all_here(&self) -> bool {
        self.installer.table().remaining() == 0
            && self
                .verifier
                .as_ref()
                .is_none_or(|verifier| verifier.open() == 0)
    }

    /// Wakes who waits for the end, if this is it.
    pub fn check_all_here(&self) {
        if self.is_all_here() {
            self.all_here.notify_one();
        }
    }

    /// Whether every digest was the source's; `None` when not asked.
    pub fn verified(&self) -> Option<bool> {
        let verifier = self.verifier.as_ref()?;
        Some(verifier.open() == 0 && verifier.differing() == 0)
    }

    /// Counts this connection's bytes from now on.
    pub fn count_bytes_of(&self, connection: &Connection) {
        self.connections().push(connection.clone());
    }

    /// UDP payload bytes of all connections so far, both ways.
    pub fn bytes_wire(&self) -> u64 {
        self.connections()
            .iter()
            .map(|connection| {
                let stats = connection.stats();
                stats.udp_rx.bytes + stats.udp_tx.bytes
            })
            .sum()
    }

    fn arrived(&self, range: PageRange) {
        self.statistics.served(range, Instant::now());
        self.check_all_here();
    }

    fn pages_counter(&self, origin: Origin) -> &AtomicU64 {
        match origin {
            Origin::Demand => &self.statistics.pages_demand,
            Origin::Push => &self.statistics.pages_pushed,
            Origin::Early => &self.statistics.pages_precopied,
        }
    }

    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.connections
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
