//! One packet that is lost holds back what it carried, and nothing else.
//!
//! What the source sends again can't be there sooner than a round trip and a half after the loss: half of one until a later
//! packet is there, half until the source hears of that, half until it is there itself. Whoever has a page before that
//! did not wait for it. A round trip of a second leaves a slow machine time.

use std::collections::HashMap;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_benches::wan::emulator::{Emulator, Passing, SOURCE};
use lazyvm_benches::wan::queue::PathConfig;
use lazyvm_pager::{Filling, InstallMode, LazyMemory, Options};
use lazyvm_server::{Server, SessionConfig};
use lazyvm_vmm_glue::plain::PlainMachine;
use lazyvm_wire::PAGE_SIZE;
use lazyvm_wire::trust::Identity;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::common::{can_move, is_root};

const RTT: Duration = Duration::from_secs(1);
const PAGES: u64 = 8192;

/// Pages that are touched at the same time.
const FAULTS: u64 = 16;

/// Where they are: far from each other, and where the push comes last.
const FIRST: u64 = PAGES / 2;
const APART: u64 = PAGES / 2 / FAULTS;

/// IP packets of this size carry pages; what is acknowledged or said besides takes less.
const LARGE: u64 = 1000;

/// A move over the path.
struct Rig {
    filling: Filling,
    memory: Arc<LazyMemory>,
    emulator: Emulator,
    _server: Server,
}

/// Contents of a page that tell which it is.
fn contents(page: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    for (word, out) in (1..).zip(bytes.chunks_exact_mut(8)) {
        let number = (page << 16 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        out.copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// A move whose push has so many bits a second, or that has none.
fn rig(push_bit_s: Option<u64>) -> Rig {
    let file = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC).unwrap());
    for page in 0..PAGES {
        let at = page * PAGE_SIZE as u64;
        file.write_all_at(&contents(page), at).unwrap();
    }
    // Nothing but what is chosen is lost.
    let emulator = Emulator::start(PathConfig {
        rtt: RTT,
        queue: 10 * RTT,
        ..PathConfig::default()
    })
    .unwrap();
    let (server, ticket) = emulator
        .source
        .within(|| {
            let identity = Identity::generate().unwrap();
            let address: IpAddr = SOURCE.parse().unwrap();
            let server = Server::bind((address, 0).into(), &identity).unwrap();
            let machine = Arc::new(PlainMachine::new(file).unwrap());
            let config = SessionConfig {
                push: push_bit_s.is_some(),
                max_bandwidth: push_bit_s.map(|bits| bits / 8),
                warm_up: Duration::ZERO,
                ..SessionConfig::new(machine)
            };
            let session = server.add_session(config).unwrap();
            let ticket = server.ticket(&session, vec![server.local_addr().unwrap()]);
            Ok((server, ticket))
        })
        .unwrap();
    let (filling, memory) = emulator
        .destination
        .within(|| {
            let offer = lazyvm_pager::connect(&ticket, Options::default()).unwrap();
            let memory = LazyMemory::shared(offer.layout(), InstallMode::Minor).unwrap();
            let memory = Arc::new(memory);
            Ok((offer.fill(memory.clone()).unwrap(), memory))
        })
        .unwrap();
    Rig {
        filling,
        memory,
        emulator,
        _server: server,
    }
}

/// Touches [`FAULTS`] pages at once, each by a thread of its own; gives when each was there, ascending.
fn touch_all(memory: &LazyMemory) -> Vec<Instant> {
    let mut times: Vec<Instant> = thread::scope(|scope| {
        let touch = |number: u64| {
            let page = FIRST + number * APART;
            move || {
                let mut bytes = [0; PAGE_SIZE];
                memory.read_at(page * PAGE_SIZE as u64, &mut bytes).unwrap();
                assert!(bytes == contents(page), "page {page}");
                Instant::now()
            }
        };
        let threads: Vec<_> = (0..FAULTS).map(|n| scope.spawn(touch(n))).collect();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap());
        joined.collect()
    });
    times.sort_unstable();
    times
}

/// When something was lost.
type LostAt = Arc<Mutex<Option<Instant>>>;

/// The soonest that what was lost can be there.
fn sent_again(lost_at: &LostAt) -> Instant {
    let lost_at = lost_at.lock().unwrap().expect("a packet was chosen");
    lost_at + RTT * 3 / 2
}

#[test]
fn a_lost_packet_of_an_answer_delays_no_other_fault() {
    let test = "a_lost_packet_of_an_answer_delays_no_other_fault";
    if !is_root(test) || !can_move(test) {
        return;
    }
    let rig = rig(None);
    let lost_at = LostAt::default();
    let large_at = Arc::new(Mutex::new(Instant::now()));
    let chooses = Arc::new(AtomicBool::new(false));
    let (lost, seen, on) = (lost_at.clone(), large_at.clone(), chooses.clone());
    rig.emulator.lose(move |packet: Passing| {
        if packet.bytes < LARGE {
            return false;
        }
        *seen.lock().unwrap() = Instant::now();
        let mut lost = lost.lock().unwrap();
        let chosen = on.load(Ordering::Relaxed) && lost.is_none();
        if chosen {
            *lost = Some(Instant::now());
        }
        chosen
    });
    // Probes for the path's largest packet are as large as answers, and come one in a round trip until that is found.
    while large_at.lock().unwrap().elapsed() < 3 * RTT {
        thread::sleep(RTT / 10);
    }
    // The first of the answers' packets: it carries one of them alone, and all others come behind it.
    chooses.store(true, Ordering::Relaxed);
    let times = touch_all(&rig.memory);
    let again = sent_again(&lost_at);
    let before = times.iter().filter(|time| **time < again).count() as u64;
    assert_eq!(before, FAULTS - 1, "{:?}", since(&times, again));
    let totals = rig.emulator.traffic().totals;
    assert_eq!((totals.lost, totals.queue_full), (1, 0));
}

#[test]
fn a_lost_packet_of_the_push_delays_no_fault() {
    let test = "a_lost_packet_of_the_push_delays_no_fault";
    if !is_root(test) || !can_move(test) {
        return;
    }
    let rig = rig(Some(20_000_000));
    let lost_at = LostAt::default();
    let lost = lost_at.clone();
    let (started, under_way) = std::sync::mpsc::channel();
    let mut started = Some(started);
    let mut bytes_to: HashMap<u16, u64> = HashMap::new();
    let mut push_port = None;
    let mut answers = 0;
    rig.emulator.lose(move |packet: Passing| {
        let Some(port) = packet.to_port else {
            return false;
        };
        let Some(push_port) = push_port else {
            let bytes = bytes_to.entry(port).or_default();
            *bytes += packet.bytes;
            // No fault has been answered yet.
            if *bytes > 1_000_000 {
                push_port = Some(port);
                let _ = started.take().map(|started| started.send(()));
            }
            return false;
        };
        if packet.bytes < LARGE {
            return false;
        }
        if port != push_port {
            answers += 1;
            return false;
        }
        let mut lost = lost.lock().unwrap();
        // More than the probes for the path's largest packet that may come meanwhile.
        let chosen = answers > 5 && lost.is_none();
        if chosen {
            *lost = Some(Instant::now());
        }
        chosen
    });
    under_way.recv_timeout(30 * RTT).expect("the push begins");
    let times = touch_all(&rig.memory);
    let again = sent_again(&lost_at);
    assert!(
        times.iter().all(|time| *time < again),
        "{:?}",
        since(&times, again)
    );
    let report = rig.filling.wait().unwrap();
    assert_eq!(report.pages_demand + report.pages_pushed, PAGES);
    assert!(report.faults >= FAULTS, "{report:?}");
    let totals = rig.emulator.traffic().totals;
    assert_eq!((totals.lost, totals.queue_full), (1, 0));
}

/// In milliseconds, for messages; negative before.
fn since(times: &[Instant], from: Instant) -> Vec<i64> {
    let ms = |time: &Instant| match time.checked_duration_since(from) {
        Some(after) => after.as_millis() as i64,
        None => -(from.duration_since(*time).as_millis() as i64),
    };
    times.iter().map(ms).collect()
}
