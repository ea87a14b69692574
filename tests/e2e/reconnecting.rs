//! A network that goes away for longer than any connection lives.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::{Home, can_move};

/// Longer than the idle timeout of a connection, which is 15 s.
const OUTAGE: Duration = Duration::from_secs(20);

/// Carries datagrams between clients and a server, or drops them all.
struct Network {
    dark: Arc<AtomicBool>,
}

impl Network {
    /// Between those who send to `entrance` and `server`. Its threads end with the process.
    fn new(entrance: UdpSocket, server: SocketAddr) -> Self {
        let dark = Arc::new(AtomicBool::new(false));
        let is_dark = Arc::clone(&dark);
        thread::spawn(move || forward(&entrance, server, &is_dark));
        Self { dark }
    }
}

fn forward(entrance: &UdpSocket, server: SocketAddr, dark: &Arc<AtomicBool>) {
    let mut exits: HashMap<SocketAddr, UdpSocket> = HashMap::new();
    let mut datagram = [0; 65536];
    loop {
        let Ok((length, client)) = entrance.recv_from(&mut datagram) else {
            continue;
        };
        let exit = exits.entry(client).or_insert_with(|| {
            let exit = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            exit.connect(server).unwrap();
            let (back, entrance) = (exit.try_clone().unwrap(), entrance.try_clone().unwrap());
            let dark = Arc::clone(dark);
            thread::spawn(move || {
                let mut datagram = [0; 65536];
                loop {
                    // An error is the answer of a port that is closed: the server's end.
                    let Ok(length) = back.recv(&mut datagram) else {
                        continue;
                    };
                    if !dark.load(Ordering::Relaxed) {
                        let _ = entrance.send_to(&datagram[..length], client);
                    }
                }
            });
            exit
        });
        if !dark.load(Ordering::Relaxed) {
            let _ = exit.send(&datagram[..length]);
        }
    }
}

#[test]
fn a_move_goes_on_after_the_network_was_away() {
    if !can_move("a_move_goes_on_after_the_network_was_away") {
        return;
    }
    let home = Home::new();
    let mut run = home.run("a", "32M", &[]);
    home.wait_ticks("a", 2);
    let entrance = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let server = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .unwrap()
        .local_addr()
        .unwrap();
    let advertised = entrance.local_addr().unwrap().to_string();
    let flags = [
        "--listen",
        &server.to_string(),
        "--advertise",
        &advertised,
        "--max-bandwidth",
        "50mbit",
    ];
    let (mut serve, ticket) = home.serve("serve", "a", &flags);
    let network = Network::new(entrance, server);
    let mut resume = home.resume("b", &ticket, &["--verify", "--stay"]);
    resume.wait_log("the VM runs here");
    home.wait_ticks("b", 2);

    network.dark.store(true, Ordering::Relaxed);
    thread::sleep(OUTAGE);
    assert!(serve.is_running() && resume.is_running());
    assert!(
        resume
            .log()
            .contains("the connection to the source is lost"),
        "{}",
        resume.log()
    );
    network.dark.store(false, Ordering::Relaxed);

    serve.ends_with(0);
    run.ends_with(0);
    resume.wait_log("all memory is here");
    home.wait_ticks("b", 2);
    let report = home.report("b");
    assert!(report["reconnects"].as_u64().unwrap() >= 1, "{report}");
    assert_eq!(report["verified"], true, "{report}");
    home.assert_unbroken(&["a", "b"]);
}
