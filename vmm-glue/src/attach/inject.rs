//! System calls that a thread of another process is made to do.
//!
//! The thread is seized and interrupted, which leaves it in the middle of the kernel's handling of signals. If it was in
//! a system call then, that one has ended with an internal error (`-ERESTARTSYS` and its like) and `orig_rax` holds its
//! number: on its way out the kernel would start it again, or have it end with `EINTR` if a handler runs.
//!
//! 1. Registers and signal mask are kept, and all signals held back, so that no handler runs with foreign registers.
//! 2. `rip` is set to a `syscall` instruction of the process's own, `orig_rax` to -1 so that the kernel starts nothing
//!    again, and the thread goes on to the end of that system call.
//! 3. Registers and mask are put back. The thread is now at the end of a system call, where nothing would be started
//!    again; so it is interrupted once more, which brings it back to where it was at first.
//! 4. It is let go: the kernel starts the first system call again, or delivers what signals came meanwhile, as it would
//!    have done after any other stop.
//!
//! Some system calls are never started again (`signal(7)`, "Interruption of system calls"): they end with `EINTR` after
//! any stop. A thread that is in one of these is left alone.

use std::fs;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::{self, c_int, pid_t};

use super::sys;

/// How long a thread may take to stop: it may be in the kernel, waiting for a disk.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// How often it is looked at without a pause between: for some tens of microseconds.
const LOOKS_AT_ONCE: u32 = 100;

/// How often after that. Timers have 50 µs of slack besides.
const LOOK_EVERY: Duration = Duration::from_micros(20);

/// Code segment of 64-bit programs.
const CODE_SEGMENT_64: u64 = 0x33;

/// System calls that end with `EINTR` after any stop: `epoll_wait`, `epoll_pwait`, `epoll_pwait2`, `semop`,
/// `semtimedop`, `rt_sigtimedwait`, `io_getevents`, `io_pgetevents`, `io_uring_enter`, `msgsnd`, `msgrcv`.
const NEVER_RESTARTED: [i64; 11] = [232, 281, 441, 65, 220, 128, 208, 333, 426, 69, 70];

/// A system call: its number, and its first three arguments.
pub(super) type Call = [u64; 4];

/// How many of some calls are to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Each is another way to the same: one after the other until one succeeds.
    Success,
    /// Each is a step: one after the other until one fails.
    Failure,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Injected {
    /// What the last of the calls that were done gave.
    pub result: i64,
    /// From the request to stop until the thread was let go.
    pub stopped: Duration,
}

/// A thread that can't be made to do a system call.
#[derive(Debug, thiserror::Error)]
pub enum InjectError {
    /// `ptrace` is refused.
    #[error("ptrace of thread {thread} is refused: {}", refusal())]
    Refused {
        /// Which.
        thread: i32,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// It ended.
    #[error("thread {0} has ended")]
    Gone(i32),
    /// It does not stop.
    #[error("thread {0} did not stop within 2 s")]
    NoStop(i32),
    /// A signal has stopped it.
    #[error("the process is stopped by a signal; let it go on with kill -CONT")]
    Halted,
    /// A 32-bit program.
    #[error("the process is no 64-bit program")]
    NotLong,
    /// Another answer.
    #[error("ptrace of thread {thread} failed")]
    System {
        /// Which.
        thread: i32,
        /// The system's answer.
        #[source]
        source: Errno,
    },
}

/// What forbids it, in words that name the setting.
fn refusal() -> String {
    refusal_with(&fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default())
}

/// With this scope of the security module Yama (`Documentation/admin-guide/LSM/Yama.rst`); empty where it is not there.
fn refusal_with(scope: &str) -> String {
    let yama = match scope.trim() {
        "" | "0" => String::new(),
        "3" => {
            ", and kernel.yama.ptrace_scope is 3, which forbids it until the next boot".to_owned()
        }
        scope => format!(
            ", or set kernel.yama.ptrace_scope, which is {scope}, to 0 (sysctl -w kernel.yama.ptrace_scope=0)"
        ),
    };
    format!(
        "run lazyvm as root or with the capability CAP_SYS_PTRACE if the process belongs to another user, has \
         capabilities of its own or may not be dumped{yama}; another debugger may hold it too"
    )
}

/// Whether a stop of this thread goes unnoticed by what it does now.
pub(super) fn can_be_interrupted(process: pid_t, thread: pid_t) -> bool {
    let text =
        fs::read_to_string(format!("/proc/{process}/task/{thread}/syscall")).unwrap_or_default();
    // "running", or a number first.
    text.split(' ')
        .next()
        .and_then(|number| number.trim().parse().ok())
        .is_none_or(|number: i64| !NEVER_RESTARTED.contains(&number))
}

/// Has `thread` do `calls` with the `syscall` instruction at `instruction`.
///
/// To be called on a thread that ends soon: with it, the kernel lets go of what it traced, whatever happened.
pub(super) fn run(
    thread: pid_t,
    instruction: u64,
    calls: &[Call],
    until: Until,
    options: c_int,
) -> Result<Injected, InjectError> {
    sys::seize(thread, options | sys::TRACE_SYSCALL_GOOD).map_err(|source| match source {
        Errno::ESRCH => InjectError::Gone(thread),
        source => InjectError::Refused { thread, source },
    })?;
    let tracee = Tracee { thread };
    let start = Instant::now();
    let result = tracee.stop().and_then(|()| {
        let result = tracee.with_registers_kept(instruction, calls, until);
        tracee.leave()?;
        result
    });
    result.map(|result| Injected {
        result,
        stopped: start.elapsed(),
    })
}

/// A thread that is seized.
struct Tracee {
    thread: pid_t,
}

/// Why it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Interrupted,
    Halted,
    Syscall,
    Signal(c_int),
    Other,
}

impl Tracee {
    fn check<T>(&self, result: Result<T, Errno>) -> Result<T, InjectError> {
        let thread = self.thread;
        result.map_err(|source| match source {
            Errno::ESRCH | Errno::ECHILD => InjectError::Gone(thread),
            source => InjectError::System { thread, source },
        })
    }

    /// Stops it in the kernel's handling of signals.
    fn stop(&self) -> Result<(), InjectError> {
        self.check(sys::interrupt(self.thread))?;
        self.wait_interrupted(true)
    }

    fn wait_interrupted(&self, refuse_halted: bool) -> Result<(), InjectError> {
        let deadline = Instant::now() + STOP_WITHIN;
        loop {
            let signal = match self.wait(deadline)? {
                Stop::Interrupted => return Ok(()),
                Stop::Halted if refuse_halted => {
                    self.leave()?;
                    return Err(InjectError::Halted);
                }
                // It halts again when it is let go.
                Stop::Halted => return Ok(()),
                // Before the stop that was asked for: delivered as it is.
                Stop::Signal(signal) => signal,
                Stop::Syscall | Stop::Other => 0,
            };
            self.check(sys::go_on(self.thread, signal))?;
        }
    }

    fn wait_syscall(&self) -> Result<(), InjectError> {
        let deadline = Instant::now() + STOP_WITHIN;
        loop {
            self.check(sys::go_on_to_syscall(self.thread))?;
            // All signals are held back; one that halts the process takes effect when it is let go.
            if self.wait(deadline)? == Stop::Syscall {
                return Ok(());
            }
        }
    }

    fn wait(&self, deadline: Instant) -> Result<Stop, InjectError> {
        let mut looks = 0_u32;
        loop {
            if let Some(status) = self.check(sys::poll_status(self.thread))? {
                return self.reason(status);
            }
            if Instant::now() > deadline {
                return Err(InjectError::NoStop(self.thread));
            }
            looks += 1;
            // It takes microseconds as a rule. Then this processor may be what the thread needs. Sleeping gives it away as
            // yielding does, but who yields comes back only after all others have had their turns, milliseconds each,
            // while the thread stands still.
            if looks < LOOKS_AT_ONCE {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }

    fn reason(&self, status: c_int) -> Result<Stop, InjectError> {
        if !libc::WIFSTOPPED(status) {
            return Err(InjectError::Gone(self.thread));
        }
        let signal = libc::WSTOPSIG(status);
        Ok(match status >> 16 {
            libc::PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Interrupted,
            libc::PTRACE_EVENT_STOP => Stop::Halted,
            0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
            0 => Stop::Signal(signal),
            _ => Stop::Other,
        })
    }

    fn with_registers_kept(
        &self,
        instruction: u64,
        calls: &[Call],
        until: Until,
    ) -> Result<i64, InjectError> {
        let registers = self.check(sys::registers(self.thread))?;
        if registers.cs != CODE_SEGMENT_64 {
            return Err(InjectError::NotLong);
        }
        let mask = self.check(sys::signal_mask(self.thread))?;
        self.check(sys::set_signal_mask(self.thread, u64::MAX))?;
        let mut result = Ok(0);
        for call in calls {
            let mut changed = registers;
            [changed.rax, changed.rdi, changed.rsi, changed.rdx] = *call;
            changed.rip = instruction;
            changed.orig_rax = u64::MAX;
            result = self.call(&changed);
            let failed = matches!(result, Ok(negative) if negative < 0);
            if result.is_err() || failed == (until == Until::Failure) {
                break;
            }
        }
        self.check(sys::set_registers(self.thread, &registers))?;
        self.check(sys::set_signal_mask(self.thread, mask))?;
        self.check(sys::interrupt(self.thread))?;
        self.check(sys::go_on(self.thread, 0))?;
        self.wait_interrupted(false)?;
        result
    }

    fn call(&self, registers: &sys::Registers) -> Result<i64, InjectError> {
        self.check(sys::set_registers(self.thread, registers))?;
        // Its begin, and its end.
        self.wait_syscall()?;
        self.wait_syscall()?;
        Ok(self.check(sys::registers(self.thread))?.rax as i64)
    }

    fn leave(&self) -> Result<(), InjectError> {
        self.check(sys::detach(self.thread))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_setting_that_is_in_the_way() {
        assert!(refusal_with("1\n").contains("sysctl -w kernel.yama.ptrace_scope=0"));
        assert!(refusal_with("3\n").contains("until the next boot"));
        for scope in ["0\n", ""] {
            assert!(!refusal_with(scope).contains("yama"));
            assert!(refusal_with(scope).contains("CAP_SYS_PTRACE"));
        }
    }
}
