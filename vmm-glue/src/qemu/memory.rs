//! A QEMU's RAM: which of its blocks lies where in guest-physical memory, and in which file.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use lazyvm_pager::LazyRegion;
use lazyvm_wire::{Backing, Gpa, Layout, LayoutError, PAGE_SHIFT, Region};
use nix::libc;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError};
use super::tree::{Piece, covers, host_address, pieces};
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
