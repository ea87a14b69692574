//! `lazyvm bench wan`.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use lazyvm_benches::wan::guest::Workload;
use lazyvm_benches::wan::queue::PathConfig;
use lazyvm_benches::wan::{self, Setup, WanError};

use super::{OutputArgs, write};
use crate::exit::{Exit, Problem};
use crate::serve::Mode;
use crate::units;

/// Flags of `bench wan`.
#[derive(Args)]
pub struct WanArgs {
    /// How the VM is moved
    #[arg(long, default_value = "hybrid")]
    mode: Mode,
    #[command(flatten)]
    path: PathArgs,
    #[command(flatten)]
    guest: GuestArgs,
    /// Resume it from a snapshot instead of moving it: first without a profile of earlier resumes, then with what the first
    /// one has recorded. Times count as if it had been paused at the order to resume; --mode has no part in it
    #[arg(long)]
    snapshot: bool,
    /// With --snapshot: behind those two, resume so many clones of the bundled payload at once
    #[arg(long, value_name = "COUNT", default_value_t = 1, requires = "snapshot")]
    clones: u32,
    /// Whose own migration it is compared with, over the same path in the same run
    #[arg(long, default_value = "none")]
    compare: Peer,
    /// How often all of it is done; medians count
    #[arg(long, value_name = "COUNT", default_value_t = 1)]
    runs: u32,
    /// The longest that one move may take
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = units::duration)]
    within: Duration,
    /// One more flag for lazyvm serve, such as --serve-flag=--max-bandwidth=500mbit; may be repeated
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    serve_flag: Vec<String>,
    /// One more flag for lazyvm resume, such as --resume-flag=--verify; may be repeated
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    resume_flag: Vec<String>,
    #[command(flatten)]
    output: OutputArgs,
    /// Write the guest's speed and the bytes on the path over time as a picture to FILE
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// The path between source and destination, each way alike.
#[derive(Args)]
#[command(next_help_heading = "The path")]
struct PathArgs {
    /// Round-trip time
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = units::duration)]
    rtt: Duration,
    /// Rate; 0 is no limit
    #[arg(long, value_name = "RATE", default_value = "1gbit", value_parser = units::rate)]
    rate: u64,
    /// The longest that a packet waits for those before it; more is dropped
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = units::duration)]
    queue: Duration,
    /// Share of the packets that are lost
    #[arg(long, value_name = "SHARE", default_value = "0%", value_parser = units::share)]
    loss: f64,
    /// The most that is added to a packet's delay by chance; packets stay in order
    #[arg(long, value_name = "TIME", default_value = "0ms", value_parser = units::duration)]
    jitter: Duration,
    /// Share of the packets that come 5 ms late, behind others
    #[arg(long, value_name = "SHARE", default_value = "0%", value_parser = units::share)]
    reorder: f64,
    /// Let nothing through from this long after the start of the move on
    #[arg(long, value_name = "TIME", requires = "blackout_for", value_parser = units::duration)]
    blackout_at: Option<Duration>,
    /// For this long
    #[arg(long, value_name = "TIME", requires = "blackout_at", value_parser = units::duration)]
    blackout_for: Option<Duration>,
    /// Where the path's random numbers begin
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
}

/// What is moved.
#[derive(Args)]
#[command(next_help_heading = "The guest")]
struct GuestArgs {
    /// What is moved
    #[arg(long, default_value = "payload")]
    guest: Guest,
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::size)]
    memory: u64,
    /// Memory that it fills [default: half of it; three quarters from 2G on]
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    fill: Option<u64>,
    /// Memory of that which it touches nearly always [default: 1/16 of its memory; 1/32 from 2G on]
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    hot: Option<u64>,
    /// Touches of a million that go anywhere in what it fills
    #[arg(long, value_name = "COUNT", default_value_t = 50)]
    cold_per_million: u32,
    /// The Linux kernel of --guest qemu [default: the one that the build has fetched for its tests]
    #[arg(long, value_name = "BZIMAGE")]
    kernel: Option<PathBuf>,
}

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// The bundled payload in the built-in monitor
    Payload,
    /// A Linux guest in QEMU
    Qemu,
}

impl From<Guest> for wan::guest::Guest {
    fn from(guest: Guest) -> Self {
        match guest {
            Guest::Payload => Self::Payload,
            Guest::Qemu => Self::Qemu,
        }
    }
}

/// Whose own migration is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// Nobody's
    None,
    /// QEMU's own ways of the same mode; needs --guest qemu
    Qemu,
}

impl PathArgs {
    fn config(&self) -> PathConfig {
        PathConfig {
            rtt: self.rtt,
            rate_bit_s: self.rate,
            queue: self.queue,
            loss: self.loss,
            jitter: self.jitter,
            reorder: self.reorder,
            seed: self.seed,
        }
    }
}

impl WanArgs {
    fn setup(&self) -> anyhow::Result<Setup> {
        let default = Workload::of(self.guest.memory);
        Ok(Setup {
            lazyvm: std::env::current_exe().context("can't tell where this program is")?,
            path: self.path.config(),
            blackout: self.path.blackout_at.zip(self.path.blackout_for),
            guest: self.guest.guest.into(),
            memory_bytes: self.guest.memory,
            workload: Workload {
                fill_bytes: self.guest.fill.unwrap_or(default.fill_bytes),
                hot_bytes: self.guest.hot.unwrap_or(default.hot_bytes),
                cold_per_million: self.guest.cold_per_million,
            },
            kernel: self.guest.kernel.clone(),
            mode: self.mode.into(),
            snapshot: self.snapshot,
            clones: self.clones,
            compare_qemu: self.compare == Peer::Qemu,
            runs: self.runs,
            within: self.within,
            serve_flags: self.serve_flag.clone(),
            resume_flags: self.resume_flag.clone(),
        })
    }
}

/// Runs it.
pub fn wan(args: &WanArgs) -> anyhow::Result<Exit> {
    let outcome = wan::run(&args.setup()?, |what| tracing::info!("{what}"));
    let outcome = outcome.map_err(|error| match exit(&error) {
        Some(exit) => Problem::new(exit, error.to_string()).into(),
        None => anyhow::Error::from(error),
    })?;
    let json = format!("{:#}\n", outcome.json());
    let to_stdout = match &args.output.json {
        Some(path) if path.as_os_str() == "-" => json,
        Some(path) => {
            write(path, &json)?;
            outcome.table()
        }
        None => outcome.table(),
    };
    if let Some(path) = &args.output.html {
        write(path, &outcome.page())?;
    }
    if let Some(path) = &args.svg {
        write(path, &outcome.svg())?;
    }
    std::io::stdout().write_all(to_stdout.as_bytes())?;
    Ok(Exit::Done)
}

/// The exit code of what the rig's user can change.
pub fn exit(error: &WanError) -> Option<Exit> {
    match error {
        WanError::Asked(_) => Some(Exit::Usage),
        WanError::NotRoot
        | WanError::Missing(_)
        | WanError::NoKernel(_)
        | WanError::NoRoom { .. } => Some(Exit::Environment),
        WanError::WrongMemory(..) => Some(Exit::Integrity),
        _ => None,
    }
}
