//! The calls that the compiler can't check: mappings, copies to and from memory that others change, userfaultfd.
//!
//! Everything here is small, and safe to call from the rest of the crate unless its name says `unsafe`.

#![allow(unsafe_code)]

mod copy;
mod map;
mod regions;
mod uffd;
mod watch;

pub(crate) use copy::{copy_in, copy_out};
pub(crate) use map::{Mapping, memfd};
pub(crate) use uffd::{adopt, copy_pages, handshake, open_device, open_syscall, zero_pages};
pub(crate) use watch::watch;
