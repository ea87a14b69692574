//! Firecracker, as it is: its API socket, its snapshots, and the page-fault socket that it gives its memory away on.
//!
//! What is known here of Firecracker comes from its own `docs/snapshotting/` and `src/firecracker/swagger/`, and from
//! `src/vmm/src/persist.rs` of each release since 1.1.

pub mod api;
pub mod destination;
mod folder;
mod frozen;
mod guest;
pub mod handshake;
mod marks;
mod offer;
pub mod process;
mod receive;
pub mod snapshot;
pub mod source;
mod sys;
mod tracker;

/// The kind in the [`MachineOffer`](lazyvm_wire::MachineOffer) of a Firecracker.
pub const KIND: &str = "firecracker";
