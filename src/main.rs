//! The command line, and nothing else: what each command does is in the libraries.

mod addresses;
mod bench;
mod cli;
mod events;
mod exit;
mod files;
mod log;
mod manual;
mod metrics;
mod progress;
mod resume;
mod run;
mod serve;
mod signals;
mod snapshot;
mod status;
mod sys;
mod ticket;
mod units;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use cli::{Cli, Command};
use exit::Exit;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    // First of all, since whoever lists processes sees them until then.
    let hidden = sys::wipe_arguments(ticket::looks_like_one);
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error, &arguments),
    };
    log::start(&cli.log);
    if let Err(error) = hidden {
        tracing::warn!(%error, "can't hide a ticket on the command line from other users; pass @FILE or - instead");
    }
    let done = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Serve(args) => serve::serve(args),
        Command::Resume(args) => resume::resume(args),
        Command::Snapshot(args) => snapshot::snapshot(args),
        Command::Status(args) => status::status(args),
        Command::Bench(args) => bench::bench(args),
        Command::Man(args) => manual::man(args),
        Command::Completions(args) => manual::completions(args),
    };
    let exit = done.unwrap_or_else(|error| {
        log::above_bars(&format!("lazyvm: {error:#}\n"));
        exit::of_anyhow(&error)
    });
    exit.into()
}

/// Tells what is wrong with the command line, or gives the help that it asks for; shows no ticket.
fn usage(error: &clap::Error, arguments: &[OsString]) -> ExitCode {
    let tickets: Vec<&str> = arguments
        .iter()
        .filter(|argument| ticket::looks_like_one(argument.as_encoded_bytes()))
        .filter_map(|argument| argument.to_str())
        .collect();
    if tickets.is_empty() {
        // Fails only where there is nobody to read it.
        let _ = error.print();
    } else {
        let text = tickets
            .iter()
            .fold(error.render().to_string(), |text, ticket| {
                text.replace(ticket, "TICKET")
            });
        log::above_bars(&text);
    }
    if error.use_stderr() {
        Exit::Usage
    } else {
        Exit::Done
    }
    .into()
}
