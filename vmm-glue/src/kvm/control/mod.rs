//! The control socket: how a machine is asked and told from other processes.
//!
//! A Unix stream socket with mode 0600. A client sends one request a line and reads one reply a line, both JSON:
//!
//! ```text
//! {"v":1,"command":"status"}                     {"v":1,"reply":"status","body":{"state":"running",…}}
//! {"v":1,"command":"pause"}                      {"v":1,"reply":"done"}
//! {"v":1,"command":"resume","force":false}       {"v":1,"reply":"done"}
//! {"v":1,"command":"quit"}                       {"v":1,"reply":"done"}
//! {"v":1,"command":"release"}                    {"v":1,"reply":"done"}
//! {"v":1,"command":"memory"}                     {"v":1,"reply":"memory","body":{"layout":…,"offer":…}}
//! {"v":1,"command":"state"}                      {"v":1,"reply":"state","body":{"bytes":12345}}  and those bytes
//! {"v":1,"command":"track"}                      {"v":1,"reply":"tracking","body":{"session":1}}
//! {"v":1,"command":"written","session":1}        {"v":1,"reply":"written","body":{"bytes":512}}  and those bytes
//! {"v":1,"command":"untrack","session":1}        {"v":1,"reply":"done"}
//! {"v":1,"command":"registers"}                  {"v":1,"reply":"registers","body":{"vcpus":[{"rip":…}]}}
//! {"v":1,"command":"watch"}                      {"v":1,"reply":"done"}
//! {"v":1,"command":"touched"}                    {"v":1,"reply":"touched","body":{"bytes":512}}  and those bytes
//! anything else                                  {"v":1,"reply":"error","body":{"message":"…"}}
//! ```
//!
//! With the reply to `memory` comes a descriptor of the guest memory's file, for reading only (`SCM_RIGHTS`).
//! `state` pauses the machine. Several clients may be connected; a client that goes away changes nothing, above all
//! it does not resume a machine that it paused. `release` ends a paused machine whose place another has taken.
//!
//! `track` begins to note which pages the guest writes, and ends what an earlier `track` began. `written` takes those
//! that were written since, as a bitmap of the image: page `n` is bit `n % 8` of byte `n / 8`. Taken is taken: a client
//! that did not get the whole reply must begin again. A machine from before these three refuses them as unknown.
//!
//! `registers` tells where the processors are, whether they run or not. `watch` drops the entries of the machine's page
//! tables in the host, and `touched` tells which are back, in the same form as `written`. Both are hints: of pages that are
//! read, neighbours show too, and another `watch` begins anew for everybody. Machines from before these three refuse them.
//!
//! Any change to the messages that an old peer would misread is a new [`CONTROL_VERSION`].

mod client;
mod offer_text;
pub(super) mod server;

use lazyvm_wire::{Layout, MachineOffer};
use serde::{Deserialize, Serialize};

use crate::x86;

pub use client::{ControlClient, ControlError};
pub use server::BindError;

/// The protocol's version.
pub const CONTROL_VERSION: u32 = 1;

/// Longest request, in bytes, with its newline.
pub const REQUEST_MAX: usize = 4 * 1024;

/// Longest reply's line, in bytes, with its newline: a layout and an offer at their largest, as JSON.
pub const REPLY_MAX: usize = 2 * 1024 * 1024;

/// What the machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunState {
    /// It is being moved here and has not started yet.
    Incoming,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It is no more.
    Stopped,
}

/// The reply to `status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Tells this machine, in its process, from any other.
    pub id: String,
    /// The monitor's name (see [`super::KIND`]).
    pub kind: String,
    /// What it is doing.
    pub state: RunState,
    /// What runs in it.
    pub payload: String,
    /// vCPUs.
    pub cpus: u32,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Whether all of that is here. `false` after a move until the last page has arrived.
    pub memory_complete: bool,
    /// Whether its state was given away for a move, and it has not been resumed since.
    pub handed_out: bool,
    /// The process that it runs in.
    pub pid: u32,
    /// Bytes that it wrote to its serial console here.
    pub serial_bytes: u64,
    /// Complete lines of those; with the touch payload, its ticks.
    pub serial_lines: u64,
    /// The last complete one.
    pub serial_last_line: String,
}

/// The reply to `memory`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryInfo {
    /// As in [`Status`].
    pub id: String,
    /// How the file's bytes lie in guest-physical memory: byte `n` of the image is byte `n` of the file.
    pub layout: Layout,
    /// What a destination checks before the pause.
    #[serde(with = "offer_text")]
    pub offer: MachineOffer,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Request {
    v: u32,
    #[serde(flatten)]
    command: Command,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
enum Command {
    Status,
    Pause,
    Resume {
        #[serde(default)]
        force: bool,
    },
    Quit,
    Release,
    Memory,
    State,
    Track,
    Written {
        session: u64,
    },
    Untrack {
        session: u64,
    },
    Registers,
    Watch,
    Touched,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Reply {
    v: u32,
    #[serde(flatten)]
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "body", rename_all = "lowercase")]
enum Outcome {
    Done,
    Status(Box<Status>),
    Memory(Box<MemoryInfo>),
    State { bytes: u64 },
    Tracking { session: u64 },
    Written { bytes: u64 },
    Registers { vcpus: Vec<x86::Vcpu> },
    Touched { bytes: u64 },
    Error { message: String },
}

/// A line without its end, as JSON of this version, or what is wrong with it in words.
fn parse<T: for<'de> Deserialize<'de>>(line: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Versioned {
        v: u32,
    }
    let version: Versioned = serde_json::from_slice(line)
        .map_err(|error| format!("not JSON with a version \"v\": {error}"))?;
    if version.v != CONTROL_VERSION {
        return Err(format!(
            "control protocol version {}, where version {CONTROL_VERSION} is spoken",
            version.v
        ));
    }
    serde_json::from_slice(line).map_err(|error| error.to_string())
}

fn line_of<T: Serialize>(message: &T) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// A request's line as a client writes it, of one as a machine reads it. By itself only for fuzzing.
///
/// # Errors
/// What is wrong with the line, in words.
pub fn rewrite_request(line: &[u8]) -> Result<Vec<u8>, String> {
    line_of(&parse::<Request>(line)?).map_err(|error| error.to_string())
}

/// A reply's line as a machine writes it, of one as a client reads it. By itself only for fuzzing.
///
/// # Errors
/// What is wrong with the line, in words.
pub fn rewrite_reply(line: &[u8]) -> Result<Vec<u8>, String> {
    line_of(&parse::<Reply>(line)?).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_read_as_documented() {
        for (line, command) in [
            (r#"{"v":1,"command":"status"}"#, Command::Status),
            (r#"{"v":1,"command":"pause"}"#, Command::Pause),
            (
                r#"{"v":1,"command":"resume"}"#,
                Command::Resume { force: false },
            ),
            (
                r#"{"v":1,"command":"resume","force":true}"#,
                Command::Resume { force: true },
            ),
            (r#"{"v":1,"command":"quit"}"#, Command::Quit),
            (r#"{"v":1,"command":"release"}"#, Command::Release),
            (r#"{"v":1,"command":"memory"}"#, Command::Memory),
            (r#"{"v":1,"command":"state"}"#, Command::State),
            (r#"{"v":1,"command":"track"}"#, Command::Track),
            (
                r#"{"v":1,"command":"written","session":18446744073709551615}"#,
                Command::Written { session: u64::MAX },
            ),
            (
                r#"{"v":1,"command":"untrack","session":7}"#,
                Command::Untrack { session: 7 },
            ),
            (r#"{"v":1,"command":"registers"}"#, Command::Registers),
            (r#"{"v":1,"command":"watch"}"#, Command::Watch),
            (r#"{"v":1,"command":"touched"}"#, Command::Touched),
        ] {
            let request: Request = parse(line.as_bytes()).unwrap();
            assert_eq!(request, Request { v: 1, command });
            let again: Request = parse(line_of(&request).unwrap().trim_ascii_end()).unwrap();
            assert_eq!(again, request);
        }
    }

    #[test]
    fn replies_read_as_documented() {
        let reply = Reply {
            v: 1,
            outcome: Outcome::State { bytes: 12345 },
        };
        let line = line_of(&reply).unwrap();
        assert_eq!(
            line,
            b"{\"v\":1,\"reply\":\"state\",\"body\":{\"bytes\":12345}}\n"
        );
        let done = Reply {
            v: 1,
            outcome: Outcome::Done,
        };
        assert_eq!(line_of(&done).unwrap(), b"{\"v\":1,\"reply\":\"done\"}\n");
        let tracking = Reply {
            v: 1,
            outcome: Outcome::Tracking { session: 7 },
        };
        assert_eq!(
            line_of(&tracking).unwrap(),
            b"{\"v\":1,\"reply\":\"tracking\",\"body\":{\"session\":7}}\n"
        );
        let written = Reply {
            v: 1,
            outcome: Outcome::Written { bytes: 512 },
        };
        assert_eq!(
            line_of(&written).unwrap(),
            b"{\"v\":1,\"reply\":\"written\",\"body\":{\"bytes\":512}}\n"
        );
        let registers = Reply {
            v: 1,
            outcome: Outcome::Registers {
                vcpus: vec![x86::Vcpu {
                    rip: u64::MAX,
                    kernel_gs_base: Some(5),
                    ..x86::Vcpu::default()
                }],
            },
        };
        let line = String::from_utf8(line_of(&registers).unwrap()).unwrap();
        assert!(line.starts_with(
            r#"{"v":1,"reply":"registers","body":{"vcpus":[{"rip":18446744073709551615,"rsp":0,"privilege":0,"#
        ));
        let touched = Reply {
            v: 1,
            outcome: Outcome::Touched { bytes: 512 },
        };
        assert_eq!(
            line_of(&touched).unwrap(),
            b"{\"v\":1,\"reply\":\"touched\",\"body\":{\"bytes\":512}}\n"
        );
        for reply in [reply, done, tracking, written, registers, touched] {
            assert_eq!(
                parse::<Reply>(line_of(&reply).unwrap().trim_ascii_end()).unwrap(),
                reply
            );
        }
    }

    #[test]
    fn the_largest_reply_fits() {
        use lazyvm_wire::{Backing, COMPATIBILITY_MAX, Gpa, REGION_NAME_MAX, REGIONS_MAX, Region};
        let regions = (0..REGIONS_MAX as u64)
            .map(|n| Region {
                name: "n".repeat(REGION_NAME_MAX),
                gpa: Some(Gpa(n << 40)),
                pages: 1 << 20,
                backing: Backing::Huge2M,
            })
            .collect();
        let info = MemoryInfo {
            id: "0".repeat(36),
            layout: Layout::new(regions).unwrap(),
            offer: MachineOffer {
                kind: "kvm".to_owned(),
                state_version: u32::MAX,
                compatibility: vec![255; COMPATIBILITY_MAX],
            },
        };
        let reply = Reply {
            v: 1,
            outcome: Outcome::Memory(Box::new(info)),
        };
        assert!(line_of(&reply).unwrap().len() <= REPLY_MAX);
    }

    #[test]
    fn other_versions_and_other_things_are_refused_in_words() {
        let refusal = |line: &str| parse::<Request>(line.as_bytes()).unwrap_err();
        assert!(refusal(r#"{"v":2,"command":"status"}"#).contains("version 2"));
        assert!(refusal(r#"{"command":"status"}"#).contains("missing field `v`"));
        assert!(refusal(r#"{"v":1,"command":"format"}"#).contains("unknown variant"));
        assert!(refusal("GET / HTTP/1.1").contains("not JSON"));
        assert!(refusal("").contains("not JSON"));
    }
}
