//! A VM's memory in Firecracker's process: where it is, and reading it from outside.
//!
//! Nothing tells from outside at which address Firecracker has mapped its guest's memory. `/proc/PID/maps` shows where
//! it may be, but neither where a region begins nor which is which, since the kernel shows neighbours as one. Firecracker
//! itself keeps for each region its address and its length, side by side, on its heap (`MmapRegion` of the crate
//! `vm-memory`, and its own slots). So these pairs are looked for, with the lengths that regions of this machine have.
//! The first region must then hold what Firecracker writes there before a VM starts. Where there is not just one answer,
//! there is none, and Firecracker writes its memory itself.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use lazyvm_server::port::SourceMemory;
use lazyvm_wire::{PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange};
use nix::errno::Errno;

use super::marks;
use crate::attach::{Mapping, Mappings, MapsError};
use crate::pagemap::{Pages, scan};

/// Where the second region begins in guest-physical memory is 4 GiB; where the first one ends by then: up to 1.12, and
/// since (`MEM_32BIT_GAP_SIZE`, `MMIO32_MEM_SIZE` in `src/vmm/src/arch/x86_64/`).
const FIRST_REGION_ENDS: [u64; 2] = [0xd000_0000, 0xc000_0000];

/// Where the third one would begin.
const SECOND_REGION_MAX: u64 = (256 << 30) - (4 << 30);

/// Longest mapping that is looked through for the pairs; a heap has a MiB or so.
const HEAP_MAX: u64 = 64 << 20;

/// Memory that can't be read from the process.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Its memory map.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// It can't be looked at.
    #[error(
        "can't look at process {pid}: run lazyvm as root, or as that process's user with the sysctl kernel.yama.ptrace_scope at 0"
    )]
    Look {
        /// The process.
        pid: i32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Not just one answer.
    #[error("the memory of {mib} MiB is not found in process {pid}, or in several places")]
    NotFound {
        /// The process.
        pid: i32,
        /// What was looked for.
        mib: u64,
    },
    /// Some of it is elsewhere.
    #[error("the memory in process {0} is still being filled by a page-fault handler")]
    Filling(i32),
}

/// A piece of the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Region {
    /// Its address in Firecracker.
    host: u64,
    bytes: u64,
    /// What is not there reads as zero; else it may be in a file.
    anonymous: bool,
}

/// Where a VM's memory is, in the order of its memory file.
#[derive(Debug)]
pub(super) struct Guest {
    memory: File,
    pagemap: File,
    regions: Vec<Region>,
}

impl Guest {
    /// Looks for `bytes` of guest memory in a process.
    pub fn find(pid: i32, bytes: u64) -> Result<Self, FindError> {
        let look = |source| FindError::Look { pid, source };
        let open = |name: &str| File::open(format!("/proc/{pid}/{name}")).map_err(look);
        let (memory, pagemap) = (open("mem")?, open("pagemap")?);
        let mappings = Mappings::of(pid)?;
        let not_found = || FindError::NotFound {
            pid,
            mib: bytes >> 20,
        };
        let pairs = pairs(&memory, &mappings, bytes);
        let found = choose(&pairs, bytes, |host| has_mark(&memory, host)).ok_or_else(not_found)?;
        if is_being_filled(pid, &found).map_err(look)? {
            return Err(FindError::Filling(pid));
        }
        let region = |(host, bytes)| {
            let anonymous = covering(&mappings, host, bytes)?
                .iter()
                .all(|mapping| is_anonymous(mapping));
            Some(Region {
                host,
                bytes,
                anonymous,
            })
        };
        let regions = found.into_iter().map(region).collect::<Option<Vec<_>>>();
        Ok(Self {
            memory,
            pagemap,
            regions: regions.ok_or_else(not_found)?,
        })
    }

    /// The regions: host address, length in bytes.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.regions
            .iter()
            .map(|region| (region.host, region.bytes))
    }

    /// The page of the image at this host address.
    pub fn page_at(&self, host: u64) -> Option<PageIndex> {
        let mut at = 0;
        for region in &self.regions {
            match host.checked_sub(region.host) {
                Some(offset) if offset < region.bytes => {
                    return Some(PageIndex::of_byte(at + offset));
                }
                _ => at += region.bytes,
            }
        }
        None
    }

    /// The parts that hold data while the machine runs: host address, length in bytes.
    pub fn data(self: &Arc<Self>) -> io::Result<Vec<(u64, u64)>> {
        let mut runs = Vec::new();
        ProcessMemory::running(Arc::clone(self)).data_runs(&mut |run| runs.push(run))?;
        let mut parts = Vec::new();
        for run in runs {
            self.pieces(run, |_, address, bytes, _| {
                parts.push((address, bytes));
                Ok(())
            })?;
        }
        Ok(parts)
    }

    /// Whether all of it is mapped, and is memory that nobody but this process can have mapped.
    pub fn is_private(&self, mappings: &Mappings) -> bool {
        self.ranges().all(|(host, bytes)| {
            covering(mappings, host, bytes).is_some_and(|found| found.into_iter().all(is_anonymous))
        })
    }

    /// Calls `each` with the pieces of a range: address, and bytes of the range before it.
    fn pieces(
        &self,
        range: PageRange,
        mut each: impl FnMut(&Region, u64, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let (start, end) = (range.first.byte_offset(), range.end().byte_offset());
        let mut at = 0;
        for region in &self.regions {
            let (from, to) = (start.max(at), end.min(at + region.bytes));
            if from < to {
                each(region, region.host + (from - at), to - from, from - start)?;
            }
            at += region.bytes;
        }
        if end > at {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}

/// The memory, read from the process.
#[derive(Debug)]
pub(super) struct ProcessMemory {
    guest: Arc<Guest>,
    /// Whether it is still held; `None` for one that runs.
    holds: Option<Arc<AtomicBool>>,
    /// Reading a process's page map takes a way that not every kernel has.
    no_scan: OnceLock<()>,
}

impl ProcessMemory {
    /// Of a process that is held, which `holds` tells. Nothing is read from one that goes on.
    pub fn held(guest: Arc<Guest>, holds: Arc<AtomicBool>) -> Self {
        Self {
            guest,
            holds: Some(holds),
            no_scan: OnceLock::new(),
        }
    }

    /// Of a machine that runs and writes to it meanwhile. Only a tracker tells what of it is still so later.
    pub fn running(guest: Arc<Guest>) -> Self {
        Self {
            guest,
            holds: None,
            no_scan: OnceLock::new(),
        }
    }

    fn check(&self) -> io::Result<()> {
        match &self.holds {
            Some(holds) if !holds.load(Ordering::SeqCst) => Err(gone()),
            _ => Ok(()),
        }
    }

    /// Runs of pages of a region that are there, as addresses.
    fn present(&self, region: &Region, each: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let pagemap = &self.guest.pagemap;
        let end = region.host + region.bytes;
        if self.no_scan.get().is_none() {
            match scan(pagemap, Pages::Data, region.host, end, each) {
                // Before Linux 6.7. Nothing has been told yet.
                Err(Errno::ENOTTY | Errno::EINVAL) => drop(self.no_scan.set(())),
                result => return Ok(result?),
            }
        }
        read_present(pagemap, region.host, end, each)
    }
}

fn gone() -> io::Error {
    io::Error::other("Firecracker ended, or was let go, while its memory was served")
}

impl SourceMemory for ProcessMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        self.guest.pieces(range, |_, address, bytes, before| {
            let to = (before as usize)..(before + bytes) as usize;
            let out = out.get_mut(to).ok_or(io::ErrorKind::InvalidInput)?;
            let read = self.guest.memory.read_exact_at(out, address);
            read.map_err(|error| match error.kind() {
                // A process that has ended has no memory.
                io::ErrorKind::UnexpectedEof => gone(),
                _ => error,
            })
        })?;
        // Where it has gone on meanwhile, nobody knows what was read before that and what after.
        self.check()
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        let mut at = 0;
        for region in &self.guest.regions {
            let mut tell = |start: u64, end: u64| {
                let first = PageIndex::of_byte(at + (start - region.host));
                data(PageRange::new(first, (end - start) >> PAGE_SHIFT));
            };
            if region.anonymous {
                self.present(region, &mut tell)?;
            } else {
                tell(region.host, region.host + region.bytes);
            }
            at += region.bytes;
        }
        self.check()
    }
}

/// Present or swapped out, of an entry of `/proc/PID/pagemap`: `Documentation/admin-guide/mm/pagemap.rst`.
const THERE: u64 = 0b11 << 62;

fn read_present(
    pagemap: &File,
    start: u64,
    end: u64,
    each: &mut dyn FnMut(u64, u64),
) -> io::Result<()> {
    let mut entries = vec![0; 64 * 1024];
    let mut at = start;
    while at < end {
        let count = ((end - at) >> PAGE_SHIFT).min(entries.len() as u64 / 8);
        let piece = &mut entries[..count as usize * 8];
        pagemap.read_exact_at(piece, (at >> PAGE_SHIFT) * 8)?;
        let mut run = None;
        for (entry, address) in piece.chunks_exact(8).zip((at..).step_by(PAGE_SIZE)) {
            let entry = u64::from_le_bytes(entry.try_into().unwrap_or_default());
            if entry & THERE != 0 {
                run.get_or_insert(address);
            } else if let Some(first) = run.take() {
                each(first, address);
            }
        }
        at += count << PAGE_SHIFT;
        if let Some(first) = run {
            each(first, at);
        }
    }
    Ok(())
}

/// Pairs of an address and a length, side by side in Firecracker's own memory, that may be regions of the guest's.
fn pairs(memory: &File, mappings: &Mappings, bytes: u64) -> BTreeSet<(u64, u64)> {
    let lengths: BTreeSet<u64> = shapes(bytes).into_iter().flatten().collect();
    let mut found = BTreeSet::new();
    for heap in mappings
        .iter()
        .filter(|mapping| mapping.writable && !mapping.shared && mapping.inode == 0)
    {
        let length = heap.end - heap.start;
        if length > HEAP_MAX {
            continue;
        }
        let mut content = vec![0; length as usize];
        if memory.read_exact_at(&mut content, heap.start).is_err() {
            continue;
        }
        let mut before = 0;
        for word in content.chunks_exact(8) {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            let is_pair = lengths.contains(&word)
                && before != 0
                && before % PAGE_SIZE as u64 == 0
                && covering(mappings, before, word).is_some();
            if is_pair {
                found.insert((before, word));
            }
            before = word;
        }
    }
    found
}

/// The lengths that the regions of so much memory have.
fn shapes(bytes: u64) -> Vec<Vec<u64>> {
    let mut shapes: Vec<Vec<u64>> = FIRST_REGION_ENDS
        .into_iter()
        .map(|first| match bytes.checked_sub(first) {
            None | Some(0) => vec![bytes],
            Some(second) => vec![first, second],
        })
        .filter(|shape| {
            shape
                .get(1)
                .is_none_or(|&second| second <= SECOND_REGION_MAX)
        })
        .collect();
    shapes.dedup();
    shapes
}

/// The only way to make the memory of these pairs, if there is just one.
fn choose(
    pairs: &BTreeSet<(u64, u64)>,
    bytes: u64,
    has_mark: impl Fn(u64) -> bool,
) -> Option<Vec<(u64, u64)>> {
    let mut ways = Vec::new();
    for shape in shapes(bytes) {
        let of = |length: u64| pairs.iter().filter(move |pair| pair.1 == length).copied();
        for first in of(shape[0]).filter(|&(host, _)| has_mark(host)) {
            match shape.get(1) {
                None => ways.push(vec![first]),
                Some(&length) => {
                    let apart = |&(host, bytes): &(u64, u64)| {
                        host >= first.0 + first.1 || host + bytes <= first.0
                    };
                    ways.extend(of(length).filter(apart).map(|second| vec![first, second]));
                }
            }
        }
    }
    match ways.len() {
        1 => ways.pop(),
        _ => None,
    }
}

fn has_mark(memory: &File, host: u64) -> bool {
    marks::are_in(|place, found| memory.read_exact_at(found, host + place))
}

/// The mappings that cover these bytes, if all of them may be read and written.
fn covering(mappings: &Mappings, start: u64, bytes: u64) -> Option<Vec<&Mapping>> {
    let end = start.checked_add(bytes)?;
    let mut covered = start;
    let mut found = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.end > start) {
        if mapping.start > covered || !mapping.writable {
            return None;
        }
        found.push(mapping);
        covered = mapping.end;
        if covered >= end {
            return Some(found);
        }
    }
    None
}

/// The kernel's names for private memory without a file; that of huge pages has an inode of its own.
fn is_anonymous(mapping: &Mapping) -> bool {
    !mapping.shared && (mapping.inode == 0 || mapping.name.starts_with("/anon_hugepage"))
}

/// Whether any of it is registered with a userfaultfd for missing pages: `um` in `VmFlags` of `proc_pid_smaps(5)`.
fn is_being_filled(pid: i32, regions: &[(u64, u64)]) -> io::Result<bool> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut inside = false;
    for line in text.lines() {
        let bounds = line.split(' ').next().and_then(|word| word.split_once('-'));
        let hex = |text| u64::from_str_radix(text, 16).ok();
        if let Some((start, end)) = bounds.and_then(|(start, end)| Some((hex(start)?, hex(end)?))) {
            inside = regions
                .iter()
                .any(|&(host, bytes)| start < host + bytes && end > host);
        } else if inside
            && let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split_ascii_whitespace().any(|flag| flag == "um")
        {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn chosen(pairs: &[(u64, u64)], bytes: u64, marked: &[u64]) -> Option<Vec<(u64, u64)>> {
        choose(&pairs.iter().copied().collect(), bytes, |host| {
            marked.contains(&host)
        })
    }

    #[test]
    fn one_region_is_found_by_its_mark() {
        let one = (0x7000_0000_0000, GIB);
        assert_eq!(chosen(&[one], GIB, &[one.0]), Some(vec![one]));
        assert_eq!(chosen(&[one], GIB, &[]), None);
        let other = (0x7100_0000_0000, GIB);
        assert_eq!(chosen(&[one, other], GIB, &[one.0]), Some(vec![one]));
        assert_eq!(chosen(&[one, other], GIB, &[one.0, other.0]), None);
    }

    #[test]
    fn two_regions_are_in_the_order_of_the_guest() {
        // The second one below the first, and right beside it, as 1.17 has them.
        let first = (0x7000_4000_0000, 3 * GIB);
        let second = (0x7000_0000_0000, GIB);
        assert_eq!(
            chosen(&[second, first], 4 * GIB, &[first.0]),
            Some(vec![first, second])
        );
        let before = (0x6000_0000_0000, 0xd000_0000);
        let rest = (0x6100_0000_0000, 4 * GIB - 0xd000_0000);
        assert_eq!(
            chosen(&[before, rest], 4 * GIB, &[before.0]),
            Some(vec![before, rest])
        );
        // Two second ones: no answer.
        let third = (0x5000_0000_0000, GIB);
        assert_eq!(chosen(&[first, second, third], 4 * GIB, &[first.0]), None);
        // One that lies in the first.
        let inside = (first.0 + GIB, GIB);
        assert_eq!(
            chosen(&[first, second, inside], 4 * GIB, &[first.0]),
            Some(vec![first, second])
        );
    }

    #[test]
    fn regions_of_the_same_length_are_told_apart() {
        let bytes = 2 * 0xd000_0000;
        let (one, other) = ((0x7000_0000_0000, bytes / 2), (0x7100_0000_0000, bytes / 2));
        assert_eq!(
            chosen(&[one, other], bytes, &[other.0]),
            Some(vec![other, one])
        );
    }

    #[test]
    fn what_is_there_is_found_both_ways() {
        use lazyvm_pager::LazyMemory;
        use lazyvm_wire::Layout;
        let memory = LazyMemory::anonymous(&Layout::flat(64).unwrap()).unwrap();
        let host = memory.regions()[0].host;
        for page in [3, 4, 9, 63] {
            memory.write_at(page * PAGE_SIZE as u64, &[1]).unwrap();
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let end = host + 64 * PAGE_SIZE as u64;
        let mut read = Vec::new();
        read_present(&pagemap, host, end, &mut |start, end| {
            read.push(((start - host) >> PAGE_SHIFT, (end - host) >> PAGE_SHIFT));
        })
        .unwrap();
        assert_eq!(read, [(3, 5), (9, 10), (63, 64)]);
        let mut scanned = Vec::new();
        scan(&pagemap, Pages::Data, host, end, &mut |start, end| {
            scanned.push(((start - host) >> PAGE_SHIFT, (end - host) >> PAGE_SHIFT));
        })
        .unwrap();
        assert_eq!(scanned, read);
    }
}
