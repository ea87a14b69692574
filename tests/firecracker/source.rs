//! The peer as a Firecracker that runs a VM and is to give it away.
//!
//! Its memory is mapped and noted on its heap as Firecracker notes it. One lock stands for Firecracker's one thread for
//! API and devices: a network device writes into the memory whenever the lock is free, whether the VM is paused or not,
//! as packets that come in do.

use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lazyvm_pager::LazyMemory;
use lazyvm_wire::{Layout, PAGE_SIZE};
use serde_json::{Value, json};

use super::peer::{Role, write_whole};

/// The page that the guest changes after the first snapshot.
const CHANGED: u64 = 100;

/// The page that packets are written to.
pub const PACKETS: u64 = 200;

/// What is at the pause, in the peer's home.
pub const AT_THE_PAUSE: &str = "at-the-pause";

pub struct Source {
    runs: AtomicBool,
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
        let memory = LazyMemory::anonymous(&Layout::flat(pages).unwrap()).unwrap();
        let source = Self {
            runs: AtomicBool::new(true),
            has_base: AtomicBool::new(false),
            _region: black_box(Box::new([memory.regions()[0].host, bytes])),
            memory: Arc::new(memory),
            thread: Arc::default(),
        };
        if is_source {
            source.fill(&role.memory);
            source.receive_packets();
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

    fn receive_packets(&self) {
        let (memory, thread) = (self.memory.clone(), self.thread.clone());
        std::thread::spawn(move || {
            for packet in 1_u64.. {
                {
                    let _alone = thread.lock().unwrap();
                    let at = PACKETS * PAGE_SIZE as u64;
                    memory.write_at(at, &packet.to_le_bytes()).unwrap();
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        });
    }

    pub fn answer(&self, role: &Role, line: &str, body: &Value) -> (u16, Value) {
        let tracks = role.fault == "source tracks";
        match line.trim_end_matches(" HTTP/1.1") {
            "GET /" => {
                let runs = self.runs.load(Ordering::SeqCst);
                let state = if runs { "Running" } else { "Paused" };
                (200, json!({"state": state, "vmm_version": role.version}))
            }
            "GET /machine-config" => {
                let mib = self.memory.bytes() >> 20;
                (
                    200,
                    json!({"vcpu_count": 1, "mem_size_mib": mib, "track_dirty_pages": tracks, "huge_pages": "None"}),
                )
            }
            "PATCH /vm" => {
                self.runs
                    .store(body["state"] == "Resumed", Ordering::SeqCst);
                (204, Value::Null)
            }
            "PUT /snapshot/create" if !self.runs.load(Ordering::SeqCst) => self.create(role, body),
            _ => (
                400,
                json!({"fault_message": "The requested operation is not supported."}),
            ),
        }
    }

    /// The state first, then the memory: in that order, and on one thread, as Firecracker does.
    fn create(&self, role: &Role, body: &Value) -> (u16, Value) {
        let _alone = self.thread.lock().unwrap();
        let memory = self.content();
        fs::copy(&role.state, body["snapshot_path"].as_str().unwrap()).unwrap();
        fs::write(role.home.join(AT_THE_PAUSE), &memory).unwrap();
        let path = body["mem_file_path"].as_str().unwrap();
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
            for page in [CHANGED, PACKETS] {
                let bytes = &memory[of(page)];
                file.write_all_at(bytes, page * PAGE_SIZE as u64).unwrap();
            }
            return;
        }
        let mut memory = memory.to_vec();
        if role.fault == "source tracks" {
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
