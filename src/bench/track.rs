//! `lazyvm bench track`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use lazyvm_benches::track::{self, TrackConfig, TrackError};
use lazyvm_benches::wan::guest::Workload;

use super::OutputArgs;
use super::wan::{Guest, exit};
use crate::exit::{Exit, Problem};
use crate::units;

/// Flags of `bench track`.
#[derive(Args)]
pub struct TrackArgs {
    /// What is tracked
    #[arg(long, default_value = "payload")]
    guest: Guest,
    /// Its memory
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::size)]
    memory: u64,
    /// Memory of that which it touches nearly always [default: 1/16 of its memory; 1/32 from 2G on]
    #[arg(long, value_name = "SIZE", value_parser = units::size)]
    hot: Option<u64>,
    /// How often the tracker is asked
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::duration)]
    every: Duration,
    /// How long each turn takes
    #[arg(long, value_name = "TIME", default_value = "6s", value_parser = units::duration)]
    turn: Duration,
    /// Turns with the tracker, each beside one without
    #[arg(long, value_name = "COUNT", default_value_t = 5)]
    turns: u32,
    /// The Linux kernel of --guest qemu [default: the one that the build has fetched for its tests]
    #[arg(long, value_name = "BZIMAGE")]
    kernel: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs it.
pub fn track(args: &TrackArgs) -> anyhow::Result<Exit> {
    if args.every.is_zero() || args.every > args.turn {
        let text = "--every is more than nothing, and not more than --turn";
        return Err(Problem::new(Exit::Usage, text).into());
    }
    let default = Workload::of(args.memory);
    let report = track::run(&TrackConfig {
        lazyvm: std::env::current_exe().context("can't tell where this program is")?,
        guest: args.guest.into(),
        memory_bytes: args.memory,
        workload: Workload {
            hot_bytes: args.hot.unwrap_or(default.hot_bytes),
            ..default
        },
        kernel: args.kernel.clone(),
        every: args.every,
        turn: args.turn,
        turns: args.turns,
    });
    let report = report.map_err(|error| match &error {
        TrackError::Rig(rig) => match exit(rig) {
            Some(exit) => Problem::new(exit, error.to_string()).into(),
            None => anyhow::Error::from(error),
        },
        _ => anyhow::Error::from(error),
    })?;
    args.output.write("bench track", &report)
}
