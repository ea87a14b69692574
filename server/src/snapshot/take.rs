//! Taking a snapshot of a machine that runs: its memory is written while it runs, and again what it writes meanwhile; then
//! it stands still while what is left is copied to memory, and runs on while that is written.

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange, is_zero};
use xxhash_rust::xxh3::xxh3_128_with_seed;

use super::SnapshotError;
use super::format::{self, CHUNK_PAGES, Manifest, SnapshotId};
use super::write::Writer;
use crate::port::{DirtyTracker, MachineError, SourceMachine, SourceMemory};

/// Pages that may be left for the pause: 8 MiB, which take a few milliseconds to copy.
const LEFT_PAGES: u64 = 2048;

/// Most rounds. A machine that writes faster than the disk takes it gets no nearer by more of them.
const ROUNDS_MAX: u32 = 16;

/// Pages that are copied to memory during the pause before they are written: 256 MiB.
const COPY_PAGES_MAX: usize = 64 * 1024;

/// Pages that are compared in a step, by all threads together.
const STEP_PAGES: u64 = 16 * 1024;

/// Most threads that compare.
const THREADS_MAX: usize = 4;

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
        go_on,
    };
    let (changes, rounds) = job.write_while_it_runs()?;
    if matches!(changes, Changes::Compared(_)) {
        tracing::warn!(
            "nothing tells which pages this VM writes, so that all of its memory is read while it stands still"
        );
    }
    let paused = job.pause(changes)?;
    job.writer.lay_over(&paused.ranges, &paused.bytes)?;
    let id = job.writer.id();
    let manifest = job.writer.commit(&paused.state, machine.offer())?;
    Ok(Taken {
        id,
        manifest,
        rounds,
        pages_paused: paused.pages,
        pause: paused.time,
    })
}

/// What tells at the pause which pages are to be written again.
enum Changes {
    /// A tracker, and what it has told that was not written yet.
    Tracked(Box<dyn DirtyTracker>, Vec<PageRange>),
    /// Each page's digest as it was written, 0 for zeros.
    Compared(Compared),
}

struct Compared {
    /// That a guest can't know, so that it can't make pages whose digests agree.
    seed: u64,
    digests: Vec<u128>,
}

impl Compared {
    fn digest(&self, page: &[u8]) -> u128 {
        if is_zero(page) {
            return 0;
        }
        xxh3_128_with_seed(page, self.seed).max(1)
    }
}

/// What the pause gave.
struct Paused {
    state: Vec<u8>,
    /// Pages that are to be written still, ascending, and their bytes.
    ranges: Vec<PageRange>,
    bytes: Vec<u8>,
    pages: u64,
    time: Duration,
}

struct Job<'a> {
    machine: &'a dyn SourceMachine,
    memory: std::sync::Arc<dyn SourceMemory>,
    writer: Writer,
    go_on: &'a mut dyn FnMut(Progress) -> bool,
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

    /// The rounds; also how many there were.
    fn write_while_it_runs(&mut self) -> Result<(Changes, u32), TakeError> {
        if let Some(mut tracker) = self.machine.tracker() {
            match tracker.start() {
                Ok(()) => return self.rounds(tracker),
                Err(error) => {
                    tracing::warn!(%error, "can't track which pages the VM writes; all of them are compared while it stands still");
                }
            }
        }
        let id = self.writer.id().0;
        let mut compared = Compared {
            seed: id
                .iter()
                .fold(0, |seed, &byte| seed << 8 ^ seed >> 56 ^ u64::from(byte)),
            digests: vec![0; self.machine.layout().pages() as usize],
        };
        // One that can be read at the pause only (a Firecracker's) is then all different from nothing.
        let Ok(runs) = self.data() else {
            return Ok((Changes::Compared(compared), 0));
        };
        self.write_chunks(0, &runs, &mut |range, bytes| {
            for (page, bytes) in range.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
                compared.digests[page.as_usize()] = compared.digest(bytes);
            }
        })?;
        Ok((Changes::Compared(compared), 1))
    }

    fn rounds(&mut self, mut tracker: Box<dyn DirtyTracker>) -> Result<(Changes, u32), TakeError> {
        let mut runs = self.data()?;
        let mut before = u64::MAX;
        for round in 0.. {
            self.write_chunks(round, &runs, &mut |_, _| ())?;
            runs.clear();
            tracker
                .collect(&mut |range| runs.push(range))
                .map_err(|error| {
                    TakeError::Machine("watched any more for what it writes", error)
                })?;
            let left = runs.iter().map(|range| range.count).sum::<u64>();
            tracing::debug!(round, left, "pages were written meanwhile");
            if left <= LEFT_PAGES || left >= before / 4 * 3 || round + 1 >= ROUNDS_MAX {
                return Ok((Changes::Tracked(tracker, runs), round + 1));
            }
            before = left;
        }
        Ok((Changes::Tracked(tracker, runs), ROUNDS_MAX))
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
            self.memory.read(range, bytes).map_err(TakeError::Memory)?;
            self.writer.put(chunk, bytes)?;
            written(range, bytes);
        }
        Ok(())
    }

    /// Stops the machine, copies what is to be written still, and lets it run on.
    fn pause(&mut self, changes: Changes) -> Result<Paused, TakeError> {
        let machine = self.machine;
        let failed = |error| TakeError::Machine("paused", error);
        machine.prepare_pause().map_err(failed)?;
        let start = Instant::now();
        let state = machine.pause().map_err(failed)?;
        let standing = Standing(Some(machine));
        let state_us = start.elapsed().as_micros() as u64;
        let mut paused = Paused {
            state,
            ranges: Vec::new(),
            bytes: Vec::new(),
            pages: 0,
            time: Duration::ZERO,
        };
        let tracker = match changes {
            Changes::Tracked(mut tracker, runs) => {
                self.copy_tracked(tracker.as_mut(), runs, &mut paused)?;
                Some(tracker)
            }
            Changes::Compared(compared) => {
                self.copy_compared(&compared, &mut paused)?;
                None
            }
        };
        standing.run_on()?;
        paused.time = start.elapsed();
        if let Some(mut tracker) = tracker
            && let Err(error) = tracker.stop()
        {
            tracing::warn!(%error, "the VM is still being watched for what it writes, and runs slower for it");
        }
        tracing::debug!(
            state_us,
            pause_us = paused.time.as_micros() as u64,
            pages = paused.pages,
            "the VM stood still"
        );
        Ok(paused)
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
        let image = self.machine.layout().range();
        for range in merged(runs) {
            let range = range.intersect(image);
            let mut first = range.first;
            while first < range.end() {
                let part = PageRange::new(first, STEP_PAGES).intersect(range);
                let start = paused.bytes.len();
                paused.bytes.resize(start + part.bytes() as usize, 0);
                self.memory
                    .read(part, &mut paused.bytes[start..])
                    .map_err(TakeError::Memory)?;
                paused.ranges.push(part);
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
            for (ranges, bytes) in compare(self.memory.as_ref(), compared, step, &here)? {
                paused.pages += ranges.iter().map(|range| range.count).sum::<u64>();
                paused.ranges.extend(ranges);
                paused.bytes.extend(bytes);
            }
            self.write_if_full(paused)?;
            first = step.end();
        }
        Ok(())
    }

    fn write_if_full(&mut self, paused: &mut Paused) -> Result<(), TakeError> {
        if paused.bytes.len() >= COPY_PAGES_MAX * PAGE_SIZE {
            self.writer.lay_over(&paused.ranges, &paused.bytes)?;
            paused.ranges.clear();
            paused.bytes.clear();
        }
        Ok(())
    }
}

/// Pages that differ, ascending, and their bytes.
type Different = (Vec<PageRange>, Vec<u8>);

/// Those of `step` that differ from what was written; `data` is what of it is no hole.
fn compare(
    memory: &dyn SourceMemory,
    compared: &Compared,
    step: PageRange,
    data: &[PageRange],
) -> Result<Vec<Different>, TakeError> {
    let threads = thread::available_parallelism().map_or(1, |cores| cores.get());
    let part = step.count.div_ceil(threads.min(THREADS_MAX) as u64).max(1);
    thread::scope(|scope| {
        let parts: Vec<_> = (0..step.count.div_ceil(part))
            .map(|number| {
                PageRange::new(PageIndex(step.first.0 + number * part), part).intersect(step)
            })
            .map(|part| scope.spawn(move || compare_part(memory, compared, part, data)))
            .collect();
        parts
            .into_iter()
            .map(|part| {
                part.join()
                    .unwrap_or_else(|_| Err(io::Error::other("a thread that read it has ended")))
                    .map_err(TakeError::Memory)
            })
            .collect()
    })
}

fn compare_part(
    memory: &dyn SourceMemory,
    compared: &Compared,
    part: PageRange,
    data: &[PageRange],
) -> io::Result<Different> {
    let (mut ranges, mut found) = (Vec::<PageRange>::new(), Vec::new());
    let mut buffer = vec![0; format::CHUNK_BYTES];
    let mut first = part.first;
    while first < part.end() {
        let some = PageRange::new(first, CHUNK_PAGES).intersect(part);
        let bytes = &mut buffer[..some.bytes() as usize];
        // Holes read as zeros too; not to read them is quicker.
        if data.iter().any(|run| !run.intersect(some).is_empty()) {
            memory.read(some, bytes)?;
        } else {
            bytes.fill(0);
        }
        for (page, bytes) in some.pages().zip(bytes.chunks_exact(PAGE_SIZE)) {
            if compared.digest(bytes) != compared.digests[page.as_usize()] {
                match ranges.last_mut() {
                    Some(last) if last.end() == page => last.count += 1,
                    _ => ranges.push(PageRange::one(page)),
                }
                found.extend_from_slice(bytes);
            }
        }
        first = some.end();
    }
    Ok((ranges, found))
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
