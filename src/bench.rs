//! `lazyvm bench`.

mod sim;
mod track;
mod wan;

use std::io::Write;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use lazyvm_benches::fault::FaultConfig;
use lazyvm_benches::link::Link;
use lazyvm_benches::push::PushConfig;
use serde::Serialize;
use serde_json::Value;

use crate::exit::Exit;
use crate::{files, units};
use sim::SimArgs;
use track::TrackArgs;
use wan::WanArgs;

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
    /// How long a guest freezes in a move over a long path, by its own signs of life
    Wan(Box<WanArgs>),
    /// What it costs a guest that its writes are tracked
    Track(TrackArgs),
    /// What a recorded guest would wait for over a link, in virtual time
    Sim(SimArgs),
    /// The source's process of a run, which a run starts by itself
    #[command(hide = true)]
    Source {
        /// Where it listens
        at: IpAddr,
    },
}

/// Where the figures go.
#[derive(Args)]
pub struct OutputArgs {
    /// Write the figures as one JSON object to FILE; - is standard output
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write them as a page for a browser to FILE
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
    /// Threads that touch, each a page at a time, as so many vCPUs
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: u32,
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
    /// Random and zero pages, 64 of each in turn
    Mixed,
}

/// Runs a benchmark.
pub fn bench(args: &BenchArgs) -> anyhow::Result<Exit> {
    match &args.bench {
        Bench::Fault(args) => fault(args),
        Bench::Push(args) => push(args),
        Bench::Wan(args) => wan::wan(args),
        Bench::Track(args) => track::track(args),
        Bench::Sim(args) => sim::sim(args),
        Bench::Source { at } => {
            lazyvm_benches::source::run(*at)?;
            Ok(Exit::Done)
        }
    }
}

fn fault(args: &FaultArgs) -> anyhow::Result<Exit> {
    let report = lazyvm_benches::fault::run(FaultConfig {
        bytes: args.size,
        faults: args.faults,
        threads: args.threads,
        link: Link {
            rtt: args.path.rtt,
            rate_bit_s: args.path.rate,
            loss: args.path.loss,
        },
        push: args.push == OnOff::On,
    })?;
    args.output.write("bench fault", &report)
}

fn push(args: &PushArgs) -> anyhow::Result<Exit> {
    let report = lazyvm_benches::push::run(PushConfig {
        bytes: args.size,
        content: match args.content {
            Content::Random => lazyvm_benches::Content::Random,
            Content::Zero => lazyvm_benches::Content::Zero,
            Content::Mixed => lazyvm_benches::Content::Mixed,
        },
    })?;
    args.output.write("bench push", &report)
}

impl OutputArgs {
    /// Writes the figures where they are wanted; as a table on standard output, unless JSON goes there.
    fn write(&self, title: &str, report: &impl Serialize) -> anyhow::Result<Exit> {
        let figures = serde_json::to_value(report)?;
        let json = format!("{figures:#}\n");
        match &self.json {
            Some(path) if path.as_os_str() == "-" => {
                std::io::stdout().write_all(json.as_bytes())?
            }
            Some(path) => write(path, &json)?,
            None => {}
        }
        if self
            .json
            .as_deref()
            .is_none_or(|path| path.as_os_str() != "-")
        {
            let rows: String = rows(&figures)
                .iter()
                .map(|(name, value)| format!("{name:24} {value}\n"))
                .collect();
            std::io::stdout().write_all(rows.as_bytes())?;
        }
        if let Some(path) = &self.html {
            write(path, &page(title, &figures))?;
        }
        Ok(Exit::Done)
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    files::replace(path, text.as_bytes(), files::SHARED)
        .with_context(|| format!("can't write {}", path.display()))
}

/// Name and value of each figure, percentiles on one line.
fn rows(figures: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() => format!("{float:.1}"),
            _ => number.to_string(),
        },
        other => other.to_string(),
    };
    let figures = figures.as_object().into_iter().flatten();
    let row = |(name, value): (&String, &Value)| {
        let value = match value {
            Value::Object(parts) => parts
                .iter()
                .map(|(part, value)| format!("{part} {}  ", text(value)))
                .collect(),
            other => text(other),
        };
        (name.clone(), value)
    };
    figures.map(row).collect()
}

/// A page that needs nothing else. Names and values are this program's own.
fn page(title: &str, figures: &Value) -> String {
    let rows: String = rows(figures)
        .iter()
        .map(|(name, value)| format!("<tr><th>{name}</th><td>{value}</td></tr>\n"))
        .collect();
    format!(
        "<!doctype html>\n<meta charset=\"utf-8\">\n<title>lazyvm {title}</title>\n\
         <style>body{{font:16px sans-serif;margin:2em}}th{{text-align:left;padding-right:2em}}td{{white-space:pre}}</style>\n\
         <h1>lazyvm {title}</h1>\n<table>\n{rows}</table>\n"
    )
}
