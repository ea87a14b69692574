//! QEMU's own post-copy over the same path, started at once: the commands are those of QEMU's `qapi/migration.json`.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use lazyvm_vmm_glue::qemu::Qmp;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::{Value, json};

use super::emulator::DESTINATION;
use super::guest::Images;
use super::process::{pause, wait_for};
use super::trial::{End, Record, Told, Trial, command};
use super::{Setup, WanError};

/// Nobody else is in the namespace.
const PORT: u16 = 4444;

/// How often the source is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// How long a QEMU may take until it listens.
const START_WITHIN: Duration = Duration::from_secs(20);

/// More than any path: QEMU limits itself to 128 MiB a second otherwise.
const UNLIMITED_BYTES_S: u64 = 1 << 40;

/// How QEMU moves its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// With the capability `postcopy-ram`.
    Postcopy,
    /// And with `postcopy-preempt`: pages that are waited for have a channel of their own.
    PostcopyPreempt,
}

impl Variant {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Postcopy, Self::PostcopyPreempt];

    /// As QEMU names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postcopy => "postcopy",
            Self::PostcopyPreempt => "postcopy-preempt",
        }
    }

    fn capabilities(self) -> Value {
        let on = |name: &str| json!({ "capability": name, "state": true });
        let mut on_list = vec![on("postcopy-ram")];
        if self == Self::PostcopyPreempt {
            on_list.push(on("postcopy-preempt"));
        }
        json!({ "capabilities": on_list })
    }
}

/// Moves a guest. Gives QEMU's version as well.
///
/// # Errors
/// [`WanError`].
pub fn run(setup: &Setup, images: &Images, variant: Variant) -> Result<(Record, String), WanError> {
    let trial = Trial::new(setup, Some(images))?;
    let _guest = trial.start_guest()?;
    let mut words = trial.qemu_words(End::Destination);
    words.extend(["-incoming", "defer"].map(str::to_owned));
    let mut incoming = trial.start(End::Destination, "incoming", command(&words))?;
    let socket = trial.socket(End::Destination);
    incoming.wait_for("the destination's monitor", START_WITHIN, || {
        Ok(UnixStream::connect(&socket).is_ok().then_some(()))
    })?;
    let mut destination = Qmp::connect(&socket)?;
    let mut source = Qmp::connect(&trial.socket(End::Source))?;
    for qemu in [&mut destination, &mut source] {
        qemu.run("migrate-set-capabilities", variant.capabilities())?;
    }
    let uri = format!("tcp:{DESTINATION}:{PORT}");
    destination.run("migrate-incoming", json!({ "uri": uri }))?;
    let unlimited = json!({ "max-bandwidth": UNLIMITED_BYTES_S });
    source.run("migrate-set-parameters", unlimited)?;
    let order = trial.order()?;
    source.run("migrate", json!({ "uri": uri }))?;
    source.run("migrate-start-postcopy", json!({}))?;
    let told = follow(&mut source, setup.within)?;
    let record = trial.watch(&order, &told, variant.name())?;
    Ok((record, source.version().to_owned()))
}

/// Waits for the end of the migration.
fn follow(source: &mut Qmp, within: Duration) -> Result<Told, WanError> {
    let mut faults_over_time = Vec::new();
    let mut faults = 0;
    let answer = wait_for("the end of QEMU's migration", within, || {
        let answer = source.run("query-migrate", json!({}))?;
        let now = Instant::now();
        if let Some(count) = answer["ram"]["postcopy-requests"].as_u64() {
            faults = count;
            faults_over_time.push((now, count));
        }
        match answer["status"].as_str().unwrap_or_default() {
            "completed" => Ok(Some(answer)),
            status @ ("failed" | "cancelled" | "postcopy-paused") => Err(WanError::PeerFailed {
                status: status.to_owned(),
                text: answer["error-desc"].as_str().unwrap_or_default().to_owned(),
            }),
            _ => pause(LOOK_EVERY).map(|()| None),
        }
    })?;
    Ok(Told {
        complete_at: Instant::now(),
        downtime_us: answer["downtime"].as_u64().unwrap_or(0) * 1000,
        faults,
        fault_us: None,
        faults_over_time,
    })
}

/// Kills whoever listens at a socket of this run's own folder.
pub fn kill_listener(socket: &Path) {
    let Ok(stream) = UnixStream::connect(socket) else {
        return;
    };
    // Its pid is that of listen(2)'s caller.
    if let Ok(peer) = getsockopt(&stream, PeerCredentials)
        && peer.pid() > 0
        && peer.pid() as u32 != std::process::id()
    {
        let _ = kill(Pid::from_raw(peer.pid()), Signal::SIGKILL);
    }
}
