//! `lazyvm bench wan`: how long a guest freezes in a move over a long path, by its own signs of life.
//!
//! The rig is two network namespaces with an emulated wide-area path between them (`emulator`, `queue`). A guest works
//! at one end and writes a tick for each so much progress; the ticks are stamped when they are read (`console`). lazyvm
//! moves it as a user would (`lazyvm`); QEMU's own migration in the same mode moves another one of the same kind over the
//! same path (`peer`). With `Setup::snapshot` it is resumed from a snapshot instead (`snapshot`). Figures come from the
//! ticks alone (`figures`), so they mean the same for both.

mod chart;
mod clones;
pub mod console;
pub mod emulator;
mod error;
pub mod figures;
pub mod flows;
pub mod guest;
mod lazyvm;
mod namespace;
mod packet;
mod page;
mod peer;
mod process;
pub mod queue;
mod report;
mod snapshot;
pub(crate) mod sys;
mod timeline;
pub mod traffic;
mod trial;

use lazyvm_server::Mode;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use error::WanError;
pub use report::Outcome;
pub use trial::command;

use guest::{Guest, Images, Workload};
use peer::{Fate, Variant};
use queue::PathConfig;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The program that moves.
    pub lazyvm: PathBuf,
    /// The path.
    pub path: PathConfig,
    /// Nothing goes through, this long after the order to move and for this long.
    pub blackout: Option<(Duration, Duration)>,
    /// What is moved.
    pub guest: Guest,
    /// Its memory.
    pub memory_bytes: u64,
    /// What it does.
    pub workload: Workload,
    /// Its kernel; `None` is the one that the build has fetched.
    pub kernel: Option<PathBuf>,
    /// How lazyvm moves it.
    pub mode: Mode,
    /// Whether it is resumed from a snapshot instead of being moved: first without a profile of earlier resumes, then with
    /// what the first one has recorded.
    pub snapshot: bool,
    /// How many clones are then resumed from it at once; of the payload only, and none where it is 1.
    pub clones: u32,
    /// Whether QEMU's own ways of this mode are measured too.
    pub compare_qemu: bool,
    /// How often; medians count.
    pub runs: u32,
    /// The longest that a move may take.
    pub within: Duration,
    /// More flags for `lazyvm serve`.
    pub serve_flags: Vec<String>,
    /// More flags for `lazyvm resume`.
    pub resume_flags: Vec<String>,
}

/// Runs it all. From now on SIGINT and SIGTERM end the run in good order.
///
/// # Errors
/// [`WanError`].
pub fn run(setup: &Setup, mut progress: impl FnMut(&str)) -> Result<Outcome, WanError> {
    refuse(setup)?;
    sys::hear_signals()?;
    let folder = tempfile::tempdir()?;
    let images = match setup.guest {
        Guest::Payload => None,
        Guest::Qemu => Some(Images::make(folder.path(), setup.kernel.as_deref())?),
    };
    let congestion_control = namespace::tcp_congestion_control().map_err(WanError::Network)?;
    let mut outcome = Outcome::new(setup.clone(), congestion_control);
    for number in 1..=setup.runs {
        let mut say = |what: &str| progress(&format!("run {number} of {}: {what}", setup.runs));
        if setup.snapshot {
            say("resumes from a snapshot");
            outcome.add_resumes(snapshot::run(setup, images.as_ref())?);
            continue;
        }
        say("lazyvm");
        outcome.add_own(lazyvm::run(setup, images.as_ref())?);
        let Some(images) = images.as_ref().filter(|_| setup.compare_qemu) else {
            continue;
        };
        for &variant in Variant::of(setup.mode) {
            say(&format!("QEMU's own, {}", variant.name()));
            let (fate, version) = peer::run(setup, images, variant)?;
            if let Fate::Lost(loss) = &fate {
                say(&format!("{}: {}", loss.outcome, loss.why));
            }
            outcome.add_peer(variant, fate, version);
        }
    }
    Ok(outcome)
}

fn refuse(setup: &Setup) -> Result<(), WanError> {
    if setup.compare_qemu && setup.guest == Guest::Payload {
        let text = "QEMU can't move the bundled payload; compare with --guest qemu";
        return Err(WanError::Asked(text.to_owned()));
    }
    if setup.compare_qemu && setup.snapshot {
        let text = "QEMU has no snapshot that is resumed over a path while it is read";
        return Err(WanError::Asked(text.to_owned()));
    }
    if setup.clones > 1 && (!setup.snapshot || setup.guest == Guest::Qemu) {
        let text =
            "clones are resumed from a snapshot of the bundled payload: --snapshot --guest payload";
        return Err(WanError::Asked(text.to_owned()));
    }
    if setup.runs == 0 {
        return Err(WanError::Asked("at least one run".to_owned()));
    }
    match setup.workload.refusal(setup.memory_bytes) {
        Some(text) => Err(WanError::Asked(text)),
        None => Ok(()),
    }
}

/// A lock that a panic elsewhere does not take away: what is behind it is counts and lists.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
