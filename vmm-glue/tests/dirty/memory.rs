//! The memory that is written, of every kind that a VM's memory may be.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys::Mapped;

pub const HUGE: usize = 2 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Memfd,
    Tmpfs,
    /// Private and of small pages.
    Anonymous,
    /// Private, and of huge pages where the kernel has them.
    Transparent,
    /// A memfd of huge pages from the pool.
    Huge,
}

impl Kind {
    pub const ALL: [Self; 5] = [
        Self::Memfd,
        Self::Tmpfs,
        Self::Anonymous,
        Self::Transparent,
        Self::Huge,
    ];

    pub fn parse(name: &str) -> Self {
        let named = |kind: &Self| format!("{kind:?}") == name;
        Self::ALL.into_iter().find(named).unwrap()
    }

    pub fn is_shared(self) -> bool {
        !matches!(self, Self::Anonymous | Self::Transparent)
    }

    /// The least that can be unmapped.
    pub fn unit(self) -> usize {
        if self == Self::Huge { HUGE } else { 4096 }
    }

    pub fn bytes(self) -> usize {
        4 * HUGE
    }
}

/// Memory of the process that writes.
pub struct Memory {
    pub kind: Kind,
    pub mapped: Mapped,
    pub file: Option<File>,
}

impl Memory {
    pub fn new(kind: Kind) -> Self {
        let file = match kind {
            Kind::Memfd => Some(memfd(MFdFlags::MFD_CLOEXEC)),
            Kind::Huge => Some(memfd(MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB)),
            Kind::Tmpfs => Some(tempfile::tempfile_in("/dev/shm").unwrap()),
            Kind::Anonymous | Kind::Transparent => None,
        };
        if let Some(file) = &file {
            file.set_len(kind.bytes() as u64).unwrap();
        }
        let mapped = Mapped::new(kind.bytes(), file.as_ref(), kind == Kind::Transparent);
        Self { kind, mapped, file }
    }

    /// Drops page-table entries; no byte changes.
    pub fn unmap(&self, at: usize, bytes: usize) {
        assert!(self.kind.is_shared());
        self.mapped.drop_entries(at, bytes);
    }

    /// The number of the file's descriptor, -1 without one.
    pub fn descriptor(&self) -> i32 {
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

fn memfd(flags: MFdFlags) -> File {
    memfd_create(c"memory", flags).unwrap().into()
}
