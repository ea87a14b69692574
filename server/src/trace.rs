//! A trace: which pages a machine touches after a move, and what was known at the pause. Recorded once; the simulator
//! (`lazyvm bench sim`) replays it with any policy over any link.
//!
//! The file is `LVTRACE1` and one zstd frame. In it are LEB128 numbers: pages of the image, bytes of the state; then seven
//! lists of runs (data, held, tables, processor, code, hot, virtual order), each its count and for each run the distance
//! of its first page from the end of the run before, zigzag, and its pages; then the touches: their count, and for each the
//! distance from the page before, zigzag, and the microseconds since the touch before.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use lazyvm_wire::{PageIndex, PageMap, PageRange};

use crate::port::Hints;
use crate::session::lock;

const MAGIC: &[u8; 8] = b"LVTRACE1";

/// Most pages of an image: 64 GiB.
pub const PAGES_MAX: u64 = 1 << 24;

/// Most bytes of a trace once it is decompressed.
pub const DECODED_MAX: usize = 64 << 20;

/// Most touches of a trace, and most runs of a list.
pub const ITEMS_MAX: u64 = 4 << 20;

/// zstd's; a trace is written once.
const LEVEL: i32 = 19;

/// A page that was absent when the machine touched it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// When, from the pause on.
    pub at_us: u64,
    /// The page.
    pub page: PageIndex,
}

/// What is recorded. All pages are in the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// Pages of the image.
    pub pages: u64,
    /// Bytes of the state that went with the switchover.
    pub state_bytes: u64,
    /// Pages that hold data.
    pub data: Vec<PageRange>,
    /// Pages that were sent before the pause and had not changed at it.
    pub held: Vec<PageRange>,
    /// What was known at the pause.
    pub hints: Hints,
    /// First touches of data pages, in their order.
    pub touches: Vec<Touch>,
}

/// A trace that can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file is none.
    #[error("not a trace")]
    Magic,
    /// It can't be decompressed, or is too large.
    #[error("the trace can't be decompressed")]
    Compressed(#[source] io::Error),
    /// It ends early, goes on, or counts more than there may be.
    #[error("the trace is damaged")]
    Damaged,
}

impl Trace {
    /// A trace without hints and touches.
    pub fn at_pause(data: &PageMap, held: &PageMap, state_bytes: u64) -> Self {
        Self {
            pages: data.bits().len() as u64,
            state_bytes,
            data: runs_of(data.bits().iter_ones()),
            held: runs_of(held.bits().iter_ones()),
            ..Self::default()
        }
    }

    /// For a file.
    ///
    /// # Errors
    /// zstd's.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        put(&mut out, self.pages);
        put(&mut out, self.state_bytes);
        let order = runs_of(self.hints.virtual_order.iter().map(|page| page.as_usize()));
        let hints = &self.hints;
        for list in [
            &self.data,
            &self.held,
            &hints.tables,
            &hints.processor,
            &hints.code,
            &hints.hot,
            &order,
        ] {
            put(&mut out, list.len() as u64);
            let mut at = 0;
            for run in list {
                put_signed(&mut out, run.first.0 as i64 - at);
                put(&mut out, run.count);
                at = run.end().0 as i64;
            }
        }
        put(&mut out, self.touches.len() as u64);
        let (mut page, mut time) = (0, 0);
        for touch in &self.touches {
            put_signed(&mut out, touch.page.0 as i64 - page);
            put(&mut out, touch.at_us.saturating_sub(time));
            (page, time) = (touch.page.0 as i64, touch.at_us.max(time));
        }
        Ok([MAGIC.as_slice(), &zstd::bulk::compress(&out, LEVEL)?].concat())
    }

    /// From a file.
    ///
    /// # Errors
    /// [`TraceError`], whatever the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, TraceError> {
        let packed = bytes.strip_prefix(MAGIC).ok_or(TraceError::Magic)?;
        let body = zstd::bulk::decompress(packed, DECODED_MAX).map_err(TraceError::Compressed)?;
        Self::decode_body(&body)
    }

    /// From what is inside of a file, decompressed.
    ///
    /// # Errors
    /// [`TraceError::Damaged`], whatever the bytes.
    pub fn decode_body(bytes: &[u8]) -> Result<Self, TraceError> {
        let mut body = Reader { bytes, pages: 0 };
        body.pages = body.number()?;
        if body.pages > PAGES_MAX {
            return Err(TraceError::Damaged);
        }
        let mut trace = Self {
            pages: body.pages,
            state_bytes: body.number()?,
            data: body.runs()?,
            held: body.runs()?,
            ..Self::default()
        };
        trace.hints.tables = body.runs()?;
        trace.hints.processor = body.runs()?;
        trace.hints.code = body.runs()?;
        trace.hints.hot = body.runs()?;
        let order = body.runs()?;
        if order.iter().map(|run| run.count).sum::<u64>() > ITEMS_MAX {
            return Err(TraceError::Damaged);
        }
        trace.hints.virtual_order = order.into_iter().flat_map(PageRange::pages).collect();
        trace.touches = body.touches()?;
        match body.bytes.is_empty() {
            true => Ok(trace),
            false => Err(TraceError::Damaged),
        }
    }
}

fn runs_of(pages: impl Iterator<Item = usize>) -> Vec<PageRange> {
    let mut runs: Vec<PageRange> = Vec::new();
    for page in pages.map(|page| PageIndex(page as u64)) {
        match runs.last_mut() {
            Some(run) if run.end() == page => run.count += 1,
            _ => runs.push(PageRange::one(page)),
        }
    }
    runs
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, ((value << 1) ^ (value >> 63)) as u64);
}

struct Reader<'a> {
    bytes: &'a [u8],
    pages: u64,
}

impl Reader<'_> {
    fn number(&mut self) -> Result<u64, TraceError> {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let (&byte, rest) = self.bytes.split_first().ok_or(TraceError::Damaged)?;
            self.bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(TraceError::Damaged)
    }

    /// A page number, told as the distance from `from`.
    fn page(&mut self, from: u64) -> Result<u64, TraceError> {
        let value = self.number()?;
        let distance = (value >> 1) as i64 ^ -((value & 1) as i64);
        let page = from.checked_add_signed(distance);
        page.filter(|&page| page < self.pages)
            .ok_or(TraceError::Damaged)
    }

    fn count(&mut self) -> Result<u64, TraceError> {
        let count = self.number()?;
        // Each item takes two bytes or more.
        let fits = count <= ITEMS_MAX && count <= self.bytes.len() as u64 / 2;
        fits.then_some(count).ok_or(TraceError::Damaged)
    }

    fn runs(&mut self) -> Result<Vec<PageRange>, TraceError> {
        let mut at = 0;
        (0..self.count()?)
            .map(|_| {
                let first = self.page(at)?;
                let count = self.number()?;
                if count == 0 || count > self.pages - first {
                    return Err(TraceError::Damaged);
                }
                at = first + count;
                Ok(PageRange::new(PageIndex(first), count))
            })
            .collect()
    }

    fn touches(&mut self) -> Result<Vec<Touch>, TraceError> {
        let (mut page, mut at_us) = (0, 0_u64);
        (0..self.count()?)
            .map(|_| {
                page = self.page(page)?;
                at_us = at_us
                    .checked_add(self.number()?)
                    .ok_or(TraceError::Damaged)?;
                Ok(Touch {
                    at_us,
                    page: PageIndex(page),
                })
            })
            .collect()
    }
}

/// Records a session: nothing is pushed and nothing held for a while, so that every first touch of a data page is a fault.
pub struct Recorder {
    file: PathBuf,
    time: Duration,
    state: Arc<Mutex<(Trace, Option<Instant>)>>,
}

impl Recorder {
    /// Writes to `file` what is touched within `time` of the pause.
    pub fn new(file: PathBuf, time: Duration) -> Self {
        Self {
            file,
            time,
            state: Arc::default(),
        }
    }

    pub(crate) fn paused(&self, trace: Trace, at: Instant) {
        *self.lock() = (trace, Some(at));
    }

    pub(crate) fn hints(&self, hints: &Hints) {
        self.lock().0.hints = hints.clone();
    }

    pub(crate) fn touched(&self, page: PageIndex) {
        let mut state = self.lock();
        if let Some(at) = state.1 {
            let at_us = at.elapsed().as_micros() as u64;
            state.0.touches.push(Touch { at_us, page });
        }
    }

    /// Writes the file when the time is over, and calls `then`.
    pub(crate) fn write_later(&self, then: impl FnOnce() + Send + 'static) {
        let (state, file, time) = (self.state.clone(), self.file.clone(), self.time);
        std::thread::spawn(move || {
            std::thread::sleep(time);
            let state = std::mem::take(&mut *lock(&state));
            let written = state
                .0
                .encode()
                .and_then(|bytes| std::fs::write(&file, bytes));
            if let Err(error) = written {
                tracing::error!(%error, file = %file.display(), "can't write the trace");
            }
            then();
        });
    }

    fn lock(&self) -> MutexGuard<'_, (Trace, Option<Instant>)> {
        lock(&self.state)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(first: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(first), count)
    }

    fn sample() -> Trace {
        let mut trace = Trace {
            pages: 1000,
            state_bytes: 300,
            data: vec![run(3, 200), run(400, 2)],
            held: vec![run(5, 1)],
            touches: vec![
                Touch {
                    at_us: 70,
                    page: PageIndex(401),
                },
                Touch {
                    at_us: 500,
                    page: PageIndex(3),
                },
            ],
            ..Trace::default()
        };
        trace.hints.hot = vec![run(100, 5), run(7, 1)];
        trace.hints.virtual_order = [9, 10, 3].map(PageIndex).to_vec();
        trace
    }

    #[test]
    fn golden_bytes() {
        let bytes = sample().encode().unwrap();
        let body = zstd::bulk::decompress(&bytes[8..], 1000).unwrap();
        let golden: &[u8] = &[
            0xe8, 0x07, 0xac, 0x02, 2, 6, 0xc8, 0x01, 0x8a, 0x03, 2, 1, 10, 1, 0, 0, 0, 2, 0xc8,
            0x01, 5, 0xc3, 0x01, 1, 2, 18, 2, 15, 1, 2, 0xa2, 0x06, 70, 0x9b, 0x06, 0xae, 0x03,
        ];
        assert_eq!(body, golden);
        assert_eq!(Trace::decode(&bytes).unwrap(), sample());
    }

    #[test]
    fn pages_outside_of_the_image_are_refused() {
        let mut trace = sample();
        trace.touches[0].page = PageIndex(1000);
        let error = Trace::decode(&trace.encode().unwrap()).unwrap_err();
        assert!(matches!(error, TraceError::Damaged));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_trace_or_an_error(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let packed = zstd::bulk::compress(&body, 1).unwrap();
            if let Ok(trace) = Trace::decode(&[MAGIC.as_slice(), &packed].concat()) {
                let again = Trace::decode(&trace.encode().unwrap()).unwrap();
                prop_assert_eq!(again.touches, trace.touches);
            }
        }
    }
}
