//! What sockets see of the emulated path. Limits are wide: other tests run beside these.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_benches::wan::emulator::{DESTINATION, Emulator, SOURCE};
use lazyvm_benches::wan::queue::PathConfig;

use crate::common::is_root;

const PORT: u16 = 7000;

/// Sends `bytes` over TCP from source to destination, checks each, and gives the time from connected to received.
fn tcp(emulator: &Emulator, bytes: usize) -> Duration {
    let listener = emulator
        .destination
        .within(|| TcpListener::bind((DESTINATION, PORT)))
        .unwrap();
    let mut to = emulator
        .source
        .within(|| TcpStream::connect((DESTINATION, PORT)))
        .unwrap();
    let (mut from, _) = listener.accept().unwrap();
    let started_at = Instant::now();
    let data: Vec<u8> = (0..bytes).map(byte).collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            to.write_all(&data).unwrap();
            drop(to);
        });
        let mut seen = 0;
        let mut buffer = vec![0; 1 << 20];
        loop {
            let length = from.read(&mut buffer).unwrap();
            if length == 0 {
                break;
            }
            assert!(buffer[..length] == data[seen..seen + length], "near {seen}");
            seen += length;
        }
        assert_eq!(seen, bytes);
    });
    started_at.elapsed()
}

/// A byte that tells where it belongs.
fn byte(at: usize) -> u8 {
    ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

/// Round trips of small packets.
fn pings(emulator: &Emulator, count: u32, wait: Duration) -> Vec<Duration> {
    let echo = emulator
        .destination
        .within(|| UdpSocket::bind((DESTINATION, PORT)))
        .unwrap();
    let ping = emulator
        .source
        .within(|| UdpSocket::bind((SOURCE, 0)))
        .unwrap();
    ping.connect((DESTINATION, PORT)).unwrap();
    ping.set_read_timeout(Some(wait)).unwrap();
    echo.set_read_timeout(Some(wait)).unwrap();
    let mut back = Vec::new();
    for number in 0..count {
        let started_at = Instant::now();
        ping.send(&number.to_le_bytes()).unwrap();
        let mut bytes = [0; 4];
        if let Ok((_, from)) = echo.recv_from(&mut bytes) {
            echo.send_to(&bytes, from).unwrap();
        }
        if ping.recv(&mut bytes).is_ok() && bytes == number.to_le_bytes() {
            back.push(started_at.elapsed());
        }
    }
    back
}

#[test]
fn round_trips_take_as_long_as_asked_for() {
    if !is_root("round_trips_take_as_long_as_asked_for") {
        return;
    }
    let emulator = Emulator::start(PathConfig::default()).unwrap();
    // No sooner; how much later is for a machine that does nothing else.
    let times = pings(&emulator, 11, Duration::from_secs(2));
    assert_eq!(times.len(), 11);
    assert!(
        times.iter().all(|time| *time >= Duration::from_millis(100)),
        "{times:?}"
    );
}

#[test]
fn a_gigabit_goes_through_and_no_more() {
    if !is_root("a_gigabit_goes_through_and_no_more") {
        return;
    }
    let path = PathConfig {
        rtt: Duration::from_millis(20),
        ..PathConfig::default()
    };
    let emulator = Emulator::start(path).unwrap();
    let time = tcp(&emulator, 200_000_000);
    let traffic = emulator.traffic();
    let mbit_s = traffic.totals.bytes_from_source as f64 * 8.0 / 1e6 / time.as_secs_f64();
    eprintln!(
        "{mbit_s:.0} Mbit/s of IP, {} packets in {} writes, {:.0}% of a processor",
        traffic.totals.packets,
        traffic.totals.writes,
        traffic.relay_cpu_us as f64 / time.as_micros() as f64 * 100.0
    );
    assert!(mbit_s < 1001.0);
    assert!(mbit_s > 200.0);
    // Each packet has its headers, however many went together.
    assert!(traffic.totals.bytes_from_source > 200_000_000 / 1448 * 1500);
}

#[test]
fn what_is_lost_or_late_of_many_packets_at_once_is_made_good_by_tcp() {
    if !is_root("what_is_lost_or_late_of_many_packets_at_once_is_made_good_by_tcp") {
        return;
    }
    let path = PathConfig {
        rtt: Duration::from_millis(2),
        loss: 0.01,
        reorder: 0.01,
        jitter: Duration::from_millis(1),
        ..PathConfig::default()
    };
    let emulator = Emulator::start(path).unwrap();
    tcp(&emulator, 10_000_000);
    let totals = emulator.traffic().totals;
    let share = totals.lost as f64 / (totals.lost + totals.packets) as f64;
    assert!((0.005..0.02).contains(&share), "{totals:?}");
}

#[test]
fn nothing_goes_through_in_a_blackout() {
    if !is_root("nothing_goes_through_in_a_blackout") {
        return;
    }
    let path = PathConfig {
        rtt: Duration::from_millis(2),
        ..PathConfig::default()
    };
    let emulator = Emulator::start(path).unwrap();
    let wait = Duration::from_millis(50);
    assert!(!pings(&emulator, 3, wait).is_empty());
    emulator.black_out(Instant::now(), Duration::from_secs(3600));
    assert!(pings(&emulator, 3, wait).is_empty());
    emulator.black_out(Instant::now(), Duration::ZERO);
    assert!(!pings(&emulator, 3, wait).is_empty());
    assert!(emulator.traffic().totals.blackout >= 3);
}
