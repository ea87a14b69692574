//! Which pages a QEMU's guest needs first: from its registers, its page tables, and what it touches while it is watched.
//!
//! A watch drops the entries of QEMU's own page tables for the guest's RAM (injected calls of `madvise(MADV_DONTNEED)`,
//! each for so much that it takes about half a millisecond). The RAM is shared, so its contents stay where they are, in the
//! file; private memory would lose them, and is never touched. Whatever the guest uses afterwards is mapped again, and `PAGEMAP_SCAN` tells what is. The kernel maps up
//! to 16 pages around one that is read (`fault_around_bytes`), so sparse reads look like more than they are. Under TCG
//! code that is translated is not read again: the page tables tell what is code.

use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lazyvm_server::port::{Hints, MachineError, Scout};
use lazyvm_wire::{Backing, Gpa, Layout, PAGE_SHIFT, PageIndex, PageRange};

use super::memory::RamRegion;
use super::ram::SharedRam;
use super::registers;
use super::source::Inner;
use crate::attach::Process;
use crate::pagemap::{Pages, scan};
use crate::x86::{GuestMemory, Looks, Vcpu};

/// Mapped memory that is dropped while one of QEMU's threads is stopped once: it takes half a millisecond, and others of its
/// threads that touch new memory wait for it too.
const PIECE_BYTES: u64 = 4 << 20;

/// Where a PC's option ROMs are. QEMU reads and writes its own there when it loads a state (`kvmvapic.bin`), before any
/// processor runs.
const OPTION_ROMS: std::ops::Range<u64> = 0xc_0000..0xe_0000;

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

    /// What QEMU itself needs goes ahead of all.
    fn with_roms(&self, mut hints: Hints) -> Hints {
        let count = (OPTION_ROMS.end - OPTION_ROMS.start) >> PAGE_SHIFT;
        if let Some(first) = self.layout.page_of(Gpa(OPTION_ROMS.start)) {
            hints.tables.insert(0, PageRange::new(first, count));
        }
        hints
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
        scan(
            pagemap,
            Pages::Mapped,
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

/// Parts of the memory, as address and bytes, that hold all of these runs (first byte and end, ascending), and at most
/// [`PIECE_BYTES`] of them each.
fn pieces(runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut pieces: Vec<(u64, u64)> = Vec::new();
    let mut room = 0;
    for (from, to) in runs {
        let mut from = from;
        while from < to {
            if room == 0 {
                pieces.push((from, 0));
                room = PIECE_BYTES;
            }
            let part = room.min(to - from);
            from += part;
            room -= part;
            if let Some((start, bytes)) = pieces.last_mut() {
                *bytes = from - *start;
            }
        }
    }
    pieces
}

/// Huge pages are left alone: dropping their entries does not say which part is used.
fn watched(regions: &[RamRegion]) -> impl Iterator<Item = &RamRegion> {
    regions
        .iter()
        .filter(|region| region.backing == Backing::Small)
}

impl Scout for QemuScout {
    fn watch(&mut self) -> Result<(), MachineError> {
        let pagemap = File::open(format!("/proc/{}/pagemap", self.process.pid()))?;
        let mut stopped = Vec::new();
        for region in watched(&self.regions) {
            let mut mapped = Vec::new();
            let end = region.host + region.bytes;
            scan(
                &pagemap,
                Pages::Mapped,
                region.host,
                end,
                &mut |from, to| {
                    mapped.push((from, to));
                },
            )?;
            for piece in pieces(mapped) {
                stopped.push(self.process.unmap_shared(&[piece])?);
            }
        }
        tracing::debug!(
            times = stopped.len(),
            longest_us = stopped
                .iter()
                .max()
                .map_or(0, |longest| longest.as_micros() as u64),
            stopped_us = stopped.iter().sum::<Duration>().as_micros() as u64,
            "watching what the guest touches"
        );
        self.pagemap = Some(pagemap);
        self.looks.watch();
        Ok(())
    }

    fn look(&mut self) -> Result<Hints, MachineError> {
        let vcpus = self.vcpus()?;
        let (pagemap, regions, layout) = (self.pagemap.as_ref(), &self.regions, &self.layout);
        let hints = self
            .looks
            .look(&vcpus, &mut || touched(pagemap, regions, layout))?;
        Ok(self.with_roms(hints))
    }

    fn look_paused(&mut self) -> Result<Hints, MachineError> {
        let vcpus = self.vcpus()?;
        let (pagemap, regions, layout) = (self.pagemap.as_ref(), &self.regions, &self.layout);
        let hints = self
            .looks
            .look_paused(&vcpus, &mut || touched(pagemap, regions, layout))?;
        Ok(self.with_roms(hints))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every run is dropped, once, and no piece is a long one.
        #[test]
        fn pieces_hold_all_runs(
            lengths in proptest::collection::vec((1..3000_u64, 1..5000_u64), 0..40),
        ) {
            let mut at = 0;
            let runs: Vec<_> = lengths
                .iter()
                .map(|(gap, length)| {
                    let from = at + gap * 4096;
                    at = from + length * 4096;
                    (from, at)
                })
                .collect();
            let pieces = pieces(runs.clone());
            let within = |from: u64, to: u64| -> u64 {
                runs.iter().map(|&(start, end)| end.min(to).saturating_sub(start.max(from))).sum()
            };
            for piece in pieces.windows(2) {
                prop_assert!(piece[0].0 + piece[0].1 <= piece[1].0);
            }
            for &(start, bytes) in &pieces {
                prop_assert!(within(start, start + bytes) <= PIECE_BYTES);
            }
            let dropped: u64 = pieces.iter().map(|&(start, bytes)| within(start, start + bytes)).sum();
            prop_assert_eq!(dropped, within(0, u64::MAX));
        }
    }
}
