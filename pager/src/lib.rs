//! The destination: memory that is filled lazily from a page server, through userfaultfd.
pub mod memory;
pub mod port;
