//! The destination: memory that is filled lazily from a page server, through userfaultfd.
//!
//! [`connect`] to the source that a ticket names, look at its [`Offer`], and [`Offer::take`] it into memory of your own:
//! touches of pages that are not there yet are served at once, all others stream in behind. [`resume`] does that for
//! a virtual machine, whatever monitor runs it ([`port`]).
//!
//! Two threads carry a move. The *fault lane* owns the userfaultfd and the connection for faults; between a fault and
//! its request, and between the answer and the wake, nothing hops to another thread. The *bulk lane* takes the push in,
//! on a connection of its own.

mod connect;
mod core;
mod demand;
mod driver;
mod faults;
mod fill;
pub mod handover;
pub mod install;
pub mod memory;
mod pager;
pub mod port;
mod push;
mod removal;
mod report;
mod slots;
mod stage;
mod sys;
pub mod table;
pub mod uffd;
mod verify;

pub use connect::ConnectError;
pub use core::LocalReader;
pub use memory::{InstallMode, LazyMemory, LazyRegion};
pub use pager::{
    Arrived, Filling, Offer, Options, PagerError, Progress, connect, fill_locally, resume,
};
pub use report::{Percentiles, Report};
