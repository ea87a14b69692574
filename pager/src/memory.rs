//! The memory that is filled: where it lies, what backs it, and how its pages are installed.

use std::any::Any;
use std::fs::File;
use std::sync::Arc;

use lazyvm_wire::Backing;

/// How pages are put into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstallMode {
    /// `UFFDIO_COPY` and `UFFDIO_ZEROPAGE`, for any memory; the only way for private memory.
    Missing,
    /// Written through the shared file, then `UFFDIO_CONTINUE`.
    Minor,
}

/// One region of the memory, in the order of the layout.
#[derive(Clone, Debug)]
pub struct LazyRegion {
    /// Its first byte's address in the process that the userfaultfd belongs to.
    pub host: u64,
    /// Its length in 4 KiB pages.
    pub pages: u64,
    /// What backs it here.
    pub backing: Backing,
    /// The shared file behind it and the offset of its first byte; `None` for private memory.
    pub file: Option<(Arc<File>, u64)>,
}

/// Memory that is to be filled.
pub struct LazyMemory {
    pub(crate) regions: Vec<LazyRegion>,
    pub(crate) mode: InstallMode,
    /// Keeps the mappings alive for as long as the pager runs.
    pub(crate) _owner: Arc<dyn Any + Send + Sync>,
}
