//! What stands for hosts: two network namespaces that a pair of virtual network cards joins. And the end of whatever a
//! test has left running on them.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Two hosts, 0 and 1. Dropped, they go.
pub struct Hosts {
    namespaces: [String; 2],
}

impl Hosts {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let unique = format!(
            "lazyvm-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let hosts = Self {
            namespaces: [0, 1].map(|host| format!("{unique}-{host}")),
        };
        let [a, b] = &hosts.namespaces;
        for namespace in [a, b] {
            ip(&format!("netns add {namespace}"));
            ip(&format!("-netns {namespace} link set lo up"));
        }
        ip(&format!(
            "link add card netns {a} type veth peer name card netns {b}"
        ));
        for (host, namespace) in hosts.namespaces.iter().enumerate() {
            let address = Self::address(host);
            ip(&format!(
                "-netns {namespace} address add {address}/24 dev card"
            ));
            ip(&format!("-netns {namespace} link set card up"));
        }
        hosts
    }

    /// Of a host, as the other one reaches it.
    pub fn address(host: usize) -> String {
        format!("192.0.2.{}", host + 1)
    }

    /// A command on a host.
    pub fn on(&self, host: usize, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.namespaces[host]))
            .arg("--")
            .arg(program);
        command
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            let _ = Command::new("ip")
                .args(["netns", "delete", namespace])
                .status();
        }
    }
}

fn ip(line: &str) {
    let output = Command::new("ip").args(line.split(' ')).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {line}: {error}");
}

/// Ends every process that was started with `folder`, a test's own, in its command: a QEMU that took a VM over outlives
/// the command that started it.
pub fn end_all_of(folder: &Path) {
    let folder = folder.to_string_lossy().into_owned();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let words = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&words).contains(&folder) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
