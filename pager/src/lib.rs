//! The destination: memory that is filled lazily from a page server, through userfaultfd.
//!
//! [`connect`] to the source that a ticket names, look at its [`Offer`], and [`Offer::take`] it into memory of your own:
//! touches of pages that are not there yet are served at once, all others stream in behind. [`resume`] does that for
//! a virtual machine, whatever monitor runs it ([`port`]).
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use lazyvm_pager::{LazyMemory, Options};
//! use lazyvm_wire::Ticket;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let line = String::new();
//! let offer = lazyvm_pager::connect(&Ticket::parse(&line)?, Options::default())?;
//! let memory = Arc::new(LazyMemory::anonymous(offer.layout())?);
//! let filling = offer.fill(memory.clone())?;
//!
//! let mut word = [0; 8];
//! memory.read_at(0x1234_5000, &mut word)?; // this page comes now
//! let report = filling.wait()?; // all others have come
//! println!("{} pages on demand, {} pushed", report.pages_demand, report.pages_pushed);
//! # Ok(())
//! # }
//! ```
//!
//! `docs/library.md` has a whole program, with its page server.
//!
//! Two threads carry a move. The *fault lane* owns the userfaultfd and the connection for faults; between a fault and
//! its request, and between the answer and the wake, nothing hops to another thread. The *bulk lane* takes the push in,
//! on a connection of its own.

mod connect;
mod core;
mod demand;
mod driver;
mod error;
mod faults;
mod fill;
mod filling;
pub mod handover;
mod hole;
pub mod install;
pub mod memory;
mod pager;
pub mod port;
mod push;
mod removal;
mod report;
mod room;
mod slots;
mod stage;
mod sys;
pub mod table;
mod touches;
pub mod uffd;
mod verify;

pub use connect::ConnectError;
pub use core::LocalReader;
pub use error::PagerError;
pub use filling::{Filling, Progress};
pub use hole::punch_hole;
pub use memory::{InstallMode, LazyMemory, LazyRegion};
pub use pager::{Arrived, Offer, Options, Unplaced, connect, fill_locally, resume, resume_late};
pub use report::{Percentiles, Report};
