//! UDP sockets with room for a long fat pipe.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBufForce, SndBufForce};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lane::LANE_BIT;
use crate::sys;

/// Bytes asked of the kernel for each socket buffer. It gives less where `net.core.rmem_max` and `wmem_max` are
/// lower and the process may not exceed them.
const SOCKET_BUFFER: usize = 16 << 20;

/// A UDP socket at `address`, its buffers as large as the system lets them be.
///
/// # Errors
/// When the address is taken, or not of this machine.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = unbound(address)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// Two UDP sockets at the same `address`, the first for the fault lane, the second for the bulk lane; port 0 takes a free
/// one for both. The kernel gives each packet to the lane that its connection ID tells.
///
/// # Errors
/// When the address is taken, even by another such pair, or not of this machine.
pub fn bind_lanes(address: SocketAddr) -> io::Result<(UdpSocket, UdpSocket)> {
    // Bound for itself, so that a port that others share is taken; shared only then.
    let fault = unbound(address)?;
    fault.bind(&address.into())?;
    fault.set_reuse_port(true)?;
    let fault = UdpSocket::from(fault);
    let bulk = unbound(address)?;
    bulk.set_reuse_port(true)?;
    bulk.bind(&fault.local_addr()?.into())?;
    sys::steer_by_lane(&fault, LANE_BIT)?;
    Ok((fault, bulk.into()))
}

fn unbound(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // `[::]` takes both families where the system allows it.
        let _ = socket.set_only_v6(false);
    }
    enlarge_buffers(&socket);
    Ok(socket)
}

fn enlarge_buffers(socket: &Socket) {
    // Who may exceed the system's limits does, others get what they allow. Larger buffers only help; a system that
    // refuses them still works.
    let receive = setsockopt(socket, RcvBufForce, &SOCKET_BUFFER)
        .map_err(io::Error::from)
        .or_else(|_| socket.set_recv_buffer_size(SOCKET_BUFFER));
    let send = setsockopt(socket, SndBufForce, &SOCKET_BUFFER)
        .map_err(io::Error::from)
        .or_else(|_| socket.set_send_buffer_size(SOCKET_BUFFER));
    for (name, result) in [("receive", receive), ("send", send)] {
        if let Err(error) = result {
            tracing::debug!(%error, "socket keeps its {name} buffer");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    /// What a packet's first bytes are: long or short header, and the first byte of its connection ID.
    fn packet(long: bool, id: u8) -> Vec<u8> {
        let mut packet = vec![if long { 0xc0 } else { 0x40 }; 64];
        packet[if long { 6 } else { 1 }] = id;
        packet
    }

    #[test]
    fn packets_go_to_the_lane_that_their_connection_id_tells() {
        let (fault, bulk) = bind_lanes((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = fault.local_addr().unwrap();
        assert_eq!(bulk.local_addr().unwrap(), address);
        let sender = bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let mut buffer = [0; 128];
        for socket in [&fault, &bulk] {
            socket
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
        }
        for long in [true, false] {
            for id in [0x00, 0x01, 0xfe, 0xff] {
                sender.send_to(&packet(long, id), address).unwrap();
                let lane = if id & LANE_BIT == 0 { &fault } else { &bulk };
                let length = lane.recv(&mut buffer).unwrap();
                assert_eq!(buffer[..length], packet(long, id));
            }
        }
        sender.send_to(&[0xc0], address).unwrap();
        assert_eq!(fault.recv(&mut buffer).unwrap(), 1);
    }

    #[test]
    fn a_port_that_lanes_share_is_taken_for_all_others() {
        let (fault, _bulk) = bind_lanes((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = fault.local_addr().unwrap();
        assert_eq!(
            bind_lanes(address).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        assert_eq!(bind(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
