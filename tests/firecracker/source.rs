//! The peer as a Firecracker that runs a VM and is to give it away.
//!
//! Its memory is mapped and noted on its heap as Firecracker notes it. One lock stands for Firecracker's one thread for
//! API and devices: a network device writes into the memory whenever the lock is free, whether the VM is paused or not,
//! as packets that come in do, by a system call. A busy guest writes too, and gives memory back, for as long as it is not
//! paused.

use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lazyvm_pager::{InstallMode, LazyMemory};
use lazyvm_wire::{Backing, Layout, PAGE_SIZE, PageIndex, PageRange, Region};
use nix::fcntl::OFlag;
use serde_json::{Value, json};

use super::peer::{Role, write_whole};
use super::sys;

/// The page that the guest changes after the first snapshot.
const CHANGED: u64 = 100;

/// The page that packets are written to.
pub const PACKETS: u64 = 200;

/// The page that a device writes to while its state is saved.
const SAVED: u64 = 201;

/// What a busy guest writes to, and what it gives back.
const BUSY: PageRange = PageRange::new(PageIndex(1000), 96);
const GIVEN_BACK: PageRange = PageRange::new(PageIndex(2000), 64);

/// The same of huge pages.
const GIVEN_BACK_HUGE: PageRange = PageRange::new(PageIndex(2048), 512);

/// What is at the pause, in the peer's home.
pub const AT_THE_PAUSE: &str = "at-the-pause";

pub struct Source {
    /// Held by the guest while it writes.
    runs: Arc<Mutex<bool>>,
    /// Kept open, whatever it is for.
    _disk: Option<File>,
    config: Value,
    /// A full snapshot was made.
    has_base: AtomicBool,
    /// Address and length of its memory, side by side.
    _region: Box<[u64; 2]>,
    memory: Arc<LazyMemory>,
    thread: Arc<Mutex<()>>,
}

impl Source {
    pub fn new(role: &Role) -> Self {
        let is_source = role.fault.starts_with("source");
        // The memory of another one is there only when the source has been paused.
        let bytes = if is_source {
            fs::metadata(&role.memory).unwrap().len()
        } else {
            PAGE_SIZE as u64
        };
        let pages = bytes / PAGE_SIZE as u64;
        let is_huge = is_source && role.fault.contains("huge");
        let backing = if is_huge {
            Backing::Huge2M
        } else {
            Backing::Small
        };
        let region = Region {
            name: "memory".to_owned(),
            gpa: None,
            pages,
            backing,
        };
        let layout = Layout::new(vec![region]).unwrap();
        let memory = if role.fault.contains("shared") {
            LazyMemory::shared(&layout, InstallMode::Minor).unwrap()
        } else {
            LazyMemory::anonymous(&layout).unwrap()
        };
        let disk = role.fault.contains("direct").then(|| {
            let path = role.home.join("disk");
            fs::write(&path, [0; PAGE_SIZE]).unwrap();
            let mut options = File::options();
            let options = options.read(true).custom_flags(OFlag::O_DIRECT.bits());
            options.open(path).unwrap()
        });
        let source = Self {
            runs: Arc::new(Mutex::new(!role.fault.contains("paused"))),
            _disk: disk,
            config: config(&role.fault),
            has_base: AtomicBool::new(false),
            _region: black_box(Box::new([memory.regions()[0].host, bytes])),
            memory: Arc::new(memory),
            thread: Arc::default(),
        };
        if is_source {
            source.fill(&role.memory);
            source.receive_packets(&role.home);
        }
        if role.fault.contains("busy") {
            source.run_guest(is_huge);
        }
        source
    }

    fn fill(&self, from: &Path) {
        let content = fs::read(from).unwrap();
        for (page, bytes) in (0..).zip(content.chunks(PAGE_SIZE)) {
            // What the guest never touched is not there.
            if bytes.iter().any(|byte| *byte != 0) {
                self.memory
                    .write_at(page * PAGE_SIZE as u64, bytes)
                    .unwrap();
            }
        }
    }

    fn receive_packets(&self, home: &Path) {
        let (memory, thread) = (self.memory.clone(), self.thread.clone());
        let path = home.join("packets");
        std::thread::spawn(move || {
            for packet in 1_u64.. {
                fs::write(&path, packet.to_le_bytes()).unwrap();
                let packet = File::open(&path).unwrap();
                {
                    let _alone = thread.lock().unwrap();
                    sys::receive(&memory, PageIndex(PACKETS), &packet);
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
    }

    fn run_guest(&self, is_huge: bool) {
        let (memory, runs) = (self.memory.clone(), self.runs.clone());
        std::thread::spawn(move || {
            let mut random = 1_u64;
            loop {
                {
                    let runs = runs.lock().unwrap();
                    for _ in 0..if *runs { 8 } else { 0 } {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1);
                        let pick = |range: PageRange| range.first.0 + (random >> 33) % range.count;
                        let page = match random >> 62 {
                            0 => pick(GIVEN_BACK),
                            _ => pick(BUSY),
                        };
                        let at = page * PAGE_SIZE as u64 + (random >> 20) % 512 * 8;
                        memory.write_at(at, &random.to_le_bytes()).unwrap();
                        if is_huge && random >> 60 == 1 {
                            // Its next owner writes to it at once.
                            sys::give_back(&memory, GIVEN_BACK_HUGE);
                            let at = pick(GIVEN_BACK_HUGE) * PAGE_SIZE as u64;
                            memory.write_at(at, &random.to_le_bytes()).unwrap();
                        }
                        if !is_huge && random >> 60 == 0 {
                            let page = PageRange::one(PageIndex(pick(GIVEN_BACK)));
                            sys::give_back(&memory, page);
                        }
                    }
                }
                std::thread::sleep(Duration::from_micros(100));
            }
        });
    }

    pub fn answer(&self, role: &Role, line: &str, body: &Value) -> (u16, Value) {
        let tracks = role.fault.contains("tracks");
        match line.trim_end_matches(" HTTP/1.1") {
            "GET /" => {
                let runs = *self.runs.lock().unwrap();
                let state = if runs { "Running" } else { "Paused" };
                (200, json!({"state": state, "vmm_version": role.version}))
            }
            "GET /machine-config" => {
                let mib = self.memory.bytes() >> 20;
                let huge = if role.fault.contains("huge") {
                    "2M"
                } else {
                    "None"
                };
                (
                    200,
                    json!({"vcpu_count": 1, "mem_size_mib": mib, "track_dirty_pages": tracks, "huge_pages": huge}),
                )
            }
            "PATCH /vm" => {
                let runs = body["state"] == "Resumed";
                *self.runs.lock().unwrap() = runs;
                write_whole(&role.home.join("told"), if runs { "run" } else { "pause" });
                (204, Value::Null)
            }
            "GET /vm/config" if !self.config.is_null() => (200, self.config.clone()),
            "PUT /snapshot/create" if !*self.runs.lock().unwrap() => self.create(role, body),
            _ => (
                400,
                json!({"fault_message": "The requested operation is not supported."}),
            ),
        }
    }

    /// The state first, then the memory: in that order, and on one thread, as Firecracker does.
    fn create(&self, role: &Role, body: &Value) -> (u16, Value) {
        let _alone = self.thread.lock().unwrap();
        let saved = (SAVED * PAGE_SIZE as u64, 0x5a5e_d000_u64);
        self.memory
            .write_at(saved.0, &saved.1.to_le_bytes())
            .unwrap();
        let memory = self.content();
        fs::copy(&role.state, body["snapshot_path"].as_str().unwrap()).unwrap();
        fs::write(role.home.join(AT_THE_PAUSE), &memory).unwrap();
        let path = body["mem_file_path"].as_str().unwrap();
        if role.fault.contains("hasty") {
            return (204, Value::Null);
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap();
        if let Err(error) = file.set_len(memory.len() as u64) {
            let fault = format!(
                "Create snapshot error: Cannot perform set_length on the memory backing file: {error}"
            );
            return (400, json!({"fault_message": fault}));
        }
        self.write_memory(role, &file, &memory, body["snapshot_type"] == "Diff");
        (204, Value::Null)
    }

    /// Without a record of dirty pages all at once; with one, all but what changes first, and that as a diff.
    fn write_memory(&self, role: &Role, file: &File, memory: &[u8], is_diff: bool) {
        let of = |page: u64| page as usize * PAGE_SIZE..(page as usize + 1) * PAGE_SIZE;
        if is_diff {
            assert!(self.has_base.load(Ordering::SeqCst), "a diff of nothing");
            for page in [CHANGED, PACKETS, SAVED] {
                let bytes = &memory[of(page)];
                file.write_all_at(bytes, page * PAGE_SIZE as u64).unwrap();
            }
            return;
        }
        let mut memory = memory.to_vec();
        if role.fault.contains("tracks") {
            memory[of(CHANGED)].fill(0xee);
        }
        self.has_base.store(true, Ordering::SeqCst);
        file.write_all_at(&memory, 0).unwrap();
        write_whole(&role.home.join("wrote-all"), "");
    }

    fn content(&self) -> Vec<u8> {
        let mut content = vec![0; self.memory.bytes() as usize];
        self.memory.read_at(0, &mut content).unwrap();
        content
    }
}

/// What it tells of its devices; nothing at all where there is nothing to tell, as releases do that know no such request.
fn config(fault: &str) -> Value {
    if fault.contains("vhost-user") {
        json!({"drives": [{"drive_id": "a", "path_on_host": null, "socket": "/run/a.sock"}]})
    } else if fault.contains("hotplug") {
        json!({"drives": [], "memory-hotplug": {"total_size_mib": 1024}})
    } else {
        Value::Null
    }
}
