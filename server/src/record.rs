//! A session's record on disk: what a `serve` that was killed must know to go on, and what `status` shows.
//!
//! One file, `session.json`, replaced as a whole: written beside, synced, renamed, and the directory synced, so that a
//! crash leaves the old or the new one. It holds the server's private key and the ticket's secret; the directory is
//! for its owner alone.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lazyvm_wire::trust::{Fingerprint, Identity};
use serde::{Deserialize, Serialize};

use crate::handover::Phase;
use crate::session::Session;

const FILE: &str = "session.json";

/// Version of the file's form.
const FORMAT: u32 = 1;

/// Largest file that is read, in bytes.
const FILE_MAX: u64 = 64 * 1024;

/// Where a recorded session is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecordedPhase {
    /// The machine runs at the source.
    Offered,
    /// The machine is the destination's; here it stands paused.
    HandedOver,
    /// The destination has everything.
    Moved,
    /// The move failed; the machine runs at the source.
    Ended,
}

/// What the file says.
#[derive(Clone, Serialize, Deserialize)]
pub struct RecordFile {
    /// Version of the form.
    pub format: u32,
    /// The session's ID.
    pub session: String,
    /// Where it is.
    pub phase: RecordedPhase,
    /// Why it ended, where it did.
    pub ended: Option<String>,
    /// The destination's key, once one was let in.
    pub owner: Option<Fingerprint>,
    /// Pages of the image.
    pub pages_total: u64,
    /// Pages that the destination last said it has.
    pub pages_at_destination: u64,
    /// No vCPU ran anywhere for so long; 0 before.
    pub downtime_us: u64,
    /// Of the process that serves it.
    pub pid: u32,
    certificate: Vec<u8>,
    key: Vec<u8>,
}

/// A record that can't be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file or its directory.
    #[error("can't {doing} {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Not a record of this release's.
    #[error("{0} is no session record that this lazyvm can read")]
    Malformed(PathBuf),
    /// Another session's record is in the way.
    #[error(
        "{path} holds session {session}, which is {phase}; use another directory, or remove it when the \
         machine is safe"
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        session: String,
        /// Where that session is.
        phase: &'static str,
    },
}

/// A directory with one session's record.
#[derive(Clone)]
pub struct SessionRecord {
    dir: PathBuf,
    identity: Arc<Identity>,
}

impl SessionRecord {
    /// Makes the directory where it is missing, for its owner alone.
    ///
    /// # Errors
    /// [`RecordError::InUse`] when a session that is handed over is recorded there: its pages may be needed.
    pub fn create(dir: &Path, identity: Arc<Identity>) -> Result<Self, RecordError> {
        let io = |doing, source| RecordError::Io {
            doing,
            path: dir.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|error| io("make directory", error))?;
        match read_record(dir) {
            Ok(found) if found.phase == RecordedPhase::HandedOver => {
                return Err(RecordError::InUse {
                    path: dir.to_owned(),
                    session: found.session,
                    phase: "handed over",
                });
            }
            Ok(_) => {}
            Err(RecordError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(Self {
            dir: dir.to_owned(),
            identity,
        })
    }

    pub(crate) fn write(
        &self,
        session: &Session,
        phase: &Phase,
        owner: Option<Fingerprint>,
    ) -> Result<(), RecordError> {
        let status = session.status();
        let ended = match phase {
            Phase::Ended(reason) => Some(reason.to_string()),
            _ => None,
        };
        let record = RecordFile {
            format: FORMAT,
            session: session.id.to_string(),
            phase: match phase {
                Phase::Offered | Phase::Pausing => RecordedPhase::Offered,
                Phase::Recording | Phase::HandedOver | Phase::Started | Phase::Releasing => {
                    RecordedPhase::HandedOver
                }
                Phase::Moved => RecordedPhase::Moved,
                Phase::Ended(_) => RecordedPhase::Ended,
            },
            ended,
            owner,
            pages_total: status.pages_total,
            pages_at_destination: status.pages_at_destination,
            downtime_us: status.downtime_us,
            pid: std::process::id(),
            certificate: self.identity.certificate_der().to_vec(),
            key: self.identity.key_der().to_vec(),
        };
        self.replace(&record)
    }

    fn replace(&self, record: &RecordFile) -> Result<(), RecordError> {
        let path = self.dir.join(FILE);
        let beside = self.dir.join("session.json.new");
        let write = || {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&beside)?;
            serde_json::to_writer_pretty(&mut file, record)?;
            file.write_all(b"\n")?;
            file.sync_all()?;
            fs::rename(&beside, &path)?;
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|source: io::Error| RecordError::Io {
            doing: "write",
            path: path.clone(),
            source,
        })
    }
}

/// Reads the record in a session directory.
///
/// # Errors
/// [`RecordError`] when there is none, or it can't be read.
pub fn read_record(dir: &Path) -> Result<RecordFile, RecordError> {
    let path = dir.join(FILE);
    let io = |source| RecordError::Io {
        doing: "read",
        path: path.clone(),
        source,
    };
    let file = File::open(&path).map_err(io)?;
    if file.metadata().map_err(io)?.len() > FILE_MAX {
        return Err(RecordError::Malformed(path));
    }
    let record: RecordFile =
        serde_json::from_reader(file).map_err(|_| RecordError::Malformed(path.clone()))?;
    if record.format != FORMAT {
        return Err(RecordError::Malformed(path));
    }
    Ok(record)
}
