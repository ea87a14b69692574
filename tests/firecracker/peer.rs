//! A conformance peer: Firecracker's side of a restore as each release since 1.1 does it, in a process of its own.
//!
//! It answers on an API socket, and when it is told to load a snapshot with a page-fault handler it maps memory, opens
//! its userfaultfd, connects, sends its handshake, and touches memory before it answers. Once resumed it looks at every
//! page from several threads, and gives pages back as a balloon does. What it finds it writes to a file.

use std::fs::{self, File};
use std::io::{IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lazyvm_pager::install::{Installer, Registration};
use lazyvm_pager::uffd::Uffd;
use lazyvm_pager::{LazyMemory, LazyRegion};
use lazyvm_wire::{Backing, Layout, PAGE_SIZE, PageIndex, PageRange, Region};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};

use super::source::Source;
use super::sys;

/// What the peer is told, in its environment.
pub const ROLE: &str = "LAZYVM_TEST_FIRECRACKER";

/// How a peer behaves.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Role {
    /// Its home: `api`, `result` and so on are made here.
    pub home: PathBuf,
    /// The release that it says it is.
    pub version: String,
    /// What is wrong with its handshake, if anything.
    pub fault: String,
    /// The memory file, to compare with.
    pub memory: PathBuf,
    /// The state file, to compare with.
    pub state: PathBuf,
    /// Whether it has a balloon, so that its userfaultfd reports removals.
    pub balloon: bool,
}

/// Pages that are given back before anybody has touched them, and after.
fn given_back(backing: Backing) -> [PageRange; 2] {
    match backing {
        Backing::Small => [
            PageRange::new(PageIndex(700), 40),
            PageRange::new(PageIndex(900), 40),
        ],
        Backing::Huge2M => [
            PageRange::new(PageIndex(1024), 1024),
            PageRange::new(PageIndex(2560), 512),
        ],
    }
}

struct Peer {
    role: Role,
    source: Source,
    loaded: Mutex<Option<Arc<Installer>>>,
    /// Kept open from 1.12 on.
    socket: Mutex<Option<UnixStream>>,
}

/// Plays the part of a Firecracker until it is killed.
pub fn play(role: Role) {
    let listener = UnixListener::bind(role.home.join("api")).unwrap();
    let peer = Arc::new(Peer {
        source: Source::new(&role),
        loaded: Mutex::default(),
        socket: Mutex::default(),
        role,
    });
    for connection in listener.incoming() {
        let peer = peer.clone();
        let mut connection = connection.unwrap();
        std::thread::spawn(move || {
            while let Some((line, body)) = request(&mut connection) {
                let (status, body) = peer.answer(&line, &body);
                let body = body.to_string();
                let head = format!(
                    "HTTP/1.1 {status} \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
                );
                let answer = if status == 204 {
                    format!("{head}\r\n")
                } else {
                    format!(
                        "{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                        body.len()
                    )
                };
                if connection.write_all(answer.as_bytes()).is_err() {
                    return;
                }
            }
        });
    }
}

fn request(connection: &mut UnixStream) -> Option<(String, Value)> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        let mut byte = [0];
        if connection.read(&mut byte).ok()? == 0 {
            return None;
        }
        bytes.push(byte[0]);
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("Content-Length: "))
        .map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    connection.read_exact(&mut body).ok()?;
    let line = head.lines().next()?.to_owned();
    Some((line, serde_json::from_slice(&body).unwrap_or(Value::Null)))
}

impl Peer {
    fn answer(self: &Arc<Self>, line: &str, body: &Value) -> (u16, Value) {
        let none = Value::Null;
        if self.role.fault.starts_with("source") {
            return self.source.answer(&self.role, line, body);
        }
        match line.trim_end_matches(" HTTP/1.1") {
            "GET /" => {
                let state = if self.loaded.lock().unwrap().is_some() {
                    "Paused"
                } else {
                    "Not started"
                };
                let version = &self.role.version;
                (
                    200,
                    json!({"id": "peer", "state": state, "vmm_version": version, "app_name": "Firecracker"}),
                )
            }
            "GET /vm/config" => (
                200,
                json!({"drives": [], "network-interfaces": [], "boot-source": {"kernel_image_path": ""}}),
            ),
            "PUT /snapshot/load" if self.role.fault == "refuses" => (
                400,
                json!({"fault_message": "Load snapshot error: Failed to restore from snapshot: invalid magic"}),
            ),
            "PUT /snapshot/load" => {
                self.load(body);
                (204, none)
            }
            "PATCH /vm" if body["state"] == "Resumed" => {
                let peer = self.clone();
                std::thread::spawn(move || peer.run());
                (204, none)
            }
            other => (
                400,
                json!({"fault_message": format!("Invalid request method and/or path: {other}.")}),
            ),
        }
    }

    fn load(&self, body: &Value) {
        let track = if self.minor() < 13 {
            "enable_diff_snapshots"
        } else {
            "track_dirty_pages"
        };
        let known = ["snapshot_path", "mem_backend", "resume_vm", track];
        // As Firecracker, which denies fields that it does not know.
        assert!(
            body.as_object()
                .unwrap()
                .keys()
                .all(|key| known.contains(&key.as_str())),
            "{body}"
        );
        let tracks = body[track] == true;
        write_whole(&self.role.home.join("tracks"), &tracks.to_string());
        assert_eq!(body["mem_backend"]["backend_type"], "Uffd");
        assert_eq!(body["resume_vm"], false);
        let state = fs::read(body["snapshot_path"].as_str().unwrap()).unwrap();
        assert!(
            state == fs::read(&self.role.state).unwrap(),
            "another state"
        );
        let backend = body["mem_backend"]["backend_path"].as_str().unwrap();
        let layout = self.layout();
        let memory = Arc::new(LazyMemory::anonymous(&layout).unwrap());
        let uffd = Uffd::open(&memory, self.role.balloon).unwrap();
        let installer = Installer::new(&layout, memory, uffd, Registration::Register).unwrap();
        let installer = Arc::new(installer);
        *self.loaded.lock().unwrap() = Some(installer.clone());
        let socket = UnixStream::connect(backend).unwrap();
        self.shake_hands(&socket, &installer);
        if self.minor() >= 12 {
            *self.socket.lock().unwrap() = Some(socket);
        } else {
            drop(socket);
        }
        // What a restore reads: queues, the MP table, the end of memory.
        let pages = layout.pages();
        for page in [0, 1, 159, 512, pages / 2, pages - 1] {
            self.compare(&installer, page).unwrap();
        }
        write_whole(&self.role.home.join("loaded"), "");
    }

    fn minor(&self) -> u32 {
        self.role
            .version
            .split('.')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap()
    }

    fn backing(&self) -> Backing {
        if self.role.fault == "huge" {
            Backing::Huge2M
        } else {
            Backing::Small
        }
    }

    /// Two regions, as around the hole below 4 GiB.
    fn layout(&self) -> Layout {
        let pages = fs::metadata(&self.role.memory).unwrap().len() / PAGE_SIZE as u64;
        let region = |name: &str, pages| Region {
            name: name.to_owned(),
            gpa: None,
            pages,
            backing: self.backing(),
        };
        let low = pages / 4 * 3;
        Layout::new(vec![region("low", low), region("high", pages - low)]).unwrap()
    }

    fn shake_hands(&self, socket: &UnixStream, installer: &Installer) {
        let mut offset = 0;
        let mut regions = Vec::new();
        for LazyRegion { host, pages, .. } in installer.memory().regions() {
            let size = pages * PAGE_SIZE as u64;
            let mut region = json!({"base_host_virt_addr": host, "size": size, "offset": offset});
            if (7..20).contains(&self.minor()) {
                region["page_size_kib"] = json!(self.backing().bytes());
            }
            if self.minor() >= 12 {
                region["page_size"] = json!(self.backing().bytes());
            }
            if self.minor() >= 20 {
                region["not_known_yet"] = json!({"a": [1, "]"]});
            }
            regions.push(region);
            offset += size;
        }
        let fault = self.role.fault.as_str();
        match fault {
            "overlap" => {
                regions[1]["base_host_virt_addr"] = regions[0]["base_host_virt_addr"].clone()
            }
            "smaller" => drop(regions.pop()),
            "page size" => regions[0]["page_size"] = json!(1234),
            _ => {}
        }
        let mut message = serde_json::to_vec(&regions).unwrap();
        match fault {
            "cut" => message.truncate(20),
            "garbage" => message = b"hello".to_vec(),
            _ => {}
        }
        let uffd = installer.uffd().as_raw_fd();
        let null = File::open("/dev/null").unwrap();
        let descriptors = match fault {
            "no descriptor" => vec![],
            "another descriptor" => vec![null.as_raw_fd()],
            "many descriptors" => vec![uffd; 12],
            "three descriptors" => vec![uffd, null.as_raw_fd(), null.as_raw_fd()],
            _ => vec![uffd],
        };
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let control = if descriptors.is_empty() {
            &[][..]
        } else {
            &rights
        };
        // A long message arrives in pieces: the descriptor comes with the first.
        let (first, rest) = message.split_at(message.len().min(15));
        sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(first)],
            control,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        let mut writer = socket;
        let _ = writer.write_all(rest);
    }

    /// The VM runs: everything is looked at, some of it is given back meanwhile.
    fn run(&self) {
        let installer = self.loaded.lock().unwrap().clone().unwrap();
        let pages = self.layout().pages();
        let errors = Mutex::new(Vec::new());
        let check = |result: Result<(), String>| {
            if let Err(error) = result {
                errors.lock().unwrap().push(error);
            }
        };
        let [before, after] = given_back(self.backing());
        let given_back = |page: u64| {
            self.role.balloon
                && [before, after]
                    .iter()
                    .any(|range| range.contains(PageIndex(page)))
        };
        // Until 1.10, without a word to who fills the memory.
        let give_back = if self.minor() < 11 && self.backing() == Backing::Small {
            |memory: &LazyMemory, range| {
                sys::map_over(memory, range);
                sys::give_back(memory, range);
            }
        } else {
            sys::give_back
        };
        if self.role.balloon {
            give_back(installer.memory(), before);
            for page in after.pages() {
                check(self.compare(&installer, page.0));
            }
            give_back(installer.memory(), after);
        }
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (check, installer) = (&check, &installer);
                scope.spawn(move || {
                    for page in (thread..pages).step_by(4).filter(|&page| !given_back(page)) {
                        if self.role.fault == "slow" {
                            std::thread::sleep(Duration::from_millis(20));
                        }
                        check(self.compare(installer, page));
                    }
                });
            }
        });
        if self.role.balloon {
            for page in [before, after].iter().flat_map(|range| range.pages()) {
                if read(&installer, page.0) != [0; PAGE_SIZE] {
                    check(Err(format!("page {page} was given back, and is not zero")));
                }
            }
        }
        let errors = errors.into_inner().unwrap();
        let text = if errors.is_empty() {
            "ok".to_owned()
        } else {
            errors.join("\n")
        };
        write_whole(&self.role.home.join("result"), &text);
    }

    fn compare(&self, installer: &Installer, page: u64) -> Result<(), String> {
        let mut expected = [0; PAGE_SIZE];
        let file = File::open(&self.role.memory).unwrap();
        file.read_exact_at(&mut expected, page * PAGE_SIZE as u64)
            .unwrap();
        if read(installer, page) == expected {
            Ok(())
        } else {
            Err(format!("page {page} differs"))
        }
    }
}

fn read(installer: &Installer, page: u64) -> [u8; PAGE_SIZE] {
    let mut found = [0; PAGE_SIZE];
    installer
        .memory()
        .read_at(page * PAGE_SIZE as u64, &mut found)
        .unwrap();
    found
}

pub fn write_whole(path: &Path, text: &str) {
    let beside = path.with_extension("new");
    fs::write(&beside, text).unwrap();
    fs::rename(beside, path).unwrap();
}
