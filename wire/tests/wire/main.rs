//! The protocol from outside, as a peer sees it: bytes in, bytes out.

// Clippy's leave for tests covers `#[test]` functions only, not the helpers beside them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bounds;
mod decoder;
mod digest;
mod frame;
mod golden;
mod layout;
mod messages;
mod page_map;
mod samples;
mod text;
mod ticket;
mod trust;
