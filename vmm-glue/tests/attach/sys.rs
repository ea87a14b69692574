//! The calls of this test that the compiler can't check.
#![allow(unsafe_code)]

use std::os::fd::AsFd;
use std::ptr;

use nix::errno::Errno;
use nix::libc;

/// `nanosleep(2)`, which tells of an interruption.
pub fn nanosleep(nanoseconds: i64) -> Result<(), Errno> {
    let time = libc::timespec {
        tv_sec: nanoseconds / 1_000_000_000,
        tv_nsec: nanoseconds % 1_000_000_000,
    };
    // SAFETY: the kernel reads `time` alone.
    Errno::result(unsafe { libc::nanosleep(&raw const time, ptr::null_mut()) }).map(drop)
}

/// Shared memory that stays mapped for as long as the process.
pub struct Shared {
    address: *mut u8,
    pages: usize,
}

impl Shared {
    pub fn map(file: impl AsFd, pages: usize) -> Self {
        use std::os::fd::AsRawFd;
        // SAFETY: a new mapping, which nothing else knows of.
        let address = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * 4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_fd().as_raw_fd(),
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

    /// The first byte of a page.
    pub fn byte(&self, page: usize) -> u8 {
        assert!(page < self.pages);
        // SAFETY: in the mapping, which is never undone; others write to it, so it is read as it is at this moment.
        unsafe { self.address.add(page * 4096).read_volatile() }
    }
}

/// Takes `signal` with a handler that does nothing, with these flags.
pub fn handle(signal: libc::c_int, flags: libc::c_int) {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the struct is zeroed, which is valid for it, and the handler touches nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = flags;
        Errno::result(libc::sigaction(signal, &raw const action, ptr::null_mut())).unwrap();
    }
}
