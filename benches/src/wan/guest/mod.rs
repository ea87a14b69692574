//! The guests that are moved: the bundled payload in the built-in monitor, and Linux in QEMU. Both fill a part of their
//! memory, touch a hot part of that at random, now and then a page anywhere, check what they find, and write a tick for
//! each so much progress.

mod linux;
mod touches;

use std::path::Path;
use std::process::Command;

use lazyvm_wire::PAGE_SIZE;
use serde::Serialize;

pub use linux::Images;
pub use touches::{Touches, distinct_pages};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Guest {
    /// The bundled payload in the built-in monitor.
    Payload,
    /// Linux in QEMU.
    Qemu,
}

/// What a guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// Memory that it fills.
    pub fill_bytes: u64,
    /// Memory of that which it touches nearly always.
    pub hot_bytes: u64,
    /// Touches of a million that go anywhere in the filled memory.
    pub cold_per_million: u32,
}

impl Workload {
    /// What suits a guest of `memory` bytes: half of it filled and a sixteenth hot; of large ones three quarters, and a
    /// thirty-second.
    pub fn of(memory: u64) -> Self {
        let (fill_bytes, hot_bytes) = if memory < 2 * GIB {
            (memory / 2, memory / 16)
        } else {
            (memory / 4 * 3, memory / 32)
        };
        Self {
            fill_bytes,
            hot_bytes,
            cold_per_million: 50,
        }
    }

    /// Why it can't be.
    pub fn refusal(&self, memory: u64) -> Option<String> {
        let Self {
            fill_bytes,
            hot_bytes,
            cold_per_million,
        } = *self;
        if hot_bytes < MIB || fill_bytes < hot_bytes {
            let text = "the guest's hot memory is at least 1M and not more than it fills";
            return Some(text.to_owned());
        }
        // The kernel and its tables have the rest.
        if fill_bytes > memory / 8 * 7 {
            let text = format!("of {memory} bytes the guest can fill {}", memory / 8 * 7);
            return Some(text);
        }
        (cold_per_million > 1_000_000)
            .then(|| "of a million touches no more than a million are cold".to_owned())
    }
}

/// Pages that a guest wrote to from one count of touches to another, each counted once. Where its draws are not known, that
/// many are expected: each of the payload's touches writes to a page of its hot part that is as likely as any other.
pub fn written_pages(guest: Guest, workload: &Workload, from: u64, to: u64) -> f64 {
    match guest {
        Guest::Qemu => distinct_pages(workload, Touches::Writes, from, to) as f64,
        Guest::Payload => {
            let hot = (workload.hot_bytes / PAGE_SIZE as u64) as f64;
            hot * (1.0 - (-(to.saturating_sub(from) as f64) / hot).exp())
        }
    }
}

/// `lazyvm run` with the payload.
pub fn payload_command(
    lazyvm: &Path,
    memory: u64,
    workload: &Workload,
    control: &Path,
    console: &Path,
) -> Command {
    let mut command = Command::new(lazyvm);
    command
        .args(["run", "--memory", &memory.to_string()])
        .args(["--fill", &workload.fill_bytes.to_string()])
        .args(["--hot", &workload.hot_bytes.to_string()])
        .args(["--cold-per-million", &workload.cold_per_million.to_string()])
        .arg("--control")
        .arg(control)
        .arg("--serial")
        .arg(console);
    command
}

/// The whole command of a QEMU with the Linux guest: `ram` is its memory's file.
pub fn qemu_words(
    images: &Images,
    memory: u64,
    workload: &Workload,
    ram: &Path,
    qmp: &Path,
    console: &Path,
) -> Vec<String> {
    let memory_mib = memory / MIB;
    let words = format!(
        "qemu-system-x86_64 -accel tcg,thread=multi -m {memory_mib}M -smp 1 \
         -object memory-backend-file,id=ram0,mem-path={},share=on,size={memory_mib}M \
         -machine memory-backend=ram0 -nodefaults -display none -kernel {} -initrd {} -serial file:{} \
         -qmp unix:{},server=on,wait=off -append",
        ram.display(),
        images.kernel.display(),
        images.initrd.display(),
        console.display(),
        qmp.display(),
    );
    let append = format!(
        "console=ttyS0 quiet fill_mib={} hot_mib={} cold_per_million={}",
        workload.fill_bytes / MIB,
        workload.hot_bytes / MIB,
        workload.cold_per_million
    );
    words
        .split_ascii_whitespace()
        .map(str::to_owned)
        .chain([append])
        .collect()
}
