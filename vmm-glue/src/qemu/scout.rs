//! Which pages a QEMU's guest needs first: from its registers, its page tables, and what it touches while it is watched.
//!
//! A watch drops the entries of QEMU's own page tables for the guest's RAM (one injected `madvise(MADV_DONTNEED)` for each
//! backend). The RAM is shared, so its contents stay where they are, in the file; private memory would lose them, and is
//! never touched. Whatever the guest uses afterwards is mapped again, and `PAGEMAP_SCAN` tells what is. The kernel maps up
//! to 16 pages around one that is read (`fault_around_bytes`), so sparse reads look like more than they are. Under TCG
//! code that is translated is not read again: the page tables tell what is code.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lazyvm_server::port::{Hints, MachineError, Scout};
use lazyvm_wire::{Backing, Gpa, Layout, PAGE_SHIFT, PageIndex, PageRange};

use super::memory::RamRegion;
use super::ram::SharedRam;
use super::registers;
use super::source::Inner;
use crate::attach::Process;
use crate::pagemap::scan_mapped;
use crate::x86::{GuestMemory, Looks, Vcpu};

/// See the module.
pub(super) struct QemuScout {
    process: Arc<Process>,
    inner: Arc<Mutex<Inner>>,
    regions: Arc<[RamRegion]>,
    layout: Layout,
    pagemap: Option<File>,
    looks: Looks,
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
            looks: Looks::new(GuestMemory::new(layout.clone(), memory)),
            layout: layout.clone(),
            process,
            inner,
            regions,
            pagemap: None,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn vcpus(&self) -> Result<Vec<Vcpu>, MachineError> {
        let shown = self.inner().qmp.human("info registers -a")?;
        Ok(registers::parse(&shown))
    }
}

/// The pages that are mapped, and so were touched since the watch began; none without one.
fn touched(
    pagemap: Option<&File>,
    regions: &[RamRegion],
    layout: &Layout,
) -> Result<Vec<PageRange>, MachineError> {
    let mut touched = Vec::new();
    let Some(pagemap) = pagemap else {
        return Ok(touched);
    };
    for region in watched(regions) {
        let Some(first) = layout.page_of(Gpa(region.gpa)) else {
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
        self.looks.watch();
        Ok(())
    }

    fn look(&mut self) -> Result<Hints, MachineError> {
        let vcpus = self.vcpus()?;
        let (pagemap, regions, layout) = (self.pagemap.as_ref(), &self.regions, &self.layout);
        self.looks
            .look(&vcpus, &mut || touched(pagemap, regions, layout))
    }

    fn look_paused(&mut self) -> Result<Hints, MachineError> {
        let vcpus = self.vcpus()?;
        let (pagemap, regions, layout) = (self.pagemap.as_ref(), &self.regions, &self.layout);
        self.looks
            .look_paused(&vcpus, &mut || touched(pagemap, regions, layout))
    }
}
