//! Which pages a QEMU's guest and its devices write: [`WriteWatch`] on every mapping of the RAM's files.

use std::sync::Arc;

use lazyvm_server::port::{DirtyTracker, MachineError, SourceMemory};
use lazyvm_wire::{Backing, Gpa, Layout, PAGE_SHIFT, PageIndex, PageRange};

use super::memory::RamRegion;
use super::ram::SharedRam;
use crate::attach::Process;
use crate::dirty::WriteWatch;
use crate::dirty::unseen::{self, Commands};
use crate::record::Piece;

/// Why a QEMU's writes can't be noted.
#[derive(Debug, thiserror::Error)]
enum TrackError {
    #[error("can't look at the open files of this QEMU")]
    Files(#[source] std::io::Error),
    #[error(
        "this QEMU has {0} open, through which RAM may be written unseen (O_DIRECT, a host's disk, FUSE, VFIO and the like): \
         give its drives files and cache=writeback, or move with post-copy"
    )]
    Unseen(String),
    #[error("process {0} has this VM's RAM mapped as well, and its writes would not be seen")]
    OtherUser(i32),
    #[error("can't look which other processes have this VM's RAM mapped")]
    Others(#[source] std::io::Error),
    #[error("QEMU's mappings of its RAM have changed, so that writes may have been missed")]
    Changed,
    #[error("part of the RAM {0} is not found in QEMU's memory map")]
    NotMapped(String),
    #[error("writes are not being noted")]
    NotStarted,
}

/// See the module.
pub(super) struct QemuTracker {
    process: Arc<Process>,
    regions: Arc<[RamRegion]>,
    layout: Layout,
    memory: Arc<SharedRam>,
    pieces: Vec<Piece>,
    watch: Option<WriteWatch>,
    reports_holes: bool,
}

impl QemuTracker {
    pub fn new(
        process: Arc<Process>,
        regions: Arc<[RamRegion]>,
        layout: &Layout,
        memory: Arc<SharedRam>,
    ) -> Self {
        Self {
            process,
            regions,
            layout: layout.clone(),
            memory,
            pieces: Vec::new(),
            watch: None,
            reports_holes: false,
        }
    }

    /// Reports all holes of the memory too, whenever writes are asked for: for a guest that gives memory back, since the kernel
    /// reports no write for a page that becomes a hole. That takes a walk through all of it. Of huge pages, whose file does
    /// not tell its holes, those are reported that are not mapped.
    pub fn with_holes(self) -> Self {
        Self {
            reports_holes: true,
            ..self
        }
    }

    /// Every shared mapping of every region, ascending: the guest's own and those that QEMU has besides.
    fn find(&self) -> Result<Vec<Piece>, MachineError> {
        let mappings = self.process.mappings()?;
        let mut pieces = Vec::new();
        for region in self.regions.iter() {
            let first = self.layout.page_of(Gpa(region.gpa));
            let first = first.ok_or_else(|| TrackError::NotMapped(region.name.clone()))?;
            let file = region.file.metadata()?;
            let region_end = region.offset + region.bytes;
            let before = pieces.len();
            for mapping in mappings.iter().filter(|mapping| mapping.is_of(&file)) {
                let mapping_end = mapping.offset + (mapping.end - mapping.start);
                let from = mapping.offset.max(region.offset);
                let to = mapping_end.min(region_end);
                if from < to {
                    pieces.push(Piece {
                        host: mapping.start + (from - mapping.offset),
                        bytes: to - from,
                        first: PageIndex(first.0 + ((from - region.offset) >> PAGE_SHIFT)),
                    });
                }
            }
            let covered: u64 = pieces[before..]
                .iter()
                .filter(|piece| {
                    piece.host >= region.host && piece.host < region.host + region.bytes
                })
                .map(|piece| piece.bytes)
                .sum();
            if covered < region.bytes {
                return Err(TrackError::NotMapped(region.name.clone()).into());
            }
        }
        // The kernel may split and join mappings; what lies side by side is one.
        pieces.sort_by_key(|piece| piece.host);
        pieces.dedup_by(|next, last| {
            let joins = last.host + last.bytes == next.host
                && last.first.0 + (last.bytes >> PAGE_SHIFT) == next.first.0;
            if joins {
                last.bytes += next.bytes;
            }
            joins
        });
        Ok(pieces)
    }

    /// The parts of the pieces that hold data, ascending. What becomes data from now on is written, and so reported.
    fn data(&self) -> Result<Vec<(u64, u64)>, MachineError> {
        let mut runs = Vec::new();
        self.memory.data_runs(&mut |range| runs.push(range))?;
        let mut parts = Vec::new();
        for piece in &self.pieces {
            let pages = PageRange::new(piece.first, piece.bytes >> PAGE_SHIFT);
            let from = runs.partition_point(|run| run.end() <= pages.first);
            let within = runs[from..].iter().map(|run| run.intersect(pages));
            parts.extend(within.take_while(|run| !run.is_empty()).map(|run| {
                let (start, end) = piece.hosts(run);
                (start, end - start)
            }));
        }
        Ok(parts)
    }

    /// Where the guest has its huge pages.
    fn huge(&self) -> Vec<(u64, u64)> {
        let huge = |region: &&RamRegion| region.backing == Backing::Huge2M;
        let place = |region: &RamRegion| (region.host, region.bytes);
        self.regions.iter().filter(huge).map(place).collect()
    }

    /// Before a scan, so that it is known what is scanned, and after it: what has come meanwhile may have written already.
    fn check(&self) -> Result<(), MachineError> {
        let pid = self.process.pid();
        if let Some(name) = unseen::descriptor(pid, Commands::Any).map_err(TrackError::Files)? {
            return Err(TrackError::Unseen(name).into());
        }
        if self.find()? != self.pieces {
            return Err(TrackError::Changed.into());
        }
        Ok(())
    }

    fn scan(&mut self, dirty: &mut dyn FnMut(PageRange)) -> Result<(), MachineError> {
        if self.watch.is_none() {
            return Err(TrackError::NotStarted.into());
        }
        self.check()?;
        let watch = self.watch.as_mut().ok_or(TrackError::NotStarted)?;
        let (pieces, memory) = (&self.pieces, &self.memory);
        let piece_at = |host: u64| {
            let at = pieces.partition_point(|piece| piece.host + piece.bytes <= host);
            pieces.get(at)
        };
        let mut holding = |start, end, data: &mut dyn FnMut(u64, u64)| match piece_at(start) {
            Some(piece) => memory.data_in(piece.pages(start, end), &mut |run| {
                let (from, to) = piece.hosts(run);
                data(from, to);
            }),
            None => Ok(()),
        };
        watch.collect_holding(&mut holding, &mut |start, end| {
            if let Some(piece) = piece_at(start) {
                dirty(piece.pages(start, end));
            }
        })?;
        if self.reports_holes {
            self.memory.holes(dirty)?;
        }
        self.check()?;
        self.check_others()
    }

    fn check_others(&self) -> Result<(), MachineError> {
        let files = self.regions.iter().map(|region| &*region.file);
        match unseen::process(files, self.process.pid()).map_err(TrackError::Others)? {
            Some(pid) => Err(TrackError::OtherUser(pid).into()),
            None => Ok(()),
        }
    }
}

impl DirtyTracker for QemuTracker {
    fn start(&mut self) -> Result<(), MachineError> {
        self.watch = None;
        self.pieces = self.find()?;
        self.check()?;
        let ranges: Vec<_> = self
            .pieces
            .iter()
            .map(|piece| (piece.host, piece.bytes))
            .collect();
        let mut watch = WriteWatch::start(&self.process, &ranges, &self.data()?)?;
        if self.reports_holes {
            watch = watch.reporting_absent(&self.huge());
        }
        self.check()?;
        self.check_others()?;
        self.watch = Some(watch);
        Ok(())
    }

    fn collect(&mut self, dirty: &mut dyn FnMut(PageRange)) -> Result<(), MachineError> {
        let scanned = self.scan(dirty);
        if scanned.is_err() {
            // What was missed would never be reported.
            self.watch = None;
        }
        scanned
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        self.watch = None;
        Ok(())
    }
}
