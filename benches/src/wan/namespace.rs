//! Network namespaces without a name: they vanish with the last process in them and the last descriptor of them, however
//! this process ends.

use std::fs::{self, File};
use std::io;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::WanError;

/// One.
pub struct Namespace(File);

impl Namespace {
    /// A new one, with nothing but a loopback device that is down.
    pub fn new() -> io::Result<Self> {
        // A thread's namespace is its own, and its children's.
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open("/proc/thread-self/ns/net").map(Self)
        })
    }

    /// Runs `act` within: sockets and devices that it makes, and processes that it starts, belong to the namespace.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_a_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            act()
        })
    }

    /// Runs `ip` with these words within.
    pub fn ip(&self, words: &str) -> Result<(), WanError> {
        let done = self.within(|| {
            Command::new("ip")
                .args(words.split_ascii_whitespace())
                .output()
        });
        let output = done.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => WanError::Missing("ip, of the package iproute2"),
            _ => WanError::Network(source),
        })?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(WanError::Network(io::Error::other(format!(
            "ip {words}: {text}"
        ))))
    }

    /// Sets what stands below `/proc/sys/net` within.
    pub fn set(&self, name: &str, value: &str) -> io::Result<()> {
        self.within(|| fs::write(format!("/proc/sys/net/{name}"), value))
    }
}

/// The congestion control of TCP in a new namespace: the machine's default.
pub fn tcp_congestion_control() -> io::Result<String> {
    let read = || fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control");
    let name = Namespace::new()?.within(read)?;
    Ok(name.trim().to_owned())
}

fn on_a_thread<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, act)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    })
}

/// A setting of the whole system, which is put back when this is dropped.
pub struct Raised {
    path: &'static str,
    before: String,
}

impl Raised {
    /// Raises the number at `path` to `least`, if it is lower.
    pub fn to(path: &'static str, least: u64) -> io::Result<Option<Self>> {
        let before = fs::read_to_string(path)?;
        if before.trim().parse().is_ok_and(|now: u64| now >= least) {
            return Ok(None);
        }
        fs::write(path, least.to_string())?;
        Ok(Some(Self { path, before }))
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.path, &self.before) {
            tracing::warn!(%error, path = self.path, "can't put a setting back");
        }
    }
}
