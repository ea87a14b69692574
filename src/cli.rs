//! What can be said on the command line. Names and meanings are what scripts rely on; they stay.

use clap::{Parser, Subcommand};

use crate::bench::BenchArgs;
use crate::exit::Exit;
use crate::log::LogArgs;
use crate::manual::{CompletionsArgs, ManArgs};
use crate::resume::ResumeArgs;
use crate::run::RunArgs;
use crate::serve::ServeArgs;
use crate::snapshot::SnapshotArgs;
use crate::status::StatusArgs;

/// Moves a running virtual machine between distant hosts with almost no downtime.
///
/// `lazyvm serve` at the source prints a ticket, `lazyvm resume TICKET` at the destination takes the VM over at once, and
/// its memory follows: pages that it touches on demand, all others behind them.
#[derive(Parser)]
#[command(name = "lazyvm", version, max_term_width = 100, after_help = Exit::table(), after_long_help = Exit::table())]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Flags of every command.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Commands.
#[derive(Subcommand)]
pub enum Command {
    /// Run a VM in the built-in KVM monitor, until it ends or has been moved away
    Run(RunArgs),
    /// At the source: offer a VM, print its ticket, and serve its memory until the destination has all of it
    Serve(Box<ServeArgs>),
    /// At the destination: take the VM over that a ticket names, and run it while its memory arrives
    Resume(ResumeArgs),
    /// Write a VM to files; the VM goes on (not in this release)
    Snapshot(SnapshotArgs),
    /// Tell how a VM or a session is
    Status(StatusArgs),
    /// Measure how long faults take and how fast pages move
    Bench(BenchArgs),
    /// Print the manual page
    Man(ManArgs),
    /// Print the completions for a shell
    Completions(CompletionsArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_documented_line_is_understood() {
        for line in [
            "run --control s",
            "run --kernel k --initrd i --cmdline c --memory 512M --cpus 1 --serial stdio --control s",
            "run --payload touch --memory 512M --cpus 1 --serial f --control s",
            "serve --vm s",
            "serve --qemu s",
            "serve --firecracker s",
            "serve --snapshot d",
            "serve --vm s --listen 0.0.0.0:4747 --advertise 192.0.2.1:1 --advertise [2001:db8::1]:2 --ticket-file f \
             --session-dir d --mode hybrid --max-bandwidth 1gbit --disk a=b --disk c=d",
            "resume t",
            "resume t --control s --serial f --stay --report r --verify --disk a=b --status-addr 127.0.0.1:9000",
            "resume - --firecracker s",
            "resume @f --qemu -- qemu-system-x86_64 -m 512",
            "snapshot --vm s d",
            "snapshot --qemu s d",
            "snapshot --firecracker s d",
            "status s",
            "status s --json",
            "bench fault --size 256M --faults 5000 --rtt 0ms --rate 0 --loss 0% --push on --json -",
            "bench push --size 1G --content mixed --json f --html h",
            "bench wan --guest qemu --snapshot --memory 2G",
            "bench track --guest qemu --memory 512M --every 1s --json -",
            "bench wan --mode stop --rtt 100ms --rate 1gbit --loss 0.1% --memory 512M --guest qemu --compare qemu",
            "man",
            "completions bash",
        ] {
            let words = ["lazyvm"].into_iter().chain(line.split_ascii_whitespace());
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn what_can_not_be_is_refused() {
        for line in [
            "",
            "run",
            "serve",
            "serve --vm s --qemu q",
            "resume",
            "snapshot d",
            "run --control s --initrd i",
            "run --control s --kernel k --payload touch --fill 1M",
            "run --control s --memory lots",
            "resume t --firecracker s --qemu -- q",
            "bench fault --size 256M --push maybe",
        ] {
            let words = ["lazyvm"].into_iter().chain(line.split_ascii_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
