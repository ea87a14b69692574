//! UDP sockets with room for a long fat pipe.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use socket2::{Domain, Protocol, Socket, Type};

/// Bytes asked of the kernel for each socket buffer. It gives less where `net.core.rmem_max` and `wmem_max` are
/// lower and the process may not exceed them.
const SOCKET_BUFFER: usize = 16 << 20;

/// A UDP socket at `address`, its buffers as large as the system lets them be.
///
/// # Errors
/// When the address is taken, or not of this machine.
pub fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
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
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn enlarge_buffers(socket: &Socket) {
    // Larger buffers only help; a system that refuses them still works.
    for (name, result) in [
        ("receive", socket.set_recv_buffer_size(SOCKET_BUFFER)),
        ("send", socket.set_send_buffer_size(SOCKET_BUFFER)),
    ] {
        if let Err(error) = result {
            tracing::debug!(%error, "socket keeps its {name} buffer");
        }
    }
}
