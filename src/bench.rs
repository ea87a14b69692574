//! `lazyvm bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use crate::exit::{Exit, Problem};
use crate::serve::Mode;
use crate::units;

/// Which benchmark.
#[derive(Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// How long a page takes that a thread waits for, against one in local memory
    Fault(FaultArgs),
    /// How fast pages move from the source's memory to their place, against bare QUIC
    Push(PushArgs),
    /// How long a guest freezes in a move over a long path (not in this release)
    Wan(WanArgs),
}

/// Where the figures go.
#[derive(Args)]
pub struct OutputArgs {
    /// Write the figures as one JSON object to FILE; - is standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write them as a page for a browser (not in this release)
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// The path between source and destination.
#[derive(Args)]
pub struct PathArgs {
    /// Round-trip time that is added
    #[arg(long, value_name = "TIME", default_value = "0ms", value_parser = units::duration)]
    pub rtt: Duration,
    /// Rate of the path; 0 is no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = units::rate)]
    pub rate: u64,
    /// Share of the packets that are lost
    #[arg(long, value_name = "SHARE", default_value = "0%", value_parser = units::share)]
    pub loss: f64,
}

/// Flags of `bench fault`.
#[derive(Args)]
pub struct FaultArgs {
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = units::size)]
    pub size: u64,
    /// Pages that are touched
    #[arg(long, value_name = "COUNT", default_value_t = 5000)]
    pub faults: u64,
    /// The path
    #[command(flatten)]
    pub path: PathArgs,
    /// Whether all other pages are pushed meanwhile
    #[arg(long, default_value = "off")]
    pub push: OnOff,
    /// Where the figures go
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Flags of `bench push`.
#[derive(Args)]
pub struct PushArgs {
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = units::size)]
    pub size: u64,
    /// What is in it
    #[arg(long, default_value = "random")]
    pub content: Content,
    /// Where the figures go
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Flags of `bench wan`.
#[derive(Args)]
pub struct WanArgs {
    /// How the VM is moved
    #[arg(long, default_value = "postcopy")]
    pub mode: Mode,
    /// Round-trip time
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = units::duration)]
    pub rtt: Duration,
    /// Rate of the path
    #[arg(long, value_name = "RATE", default_value = "1gbit", value_parser = units::rate)]
    pub rate: u64,
    /// Share of the packets that are lost
    #[arg(long, value_name = "SHARE", default_value = "0%", value_parser = units::share)]
    pub loss: f64,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::size)]
    pub memory: u64,
    /// What is moved
    #[arg(long, default_value = "payload")]
    pub guest: Guest,
    /// Whose own migration it is compared with
    #[arg(long, default_value = "none")]
    pub compare: Peer,
    /// Where the figures go
    #[command(flatten)]
    pub output: OutputArgs,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Yes.
    On,
    /// No.
    Off,
}

/// What is in the memory that is pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Content {
    /// Random bytes in every page
    Random,
    /// Nothing but zeros, in memory that was written to
    Zero,
    /// Random, zero and repetitive pages
    Mixed,
}

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// The bundled payload in the built-in monitor
    Payload,
    /// A Linux guest in QEMU
    Qemu,
}

/// Whose own migration is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// Nobody's
    None,
    /// QEMU's
    Qemu,
}

/// Runs a benchmark.
pub fn bench(args: &BenchArgs) -> anyhow::Result<Exit> {
    match &args.bench {
        Bench::Fault(args) => fault(args),
        Bench::Push(args) => push(args),
        Bench::Wan(_) => Err(Problem::not_in_this_release("bench wan").into()),
    }
}

fn fault(_: &FaultArgs) -> anyhow::Result<Exit> {
    Err(Problem::not_in_this_release("bench fault").into())
}

fn push(_: &PushArgs) -> anyhow::Result<Exit> {
    Err(Problem::not_in_this_release("bench push").into())
}
