//! Attaching to a process that runs already, without its help: a userfaultfd for its memory.
//!
//! A userfaultfd acts on the address space of the process that opened it, so one thread of that process is stopped with
//! `ptrace(2)` and made to open one; `pidfd_getfd(2)` then brings the descriptor over, and all else is done from here.
//! The thread is stopped for well under a millisecond, and notices nothing: `inject.rs` says how.

mod inject;
mod maps;
mod process;
mod sys;
mod take;

pub use inject::InjectError;
pub use maps::{Mapping, Mappings, MapsError};
pub(crate) use process::DEVICE;
pub use process::{AttachError, Attached, Process};
