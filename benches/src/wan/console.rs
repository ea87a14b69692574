//! The guest's serial console at both ends of a move: ticks, each stamped when it is read.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;

use super::{lock, sys};

/// Longest line that is kept.
const LINE_MAX: usize = 4096;

/// Lines that are no ticks, which are kept for messages.
const OTHERS_MAX: usize = 100;

/// How often the reader looks whether it is to end, in milliseconds.
const LOOK_EVERY_MS: u16 = 50;

/// A sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// When its line was read.
    pub at: Instant,
    /// Whether its end came from the destination.
    pub moved: bool,
    /// The guest's own count.
    pub number: u64,
    /// How many touches it has made so far.
    pub touches: u64,
    /// How often it found wrong contents so far.
    pub errors: u64,
}

/// Two pipes that a guest's console is written to, one after the other.
pub struct Console {
    /// For the source's command line.
    pub source: PathBuf,
    /// For the destination's.
    pub destination: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// What there is of a line is to be forgotten.
    cut: AtomicBool,
    ticks: Mutex<Vec<Tick>>,
    others: Mutex<Vec<String>>,
}

impl Console {
    /// Makes the pipes in `folder` and reads from them until it is dropped.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let paths = ["source.console", "destination.console"].map(|name| folder.join(name));
        let mut pipes = Vec::new();
        for path in &paths {
            nix::unistd::mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
            // Open for writing as well: there is no end of file then, and a guest can open it at once.
            let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
            let mut options = File::options();
            options.read(true).write(true).custom_flags(flags);
            pipes.push(options.open(path)?);
        }
        let shared = Arc::new(Shared::default());
        let thread = std::thread::Builder::new().name("console".to_owned());
        let thread = thread.spawn({
            let shared = shared.clone();
            move || {
                if let Err(error) = read_all(&pipes, &shared) {
                    tracing::error!(%error, "can't read the guest's console");
                }
            }
        })?;
        let [source, destination] = paths;
        Ok(Self {
            source,
            destination,
            shared,
            thread: Some(thread),
        })
    }

    /// All ticks so far.
    pub fn ticks(&self) -> Vec<Tick> {
        lock(&self.shared.ticks).clone()
    }

    /// Forgets a line that has begun, before anything else is read: who comes next does not go on with it.
    pub fn cut_line(&self) {
        self.shared.cut.store(true, Ordering::Relaxed);
    }

    /// What else it said.
    pub fn others(&self) -> String {
        lock(&self.shared.others).join("\n")
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_all(pipes: &[File], shared: &Shared) -> io::Result<()> {
    // A stamp must not wait for those whose work is measured.
    if let Err(error) = sys::run_first() {
        tracing::warn!(%error, "ticks are stamped without real-time priority");
    }
    // A move may cut a line in two, which then goes on at the other end.
    let mut line = Vec::new();
    let mut bytes = [0; 4096];
    while !shared.stop.load(Ordering::Relaxed) {
        let mut polled: Vec<_> = pipes
            .iter()
            .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN))
            .collect();
        match poll(&mut polled, PollTimeout::from(LOOK_EVERY_MS)) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if shared.cut.swap(false, Ordering::Relaxed) {
            line.clear();
        }
        for (moved, mut pipe) in [false, true].into_iter().zip(pipes) {
            while let Ok(length @ 1..) = pipe.read(&mut bytes) {
                take(&bytes[..length], &mut line, moved, shared);
            }
        }
    }
    Ok(())
}

fn take(bytes: &[u8], line: &mut Vec<u8>, moved: bool, shared: &Shared) {
    let at = Instant::now();
    for &byte in bytes {
        if byte != b'\n' {
            if line.len() < LINE_MAX {
                line.push(byte);
            }
            continue;
        }
        let text = String::from_utf8_lossy(line).trim().to_owned();
        line.clear();
        match parse(&text) {
            Some([number, touches, errors]) => lock(&shared.ticks).push(Tick {
                at,
                moved,
                number,
                touches,
                errors,
            }),
            None => {
                let mut others = lock(&shared.others);
                if others.len() < OTHERS_MAX && !text.is_empty() {
                    others.push(text);
                }
            }
        }
    }
}

/// Number, touches and errors of `tick 123 touches 45678 errors 0`.
fn parse(line: &str) -> Option<[u64; 3]> {
    match line.split(' ').collect::<Vec<_>>()[..] {
        ["tick", number, "touches", touches, "errors", errors] => Some([
            number.parse().ok()?,
            touches.parse().ok()?,
            errors.parse().ok()?,
        ]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_line_that_is_cut_does_not_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let console = Console::open(folder.path()).unwrap();
        let mut pipe = File::options().append(true).open(&console.source).unwrap();
        pipe.write_all(b"filled\ntick 1 tou").unwrap();
        while console.others().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        console.cut_line();
        // Longer than the reader waits.
        std::thread::sleep(Duration::from_millis(4 * u64::from(LOOK_EVERY_MS)));
        pipe.write_all(b"tick 2 touches 9 errors 0\n").unwrap();
        while console.ticks().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(console.ticks()[0].number, 2);
        assert_eq!(console.others(), "filled");
    }

    #[test]
    fn lines_go_on_from_one_pipe_to_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let console = Console::open(folder.path()).unwrap();
        let write = |path: &Path, text: &str| {
            File::options()
                .append(true)
                .open(path)
                .unwrap()
                .write_all(text.as_bytes())
                .unwrap();
        };
        write(
            &console.source,
            "filled\ntick 1 touches 9 errors 0\r\ntick 2 tou",
        );
        while console.ticks().is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        write(&console.destination, "ches 10 errors 3\ntick 3 touches 11");
        while console.ticks().len() < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let ticks = console.ticks();
        let seen: Vec<_> = ticks
            .iter()
            .map(|t| (t.number, t.touches, t.errors, t.moved))
            .collect();
        assert_eq!(seen, [(1, 9, 0, false), (2, 10, 3, true)]);
        assert_eq!(console.others(), "filled");
    }
}
