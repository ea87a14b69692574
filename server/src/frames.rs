//! From pages to frames: reads a machine's memory, leaves zeros out, and puts headers ahead of what is left.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lazyvm_wire::frame::{FRAME_PAGES_MAX, FrameHeader, FrameKind};
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange, is_zero, page_digest, zero_digest};

use crate::early::Outgoing;
use crate::packing::Packer;
use crate::port::SourceMemory;

/// Most pages that are read at a time for the push: 128 KiB, which a core's cache still holds when they are encrypted.
pub(crate) const READ_PAGES_MAX: u64 = 32;

/// Buffers that are kept for the next read, in bytes.
const POOL_BYTES_MAX: usize = 16 << 20;

/// Reads pages as frames.
pub(crate) struct FrameReader {
    memory: Arc<dyn SourceMemory>,
    pool: Arc<Pool>,
}

/// What a row of frames holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FrameStats {
    /// Pages sent with their bytes.
    pub raw_pages: u64,
    /// Pages that turned out to be zero.
    pub zero_pages: u64,
    /// Pages that could not be read.
    pub unreadable_pages: u64,
}

/// What a run of pages is found to hold.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    Data(&'a [u8]),
    Zero,
    Unreadable,
}

impl FrameReader {
    pub fn new(memory: Arc<dyn SourceMemory>) -> Self {
        Self {
            memory,
            pool: Arc::default(),
        }
    }

    /// Appends the frames of `range`, of at most [`READ_PAGES_MAX`] pages, or a huge page `whole`, to `out`.
    pub fn push_frames(
        &self,
        range: PageRange,
        whole: bool,
        packer: &mut Packer,
        out: &mut Vec<Bytes>,
    ) -> FrameStats {
        let mut stats = FrameStats::default();
        let mut buffer = Pool::take(&self.pool, range.bytes() as usize);
        if let Err(error) = self.memory.read(range, &mut buffer.bytes) {
            tracing::error!(%range, %error, "can't read memory of the machine");
            stats.unreadable_pages = range.count;
            out.push(header(range, FrameKind::Unreadable));
            return stats;
        }
        let payload = Bytes::from_owner(buffer);
        let mut rest = range;
        while let Some((run, zero)) = next_run(&payload, range.first, rest, whole) {
            if zero {
                stats.zero_pages += run.count;
                out.push(header(run, FrameKind::Zero));
            } else {
                stats.raw_pages += run.count;
                let start = ((run.first.0 - range.first.0) as usize) * PAGE_SIZE;
                let pages = payload.slice(start..start + run.bytes() as usize);
                append(FrameHeader::new(run, FrameKind::Raw), pages, packer, out);
            }
            rest = PageRange::new(run.end(), rest.count - run.count);
        }
        stats
    }

    /// Appends frames with the pages as they are now, while the machine runs, and tells `found` what is in each run. Only
    /// what has data goes.
    pub fn early_frames(
        &self,
        outgoing: Outgoing,
        packer: &mut Packer,
        out: &mut Vec<Bytes>,
        mut found: impl FnMut(PageRange, Content<'_>),
    ) {
        let Outgoing {
            range,
            round,
            whole,
        } = outgoing;
        let mut buffer = Pool::take(&self.pool, range.bytes() as usize);
        if self.memory.read(range, &mut buffer.bytes).is_err() {
            found(range, Content::Unreadable);
            return;
        }
        let payload = Bytes::from_owner(buffer);
        let mut rest = range;
        while let Some((run, zero)) = next_run(&payload, range.first, rest, whole) {
            if zero {
                found(run, Content::Zero);
            } else {
                let start = ((run.first.0 - range.first.0) as usize) * PAGE_SIZE;
                let bytes = payload.slice(start..start + run.bytes() as usize);
                found(run, Content::Data(&bytes));
                let header = FrameHeader::new(run, FrameKind::Early).in_round(round);
                append(header, bytes, packer, out);
            }
            rest = PageRange::new(run.end(), rest.count - run.count);
        }
    }

    /// The frame that answers a fault on `range`, of at most [`FRAME_PAGES_MAX`] pages: header and bytes in one.
    pub fn demand_frame(&self, range: PageRange) -> Bytes {
        let header_len = lazyvm_wire::frame::FRAME_HEADER_LEN;
        let mut frame = vec![0; header_len + range.bytes() as usize];
        let (head, body) = frame.split_at_mut(header_len);
        let kind = match self.memory.read(range, body) {
            Ok(()) if is_zero(body) => FrameKind::Zero,
            Ok(()) => FrameKind::Raw,
            Err(error) => {
                tracing::error!(%range, %error, "can't read memory of the machine");
                FrameKind::Unreadable
            }
        };
        let header = FrameHeader::new(range, kind);
        head.copy_from_slice(&header.encode());
        frame.truncate(header_len + header.payload_len());
        frame.into()
    }

    /// Appends the digests of `range`, of at most [`FRAME_PAGES_MAX`] pages, to `out`.
    pub fn digest_frames(&self, range: PageRange, out: &mut Vec<Bytes>) {
        debug_assert!(range.count <= FRAME_PAGES_MAX);
        match self.digests(range) {
            Ok(digests) if digests.iter().all(|&digest| digest == zero_digest()) => {
                out.push(header(range, FrameKind::ZeroDigests));
            }
            Ok(digests) => {
                out.push(header(range, FrameKind::Digests));
                let bytes = digests.iter().flat_map(|digest| digest.to_le_bytes());
                out.push(bytes.collect());
            }
            // The destination misses these digests, and says that it could not verify the pages.
            Err(error) => tracing::error!(%range, %error, "can't read memory of the machine"),
        }
    }

    /// In reads as small as the push's: larger buffers would end up in the pool and stay there.
    fn digests(&self, range: PageRange) -> io::Result<Vec<u64>> {
        let mut digests = Vec::with_capacity(range.count as usize);
        let mut rest = range;
        while !rest.is_empty() {
            let part = PageRange::new(rest.first, rest.count.min(READ_PAGES_MAX));
            let mut buffer = Pool::take(&self.pool, part.bytes() as usize);
            self.memory.read(part, &mut buffer.bytes)?;
            digests.extend(buffer.bytes.chunks_exact(PAGE_SIZE).map(page_digest));
            rest = PageRange::new(part.end(), rest.count - part.count);
        }
        Ok(digests)
    }
}

pub(crate) fn header(range: PageRange, kind: FrameKind) -> Bytes {
    Bytes::copy_from_slice(&FrameHeader::new(range, kind).encode())
}

/// Appends a frame of these pages, compressed where that is worth it.
fn append(header: FrameHeader, pages: Bytes, packer: &mut Packer, out: &mut Vec<Bytes>) {
    let (header, payload) = match packer.pack(&pages) {
        Some((encoding, packed)) => {
            let packed_header =
                FrameHeader::packed(header.range, header.kind, encoding, packed.len());
            (packed_header.in_round(header.round), packed.into())
        }
        None => (header, pages),
    };
    out.push(Bytes::copy_from_slice(&header.encode()));
    out.push(payload);
}

/// The longest run at the start of `rest` that is all zero or has no zero page, and which of the two. A `whole` one is not
/// cut, and has data where any page of it has; nothing is left behind it.
fn next_run(
    payload: &[u8],
    first: PageIndex,
    rest: PageRange,
    whole: bool,
) -> Option<(PageRange, bool)> {
    if whole {
        return (!rest.is_empty()).then(|| (rest, is_zero(payload)));
    }
    let start = ((rest.first.0 - first.0) as usize) * PAGE_SIZE;
    let mut pages = payload[start..start + rest.bytes() as usize]
        .chunks_exact(PAGE_SIZE)
        .map(is_zero);
    let zero = pages.next()?;
    let count = 1 + pages.take_while(|&other| other == zero).count() as u64;
    Some((PageRange::new(rest.first, count), zero))
}

/// Buffers to read into. A fresh one for each read would cost a page fault for each page of it.
#[derive(Default)]
struct Pool(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    buffers: Vec<Vec<u8>>,
    /// Of all of them together.
    bytes: usize,
}

struct Buffer {
    bytes: Vec<u8>,
    pool: Arc<Pool>,
}

impl Pool {
    fn take(pool: &Arc<Self>, len: usize) -> Buffer {
        let mut bytes = pool.pop().unwrap_or_default();
        bytes.resize(len, 0);
        Buffer {
            bytes,
            pool: pool.clone(),
        }
    }

    fn pop(&self) -> Option<Vec<u8>> {
        let mut kept = self.lock();
        let buffer = kept.buffers.pop()?;
        kept.bytes -= buffer.capacity();
        Some(buffer)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut kept = self.pool.lock();
        if kept.bytes + self.bytes.capacity() <= POOL_BYTES_MAX {
            kept.bytes += self.bytes.capacity();
            kept.buffers.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages whose number is in the list are zero; page 13 can't be read.
    struct Memory(&'static [u64]);

    impl SourceMemory for Memory {
        fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
            if range.contains(PageIndex(13)) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            for (page, bytes) in range.pages().zip(out.chunks_exact_mut(PAGE_SIZE)) {
                bytes.fill(0);
                if !self.0.contains(&page.0) {
                    bytes[PAGE_SIZE - 1] = (page.0 as u8).wrapping_add(1);
                }
            }
            Ok(())
        }

        fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
            data(PageRange::new(PageIndex(0), 16));
            Ok(())
        }
    }

    fn parse(frames: &[Bytes]) -> Vec<(FrameHeader, Vec<u8>)> {
        let bytes: Vec<u8> = frames.concat();
        let mut rest = &bytes[..];
        let mut out = Vec::new();
        while let Some((head, body)) = rest.split_first_chunk() {
            let header = FrameHeader::decode(head, 16).unwrap();
            let (payload, after) = body.split_at(header.payload_len());
            out.push((header, payload.to_vec()));
            rest = after;
        }
        out
    }

    #[test]
    fn zero_runs_are_left_out_of_the_payload() {
        let reader = FrameReader::new(Arc::new(Memory(&[0, 1, 4])));
        let mut out = Vec::new();
        let stats = reader.push_frames(
            PageRange::new(PageIndex(0), 6),
            false,
            &mut Packer::default(),
            &mut out,
        );
        assert_eq!((stats.raw_pages, stats.zero_pages), (3, 3));
        let frames = parse(&out);
        let shape: Vec<_> = frames
            .iter()
            .map(|(h, _)| (h.range.first.0, h.range.count, h.kind))
            .collect();
        assert_eq!(
            shape,
            [
                (0, 2, FrameKind::Zero),
                (2, 2, FrameKind::Raw),
                (4, 1, FrameKind::Zero),
                (5, 1, FrameKind::Raw)
            ]
        );
        assert_eq!(frames[1].1[PAGE_SIZE - 1], 3);
        assert_eq!(frames[1].1[2 * PAGE_SIZE - 1], 4);
        assert_eq!(frames[3].1[PAGE_SIZE - 1], 6);
    }

    #[test]
    fn a_page_that_cannot_be_read_is_said_so_and_never_made_up() {
        let reader = FrameReader::new(Arc::new(Memory(&[])));
        let mut out = Vec::new();
        let stats = reader.push_frames(
            PageRange::new(PageIndex(12), 4),
            false,
            &mut Packer::default(),
            &mut out,
        );
        assert_eq!(stats.unreadable_pages, 4);
        assert_eq!(parse(&out)[0].0.kind, FrameKind::Unreadable);
        let demand = reader.demand_frame(PageRange::one(PageIndex(13)));
        assert_eq!(parse(&[demand])[0].0.kind, FrameKind::Unreadable);
    }

    #[test]
    fn buffers_come_back_once_the_frames_are_gone() {
        let reader = FrameReader::new(Arc::new(Memory(&[])));
        let mut out = Vec::new();
        reader.push_frames(
            PageRange::new(PageIndex(0), 8),
            false,
            &mut Packer::default(),
            &mut out,
        );
        assert_eq!(reader.pool.lock().buffers.len(), 0);
        out.clear();
        assert_eq!(reader.pool.lock().buffers.len(), 1);
    }

    #[test]
    fn digests_leave_no_larger_buffers_behind_than_the_push_needs() {
        let reader = FrameReader::new(Arc::new(Memory(&[])));
        let mut out = Vec::new();
        for _ in 0..3 {
            reader.push_frames(
                PageRange::new(PageIndex(0), 8),
                false,
                &mut Packer::default(),
                &mut out,
            );
            reader.digest_frames(PageRange::new(PageIndex(14), FRAME_PAGES_MAX), &mut out);
        }
        out.clear();
        let kept = reader.pool.lock();
        assert!(kept.bytes <= kept.buffers.len() * READ_PAGES_MAX as usize * PAGE_SIZE);
        assert_eq!(
            kept.bytes,
            kept.buffers.iter().map(Vec::capacity).sum::<usize>()
        );
    }
}
