//! Logs on standard error, above any progress bar.

use std::io::{self, IsTerminal, Write};
use std::sync::LazyLock;

use clap::{Args, ValueEnum};
use indicatif::MultiProgress;
use tracing_subscriber::EnvFilter;

/// The bars of this process; they are drawn on a terminal only.
pub static BARS: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);

/// Flags of every command.
#[derive(Args)]
#[command(next_help_heading = "Logs")]
pub struct LogArgs {
    /// Log more; twice for everything. RUST_LOG, where it is set, decides alone.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Log warnings and errors only, and draw no progress bar.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// How log lines are written on standard error: for people, or as one JSON object a line with an event's fields,
    /// progress among them.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Starts to log.
pub fn start(args: &LogArgs) {
    if args.quiet || args.log_format == LogFormat::Json {
        BARS.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let default = match (args.quiet, args.verbose) {
        (true, _) => "warn",
        // Progress is for programs; people have the bar.
        (_, 0) if args.log_format == LogFormat::Text => "warn,lazyvm=info,lazyvm::progress=warn",
        (_, 0) => "warn,lazyvm=info",
        (_, 1) => "info,lazyvm=debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| AboveBars)
        .with_ansi(io::stderr().is_terminal());
    match args.log_format {
        LogFormat::Text => builder.with_target(false).init(),
        LogFormat::Json => builder.json().flatten_event(true).init(),
    }
}

/// Writes text on standard error. Nobody is left to be told where that fails.
pub fn above_bars(text: &str) {
    let _ = AboveBars.write_all(text.as_bytes());
}

struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        BARS.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
