//! Which pages a QEMU's guest needs first: from its registers, its page tables, and what it touches while it is watched.
//!
//! A watch drops the entries of QEMU's own page tables for the guest's RAM (one injected `madvise(MADV_DONTNEED)` for each
//! backend). The RAM is shared, so its contents stay where they are, in the file; private memory would lose them, and is
//! never touched. Whatever the guest uses afterwards is mapped again, and `PAGEMAP_SCAN` tells what is. The kernel maps up
//! to 16 pages around one that is read (`fault_around_bytes`), so sparse reads look like more than they are. Under TCG
//! code that is translated is not read again: the page tables tell what is code.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lazyvm_server::port::{Hints, MachineError, Scout};
use lazyvm_wire::{Backing, Gpa, Layout, PAGE_SHIFT, PageIndex, PageRange};

use super::memory::RamRegion;
use super::ram::SharedRam;
use super::registers;
use super::source::Inner;
use crate::attach::Process;
use crate::pagemap::scan_mapped;
use crate::x86::{
    AddressSpace, Bounds, GuestMemory, Known, PageSet, Vcpu, find_spaces, resume_set,
};

/// Most page tables that are read in a look: those of 16 GiB in small pages.
const TABLES_MAX: usize = 16 * 1024;

/// How long a look at the running guest may take, and one at a guest that stands still.
const LOOK_TIME: Duration = Duration::from_millis(500);
const PAUSED_TIME: Duration = Duration::from_millis(5);

/// See the module.
pub(super) struct QemuScout {
    process: Arc<Process>,
    inner: Arc<Mutex<Inner>>,
    regions: Arc<[RamRegion]>,
    memory: GuestMemory,
    pagemap: Option<File>,
    spaces: Option<Vec<AddressSpace>>,
    last: Hints,
}

impl QemuScout {
    pub fn new(
        process: Arc<Process>,
        inner: Arc<Mutex<Inner>>,
        regions: Arc<[RamRegion]>,
        layout: &Layout,
        memory: Arc<SharedRam>,
    ) -> Self {
        Self {
            memory: GuestMemory::new(layout.clone(), memory),
            process,
            inner,
            regions,
            pagemap: None,
            spaces: None,
            last: Hints::default(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vcpus(&self) -> Result<Vec<Vcpu>, MachineError> {
        let shown = self.inner().qmp.human("info registers -a")?;
        Ok(registers::parse(&shown))
    }

    /// The pages that are mapped, and so were touched since the watch began; none without one.
    fn touched(&self) -> Result<Vec<PageRange>, MachineError> {
        let mut touched = Vec::new();
        let Some(pagemap) = &self.pagemap else {
            return Ok(touched);
        };
        for region in watched(&self.regions) {
            let Some(first) = self.memory.layout().page_of(Gpa(region.gpa)) else {
                continue;
            };
            scan_mapped(
                pagemap,
                region.host,
                region.host + region.bytes,
                &mut |start, end| {
                    let page = first.0 + (start.saturating_sub(region.host) >> PAGE_SHIFT);
                    let count = end.saturating_sub(start) >> PAGE_SHIFT;
                    touched.push(PageRange::new(PageIndex(page), count));
                },
            )?;
        }
        Ok(touched)
    }

    fn find(&mut self, time: Duration) -> Result<Hints, MachineError> {
        let start = Instant::now();
        let go_on = || start.elapsed() < time;
        let vcpus = self.vcpus()?;
        let touched = self.touched()?;
        let mut hot = PageSet::new(self.memory.layout().pages());
        for page in touched.iter().flat_map(|range| range.pages()) {
            hot.insert(page);
        }
        if self.spaces.is_none() {
            let current = vcpus.iter().find_map(Vcpu::paging);
            self.spaces = current.map(|paging| {
                let known = AddressSpace::of(&self.memory, paging);
                find_spaces(&self.memory, known, &go_on)
            });
        }
        let known = Known {
            spaces: self.spaces.as_deref().unwrap_or_default(),
            hot: self.pagemap.is_some().then_some(&hot),
            rings: &[],
        };
        let bounds = Bounds {
            tables: TABLES_MAX,
            go_on: &go_on,
        };
        let hints = Hints {
            hot: touched,
            ..resume_set(&self.memory, &vcpus, known, bounds)
        };
        let pages = |ranges: &[PageRange]| ranges.iter().map(|range| range.count).sum::<u64>();
        tracing::debug!(
            us = start.elapsed().as_micros() as u64,
            spaces = known.spaces.len(),
            tables = pages(&hints.tables),
            processor = pages(&hints.processor),
            code = pages(&hints.code),
            hot = pages(&hints.hot),
            "looked at what the guest uses"
        );
        Ok(hints)
    }
}

/// Huge pages are left alone: dropping their entries does not say which part is used.
fn watched(regions: &[RamRegion]) -> impl Iterator<Item = &RamRegion> {
    regions
        .iter()
        .filter(|region| region.backing == Backing::Small)
}

impl Scout for QemuScout {
    fn watch(&mut self) -> Result<(), MachineError> {
        let ranges: Vec<_> = watched(&self.regions)
            .map(|region| (region.host, region.bytes))
            .collect();
        let stopped = self.process.unmap_shared(&ranges)?;
        tracing::debug!(
            stopped_us = stopped.as_micros() as u64,
            "watching what the guest touches"
        );
        self.pagemap = Some(File::open(format!("/proc/{}/pagemap", self.process.pid()))?);
        Ok(())
    }

    fn look(&mut self) -> Result<Hints, MachineError> {
        self.last = self.find(LOOK_TIME)?;
        Ok(self.last.clone())
    }

    /// What is there now, and behind it what was there before.
    fn look_paused(&mut self) -> Result<Hints, MachineError> {
        let now = self.find(PAUSED_TIME)?;
        let last = std::mem::take(&mut self.last);
        Ok(Hints {
            tables: [now.tables, last.tables].concat(),
            processor: [now.processor, last.processor].concat(),
            code: [now.code, last.code].concat(),
            hot: [now.hot, last.hot].concat(),
            virtual_order: last.virtual_order,
        })
    }
}
