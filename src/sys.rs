//! What can't be said in safe Rust: overwriting this process's own arguments, giving back memory that it has freed.
#![allow(unsafe_code)]

use std::io;
use std::ptr;
use std::slice;

/// Fields of `/proc/self/stat`, counted from 1 (proc_pid_stat(5)).
const NUM_THREADS: usize = 20;
const ARG_START: usize = 48;
const ARG_END: usize = 49;

/// Where the kernel put this process's arguments, each with a zero byte behind it.
#[derive(Debug, PartialEq, Eq)]
struct ArgumentArea {
    start: usize,
    end: usize,
    threads: usize,
}

impl ArgumentArea {
    fn parse(stat: &str) -> Option<Self> {
        // The second field is the program's name in brackets, which may hold anything. The third follows it.
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse().ok();
        Some(Self {
            start: number(ARG_START)?,
            end: number(ARG_END)?,
            threads: number(NUM_THREADS)?,
        })
    }
}

/// Overwrites each of this process's arguments that is `secret`, so that `/proc/PID/cmdline` does not show it.
/// [`std::env::args`] gives the overwritten text from then on.
///
/// # Errors
/// When `/proc` does not tell where they are, or when other threads run, which might be reading them.
pub fn wipe_arguments(secret: impl Fn(&[u8]) -> bool) -> io::Result<()> {
    let stat = std::fs::read("/proc/self/stat")?;
    let area = ArgumentArea::parse(&String::from_utf8_lossy(&stat))
        .filter(|area| area.start != 0 && area.start < area.end)
        .ok_or_else(|| io::Error::other("/proc/self/stat does not tell where the arguments are"))?;
    if area.threads != 1 {
        return Err(io::Error::other("other threads run already"));
    }
    // SAFETY: the kernel mapped these bytes, readable and writable, when it started this program, and says so in the
    // same breath; they stay mapped as long as the stack. A program may change its arguments (C17, 5.1.2.2.1). No
    // other thread exists, and this one has no reference into them: the standard library gives copies only.
    let bytes = unsafe {
        slice::from_raw_parts_mut(
            ptr::with_exposed_provenance_mut::<u8>(area.start),
            area.end - area.start,
        )
    };
    for argument in bytes.split_mut(|&byte| byte == 0) {
        if secret(argument) {
            argument.fill(b'x');
        }
    }
    Ok(())
}

/// Gives memory that was freed back to the system, which glibc otherwise keeps for later: for a process that goes on for
/// long and needs less from now on.
pub fn give_back_freed_memory() {
    // SAFETY: malloc_trim(3) may be called at any time, from any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_is_found_behind_any_program_name() {
        let numbers: Vec<String> = (4..=52).map(|field| (field * 100).to_string()).collect();
        let stat = format!("42 (a ) b) S {}\n", numbers.join(" "));
        let area = ArgumentArea {
            start: 4800,
            end: 4900,
            threads: 2000,
        };
        assert_eq!(ArgumentArea::parse(&stat), Some(area));
        assert_eq!(ArgumentArea::parse("42 (lazyvm) S 1 2 3"), None);
        assert_eq!(ArgumentArea::parse(""), None);
    }
}
