//! Firecracker's API: HTTP/1.1 with JSON over a Unix socket. A connection for each request, bounded in length and time.
//!
//! Paths and bodies are those of Firecracker's `src/firecracker/swagger/firecracker.yaml`.

mod http;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use self::http::{Answer, AnswerError, read_answer, request_text};
use super::process::PeerProcess;

/// Time for an answer that takes no work.
const QUICK: Duration = Duration::from_secs(10);

/// Time for the making or loading of a snapshot, which goes with the memory's size and the disk's speed.
const LONG: Duration = Duration::from_secs(3600);

/// A request that was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Nobody listens.
    #[error("no Firecracker answers at {}; is it running with --api-sock and that path?", path.display())]
    NotThere {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The conversation broke.
    #[error("Firecracker at {} broke off when asked to {what}", path.display())]
    Lost {
        /// Where.
        path: PathBuf,
        /// What was asked.
        what: &'static str,
        /// How.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("what answers at {} is no Firecracker: {reason}", path.display())]
    NotHttp {
        /// Where.
        path: PathBuf,
        /// What was wrong.
        reason: String,
    },
    /// It said no, in its own words.
    #[error("Firecracker refuses to {what}: {fault}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The `fault_message`.
        fault: String,
    },
}

/// What `GET /` says.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct InstanceInfo {
    /// `Not started`, `Running` or `Paused`.
    pub state: String,
    /// The release, as `1.17.0`.
    pub vmm_version: String,
}

/// What `GET /machine-config` says, as far as it matters here.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MachineConfig {
    /// Memory.
    pub mem_size_mib: u64,
    /// vCPUs.
    pub vcpu_count: u32,
    /// Whether the VM keeps a record of the pages that it writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// `None`, `2M`, or what later releases know; from 1.7 on.
    #[serde(default)]
    pub huge_pages: Option<String>,
}

/// What a snapshot holds of the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotKind {
    /// All.
    Full,
    /// What changed since the last one; without a record of that, what is there at all.
    Diff,
}

/// What a state is loaded with. The paths are as Firecracker sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadSnapshot {
    /// The state file.
    pub state: PathBuf,
    /// The page-fault socket.
    pub page_faults: PathBuf,
    /// The machine keeps a record of the pages that it writes, so that diff snapshots can be made of it.
    pub tracks_dirty_pages: bool,
    /// Who is to load it, where that is known.
    pub release: Option<(u32, u32)>,
}

/// The first release that knows `track_dirty_pages` when it loads; before, it was `enable_diff_snapshots`.
const TRACK_DIRTY_PAGES: (u32, u32) = (1, 13);

impl LoadSnapshot {
    fn body(&self) -> Value {
        let mut body = json!({
            "snapshot_path": self.state,
            "mem_backend": {"backend_type": "Uffd", "backend_path": self.page_faults},
            "resume_vm": false,
        });
        // A release refuses a field that it does not know, so it is only there where it says something.
        if self.tracks_dirty_pages {
            let is_old = self
                .release
                .is_some_and(|release| release < TRACK_DIRTY_PAGES);
            let name = if is_old {
                "enable_diff_snapshots"
            } else {
                "track_dirty_pages"
            };
            body[name] = Value::Bool(true);
        }
        body
    }
}

/// A Firecracker's API socket.
#[derive(Clone, Debug)]
pub struct Api {
    path: PathBuf,
}

impl Api {
    /// The API at this socket. Nothing is asked yet.
    pub fn at(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who listens there.
    ///
    /// # Errors
    /// [`ApiError::NotThere`].
    pub fn process(&self) -> Result<PeerProcess, ApiError> {
        PeerProcess::of(&self.connect()?).map_err(|source| self.not_there(source))
    }

    /// How it is.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn info(&self) -> Result<InstanceInfo, ApiError> {
        self.ask("tell how it is", "/")
    }

    /// Its machine.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn machine_config(&self) -> Result<MachineConfig, ApiError> {
        self.ask("tell its machine's size", "/machine-config")
    }

    /// Its whole configuration, as it would be given with `--config-file`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn full_config(&self) -> Result<Value, ApiError> {
        self.ask("tell its configuration", "/vm/config")
    }

    /// Its release.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn version(&self) -> Result<String, ApiError> {
        #[derive(Deserialize)]
        struct Version {
            firecracker_version: String,
        }
        let version: Version = self.ask("tell its version", "/version")?;
        Ok(version.firecracker_version)
    }

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn pause(&self) -> Result<(), ApiError> {
        self.tell("pause", "PATCH", "/vm", &json!({"state": "Paused"}), QUICK)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn resume(&self) -> Result<(), ApiError> {
        self.tell(
            "resume",
            "PATCH",
            "/vm",
            &json!({"state": "Resumed"}),
            QUICK,
        )
    }

    /// Writes state and memory of a paused machine. The paths are as Firecracker sees them.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn create_snapshot(
        &self,
        kind: SnapshotKind,
        state: &Path,
        memory: &Path,
    ) -> Result<(), ApiError> {
        let kind = match kind {
            SnapshotKind::Full => "Full",
            SnapshotKind::Diff => "Diff",
        };
        let body = json!({
            "snapshot_type": kind,
            "snapshot_path": state,
            "mem_file_path": memory,
        });
        self.tell("make a snapshot", "PUT", "/snapshot/create", &body, LONG)
    }

    /// Loads a state, with its memory to be asked for at a page-fault socket. The machine stays paused. Paths are as
    /// Firecracker sees them. Firecracker touches memory before it answers.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn load_snapshot(&self, load: &LoadSnapshot) -> Result<(), ApiError> {
        self.tell(
            "load the state",
            "PUT",
            "/snapshot/load",
            &load.body(),
            LONG,
        )
    }

    fn ask<T: for<'a> Deserialize<'a>>(
        &self,
        what: &'static str,
        path: &str,
    ) -> Result<T, ApiError> {
        let body = self.request(what, "GET", path, None, QUICK)?;
        serde_json::from_slice(&body).map_err(|error| ApiError::NotHttp {
            path: self.path.clone(),
            reason: format!("its answer to GET {path} can't be read: {error}"),
        })
    }

    fn tell(
        &self,
        what: &'static str,
        method: &str,
        path: &str,
        body: &Value,
        time: Duration,
    ) -> Result<(), ApiError> {
        self.request(what, method, path, Some(body), time).map(drop)
    }

    fn request(
        &self,
        what: &'static str,
        method: &str,
        path: &str,
        body: Option<&Value>,
        time: Duration,
    ) -> Result<Vec<u8>, ApiError> {
        let mut socket = self.connect()?;
        let lost = |source| ApiError::Lost {
            path: self.path.clone(),
            what,
            source,
        };
        let request = request_text(method, path, body);
        socket.set_write_timeout(Some(QUICK)).map_err(lost)?;
        socket.write_all(request.as_bytes()).map_err(lost)?;
        let answer = read_answer(&mut socket, time).map_err(|error| match error {
            AnswerError::Io(source) => lost(source),
            AnswerError::NotHttp(reason) => ApiError::NotHttp {
                path: self.path.clone(),
                reason,
            },
        })?;
        if (200..300).contains(&answer.status) {
            return Ok(answer.body);
        }
        Err(ApiError::Refused {
            what,
            fault: fault_of(&answer),
        })
    }

    fn connect(&self) -> Result<UnixStream, ApiError> {
        UnixStream::connect(&self.path).map_err(|source| self.not_there(source))
    }

    fn not_there(&self, source: io::Error) -> ApiError {
        ApiError::NotThere {
            path: self.path.clone(),
            source,
        }
    }
}

/// Firecracker's own words for why not, in one printable line.
fn fault_of(answer: &Answer) -> String {
    #[derive(Deserialize)]
    struct Fault {
        fault_message: String,
    }
    let text = serde_json::from_slice::<Fault>(&answer.body).map_or_else(
        |_| format!("HTTP status {}", answer.status),
        |fault| fault.fault_message,
    );
    lazyvm_wire::printable(&lazyvm_wire::control::short_text(&text)).to_string()
}

/// The numbers of a release, as `1.12.0-dev` or `v1.7.0`; `None` where it is no release's name.
pub fn release(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.trim_start_matches('v').split(['.', '-']);
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn load() -> LoadSnapshot {
        LoadSnapshot {
            state: "/a/state".into(),
            page_faults: "/a/faults".into(),
            tracks_dirty_pages: false,
            release: None,
        }
    }

    #[test]
    fn each_release_is_told_of_dirty_pages_in_its_own_words() {
        for (release, name) in [
            (Some((1, 1)), "enable_diff_snapshots"),
            (Some((1, 12)), "enable_diff_snapshots"),
            (Some((1, 13)), "track_dirty_pages"),
            (Some((2, 0)), "track_dirty_pages"),
            (None, "track_dirty_pages"),
        ] {
            let body = LoadSnapshot {
                tracks_dirty_pages: true,
                release,
                ..load()
            }
            .body();
            assert_eq!(body[name], true, "{body}");
            assert_eq!(body.as_object().unwrap().len(), 4, "{body}");
        }
        assert_eq!(load().body().as_object().unwrap().len(), 3);
    }

    /// An API that gives one answer; what it was asked, and what came of it.
    fn once<T: Send>(answer: &[u8], ask: impl FnOnce(&Api) -> T + Send) -> (T, String) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                let (mut socket, _) = listener.accept().unwrap();
                let mut asked = vec![0; 4096];
                let length = socket.read(&mut asked).unwrap();
                for piece in answer.chunks(7) {
                    let _ = socket.write_all(piece);
                }
                String::from_utf8(asked[..length].to_vec()).unwrap()
            });
            (ask(&Api::at(&path)), asked.join().unwrap())
        })
    }

    #[test]
    fn an_answer_is_read_and_a_request_is_as_firecracker_wants_it() {
        let body = r#"{"id":"anonymous","state":"Not started","vmm_version":"1.17.0","app_name":"Firecracker"}"#;
        let answer = format!(
            "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let (info, asked) = once(answer.as_bytes(), Api::info);
        assert_eq!(info.unwrap().state, "Not started");
        assert!(asked.starts_with("GET / HTTP/1.1\r\n"), "{asked}");
        let (done, asked) = once(b"HTTP/1.1 204 \r\nServer: Firecracker API\r\n\r\n", |api| {
            api.load_snapshot(&load())
        });
        done.unwrap();
        assert!(asked.ends_with(
            r#"{"mem_backend":{"backend_path":"/a/faults","backend_type":"Uffd"},"resume_vm":false,"snapshot_path":"/a/state"}"#
        ), "{asked}");
    }

    #[test]
    fn a_refusal_is_told_in_firecrackers_words() {
        let body = r#"{"fault_message":"The requested operation is not supported\nafter starting the microVM."}"#;
        let answer = format!(
            "HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let (refused, _) = once(answer.as_bytes(), Api::pause);
        let words = refused.unwrap_err().to_string();
        assert!(
            words.starts_with("Firecracker refuses to pause: The requested operation"),
            "{words}"
        );
        assert!(!words.contains('\n'), "{words}");
    }

    #[test]
    fn what_is_no_answer_is_told_apart() {
        for (answer, words) in [
            (&b"lazyvm control 1\n"[..], "is no Firecracker"),
            (b"", "broke off when asked to pause"),
            (
                b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
                "wrong Content-Length",
            ),
            (b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{}", "broke off"),
        ] {
            let (result, _) = once(answer, Api::pause);
            let error = result.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let nobody = Api::at(Path::new("/nobody/here")).info().unwrap_err();
        assert!(matches!(nobody, ApiError::NotThere { .. }));
    }

    #[test]
    fn releases_are_read() {
        assert_eq!(release("1.12.0-dev"), Some((1, 12)));
        assert_eq!(release("v1.7.0"), Some((1, 7)));
        assert_eq!(release("next"), None);
    }
}
