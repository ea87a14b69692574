//! The userfaultfd: opening it, what the kernel has to have, registering memory, reading events.
//!
//! The kernel's side is documented in `userfaultfd(2)`, `ioctl_userfaultfd(2)` and the kernel's
//! `Documentation/admin-guide/mm/userfaultfd.rst`.

use std::ffi::c_void;
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use lazyvm_wire::Backing;
use nix::errno::Errno;
use userfaultfd::{
    Error as CrateError, Event as CrateEvent, EventBuffer, FaultKind, ReadWrite, RegisterMode,
};

use crate::memory::{InstallMode, LazyMemory, Size};
use crate::sys;

/// Events that one read takes at most.
pub(crate) const EVENTS_MAX: usize = 64;

/// Where the addresses of a userfaultfd or of a memory are valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this process.
    Here,
    /// In the process that handed the userfaultfd over.
    OtherProcess,
}

/// A feature of userfaultfd that the pager asks for: bit, name, and the first kernel that has it.
struct Feature(u64, &'static str, &'static str);

const EVENT_REMOVE: u64 = 1 << 3;
const MISSING_HUGETLBFS: u64 = 1 << 4;
const MISSING_SHMEM: u64 = 1 << 5;
const THREAD_ID: u64 = 1 << 8;
const MINOR_HUGETLBFS: u64 = 1 << 9;
const MINOR_SHMEM: u64 = 1 << 10;

const FEATURES: [Feature; 6] = [
    Feature(EVENT_REMOVE, "EVENT_REMOVE", "4.11"),
    Feature(MISSING_HUGETLBFS, "MISSING_HUGETLBFS", "4.11"),
    Feature(MISSING_SHMEM, "MISSING_SHMEM", "4.11"),
    Feature(THREAD_ID, "THREAD_ID", "4.14"),
    Feature(MINOR_HUGETLBFS, "MINOR_HUGETLBFS", "5.13"),
    Feature(MINOR_SHMEM, "MINOR_SHMEM", "5.14"),
];

/// Names of features, each with the kernel that brought it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureNames(pub u64);

impl fmt::Display for FeatureNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for Feature(bit, name, kernel) in FEATURES {
            if self.0 & bit != 0 {
                let comma = if first { "" } else { ", " };
                write!(f, "{comma}{name} (Linux {kernel})")?;
                first = false;
            }
        }
        Ok(())
    }
}

/// A userfaultfd that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Neither of the two ways is permitted.
    #[error(
        "no permission for userfaultfd: give this user access to /dev/userfaultfd, or give this program the \
         capability CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1"
    )]
    Permission(#[source] Errno),
    /// The kernel was built without it.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD)")]
    NoKernelSupport(#[source] Errno),
    /// The kernel is too old.
    #[error("this kernel's userfaultfd lacks {missing}")]
    Features {
        /// The features that are needed and not there.
        missing: FeatureNames,
    },
    /// Anything else.
    #[error("userfaultfd can't be opened")]
    System(#[source] Errno),
}

/// Memory that can't be registered with the userfaultfd.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The kernel refuses the range.
    #[error(
        "region {region} ({bytes} at {host:#x}) can't be registered with userfaultfd", bytes = Size(*.bytes)
    )]
    Refused {
        /// The region's number.
        region: usize,
        /// Its address.
        host: u64,
        /// Its length in bytes.
        bytes: u64,
        /// `EBUSY`: another userfaultfd has it. `EINVAL`: memory that userfaultfd does not take.
        #[source]
        source: Errno,
    },
    /// The addresses are another process's than the descriptor's.
    #[error("the memory and the userfaultfd are not of the same process")]
    OtherProcess,
    /// The layout is not the memory's.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// The alias for writing to huge pages can't be mapped.
    #[error("region {region} can't be mapped a second time, to write to it")]
    Alias {
        /// The region's number.
        region: usize,
        /// The system's answer.
        #[source]
        source: Errno,
    },
}

/// Events that can't be read or understood.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// The descriptor gives an error.
    #[error("the userfaultfd can't be read")]
    Read(#[source] CrateError),
    /// An event that was not asked for.
    #[error("userfaultfd reports {0}, which the pager did not ask for")]
    Unexpected(&'static str),
    /// An address that is not in the memory.
    #[error("userfaultfd reports a fault at {0:#x}, which is no memory of the image")]
    Stray(u64),
}

/// An event as the kernel tells it, with host addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RawEvent {
    Fault {
        address: u64,
        write: bool,
        minor: bool,
        thread: Option<u32>,
    },
    Removed {
        start: u64,
        end: u64,
    },
}

/// How far an ioctl on a range got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// So many bytes from the start of the range are done, at least a page.
    Bytes(u64),
    /// The first page is there already.
    Exists,
    /// Nothing is done; the memory map is changing, or an event has to be read first.
    Again,
    /// `UFFDIO_CONTINUE` alone: the file has no page here.
    Hole,
    /// The process is gone, or has nothing mapped or registered here.
    Gone(Errno),
    /// Anything else.
    Failed(Errno),
}

impl Progress {
    pub(crate) fn of_errno(errno: Errno) -> Self {
        match errno {
            Errno::EEXIST => Self::Exists,
            Errno::EAGAIN => Self::Again,
            Errno::ENOENT | Errno::ESRCH => Self::Gone(errno),
            _ => Self::Failed(errno),
        }
    }

    pub(crate) fn of_error(error: &CrateError) -> Self {
        Self::of_errno(errno_of(error))
    }
}

/// A userfaultfd, non-blocking.
pub struct Uffd {
    inner: userfaultfd::Uffd,
    features: u64,
    place: Place,
    buffer: Mutex<EventBuffer>,
}

impl fmt::Debug for Uffd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uffd")
            .field("fd", &self.inner.as_raw_fd())
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}

impl Uffd {
    /// A userfaultfd for this process, with the features that `memory` needs; with `removals`, it reports memory that
    /// is given back (`madvise` with `MADV_DONTNEED` or `MADV_REMOVE`), which then waits until that is read.
    ///
    /// # Errors
    /// [`OpenError`], in words that say what to change.
    pub fn open(memory: &LazyMemory, removals: bool) -> Result<Self, OpenError> {
        let features = features_for(memory, removals);
        let fd = open_fd()?;
        match sys::handshake(&fd, features) {
            Ok(_) => Ok(Self::of(sys::adopt(fd), features, Place::Here)),
            // A handshake can be done once a descriptor, so another one is asked what there is.
            Err(Errno::EINVAL) => {
                let available = sys::handshake(&open_fd()?, 0).map_err(OpenError::System)?;
                let missing = FeatureNames(features & !available);
                Err(OpenError::Features { missing })
            }
            Err(errno) => Err(OpenError::System(errno)),
        }
    }

    pub(crate) fn of(inner: userfaultfd::Uffd, features: u64, place: Place) -> Self {
        Self {
            inner,
            features,
            place,
            buffer: Mutex::new(EventBuffer::new(EVENTS_MAX)),
        }
    }

    /// Whether it reports memory that is given back.
    pub fn reports_removals(&self) -> bool {
        self.features & EVENT_REMOVE != 0
    }

    /// Where its addresses are valid.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Registers all of `memory`: from now on a touch of a page that is not here waits.
    ///
    /// # Errors
    /// [`RegisterError::Refused`] names the region. Those before it are registered.
    pub fn register(&self, memory: &LazyMemory) -> Result<(), RegisterError> {
        // With MINOR alone, the kernel would fill a hole of the file with zeros by itself.
        let mode = match memory.mode() {
            InstallMode::Missing => RegisterMode::MISSING,
            InstallMode::Minor => RegisterMode::MISSING | RegisterMode::MINOR,
        };
        for (number, region) in memory.regions().iter().enumerate() {
            self.inner
                .register_with_mode(region.host as *mut c_void, region.bytes() as usize, mode)
                .map_err(|error| RegisterError::Refused {
                    region: number,
                    host: region.host,
                    bytes: region.bytes(),
                    source: errno_of(&error),
                })?;
        }
        Ok(())
    }

    /// Undoes [`Self::register`] for a range, and wakes all who wait in it.
    pub(crate) fn unregister(&self, host: u64, bytes: u64) -> Result<(), Errno> {
        self.inner
            .unregister(host as *mut c_void, bytes as usize)
            .map_err(|error| errno_of(&error))
    }

    pub(crate) fn copy(&self, to: u64, data: &[u8]) -> Progress {
        sys::copy_pages(&self.inner, to, data)
    }

    pub(crate) fn zero(&self, to: u64, bytes: u64) -> Progress {
        sys::zero_pages(&self.inner, to, bytes)
    }

    pub(crate) fn map_existing(&self, to: u64, bytes: u64) -> Progress {
        match self
            .inner
            .r#continue(to as *mut c_void, bytes as usize, true)
        {
            Ok(bytes) => Progress::Bytes(bytes),
            Err(error) => match errno_of(&error) {
                Errno::EFAULT => Progress::Hole,
                errno => Progress::of_errno(errno),
            },
        }
    }

    pub(crate) fn wake(&self, host: u64, bytes: u64) -> Result<(), Errno> {
        self.inner
            .wake(host as *mut c_void, bytes as usize)
            .map_err(|error| errno_of(&error))
    }

    /// Reads what events there are, up to [`EVENTS_MAX`], and passes each to `event`; returns how many.
    pub(crate) fn read(
        &self,
        mut event: impl FnMut(RawEvent) -> Result<(), EventError>,
    ) -> Result<usize, EventError> {
        let mut buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        // An error in one event must not lose those that were read with it: somebody waits for each.
        let mut first_error = None;
        for message in self
            .inner
            .read_events(&mut buffer)
            .map_err(EventError::Read)?
        {
            count += 1;
            let handled = message
                .map_err(EventError::Read)
                .and_then(raw_event)
                .and_then(&mut event);
            if let Err(error) = handled {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(count), Err)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

impl AsRawFd for Uffd {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

fn raw_event(event: CrateEvent) -> Result<RawEvent, EventError> {
    match event {
        CrateEvent::Pagefault {
            kind,
            rw,
            addr,
            thread_id,
        } => match kind {
            FaultKind::WriteProtected => Err(EventError::Unexpected("a write-protect fault")),
            FaultKind::Missing | FaultKind::Minor => Ok(RawEvent::Fault {
                address: addr as u64,
                write: rw == ReadWrite::Write,
                minor: kind == FaultKind::Minor,
                thread: u32::try_from(thread_id.as_raw())
                    .ok()
                    .filter(|&thread| thread != 0),
            }),
        },
        CrateEvent::Remove { start, end } => Ok(RawEvent::Removed {
            start: start as u64,
            end: end as u64,
        }),
        CrateEvent::Unmap { .. } => Err(EventError::Unexpected("an unmapping")),
        CrateEvent::Remap { .. } => Err(EventError::Unexpected("a moved mapping")),
        CrateEvent::Fork { .. } => Err(EventError::Unexpected("a fork")),
    }
}

pub(crate) fn features_for(memory: &LazyMemory, removals: bool) -> u64 {
    let mut features = THREAD_ID;
    if removals {
        features |= EVENT_REMOVE;
    }
    for region in memory.regions() {
        features |= match (region.backing, &region.file) {
            (Backing::Small, None) => 0,
            (Backing::Small, Some(_)) => MISSING_SHMEM,
            (Backing::Huge2M, _) => MISSING_HUGETLBFS,
        };
        if memory.mode() == InstallMode::Minor {
            features |= match region.backing {
                Backing::Small => MINOR_SHMEM,
                Backing::Huge2M => MINOR_HUGETLBFS,
            };
        }
    }
    features
}

/// The device first, which needs no capability where its file mode lets one in, then the system call.
fn open_fd() -> Result<OwnedFd, OpenError> {
    match sys::open_device() {
        Ok(fd) => return Ok(fd),
        Err(error) => tracing::debug!(%error, "/dev/userfaultfd is not to be had"),
    }
    sys::open_syscall().map_err(|errno| match errno {
        Errno::EPERM | Errno::EACCES => OpenError::Permission(errno),
        Errno::ENOSYS => OpenError::NoKernelSupport(errno),
        errno => OpenError::System(errno),
    })
}

fn errno_of(error: &CrateError) -> Errno {
    match error {
        // The crate's own version of nix, whose `Errno` is another type.
        CrateError::SystemError(errno)
        | CrateError::CopyFailed(errno)
        | CrateError::ZeropageFailed(errno) => Errno::from_raw(*errno as i32),
        // No other error comes from the calls that are made here.
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_features_are_named_with_their_kernel() {
        let missing = FeatureNames(MINOR_SHMEM | EVENT_REMOVE | 1 << 40);
        assert_eq!(
            OpenError::Features { missing }.to_string(),
            "this kernel's userfaultfd lacks EVENT_REMOVE (Linux 4.11), MINOR_SHMEM (Linux 5.14)"
        );
    }

    #[test]
    fn each_memory_asks_for_what_it_needs() {
        let region = |host, backing| crate::memory::LazyRegion {
            host,
            pages: 512,
            backing,
            file: None,
        };
        let mut regions = vec![region(0, Backing::Small)];
        let memory = |regions: &Vec<_>| {
            LazyMemory::in_other_process(regions.clone(), InstallMode::Missing).expect("memory")
        };
        assert_eq!(features_for(&memory(&regions), false), THREAD_ID);
        regions.push(region(1 << 30, Backing::Huge2M));
        assert_eq!(
            features_for(&memory(&regions), true),
            THREAD_ID | MISSING_HUGETLBFS | EVENT_REMOVE
        );
        let layout = lazyvm_wire::Layout::flat(4).expect("a layout");
        let minor = LazyMemory::shared(&layout, InstallMode::Minor).expect("memory");
        assert_eq!(
            features_for(&minor, false),
            THREAD_ID | MISSING_SHMEM | MINOR_SHMEM
        );
    }

    #[test]
    fn answers_of_the_kernel_are_told_apart() {
        assert_eq!(Progress::of_errno(Errno::EEXIST), Progress::Exists);
        assert_eq!(Progress::of_errno(Errno::EAGAIN), Progress::Again);
        for gone in [Errno::ENOENT, Errno::ESRCH] {
            assert_eq!(Progress::of_errno(gone), Progress::Gone(gone));
        }
        assert_eq!(
            Progress::of_errno(Errno::ENOMEM),
            Progress::Failed(Errno::ENOMEM)
        );
    }
}
