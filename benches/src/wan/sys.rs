//! What can't be said in safe Rust: TUN devices, the relay's priority, signals.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Kernel's `include/uapi/linux/if_tun.h`.
mod tun {
    use libc::{c_int, c_uint};

    nix::ioctl_write_ptr!(set_interface, b'T', 202, c_int);
    nix::ioctl_write_int_bad!(
        set_offload,
        nix::request_code_write!(b'T', 208, size_of::<c_uint>())
    );

    pub const CHECKSUM: c_int = 0x01;
    pub const TSO4: c_int = 0x02;
    /// Both, since the kernel takes them together only (Linux 6.2 and newer).
    pub const USO4_AND_6: c_int = 0x20 | 0x40;
}

/// Which offloads a TUN device takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Long TCP and UDP packets that stand for many.
    TcpAndUdp,
    /// TCP alone.
    Tcp,
}

/// Makes the TUN device `name` in the calling thread's network namespace. Reads and writes don't wait; each packet has a
/// `virtio_net_hdr` in front.
pub fn tun(name: &str) -> io::Result<(File, Offload)> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: all fields are integers, arrays of them, or pointers: zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, whatever type its number was made with; this one lives until
    // the call is over.
    unsafe { tun::set_interface(file.as_raw_fd(), (&raw mut request).cast_const().cast()) }?;
    let all = tun::CHECKSUM | tun::TSO4;
    // SAFETY: TUNSETOFFLOAD takes flags by value and no pointer.
    let offload = match unsafe { tun::set_offload(file.as_raw_fd(), all | tun::USO4_AND_6) } {
        Ok(_) => Offload::TcpAndUdp,
        Err(_) => {
            // SAFETY: as above.
            unsafe { tun::set_offload(file.as_raw_fd(), all) }?;
            Offload::Tcp
        }
    };
    // SAFETY: sets flags of a descriptor that is open, and takes no pointer.
    let set = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    nix::errno::Errno::result(set)?;
    Ok((file, offload))
}

/// Has the calling thread run ahead of all that is not real-time: it stands for wires.
pub fn run_first() -> io::Result<()> {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads the structure, which lives until the call is over; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameter) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT and SIGTERM don't end this process but make [`interrupted`] true. Child processes are not concerned:
/// handlers end with `exec`.
pub fn hear_signals() -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the handler does nothing but write an atomic, which is safe in a signal handler.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// Whether one of them came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}
