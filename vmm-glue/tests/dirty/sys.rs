//! The calls of this test that the compiler can't check.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use nix::libc;

use crate::memory::HUGE;

/// Of what private memory is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Private {
    Small,
    /// Of huge pages where the kernel has them.
    Transparent,
    /// Of huge pages from the pool.
    Huge,
}

/// Memory that stays mapped for as long as the process.
pub struct Mapped {
    address: *mut u8,
    bytes: usize,
}

// SAFETY: the mapping is never undone, and Rust reads and writes it by atomics only.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// `bytes` of a file, shared; without one, private.
    pub fn new(bytes: usize, file: Option<&File>, private: Private) -> Self {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (flags, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None if private == Private::Huge => (anonymous | libc::MAP_HUGETLB, -1),
            None => (anonymous, -1),
        };
        let transparent = private == Private::Transparent;
        // A huge page begins at a whole multiple of its size.
        let room = if transparent { bytes + HUGE } else { bytes };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, which nothing else knows of.
        let address = unsafe { libc::mmap(ptr::null_mut(), room, protection, flags, fd, 0) };
        assert_ne!(address, libc::MAP_FAILED);
        let address: *mut u8 = address.cast();
        let address = address.wrapping_add((room - bytes).min(address.align_offset(HUGE)));
        let advice = if transparent {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        if file.is_none() && private != Private::Huge {
            // SAFETY: within the mapping; no byte of it changes.
            let result = unsafe { libc::madvise(address.cast(), bytes, advice) };
            assert_eq!(result, 0);
        }
        Self { address, bytes }
    }

    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// At a whole multiple of eight.
    pub fn store(&self, at: usize, value: u64) {
        assert!(at + 8 <= self.bytes && at.is_multiple_of(8));
        // SAFETY: in the mapping, and aligned.
        let word = unsafe { AtomicU64::from_ptr(self.address.add(at).cast()) };
        word.store(value, Ordering::Relaxed);
    }

    pub fn load(&self, at: usize) -> u8 {
        assert!(at < self.bytes);
        // SAFETY: in the mapping.
        let byte = unsafe { AtomicU8::from_ptr(self.address.add(at)) };
        byte.load(Ordering::Relaxed)
    }

    /// Has the kernel write `length` bytes of a file, from an offset or as they come.
    pub fn read_exactly(&self, from: &File, offset: Option<i64>, at: usize, length: usize) {
        assert!(at + length <= self.bytes);
        let mut done = 0;
        while done < length {
            let (fd, left) = (from.as_raw_fd(), length - done);
            // SAFETY: in the mapping, which Rust has no reference to.
            let count = unsafe {
                let to = self.address.add(at + done).cast();
                match offset {
                    Some(offset) => libc::pread(fd, to, left, offset + done as i64),
                    None => libc::read(fd, to, left),
                }
            };
            assert!(count > 0, "{}", std::io::Error::last_os_error());
            done += count as usize;
        }
    }

    /// Whole pages, which are zero from then on.
    pub fn give_back(&self, at: usize, bytes: usize, shared: bool) {
        assert!(at + bytes <= self.bytes);
        let advice = if shared {
            libc::MADV_REMOVE
        } else {
            libc::MADV_DONTNEED
        };
        // SAFETY: in the mapping, whose bytes Rust reads and writes by atomics only.
        let result = unsafe { libc::madvise(self.address.add(at).cast(), bytes, advice) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// Of shared memory only: the contents stay in the file.
    pub fn drop_entries(&self, at: usize, bytes: usize) {
        assert!(at + bytes <= self.bytes);
        // SAFETY: the memory is shared with a file, so no byte of it changes.
        let result =
            unsafe { libc::madvise(self.address.add(at).cast(), bytes, libc::MADV_DONTNEED) };
        assert_eq!(result, 0);
    }
}
