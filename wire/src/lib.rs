//! lazyvm's protocol: what source and destination say to each other, as bytes and as types.
//!
//! No socket, clock or thread is in here. Everything that is read from outside is bounded before memory is taken for
//! it, and gives an error where it is wrong, never a panic.
//!
//! - [`Ticket`]: how a destination finds and is let into a session; [`trust`]: the keys.
//! - [`control`]: the messages of the move itself, [`ledger`] their versions.
//! - [`frame`]: pages, asked for and pushed; [`PageMap`]: which of them there are.
//! - [`Layout`], [`PageIndex`], [`PageRange`], [`Gpa`]: how pages are counted.
//! - [`printable`]: what is done to any text from outside before it is shown.
//!
//! `docs/protocol.md` shows the sequence.

#![forbid(unsafe_code)]

mod bounded;
pub mod control;
mod digest;
pub mod frame;
pub mod held;
mod layout;
pub mod ledger;
mod machine;
mod map;
mod page;
mod text;
mod ticket;
pub mod trust;

pub use digest::{is_zero, page_digest, zero_digest};
pub use layout::{Backing, Layout, LayoutError, REGION_NAME_MAX, REGIONS_MAX, Region};
pub use machine::{COMPATIBILITY_MAX, KIND_MAX, MachineOffer, STATE_MAX};
pub use map::{PAGE_MAP_BYTES_MAX, PageMap, PageMapError};
pub use page::{Gpa, IMAGE_PAGES_MAX, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange};
pub use text::printable;
pub use ticket::{ADDRESSES_MAX, Secret, SessionId, TICKET_TEXT_MAX, Ticket, TicketError};
