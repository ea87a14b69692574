//! What can go wrong with a move, at its destination.

use std::io;
use std::sync::Arc;

use lazyvm_wire::trust::TrustError;

use crate::connect::ConnectError;
use crate::memory::MemoryError;
use crate::uffd::{OpenError, RegisterError};

/// A move that failed.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// The source was not reached, or lets nobody in.
    #[error("can't connect to the source")]
    Connect(#[from] ConnectError),
    /// No keys.
    #[error("can't make a key")]
    Trust(#[from] TrustError),
    /// A thread could not be started.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
    /// The memory can't be made.
    #[error("can't make the memory")]
    Memory(#[from] MemoryError),
    /// No userfaultfd.
    #[error("can't use userfaultfd")]
    Open(#[from] OpenError),
    /// The memory can't be registered.
    #[error("can't register the memory")]
    Register(#[from] RegisterError),
    /// This side refused. The machine runs at the source.
    #[error("the machine can't be run here: {0}")]
    Refused(String),
    /// The connection was lost before the hand-over. The machine runs at the source.
    #[error("the source was lost before it handed the machine over; the machine runs there")]
    SourceLost,
    /// The connection was lost for good while the machine was being handed over.
    #[error(
        "the source was lost while it handed the machine over; it may stand paused there, \
         where lazyvm status tells"
    )]
    SourceLostAtHandover,
    /// Another error of this move that was told before.
    #[error(transparent)]
    Shared(Arc<PagerError>),
}

impl From<Arc<PagerError>> for PagerError {
    fn from(error: Arc<PagerError>) -> Self {
        Arc::try_unwrap(error).unwrap_or_else(Self::Shared)
    }
}
