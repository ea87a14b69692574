//! Taking a snapshot of a machine that runs: its memory is written while it runs, and again what it writes meanwhile; then
//! it stands still while what is left is copied to memory, and runs on while that is written.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use lazyvm_wire::{PAGE_SIZE, PageRange};

use super::SnapshotError;
use super::compare::{Compared, STEP_PAGES};
use super::format::{self, CHUNK_PAGES, Manifest, SnapshotId};
use super::known::Known;
use super::lead::Lead;
use super::write::Writer;
use crate::port::{DirtyTracker, MachineError, SourceMachine, SourceMemory};
use crate::rounds::{Judge, Round, Verdict};

/// Most rounds. A machine that writes faster than the disk takes it gets no nearer by more of them.
const ROUNDS_MAX: u32 = 16;

/// Pages that are copied to memory during the pause before they are written: 256 MiB.
const COPY_PAGES_MAX: usize = 64 * 1024;

/// What is ready for pages that are written between the last round and the pause, beyond as many as that round has left:
/// 16 MiB.
const SPARE_PAGES: usize = 4096;

/// Memory that is with a clone in no time, whatever comes first: 16 MiB.
pub(super) const SMALL_PAGES: u64 = 4096;

/// A snapshot that was not taken. The machine runs on, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// Its files.
    #[error(transparent)]
    Files(#[from] SnapshotError),
    /// The machine.
    #[error("the VM can't be {0}")]
    Machine(&'static str, #[source] MachineError),
    /// Its memory.
    #[error("the VM's memory can't be read")]
    Memory(#[source] io::Error),
    /// It was asked to end.
    #[error(
        "ended before the snapshot was complete; what was in the directory before is still there"
    )]
    Cancelled,
}

/// How far it is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// The round; 0 is the first pass.
    pub round: u32,
    /// Pages that this round has written.
    pub pages: u64,
    /// Pages of this round.
    pub pages_total: u64,
}

/// A snapshot that was taken.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Which.
    pub id: SnapshotId,
    /// What it is.
    pub manifest: Manifest,
    /// Whether its writes were tracked; else all memory was read while it stood still.
    pub tracked: bool,
    /// Rounds while the machine ran.
    pub rounds: u32,
    /// Pages that were copied while it stood still.
    pub pages_paused: u64,
    /// From the beginning of the pause until the machine ran on.
    pub pause: Duration,
}

/// Takes a snapshot into `directory`; with `base`, only what differs from that one is written. `go_on` hears of progress,
/// and ends it with `false`.
///
/// # Errors
/// [`TakeError`]. The machine runs on, and what was in the directory is still there.
pub fn take(
    machine: &dyn SourceMachine,
    directory: &Path,
    base: Option<&Path>,
    go_on: &mut dyn FnMut(Progress) -> bool,
) -> Result<Taken, TakeError> {
    let mut job = Job {
        machine,
        memory: machine.memory(),
        writer: Writer::begin(directory, machine.layout(), base)?,
        reading: Reading::default(),
        known: Known::new(machine.layout().pages()),
        lead: Lead::new(machine),
        go_on,
    };
    let (changes, rounds) = job.write_while_it_runs()?;
    let tracked = matches!(changes, Changes::Tracked(..));
    if !tracked {
        tracing::warn!(
            "nothing tells which pages this VM writes, so that all of its memory is read while it stands still"
        );
    }
    let (mut paused, tracker) = job.pause(changes)?;
    job.watch_on(tracker);
    // Of one that can be read at the pause only, that is everything.
    if rounds > 0 {
        job.lead.written(&paused.kept.ranges);
    }
    paused.kept.write(&mut job.writer)?;
    let lead = job.lead.pages(machine.layout());
    let id = job.writer.id();
    let manifest = job.writer.commit(&paused.state, machine.offer(), &lead)?;
    Ok(Taken {
        id,
        manifest,
        tracked,
        rounds,
        pages_paused: paused.pages,
        pause: paused.time,
    })
}

/// What tells at the pause which pages are to be written again.
enum Changes {
    /// A tracker, and what it has told that was not written yet.
    Tracked(Box<dyn DirtyTracker>, Vec<PageRange>),
    /// What was written.
    Compared(Compared),
}

/// What the pause gave.
struct Paused {
    state: Vec<u8>,
    kept: Kept,
    pages: u64,
    time: Duration,
}

/// Pages that are kept in memory until they are written, ascending.
struct Kept {
    ranges: Vec<PageRange>,
    /// Their bytes, and room behind them that the system has given already: it gives it page by page as it is first
    /// touched, which takes longer than the copying does.
    buffer: Vec<u8>,
    used: usize,
}

impl Kept {
    fn with_room(pages: usize) -> Self {
        let mut buffer = vec![0; pages.min(COPY_PAGES_MAX) * PAGE_SIZE];
        for byte in buffer.iter_mut().step_by(PAGE_SIZE) {
            *byte = 1;
        }
        // Else the compiler may see that nobody reads that, and leave it out.
        std::hint::black_box(&mut buffer);
        Self {
            ranges: Vec::with_capacity(pages.min(COPY_PAGES_MAX)),
            buffer,
            used: 0,
        }
    }

    /// Room for the bytes of this range, which ascends from those before.
    fn add(&mut self, range: PageRange) -> &mut [u8] {
        let start = self.used;
        self.used += range.bytes() as usize;
        if self.buffer.len() < self.used {
            self.buffer.resize(self.used, 0);
        }
        self.ranges.push(range);
        &mut self.buffer[start..self.used]
    }

    fn write(&mut self, writer: &mut Writer) -> Result<(), SnapshotError> {
        writer.lay_over(&self.ranges, &self.buffer[..self.used])?;
        self.ranges.clear();
        self.used = 0;
        Ok(())
    }
}

/// How fast the memory is read.
#[derive(Default)]
struct Reading {
    bytes: u64,
    time: Duration,
}

impl Reading {
    fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.time.as_secs_f64().max(1e-6)
    }
}

struct Job<'a> {
    machine: &'a dyn SourceMachine,
    memory: std::sync::Arc<dyn SourceMemory>,
    writer: Writer,
    reading: Reading,
    known: Known,
    lead: Lead,
    go_on: &'a mut dyn FnMut(Progress) -> bool,
}

fn stop(tracker: &mut dyn DirtyTracker) {
    if let Err(error) = tracker.stop() {
        tracing::warn!(%error, "the VM is still being watched for what it writes, and runs slower for it");
    }
}

/// Lets the machine run on, whatever happens.
struct Standing<'a>(Option<&'a dyn SourceMachine>);

impl Standing<'_> {
    fn run_on(mut self) -> Result<(), TakeError> {
        match self.0.take() {
            Some(machine) => machine
                .resume()
                .map_err(|error| TakeError::Machine("let run on, and stands still", error)),
            None => Ok(()),
        }
    }
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        if let Some(machine) = self.0.take()
            && let Err(error) = machine.resume()
        {
            tracing::error!(%error, "the VM stands still and can't be let run on");
        }
    }
}

impl Job<'_> {
    fn data(&self) -> Result<Vec<PageRange>, TakeError> {
        let mut runs = Vec::new();
        self.memory
            .data_runs(&mut |run| runs.push(run))
            .map_err(TakeError::Memory)?;
        Ok(runs)
    }

    fn changed(&self, reported: Vec<PageRange>) -> Result<Vec<PageRange>, TakeError> {
        let changed = self.known.changed(reported, self.memory.as_ref());
        changed.map_err(TakeError::Memory)
    }

    /// The rounds; also how many there were.
    fn write_while_it_runs(&mut self) -> Result<(Changes, u32), TakeError> {
        // Before there is a tracker: what is dropped from the machine's map would be taken for written.
        self.lead.forget_ahead();
        if let Some(mut tracker) = self.machine.tracker() {
            match tracker.start() {
                Ok(()) => return self.rounds(tracker),
                Err(error) => {
                    tracing::warn!(%error, "can't track which pages the VM writes; all of them are compared while it stands still");
                }
            }
        }
        let mut compared = Compared::new(self.writer.id(), self.machine.layout().pages());
        // One that can be read at the pause only (a Firecracker's) is then all different from nothing.
        let Ok(runs) = self.data() else {
            return Ok((Changes::Compared(compared), 0));
        };
        self.write_chunks(0, &runs, &mut |range, bytes| compared.note(range, bytes))?;
        self.lead.look();
        Ok((Changes::Compared(compared), 1))
    }

    fn rounds(&mut self, mut tracker: Box<dyn DirtyTracker>) -> Result<(Changes, u32), TakeError> {
        let start = Instant::now();
        let mut judge = Judge::of_snapshot();
        let mut runs = self.data()?;
        let mut round = 0;
        loop {
            self.write_chunks(round, &runs, &mut |_, _| ())?;
            if round == 0 {
                self.lead.look();
            } else {
                self.lead.written(&runs);
            }
            round += 1;
            runs.clear();
            tracker
                .collect(&mut |range| runs.push(range))
                .map_err(|error| {
                    TakeError::Machine("watched any more for what it writes", error)
                })?;
            runs = self.changed(runs)?;
            let judged = Round {
                elapsed: start.elapsed(),
                residual_pages: runs.iter().map(|range| range.count).sum(),
                bytes_per_s: self.reading.bytes_per_s(),
                more: round < ROUNDS_MAX,
            };
            let verdict = judge.after(judged);
            tracing::debug!(round, ?judged, ?verdict, "pages were written meanwhile");
            if verdict != Verdict::GoOn {
                return Ok((Changes::Tracked(tracker, runs), round));
            }
        }
    }

    /// Writes the chunks that hold any of these pages, as they are now.
    fn write_chunks(
        &mut self,
        round: u32,
        runs: &[PageRange],
        written: &mut dyn FnMut(PageRange, &[u8]),
    ) -> Result<(), TakeError> {
        let layout = self.machine.layout();
        let mut chunks: Vec<u64> = Vec::new();
        for run in runs
            .iter()
            .map(|run| run.intersect(layout.range()))
            .filter(|run| !run.is_empty())
        {
            chunks.extend(run.first.0 / CHUNK_PAGES..run.end().0.div_ceil(CHUNK_PAGES));
        }
        chunks.sort_unstable();
        chunks.dedup();
        let pages_total = chunks.len() as u64 * CHUNK_PAGES;
        let mut bytes = vec![0; format::CHUNK_BYTES];
        for (done, chunk) in chunks.into_iter().enumerate() {
            let progress = Progress {
                round,
                pages: done as u64 * CHUNK_PAGES,
                pages_total,
            };
            if !(self.go_on)(progress) {
                return Err(TakeError::Cancelled);
            }
            let range = format::chunk_range(layout, chunk);
            let bytes = &mut bytes[..range.bytes() as usize];
            let before = Instant::now();
            self.memory.read(range, bytes).map_err(TakeError::Memory)?;
            self.reading.time += before.elapsed();
            self.reading.bytes += range.bytes();
            self.writer.put(chunk, bytes)?;
            self.known.wrote(range);
            written(range, bytes);
        }
        Ok(())
    }

    /// Stops the machine, copies what is to be written still, and lets it run on.
    fn pause(
        &mut self,
        changes: Changes,
    ) -> Result<(Paused, Option<Box<dyn DirtyTracker>>), TakeError> {
        let machine = self.machine;
        let failed = |error| TakeError::Machine("paused", error);
        let room = match &changes {
            Changes::Tracked(_, runs) => {
                let left = runs.iter().map(|range| range.count).sum::<u64>();
                2 * left as usize + SPARE_PAGES
            }
            Changes::Compared(_) => SPARE_PAGES,
        };
        let kept = Kept::with_room(room);
        machine.prepare_pause().map_err(failed)?;
        let start = Instant::now();
        let state = machine.pause().map_err(failed)?;
        let standing = Standing(Some(machine));
        let state_us = start.elapsed().as_micros() as u64;
        let mut paused = Paused {
            state,
            kept,
            pages: 0,
            time: Duration::ZERO,
        };
        // It goes on for the scout, where nothing records: with it each page is mapped by itself where it is touched, and none of
        // those around it.
        let tracker = match changes {
            Changes::Tracked(mut tracker, runs) => {
                self.copy_tracked(tracker.as_mut(), runs, &mut paused)?;
                if self.lead.records() {
                    stop(tracker.as_mut());
                    None
                } else {
                    Some(tracker)
                }
            }
            Changes::Compared(compared) => {
                self.copy_compared(&compared, &mut paused)?;
                None
            }
        };
        let copied_us = start.elapsed().as_micros() as u64;
        self.lead.runs_on_next();
        let watched_us = start.elapsed().as_micros() as u64;
        standing.run_on()?;
        paused.time = start.elapsed();
        tracing::debug!(
            state_us,
            copied_us,
            watched_us,
            pause_us = paused.time.as_micros() as u64,
            pages = paused.pages,
            "the VM stood still"
        );
        Ok((paused, tracker))
    }

    /// Hears what the machine uses right after the pause, if that is worth the time.
    fn watch_on(&mut self, mut tracker: Option<Box<dyn DirtyTracker>>) {
        if self.machine.layout().pages() > SMALL_PAGES {
            self.lead
                .watch_on(tracker.as_deref_mut().map(|tracker| tracker as _));
        }
        if let Some(mut tracker) = tracker {
            stop(tracker.as_mut());
        }
    }

    fn copy_tracked(
        &mut self,
        tracker: &mut dyn DirtyTracker,
        mut runs: Vec<PageRange>,
        paused: &mut Paused,
    ) -> Result<(), TakeError> {
        tracker
            .collect(&mut |range| runs.push(range))
            .map_err(|error| TakeError::Machine("asked for what it wrote last", error))?;
        for range in merged(self.changed(runs)?) {
            let mut first = range.first;
            while first < range.end() {
                let part = PageRange::new(first, STEP_PAGES).intersect(range);
                self.memory
                    .read(part, paused.kept.add(part))
                    .map_err(TakeError::Memory)?;
                paused.pages += part.count;
                first = part.end();
                self.write_if_full(paused)?;
            }
        }
        Ok(())
    }

    /// Compares every page with what was written.
    fn copy_compared(&mut self, compared: &Compared, paused: &mut Paused) -> Result<(), TakeError> {
        let data = self.data()?;
        let image = self.machine.layout().range();
        let mut first = image.first;
        let mut at = 0;
        while first < image.end() {
            let step = PageRange::new(first, STEP_PAGES).intersect(image);
            while data.get(at).is_some_and(|run| run.end() <= step.first) {
                at += 1;
            }
            let here = data[at..].iter().take_while(|run| run.first < step.end());
            let here: Vec<_> = here.map(|run| run.intersect(step)).collect();
            let different = compared.differing(self.memory.as_ref(), step, &here);
            for (ranges, bytes) in different.map_err(TakeError::Memory)? {
                let mut rest = bytes.as_slice();
                for range in ranges {
                    let (here, behind) = rest.split_at(range.bytes() as usize);
                    paused.kept.add(range).copy_from_slice(here);
                    paused.pages += range.count;
                    rest = behind;
                }
            }
            self.write_if_full(paused)?;
            first = step.end();
        }
        Ok(())
    }

    fn write_if_full(&mut self, paused: &mut Paused) -> Result<(), TakeError> {
        if paused.kept.used >= COPY_PAGES_MAX * PAGE_SIZE {
            paused.kept.write(&mut self.writer)?;
        }
        Ok(())
    }
}

/// The same pages, ascending, each once.
fn merged(mut runs: Vec<PageRange>) -> Vec<PageRange> {
    runs.sort_unstable_by_key(|run| run.first);
    let mut merged: Vec<PageRange> = Vec::with_capacity(runs.len());
    for run in runs.into_iter().filter(|run| !run.is_empty()) {
        match merged.last_mut() {
            Some(last) if last.end() >= run.first => {
                last.count = last.end().max(run.end()).0 - last.first.0;
            }
            _ => merged.push(run),
        }
    }
    merged
}
