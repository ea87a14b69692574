//! System calls that the libraries have no safe form of: scheduling of the calling thread, steering of packets.

#![allow(unsafe_code)]

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

/// `struct sched_attr` of sched_setattr(2), its first version.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// The size that the kernel calls `SCHED_ATTR_SIZE_VER0`.
const _: () = assert!(size_of::<SchedAttr>() == 48);

/// How a thread is scheduled. Threads that it starts are scheduled as any other.
pub(crate) enum Schedule {
    /// Ahead of all that is not real-time, with the lowest real-time priority.
    RealTime,
    /// With a nice value and, from Linux 6.12 on, time slices of so many nanoseconds.
    Fair { nice: i32, slice_ns: u64 },
}

/// Changes how the calling thread is scheduled.
pub(crate) fn schedule_this_thread(schedule: &Schedule) -> io::Result<()> {
    let (policy, nice, priority, runtime) = match *schedule {
        Schedule::RealTime => (libc::SCHED_RR, 0, 1, 0),
        Schedule::Fair { nice, slice_ns } => (libc::SCHED_OTHER, nice, 0, slice_ns),
    };
    let attr = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: policy as u32,
        flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
        nice,
        priority,
        runtime,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads `attr`, whose size it is told, and writes nothing; thread 0 is the calling one.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Gives each packet of this socket's port to the socket of its lane: the kernel numbers the sockets of a port in the
/// order in which they were bound, and the program picks a number from the packet's destination connection ID.
///
/// A long header has the ID behind flags, version and length, a short one behind the flags (RFC 9000, section 17). A
/// packet that is too short for that goes to socket 0.
pub(crate) fn steer_by_lane(socket: &UdpSocket, lane_bit: u8) -> io::Result<()> {
    const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
    const JUMP_IF_SET: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
    const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
    const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_A) as u16;
    let step = |code, if_true, if_false, value| libc::sock_filter {
        code,
        jt: if_true,
        jf: if_false,
        k: value,
    };
    let mut program = [
        step(LOAD_BYTE, 0, 0, 0),
        step(JUMP_IF_SET, 0, 2, 0x80),
        step(LOAD_BYTE, 0, 0, 6),
        step(JUMP, 0, 0, 1),
        step(LOAD_BYTE, 0, 0, 1),
        step(AND, 0, 0, lane_bit.into()),
        step(RETURN, 0, 0, 0),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel copies the program that `filter` points to before the call returns, and checks it; the length
    // is that of `sock_fprog`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
