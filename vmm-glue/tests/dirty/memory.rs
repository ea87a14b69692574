//! The memory that is written, of every kind that a VM's memory may be.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys::{Mapped, Private};

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
    /// Private, and of huge pages from the pool.
    HugePrivate,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Memfd,
        Self::Tmpfs,
        Self::Anonymous,
        Self::Transparent,
        Self::Huge,
        Self::HugePrivate,
    ];

    pub fn parse(name: &str) -> Self {
        let named = |kind: &Self| format!("{kind:?}") == name;
        Self::ALL.into_iter().find(named).unwrap()
    }

    pub fn is_shared(self) -> bool {
        matches!(self, Self::Memfd | Self::Tmpfs | Self::Huge)
    }

    /// Whether its pages are huge and from the pool.
    pub fn is_huge(self) -> bool {
        matches!(self, Self::Huge | Self::HugePrivate)
    }

    /// The least that can be unmapped.
    pub fn unit(self) -> usize {
        if self.is_huge() { HUGE } else { 4096 }
    }

    pub fn bytes(self) -> usize {
        if self.is_huge() { 16 * HUGE } else { 4 * HUGE }
    }

    /// How long a writer waits between two deeds: else there would be no huge page that is clean.
    pub fn pace(self) -> Duration {
        Duration::from_millis(if self.is_huge() { 3 } else { 0 })
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
            Kind::Anonymous | Kind::Transparent | Kind::HugePrivate => None,
        };
        if let Some(file) = &file {
            file.set_len(kind.bytes() as u64).unwrap();
        }
        let private = match kind {
            Kind::Transparent => Private::Transparent,
            Kind::HugePrivate => Private::Huge,
            _ => Private::Small,
        };
        let mapped = Mapped::new(kind.bytes(), file.as_ref(), private);
        Self { kind, mapped, file }
    }

    /// Drops page-table entries; no byte changes.
    pub fn unmap(&self, at: usize, bytes: usize) {
        assert!(self.kind.is_shared());
        self.mapped.drop_entries(at, bytes);
    }

    /// Gives memory back: it is zero from then on.
    pub fn give_back(&self, at: usize, bytes: usize) {
        self.mapped.give_back(at, bytes, self.kind.is_shared());
    }

    /// The number of the file's descriptor, -1 without one.
    pub fn descriptor(&self) -> i32 {
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

fn memfd(flags: MFdFlags) -> File {
    memfd_create(c"memory", flags).unwrap().into()
}
