//! The hypervisors: what the page server and the pager need of each.
//!
//! [`kvm`] is lazyvm's own; [`firecracker`] is the real one, as it is.

pub mod firecracker;
pub mod kvm;
pub mod plain;

/// The program in `docs/library.md` is a test. It stands here because it names both ends, which never name each other.
#[cfg(doctest)]
#[doc = include_str!("../../docs/library.md")]
struct LibraryGuide;
