//! The system calls that no crate wraps in a safe way, or not at all: `ptrace`, `pidfd_open`, `pidfd_getfd`.
//!
//! Nothing here touches memory of ours but what is passed; what a traced thread is made to do is the caller's to justify.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use lazyvm_pager::LazyMemory;
use lazyvm_pager::uffd::{OpenError, Uffd};
use nix::errno::Errno;
use nix::libc::{self, c_int, c_long, c_void, pid_t};

pub(super) use nix::libc::user_regs_struct as Registers;

/// `PTRACE_GETSIGMASK` of `linux/ptrace.h`, which libc lacks.
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
/// `PTRACE_SETSIGMASK`.
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
/// `PTRACE_O_SUSPEND_SECCOMP`.
pub(super) const SUSPEND_SECCOMP: c_int = 1 << 21;
/// `PTRACE_O_TRACESYSGOOD`.
pub(super) const TRACE_SYSCALL_GOOD: c_int = 1;

/// A plain request: neither address nor data points anywhere.
fn plain(request: libc::c_uint, thread: pid_t, data: c_long) -> Result<(), Errno> {
    // SAFETY: the kernel takes `data` as a number with each of the requests that are made here.
    let result = unsafe {
        libc::ptrace(
            request,
            thread,
            ptr::null_mut::<c_void>(),
            data as *mut c_void,
        )
    };
    Errno::result(result).map(drop)
}

/// Takes a thread as it runs.
pub(super) fn seize(thread: pid_t, options: c_int) -> Result<(), Errno> {
    plain(libc::PTRACE_SEIZE, thread, c_long::from(options))
}

/// Stops a thread that was seized.
pub(super) fn interrupt(thread: pid_t) -> Result<(), Errno> {
    plain(libc::PTRACE_INTERRUPT, thread, 0)
}

/// Lets it go on, with a signal or 0.
pub(super) fn go_on(thread: pid_t, signal: c_int) -> Result<(), Errno> {
    plain(libc::PTRACE_CONT, thread, c_long::from(signal))
}

/// Lets it go on up to the next begin or end of a system call.
pub(super) fn go_on_to_syscall(thread: pid_t) -> Result<(), Errno> {
    plain(libc::PTRACE_SYSCALL, thread, 0)
}

/// Lets it go for good.
pub(super) fn detach(thread: pid_t) -> Result<(), Errno> {
    plain(libc::PTRACE_DETACH, thread, 0)
}

/// The registers of a stopped thread.
pub(super) fn registers(thread: pid_t) -> Result<Registers, Errno> {
    let mut registers = MaybeUninit::<Registers>::uninit();
    // SAFETY: the kernel writes one whole struct of this type to `registers`, and only on success it is read.
    unsafe {
        let result = libc::ptrace(
            libc::PTRACE_GETREGS,
            thread,
            ptr::null_mut::<c_void>(),
            registers.as_mut_ptr(),
        );
        Errno::result(result)?;
        Ok(registers.assume_init())
    }
}

/// Sets the registers of a stopped thread of another process.
pub(super) fn set_registers(thread: pid_t, registers: &Registers) -> Result<(), Errno> {
    // SAFETY: the kernel reads one struct of this type.
    let result = unsafe {
        libc::ptrace(
            libc::PTRACE_SETREGS,
            thread,
            ptr::null_mut::<c_void>(),
            ptr::from_ref(registers),
        )
    };
    Errno::result(result).map(drop)
}

/// The signals that a stopped thread holds back, a bit each.
pub(super) fn signal_mask(thread: pid_t) -> Result<u64, Errno> {
    let mut mask = 0_u64;
    // SAFETY: `addr` is the length of the kernel's signal set, 8, and that much is written to `mask`.
    let result = unsafe {
        libc::ptrace(
            PTRACE_GETSIGMASK,
            thread,
            size_of::<u64>() as *mut c_void,
            &raw mut mask,
        )
    };
    Errno::result(result).map(|_| mask)
}

/// Sets them.
pub(super) fn set_signal_mask(thread: pid_t, mask: u64) -> Result<(), Errno> {
    // SAFETY: as above, read from `mask`.
    let result = unsafe {
        libc::ptrace(
            PTRACE_SETSIGMASK,
            thread,
            size_of::<u64>() as *mut c_void,
            &raw const mask,
        )
    };
    Errno::result(result).map(drop)
}

/// What a traced thread did, if anything: the status of `waitpid(2)`.
pub(super) fn poll_status(thread: pid_t) -> Result<Option<c_int>, Errno> {
    let mut status = 0;
    // SAFETY: the kernel writes an integer to `status`.
    let result = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
    Errno::result(result).map(|found| (found != 0).then_some(status))
}

fn own(result: c_long) -> Result<OwnedFd, Errno> {
    let fd = RawFd::try_from(Errno::result(result)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A descriptor that stands for this process, and never for a later one of the same number.
pub(super) fn pidfd_open(process: pid_t) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes integers and touches no memory of ours.
    own(unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) })
}

/// Sends SIGKILL.
pub(super) fn pidfd_kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    let information = ptr::null::<c_void>();
    // SAFETY: the system call takes integers, and no pointer but a null one.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            information,
            0,
        )
    };
    Errno::result(result).map(drop)
}

/// A copy of another process's descriptor.
pub(super) fn pidfd_getfd(pidfd: BorrowedFd<'_>, theirs: c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: the system call takes integers and touches no memory of ours.
    own(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), theirs, 0) })
}

/// The pager's handle on a userfaultfd that [`pidfd_getfd`] brought from another process than this one.
pub(super) fn adopt(fd: OwnedFd, memory: &LazyMemory, removals: bool) -> Result<Uffd, OpenError> {
    // SAFETY: `Process` refuses to stand for this process, so the descriptor was opened by another one.
    unsafe { Uffd::of_other_process(fd, memory, removals) }
}
