//! `lazyvm snapshot`.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use lazyvm_server::port::SourceMachine;
use lazyvm_server::snapshot::{self, Progress, TakeError};
use lazyvm_vmm_glue::firecracker::api::Api;
use lazyvm_vmm_glue::firecracker::source::FirecrackerMachine;
use lazyvm_vmm_glue::kvm::RemoteMachine;
use lazyvm_vmm_glue::qemu;

use crate::exit::{Exit, Problem};
use crate::signals::Signals;

/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Flags of `snapshot`.
#[derive(Args)]
pub struct SnapshotArgs {
    #[command(flatten)]
    source: SnapshotSource,
    /// Write only what changed since the snapshot in this directory, which is then needed as well
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
    /// Where the files go: a new or empty directory, or one whose snapshot is to be replaced
    dir: PathBuf,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct SnapshotSource {
    /// The control socket of a `lazyvm run` or `lazyvm resume`
    #[arg(long, value_name = "SOCK")]
    vm: Option<PathBuf>,
    /// The QMP socket of a QEMU
    #[arg(long, value_name = "QMP_SOCK")]
    qemu: Option<PathBuf>,
    /// The API socket of a Firecracker
    #[arg(long, value_name = "API_SOCK")]
    firecracker: Option<PathBuf>,
}

impl SnapshotSource {
    fn machine(&self) -> anyhow::Result<Box<dyn SourceMachine>> {
        if let Some(api) = &self.firecracker {
            let machine = FirecrackerMachine::connect(Api::at(api), None)
                .with_context(|| format!("can't use the Firecracker at {}", api.display()))?;
            return Ok(Box::new(machine));
        }
        if let Some(qmp) = &self.qemu {
            let machine = qemu::Source::connect(qmp)
                .with_context(|| format!("can't use the QEMU at {}", qmp.display()))?;
            return Ok(Box::new(machine));
        }
        let vm = self
            .vm
            .as_ref()
            .ok_or_else(|| Problem::new(Exit::Usage, "name the VM with --vm SOCK"))?;
        let machine = RemoteMachine::connect(vm)
            .with_context(|| format!("can't use the VM at {}", vm.display()))?;
        Ok(Box::new(machine))
    }
}

/// Writes the VM to files. It goes on, whatever comes of it.
pub fn snapshot(args: &SnapshotArgs) -> anyhow::Result<Exit> {
    let signals = Signals::hold().context("can't handle signals")?;
    let machine = args.source.machine()?;
    let ended = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&ended);
    signals
        .tell(move |_| seen.store(true, Ordering::Relaxed))
        .context("can't handle signals")?;
    let mut told = Instant::now();
    let mut go_on = |progress: Progress| {
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            tracing::info!(
                round = progress.round,
                pages = progress.pages,
                pages_total = progress.pages_total,
                "writing"
            );
        }
        !ended.load(Ordering::Relaxed)
    };
    let taken = snapshot::take(
        machine.as_ref(),
        &args.dir,
        args.base.as_deref(),
        &mut go_on,
    );
    let taken = match taken {
        Err(error @ TakeError::Cancelled) => {
            return Err(Problem::new(Exit::Failed, error.to_string()).into());
        }
        taken => taken?,
    };
    tracing::info!(
        snapshot = %taken.id,
        pause_us = taken.pause.as_micros() as u64,
        pages_paused = taken.pages_paused,
        tracked = taken.tracked,
        rounds = taken.rounds,
        file_bytes = taken.manifest.memory_bytes,
        has_base = taken.manifest.base.is_some(),
        "the snapshot is complete, and the VM runs on"
    );
    Ok(Exit::Done)
}
