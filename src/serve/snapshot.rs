//! `lazyvm serve --snapshot`: a snapshot of lazyvm's or of a Firecracker's, for as many destinations as come.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use lazyvm_server::port::SourceMachine;
use lazyvm_server::{FleetConfig, FleetHandle, Phase, Server, snapshot};
use lazyvm_vmm_glue::firecracker::snapshot::{SnapshotFiles, SnapshotMachine, SnapshotOptions};
use lazyvm_wire::trust::Identity;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use super::{PROGRESS_EVERY, ServeArgs, wait};
use crate::exit::{Exit, Problem};
use crate::signals::Signals;
use crate::{addresses, ticket};

/// As long as this command runs, to all intents and purposes.
const TICKET_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Which of a snapshot's files is which.
#[derive(Args)]
pub struct Files {
    /// The snapshot's state file, in its directory [default: found by its name]
    #[arg(long, value_name = "FILE", requires = "snapshot")]
    state_file: Option<PathBuf>,
    /// The snapshot's memory file, in its directory [default: found by its name]
    #[arg(long, value_name = "FILE", requires = "snapshot")]
    memory_file: Option<PathBuf>,
    /// The snapshot's VM has its memory in huge pages of 2 MiB
    #[arg(long, requires = "snapshot")]
    huge_pages: bool,
    /// The snapshot's memory file has all of the memory, though it has holes: they are zeros. A diff snapshot has not
    #[arg(long, requires = "snapshot")]
    memory_is_whole: bool,
}

/// Serves the snapshot in `directory` until a signal comes.
pub fn serve(args: &ServeArgs, directory: &Path) -> anyhow::Result<Exit> {
    if args.session_dir.is_some() {
        let text = "--session-dir is for a VM that runs; a snapshot's files are all that its destinations need";
        return Err(Problem::new(Exit::Usage, text).into());
    }
    let signals = Signals::hold().context("can't handle signals")?;
    let machine = open(&args.files, directory)?;
    let identity = Identity::generate()?;
    let server = Server::bind_as(args.listen, &identity, args.rival())?;
    let fleet = server.add_fleet(FleetConfig {
        machine,
        ticket_lifetime: args.ticket_lifetime.unwrap_or(TICKET_LIFETIME),
        max_bandwidth: args.bytes_a_second(),
    })?;
    let listening = server.local_addr().context("can't tell where it listens")?;
    let reachable = addresses::advertised(listening, &args.advertise)?;
    tracing::info!(
        ticket = %fleet.id(),
        %listening,
        "waiting for destinations; the ticket is for all of them"
    );
    ticket::hand_out(
        &server.fleet_ticket(&fleet, reachable),
        args.ticket_file.as_deref(),
    )?;
    wait(signals, |heard| until_signalled(&fleet, heard))
}

/// The snapshot in `directory`, whoever wrote it.
fn open(flags: &Files, directory: &Path) -> anyhow::Result<Arc<dyn SourceMachine>> {
    if snapshot::is_snapshot(directory) {
        let named = flags.state_file.is_some() || flags.memory_file.is_some();
        if named || flags.huge_pages || flags.memory_is_whole {
            let text = "the snapshot in this directory was written by lazyvm snapshot, and says itself what its files are";
            return Err(Problem::new(Exit::Usage, text).into());
        }
        let machine = snapshot::SnapshotMachine::open(directory)?;
        let manifest = machine.snapshot().manifest();
        tracing::info!(
            snapshot = %manifest.id,
            kind = manifest.offer.kind,
            memory_bytes = manifest.layout.bytes(),
            "a snapshot of lazyvm's"
        );
        return Ok(Arc::new(machine));
    }
    let files = SnapshotFiles::find(
        directory,
        flags.state_file.as_deref(),
        flags.memory_file.as_deref(),
    )?;
    let options = SnapshotOptions {
        huge_pages: flags.huge_pages,
        is_whole: flags.memory_is_whole,
    };
    let machine = SnapshotMachine::open(&files, options)?;
    tracing::info!(
        state = %files.state.display(),
        memory = %files.memory.display(),
        "a snapshot of Firecracker's"
    );
    Ok(Arc::new(machine))
}

/// A first signal lets nobody else in and waits for those who need memory from here; a second one ends that.
async fn until_signalled(
    fleet: &FleetHandle,
    mut signals: mpsc::UnboundedReceiver<Signal>,
) -> anyhow::Result<Exit> {
    // The sender lives as long as this runs.
    let _ = signals.recv().await;
    fleet.close();
    let mut warned = false;
    let mut ticks = tokio::time::interval(PROGRESS_EVERY);
    loop {
        let open = open_sessions(fleet);
        if open == 0 {
            return Ok(Exit::Done);
        }
        if !warned {
            warned = true;
            tracing::warn!(
                destinations = open,
                "nobody else is let in; this command ends when these destinations have all. A second signal ends it \
                 now, and leaves their VMs without the rest"
            );
        }
        tokio::select! {
            _ = ticks.tick() => {}
            Some(_) = signals.recv() => {
                let text = format!("ended by a signal when {open} destinations still needed memory from here");
                return Err(Problem::new(Exit::BrokenOff, text).into());
            }
        }
    }
}

/// How many destinations are connected and still need something.
fn open_sessions(fleet: &FleetHandle) -> usize {
    fleet
        .sessions()
        .iter()
        .filter(|session| {
            session.is_connected()
                && !matches!(session.status().phase, Phase::Moved | Phase::Ended(_))
        })
        .count()
}
