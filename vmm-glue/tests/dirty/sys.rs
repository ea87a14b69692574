//! The calls of this test that the compiler can't check.
#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::ptr;

use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;

/// Shared memory that stays mapped for as long as the process.
pub struct Shared {
    address: *mut u8,
    pages: usize,
}

impl Shared {
    pub fn map(pages: usize) -> Self {
        let file = memfd_create(c"memory", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, (pages * 4096) as i64).unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, which nothing else knows of.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * 4096,
                protection,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        Self {
            address: address.cast(),
            pages,
        }
    }

    pub fn address(&self) -> u64 {
        self.address as u64
    }

    pub fn write(&self, page: usize) {
        assert!(page < self.pages);
        // SAFETY: in the mapping, which is never undone, and nobody else writes.
        unsafe { self.address.add(page * 4096).write_volatile(1) }
    }

    pub fn read(&self, page: usize) -> u8 {
        assert!(page < self.pages);
        // SAFETY: as above.
        unsafe { self.address.add(page * 4096).read_volatile() }
    }

    /// The contents stay in the file.
    pub fn drop_entries(&self) {
        // SAFETY: the memory is shared with a file, so no byte of it changes.
        let result =
            unsafe { libc::madvise(self.address.cast(), self.pages * 4096, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }
}
