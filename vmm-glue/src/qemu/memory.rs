//! A QEMU's RAM: which of its blocks lies where in guest-physical memory, and in which file.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use lazyvm_pager::LazyRegion;
use lazyvm_server::port::SourceMemory;
use lazyvm_wire::{
    Backing, Gpa, Layout, LayoutError, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange, Region,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};
use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};
use crate::attach::{AttachError, Mappings, Process};

/// RAM that can't be moved or not be found.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The conversation.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process.
    #[error(transparent)]
    Process(#[from] AttachError),
    /// Private RAM.
    #[error(
        "the RAM {name} ({mib} MiB) of this QEMU is private, and only shared RAM can be moved: start QEMU with -object \
         memory-backend-file,id=ram0,mem-path=/dev/shm/NAME,size={mib}M,share=on -machine memory-backend=ram0", mib = .bytes >> 20
    )]
    Private {
        /// The backend's id.
        name: String,
        /// Its size.
        bytes: u64,
    },
    /// A memfd with a QEMU that would put it into the device state.
    #[error(
        "this QEMU ({version}) moves shared RAM apart from its devices only if it is a memory-backend-file; {name} is a \
         {kind}: start QEMU with -object memory-backend-file,id={name},mem-path=/dev/shm/NAME,share=on,size=… instead"
    )]
    Unnamed {
        /// The backend's id.
        name: String,
        /// Its type.
        kind: String,
        /// QEMU's version.
        version: String,
    },
    /// No RAM at all.
    #[error(
        "this QEMU has no memory backend; start it with -object memory-backend-file,…,share=on"
    )]
    None,
    /// A memory tree that this does not understand.
    #[error(
        "the RAM {name} is not mapped as a whole in the guest's memory; hot-plugged and unplugged RAM can't be moved"
    )]
    Scattered {
        /// The backend's id.
        name: String,
    },
    /// The address that QEMU tells is not mapped as a file.
    #[error(
        "the RAM {name} is not found in the memory map of process {pid}; is that the QEMU of this socket?"
    )]
    NotMapped {
        /// The backend's id.
        name: String,
        /// Where it was looked for.
        pid: i32,
    },
    /// Huge pages of another size.
    #[error("the RAM {name} has pages of {bytes} bytes; 4 KiB and 2 MiB can be moved")]
    PageSize {
        /// The backend's id.
        name: String,
        /// The size.
        bytes: u64,
    },
    /// The file can't be looked at.
    #[error("can't look at the file behind the RAM {name}")]
    File {
        /// The backend's id.
        name: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No layout that can be moved.
    #[error("this QEMU's RAM can't be moved")]
    Layout(#[from] LayoutError),
}

/// A run of guest-physical memory in one backend.
#[derive(Clone, Debug)]
pub struct RamRegion {
    /// The backend's id.
    pub name: String,
    /// Where the guest sees it.
    pub gpa: u64,
    /// Its length.
    pub bytes: u64,
    /// Where QEMU has it mapped.
    pub host: u64,
    /// The pages behind it.
    pub backing: Backing,
    /// The file behind it.
    pub file: Arc<File>,
    /// Where in the file it starts.
    pub offset: u64,
}

impl RamRegion {
    /// For the pager.
    pub fn lazy(&self) -> LazyRegion {
        LazyRegion {
            host: self.host,
            pages: self.bytes >> PAGE_SHIFT,
            backing: self.backing,
            file: Some((Arc::clone(&self.file), self.offset)),
        }
    }
}

/// The regions' table.
pub(super) fn layout(regions: &[RamRegion]) -> Result<Layout, LayoutError> {
    let region = |region: &RamRegion| Region {
        name: region.name.clone(),
        gpa: Some(Gpa(region.gpa)),
        pages: region.bytes >> PAGE_SHIFT,
        backing: region.backing,
    };
    Layout::new(regions.iter().map(region).collect())
}

/// All RAM of a QEMU, ascending.
pub(super) fn find(
    qmp: &mut Qmp,
    process: &Process,
    writable: bool,
) -> Result<Vec<RamRegion>, MemoryError> {
    let backends = backends(qmp)?;
    let tree = qmp.human("info mtree -f")?;
    let mut found = Vec::new();
    for (name, bytes) in &backends {
        let pieces = pieces(&tree, name);
        if !covers(&pieces, *bytes) {
            return Err(MemoryError::Scattered { name: name.clone() });
        }
        for piece in pieces {
            found.push(locate(qmp, process, name, piece, writable)?);
        }
    }
    found.sort_by_key(|region| region.gpa);
    Ok(found)
}

/// Name and size of each backend, all of them shared.
fn backends(qmp: &mut Qmp) -> Result<Vec<(String, u64)>, MemoryError> {
    let answer = qmp.run("query-memdev", json!({}))?;
    let unexpected = |field| QmpError::Unexpected {
        command: "query-memdev".to_owned(),
        field,
    };
    let list = answer.as_array().ok_or_else(|| unexpected("a list"))?;
    let mut backends = Vec::new();
    for entry in list {
        let bytes = entry.get("size").and_then(Value::as_u64);
        let bytes = bytes.ok_or_else(|| unexpected("size"))?;
        let id = entry.get("id").and_then(Value::as_str);
        let name = id.ok_or_else(|| unexpected("id"))?.to_owned();
        // Told since QEMU 6.1; before that the memory map tells.
        if entry.get("share").and_then(Value::as_bool) == Some(false) {
            return Err(MemoryError::Private { name, bytes });
        }
        backends.push((name, bytes));
    }
    if backends.is_empty() {
        return Err(MemoryError::None);
    }
    Ok(backends)
}

/// Refuses backends that QEMU would put into the device state all the same: since 8.1 (`migrate_ram_is_ignored`) it
/// leaves out those alone that are files with a name. No capability tells.
pub(super) fn check_named(qmp: &mut Qmp) -> Result<(), MemoryError> {
    let version = qmp.version().to_owned();
    let mut numbers = version
        .split('.')
        .map(|number| number.parse().unwrap_or(0_u64));
    let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if number < (8, 1) {
        return Ok(());
    }
    for (name, _) in backends(qmp)? {
        let path = format!("/objects/{name}");
        let kind = qmp.run("qom-get", json!({ "path": path, "property": "type" }))?;
        let kind = kind.as_str().unwrap_or_default().to_owned();
        if kind != "memory-backend-file" {
            return Err(MemoryError::Unnamed {
                name,
                kind,
                version,
            });
        }
    }
    Ok(())
}

/// A run of one block that is mapped end to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    gpa: u64,
    offset: u64,
    bytes: u64,
}

/// Where a block lies, out of `info mtree -f`.
///
/// That shows what the guest's processors see right now, which firmware changes: part of the first megabyte is hidden
/// behind ROMs or video memory at one time, and not at another. All that is mapped with the same distance between
/// address and offset is one piece therefore, with what is hidden in it.
fn pieces(tree: &str, name: &str) -> Vec<Piece> {
    let mut by_distance: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let lines = tree
        .split("FlatView #")
        .find(|view| {
            view.lines()
                .any(|line| line.trim() == "Root memory region: system")
        })
        .unwrap_or("")
        .lines();
    for (start, end, offset) in lines.filter_map(|line| mapped(line, name)) {
        let span = by_distance
            .entry(start.wrapping_sub(offset))
            .or_insert((offset, offset));
        span.0 = span.0.min(offset);
        span.1 = span.1.max(offset.saturating_add(end - start));
    }
    let mut pieces: Vec<_> = by_distance
        .into_iter()
        .map(|(distance, (low, high))| Piece {
            gpa: distance.wrapping_add(low),
            offset: low,
            bytes: high - low,
        })
        .collect();
    pieces.sort_by_key(|piece| piece.offset);
    pieces
}

/// First address, end and offset of a line like
/// `  0000000100000000-000000013fffffff (prio 0, ram): ram0 @00000000c0000000` if it is of this block.
fn mapped(line: &str, name: &str) -> Option<(u64, u64, u64)> {
    let (range, rest) = line.trim().split_once(" (")?;
    let (kind, what) = rest.split_once("): ")?;
    if !(kind.ends_with("ram") || kind.ends_with("rom")) {
        return None;
    }
    let mut words = what.split(' ');
    let block = words.next()?;
    if block != name && block.strip_prefix("/objects/") != Some(name) {
        return None;
    }
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let offset = match words.find_map(|word| word.strip_prefix('@')) {
        Some(offset) => hex(offset)?,
        None => 0,
    };
    let (start, end) = range.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?.checked_add(1)?);
    (start < end).then_some((start, end, offset))
}

/// Whether pieces, ascending by offset, are the whole block, each byte once.
fn covers(pieces: &[Piece], bytes: u64) -> bool {
    let mut at = 0;
    for piece in pieces {
        if piece.offset != at {
            return false;
        }
        at += piece.bytes;
    }
    at == bytes && bytes > 0
}

fn locate(
    qmp: &mut Qmp,
    process: &Process,
    name: &str,
    piece: Piece,
    writable: bool,
) -> Result<RamRegion, MemoryError> {
    let not_mapped = || MemoryError::NotMapped {
        name: name.to_owned(),
        pid: process.pid(),
    };
    let told = qmp.human(&format!("gpa2hva {:#x}", piece.gpa))?;
    let host = host_address(&told).ok_or_else(not_mapped)?;
    let mappings = process.mappings()?;
    let (mapping, offset) = mappings.piece(host, piece.bytes).ok_or_else(not_mapped)?;
    if !mapping.shared {
        return Err(MemoryError::Private {
            name: name.to_owned(),
            bytes: piece.bytes,
        });
    }
    let file = process.open_file_of(mapping, writable)?;
    let backing = backing(&file, name)?;
    Ok(RamRegion {
        name: name.to_owned(),
        gpa: piece.gpa,
        bytes: piece.bytes,
        host,
        backing,
        file: Arc::new(file),
        offset,
    })
}

/// `Host virtual address for 0x0 (ram0) is 0x7f0517fff000`.
fn host_address(told: &str) -> Option<u64> {
    let (_, address) = told.trim().rsplit_once(" is 0x")?;
    u64::from_str_radix(address, 16).ok()
}

fn backing(file: &File, name: &str) -> Result<Backing, MemoryError> {
    let system = fstatfs(file).map_err(|errno| MemoryError::File {
        name: name.to_owned(),
        source: errno.into(),
    })?;
    if system.filesystem_type() != HUGETLBFS_MAGIC {
        return Ok(Backing::Small);
    }
    match u64::try_from(system.block_size()).unwrap_or(0) {
        bytes if bytes == Backing::Huge2M.bytes() => Ok(Backing::Huge2M),
        bytes => Err(MemoryError::PageSize {
            name: name.to_owned(),
            bytes,
        }),
    }
}

/// The processes that have a file mapped, but for `known` ones and this one.
pub(crate) fn users(file: &File, known: &[i32]) -> Vec<i32> {
    let Ok(found) = file.metadata() else {
        return Vec::new();
    };
    let device = (
        u64::from(libc::major(found.dev())),
        u64::from(libc::minor(found.dev())),
    );
    let own = std::process::id() as i32;
    let processes = fs::read_dir("/proc").into_iter().flatten();
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own && !known.contains(pid))
        .filter(|pid| {
            // One that has ended meanwhile, or that may not be looked at, is none.
            Mappings::of(*pid).is_ok_and(|mappings| {
                mappings
                    .iter()
                    .any(|mapping| mapping.inode == found.ino() && mapping.device == device)
            })
        })
        .collect()
}

/// Makes a hole of a region's part of its file, which takes its pages out of every process that has them mapped.
///
/// # Errors
/// The file system can't, or something is left.
pub(super) fn empty(region: &RamRegion) -> Result<(), MemoryError> {
    let failed = |source| MemoryError::File {
        name: region.name.clone(),
        source,
    };
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let (offset, bytes) = (region.offset as i64, region.bytes as i64);
    fallocate(region.file.as_ref(), flags, offset, bytes).map_err(|errno| failed(errno.into()))?;
    let end = region.offset + region.bytes;
    // hugetlbfs does not tell its holes, but makes them.
    if region.backing == Backing::Small {
        let (from, to) = next_data(&region.file, region.offset, end).map_err(failed)?;
        if from < to {
            return Err(failed(io::Error::other(
                "the file system makes no holes; put the RAM on tmpfs (/dev/shm) or hugetlbfs, or into a memfd",
            )));
        }
    }
    Ok(())
}

/// The RAM as its source reads it: through its files, without mapping them.
#[derive(Debug)]
pub(super) struct SharedRam {
    /// Each with the image page that it starts at.
    regions: Vec<(u64, RamRegion)>,
}

impl SharedRam {
    pub fn new(regions: &[RamRegion]) -> Self {
        let mut start = 0;
        let regions = regions
            .iter()
            .map(|region| {
                let placed = (start, region.clone());
                start += region.bytes >> PAGE_SHIFT;
                placed
            })
            .collect();
        Self { regions }
    }
}

impl SourceMemory for SharedRam {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        let short = || io::Error::new(io::ErrorKind::InvalidInput, "not a range of the image");
        if out.len() as u64 != range.bytes() {
            return Err(short());
        }
        let mut rest = out;
        let mut page = range.first.0;
        while !rest.is_empty() {
            let at = self.regions.partition_point(|(start, _)| *start <= page);
            let (start, region) = at
                .checked_sub(1)
                .and_then(|at| self.regions.get(at))
                .ok_or_else(short)?;
            let from = (page - start) << PAGE_SHIFT;
            let left = region.bytes.checked_sub(from).filter(|&left| left > 0);
            let length = (rest.len() as u64).min(left.ok_or_else(short)?);
            let (piece, behind) = rest.split_at_mut(length as usize);
            region.file.read_exact_at(piece, region.offset + from)?;
            page += length >> PAGE_SHIFT;
            rest = behind;
        }
        Ok(())
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        for (start, region) in &self.regions {
            let end = region.offset + region.bytes;
            let mut at = region.offset;
            while at < end {
                let (from, to) = next_data(&region.file, at, end)?;
                if from < to {
                    let first = (from - region.offset) >> PAGE_SHIFT;
                    let behind = (to - region.offset).div_ceil(PAGE_SIZE as u64);
                    data(PageRange::new(PageIndex(start + first), behind - first));
                }
                at = to;
            }
        }
        Ok(())
    }
}

/// The next bytes from `at` up to `end` that are not a hole; nothing is left when they are empty.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<(u64, u64)> {
    let seek = |from: u64, whence| lseek(file, from as i64, whence).map(|found| found as u64);
    let from = match seek(at, Whence::SeekData) {
        Ok(from) => from.min(end),
        Err(Errno::ENXIO) => end,
        // A file system that knows no holes.
        Err(Errno::EINVAL) => return Ok((at, end)),
        Err(errno) => return Err(errno.into()),
    };
    if from == end {
        return Ok((end, end));
    }
    Ok((from, seek(from, Whence::SeekHole)?.clamp(from + 1, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a booted `pc`, and of one that waits for its state.
    const BOOTED: &str = "\
FlatView #1
 AS \"VGA\", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #2
 AS \"memory\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram0
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): ram0 @00000000000c0000
  0000000000100000-00000000bfffffff (prio 0, ram): ram0 @0000000000100000
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  0000000100000000-000000013fffffff (prio 0, ram): ram0 @00000000c0000000
";
    const WAITING: &str = "\
FlatView #0
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): /objects/ram0 KVM
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-00000000bfffffff (prio 0, ram): /objects/ram0 @0000000000100000 KVM
  0000000100000000-000000013fffffff (prio 0, ram): /objects/ram0 @00000000c0000000 KVM
";

    #[test]
    fn what_firmware_hides_does_not_change_the_layout() {
        let expected = [
            Piece {
                gpa: 0,
                offset: 0,
                bytes: 3 << 30,
            },
            Piece {
                gpa: 4 << 30,
                offset: 3 << 30,
                bytes: 1 << 30,
            },
        ];
        // The human monitor ends lines as terminals want it.
        for tree in [BOOTED, WAITING, &BOOTED.replace('\n', "\r\n")] {
            assert_eq!(pieces(tree, "ram0"), expected);
        }
        assert!(covers(&expected, 4 << 30));
    }

    #[test]
    fn a_block_that_is_not_there_as_a_whole_is_noticed() {
        assert!(!covers(&pieces(BOOTED, "ram1"), 4 << 30));
        assert!(!covers(&pieces(BOOTED, "ram0"), 5 << 30));
        assert!(!covers(
            &[Piece {
                gpa: 0,
                offset: 4096,
                bytes: 4096
            }],
            8192
        ));
        assert!(!covers(&[], 0));
        assert!(pieces("", "ram0").is_empty());
    }

    #[test]
    fn addresses_are_read_as_qemu_writes_them() {
        let told = "Host virtual address for 0x0 (ram0) is 0x7f0517fff000\r\n";
        assert_eq!(host_address(told), Some(0x7f05_17ff_f000));
        assert_eq!(
            host_address("No memory is mapped at address 0xc0000000"),
            None
        );
    }
}
