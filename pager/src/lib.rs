//! The destination: memory that is filled lazily from a page server, through userfaultfd.
mod fill;
pub mod install;
pub mod memory;
pub mod port;
mod removal;
mod slots;
mod sys;
pub mod table;
pub mod uffd;
