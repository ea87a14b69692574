//! What can go wrong with a run.

use std::io;

use lazyvm_pager::PagerError;
use lazyvm_pager::memory::{AccessError, MemoryError};
use lazyvm_quic::SetupError;
use lazyvm_server::ServerError;
use lazyvm_wire::TicketError;
use lazyvm_wire::trust::TrustError;

/// A run that failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The child process that is the source.
    #[error("the source's process fails while {0}")]
    Source(&'static str, #[source] io::Error),
    /// What the source said can't be read.
    #[error("the source says what is not understood: {0}")]
    SourceSays(String),
    /// The source's ticket.
    #[error("the source's ticket")]
    Ticket(#[from] TicketError),
    /// Memory, files or sockets of the run itself.
    #[error("can't set the run up")]
    Io(#[from] io::Error),
    /// The server.
    #[error("the page server fails")]
    Server(#[from] ServerError),
    /// The pager.
    #[error("the pager fails")]
    Pager(#[from] PagerError),
    /// The memory that is filled.
    #[error("can't make memory to fill")]
    Memory(#[from] MemoryError),
    /// The memory that is touched.
    #[error("can't touch the memory")]
    Access(#[from] AccessError),
    /// QUIC.
    #[error("can't set up QUIC")]
    Setup(#[from] SetupError),
    /// Keys.
    #[error("can't make keys")]
    Trust(#[from] TrustError),
    /// The emulated path.
    #[error(transparent)]
    Wan(#[from] crate::wan::WanError),
    /// The bare QUIC comparison.
    #[error("the bare QUIC connection fails: {0}")]
    Bare(String),
}
