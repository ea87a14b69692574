//! The userfaultfd system calls that the `userfaultfd` crate lacks or leaves unsafe.

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use userfaultfd::Error as CrateError;

use crate::memory::LazyMemory;
use crate::uffd::{OpenError, Place, Progress, Uffd, features_for};

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_zeropage`, with its range written out.
#[repr(C)]
struct UffdioZeropage {
    start: u64,
    length: u64,
    mode: u64,
    /// Written by the kernel: bytes done, or a negative error.
    zeropage: i64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO: u8 = 0xaa;
const UFFDIO_API_NUMBER: u8 = 0x3f;
const UFFDIO_ZEROPAGE_NUMBER: u8 = 0x04;
const USERFAULTFD_IOC: u8 = 0xaa;

nix::ioctl_readwrite!(uffdio_api, UFFDIO, UFFDIO_API_NUMBER, UffdioApi);
nix::ioctl_readwrite!(
    uffdio_zeropage,
    UFFDIO,
    UFFDIO_ZEROPAGE_NUMBER,
    UffdioZeropage
);
nix::ioctl_write_int_bad!(
    /// Makes a userfaultfd, with the flags of the system call.
    userfaultfd_new,
    nix::request_code_none!(USERFAULTFD_IOC, 0x00)
);

// The numbers as the kernel's header gives them for every architecture with the common ioctl encoding.
const _: () = assert!(size_of::<UffdioApi>() == 24);
const _: () = assert!(
    nix::request_code_readwrite!(UFFDIO, UFFDIO_API_NUMBER, size_of::<UffdioApi>()) == 0xc018_aa3f
);
const _: () = assert!(size_of::<UffdioZeropage>() == 32);
const _: () = assert!(
    nix::request_code_readwrite!(UFFDIO, UFFDIO_ZEROPAGE_NUMBER, size_of::<UffdioZeropage>())
        == 0xc020_aa04
);
const _: () = assert!(nix::request_code_none!(USERFAULTFD_IOC, 0x00) == 0xaa00);

/// Without `UFFD_USER_MODE_ONLY`: faults of KVM and of system calls come from kernel mode.
const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// A new userfaultfd, through `/dev/userfaultfd`, which asks for permission on that file.
pub(crate) fn open_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    // SAFETY: the ioctl takes an integer and touches no memory of ours.
    let fd = unsafe { userfaultfd_new(device.as_raw_fd(), FLAGS) }?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A new userfaultfd, through the system call, which asks for CAP_SYS_PTRACE or the sysctl.
pub(crate) fn open_syscall() -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes an integer and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) })?;
    let fd = libc::c_int::try_from(fd).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `UFFDIO_API`, which works once a descriptor: asks for `features`, returns all that the kernel has.
pub(crate) fn handshake(fd: &OwnedFd, features: u64) -> Result<u64, Errno> {
    let mut api = UffdioApi {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: `api` is the struct that this ioctl reads and writes, and outlives the call.
    unsafe { uffdio_api(fd.as_raw_fd(), &raw mut api) }?;
    Ok(api.features)
}

/// The crate's handle on a descriptor, which it closes from now on.
pub(crate) fn adopt(fd: OwnedFd) -> userfaultfd::Uffd {
    // SAFETY: `fd` is owned, and ownership passes on.
    unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) }
}

impl Uffd {
    /// A userfaultfd that a hypervisor opened and registered its own memory with, and handed over (over a socket, or
    /// through `pidfd_getfd`). `features` are those that it was opened with.
    ///
    /// # Errors
    /// The descriptor can't be made non-blocking.
    ///
    /// # Safety
    /// `fd` is a userfaultfd after its handshake, of another process than this one.
    pub unsafe fn from_owned_fd(fd: OwnedFd, features: u64) -> io::Result<Self> {
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFL)?;
        let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        Ok(Self::of(adopt(fd), features, Place::OtherProcess))
    }

    /// A userfaultfd that another process has just opened, without its handshake, which is done here with the features
    /// that `memory` needs; `removals` as for [`Uffd::open`].
    ///
    /// # Errors
    /// [`OpenError`]: it is none, or this kernel lacks a feature.
    ///
    /// # Safety
    /// If `fd` is a userfaultfd, it is of another process than this one.
    pub unsafe fn of_other_process(
        fd: OwnedFd,
        memory: &LazyMemory,
        removals: bool,
    ) -> Result<Self, OpenError> {
        let features = features_for(memory, removals);
        handshake(&fd, features).map_err(OpenError::System)?;
        // SAFETY: the handshake has just succeeded, so it is a userfaultfd; whose, the caller says.
        unsafe { Self::from_owned_fd(fd, features) }
            .map_err(|error| OpenError::System(Errno::try_from(error).unwrap_or(Errno::EIO)))
    }
}

/// `UFFDIO_COPY` of `data` to the pages at `to`, waking their waiters.
pub(crate) fn copy_pages(uffd: &userfaultfd::Uffd, to: u64, data: &[u8]) -> Progress {
    // SAFETY: `data` is readable for its length. The kernel writes to pages of registered ranges only where none is
    // installed; `LazyMemory`'s contract gives these ranges to the pager, and lets no Rust reference point into them.
    let copied = unsafe {
        uffd.copy(
            data.as_ptr().cast::<c_void>(),
            to as *mut c_void,
            data.len(),
            true,
        )
    };
    match copied {
        Ok(bytes) => Progress::Bytes(bytes as u64),
        // The crate casts what the kernel wrote, bytes copied or a negative error, to `usize`.
        Err(CrateError::PartiallyCopied(bytes)) if (bytes as isize) > 0 => {
            Progress::Bytes(bytes as u64)
        }
        Err(CrateError::PartiallyCopied(_)) => Progress::of_errno(Errno::EAGAIN),
        Err(error) => Progress::of_error(&error),
    }
}

/// `UFFDIO_ZEROPAGE` of `length` bytes at `to`, waking their waiters.
///
/// Not the crate's, which forgets how much was done when the kernel stopped half-way.
pub(crate) fn zero_pages(uffd: &userfaultfd::Uffd, to: u64, length: u64) -> Progress {
    let mut zero = UffdioZeropage {
        start: to,
        length,
        mode: 0,
        zeropage: 0,
    };
    // SAFETY: `zero` is the struct that this ioctl reads and writes, and outlives the call. What is written to the
    // range is as in `copy_pages`.
    match unsafe { uffdio_zeropage(uffd.as_raw_fd(), &raw mut zero) } {
        Ok(_) => Progress::Bytes(length),
        Err(Errno::EAGAIN) if zero.zeropage > 0 => Progress::Bytes(zero.zeropage as u64),
        Err(errno) => Progress::of_errno(errno),
    }
}
