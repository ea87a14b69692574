//! `lazyvm snapshot`.

use std::path::PathBuf;

use clap::Args;

use crate::exit::{Exit, Problem};

/// Flags of `snapshot`.
#[derive(Args)]
pub struct SnapshotArgs {
    #[command(flatten)]
    source: SnapshotSource,
    /// Where the files go
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

/// Says that it is not in this release.
pub fn snapshot(_: &SnapshotArgs) -> anyhow::Result<Exit> {
    Err(Problem::not_in_this_release("lazyvm snapshot").into())
}
