//! `lazyvm run`: a VM in the built-in monitor, until it ends.

use std::convert::Infallible;
use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use lazyvm_vmm_glue::kvm::{Machine, MachineConfig, Payload, SerialTarget, TouchConfig};
use lazyvm_wire::Backing;

use crate::events::Events;
use crate::exit::Exit;
use crate::signals::Signals;
use crate::units;

/// Flags of `run`.
#[derive(Args)]
pub struct RunArgs {
    /// Boot this: an x86-64 ELF file or a Linux bzImage. Without it the bundled payload runs
    #[arg(long, value_name = "ELF_OR_BZIMAGE", conflicts_with_all = ["payload", "fill", "hot", "cold_per_million", "tick_touches"])]
    kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(
        long,
        value_name = "STR",
        requires = "kernel",
        default_value = "console=ttyS0",
        hide_default_value = true
    )]
    cmdline: String,
    /// The bundled payload
    #[arg(long, default_value = "touch")]
    payload: Bundled,
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::size)]
    memory: u64,
    /// Back guest memory with huge pages of 2 MiB, of which enough must be free (/proc/sys/vm/nr_hugepages)
    #[arg(long)]
    huge_pages: bool,
    /// vCPUs
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    cpus: u32,
    /// Where the guest's serial output goes: appended to a file, or to standard output; without it, nowhere
    #[arg(long, value_name = "FILE|stdio", value_parser = serial_target)]
    serial: Option<SerialTarget>,
    /// Make the VM's control socket here; serve and status talk to the VM through it
    #[arg(long, value_name = "SOCK")]
    control: PathBuf,
    #[command(flatten)]
    touch: TouchArgs,
}

/// The sizes of the bundled payload.
#[derive(Args)]
#[command(next_help_heading = "The bundled payload")]
struct TouchArgs {
    /// Memory that it fills and touches; the rest stays empty [default: all]
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    fill: Option<u64>,
    /// Memory of that which it touches most of the time [default: a quarter of it, at most 16M]
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    hot: Option<u64>,
    /// Touches of a million that go anywhere in the filled memory
    #[arg(long, value_name = "COUNT", default_value_t = TouchConfig::default().cold_per_million)]
    cold_per_million: u32,
    /// Touches from tick to tick [default: as many as take 10 ms]
    #[arg(long, value_name = "COUNT")]
    tick_touches: Option<u64>,
}

/// A bundled payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Bundled {
    /// Touches its memory for ever, checks every word that it reads, and prints a tick about every 10 ms
    Touch,
}

/// Reads `--serial`.
pub fn serial_target(text: &str) -> Result<SerialTarget, String> {
    match text {
        "" => Err("name a file, or stdio".to_owned()),
        "stdio" => Ok(SerialTarget::Stdio),
        path => Ok(SerialTarget::File(PathBuf::from(path))),
    }
}

impl RunArgs {
    fn machine(&self) -> MachineConfig {
        let payload = match (&self.kernel, self.payload) {
            (Some(path), _) => Payload::Kernel {
                path: path.clone(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone(),
            },
            (None, Bundled::Touch) => Payload::Touch(TouchConfig {
                fill_bytes: self.touch.fill,
                hot_bytes: self.touch.hot,
                cold_per_million: self.touch.cold_per_million,
                tick_touches: self.touch.tick_touches,
            }),
        };
        MachineConfig {
            payload,
            memory_bytes: self.memory,
            backing: if self.huge_pages {
                Backing::Huge2M
            } else {
                Backing::Small
            },
            cpus: self.cpus,
            serial: self.serial.clone().unwrap_or(SerialTarget::Nothing),
            control: self.control.clone(),
        }
    }
}

/// Runs the VM until it ends, here or because it was moved away. A signal ends it.
pub fn run(args: &RunArgs) -> anyhow::Result<Exit> {
    let signals = Signals::hold().context("can't handle signals")?;
    let machine = Machine::boot(&args.machine()).context("can't run the VM")?;
    tracing::info!(control = %args.control.display(), "the VM runs");
    Events::<Infallible>::of(signals)?.until_end_of(&machine)
}
