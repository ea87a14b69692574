//! The hypervisors: what the page server and the pager need of each.
//!
//! [`kvm`] is lazyvm's own; [`qemu`] and [`firecracker`] are the real ones, as they are; [`attach`] is what QEMU needs of any
//! process, [`dirty`] which pages
//! a process writes, [`record`] which it touches in which order, [`x86`] what a guest's own tables tell.

pub mod attach;
pub mod dirty;
pub mod firecracker;
pub mod kvm;
mod pagemap;
pub mod plain;
pub mod qemu;
pub mod record;
pub mod x86;

/// The program in `docs/library.md` is a test. It stands here because it names both ends, which never name each other.
#[cfg(doctest)]
#[doc = include_str!("../../docs/library.md")]
struct LibraryGuide;
