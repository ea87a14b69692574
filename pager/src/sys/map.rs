//! Anonymous memory, memory files, and mappings of them.

use std::fs::File;
use std::io::IoSlice;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use lazyvm_wire::Backing;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;

/// A mapping of this process's own, readable and writable, undone when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: usize,
    length: usize,
}

impl Mapping {
    /// `length` bytes of private memory, none of it taken yet (huge pages are reserved).
    pub(crate) fn anonymous(length: u64, backing: Backing) -> Result<Self, Errno> {
        let flags = MapFlags::MAP_PRIVATE
            | match backing {
                Backing::Small => MapFlags::MAP_NORESERVE,
                Backing::Huge2M => MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB,
            };
        let length = length_of(length)?;
        // SAFETY: the kernel chooses the address, so no mapping that exists is touched.
        let address = unsafe { mmap_anonymous(None, length, prot(), flags) }?;
        Ok(Self::of(address, length))
    }

    /// `length` bytes of a file from `offset`, shared with all who map it.
    pub(crate) fn shared(file: impl AsFd, offset: u64, length: u64) -> Result<Self, Errno> {
        let offset = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        let length = length_of(length)?;
        // SAFETY: as above. The file may be changed or cut short by others; nothing here makes references into the
        // mapping, see `crate::sys::copy`.
        let address = unsafe { mmap(None, length, prot(), MapFlags::MAP_SHARED, file, offset) }?;
        Ok(Self::of(address, length))
    }

    fn of(address: NonNull<std::ffi::c_void>, length: NonZeroUsize) -> Self {
        Self {
            address: address.as_ptr() as usize,
            length: length.get(),
        }
    }

    /// Its first byte.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    /// Writes `data` at `offset`, through the kernel: where a touch would end in `SIGBUS`, as there is no huge page left
    /// for a hole, this says `EFAULT`.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let offset = usize::try_from(offset).map_err(|_| Errno::EFBIG)?;
        let end = offset.checked_add(data.len()).ok_or(Errno::EFBIG)?;
        if end > self.length {
            return Err(Errno::EFBIG);
        }
        let mut done = 0;
        while done < data.len() {
            let to = RemoteIoVec {
                base: self.address + offset + done,
                len: data.len() - done,
            };
            match process_vm_writev(Pid::this(), &[IoSlice::new(&data[done..])], &[to])? {
                0 => return Err(Errno::EFAULT),
                written => done += written,
            }
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some(address) = NonNull::new(self.address as *mut std::ffi::c_void) {
            // SAFETY: the mapping is this value's own, and whoever uses its address keeps this value alive.
            let undone = unsafe { munmap(address, self.length) };
            debug_assert_eq!(undone, Ok(()));
        }
    }
}

/// A file in memory of `length` bytes, holes all over, whose size can't change any more.
pub(crate) fn memfd(name: &str, length: u64, backing: Backing) -> Result<File, Errno> {
    let flags = MFdFlags::MFD_CLOEXEC
        | MFdFlags::MFD_ALLOW_SEALING
        | match backing {
            Backing::Small => MFdFlags::empty(),
            Backing::Huge2M => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
        };
    let file = File::from(memfd_create(name, flags)?);
    let length = i64::try_from(length).map_err(|_| Errno::EFBIG)?;
    nix::unistd::ftruncate(&file, length)?;
    // A file that is cut short turns a touch of its mapping into SIGBUS.
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

fn length_of(bytes: u64) -> Result<NonZeroUsize, Errno> {
    usize::try_from(bytes)
        .ok()
        .and_then(NonZeroUsize::new)
        .ok_or(Errno::EINVAL)
}

fn prot() -> ProtFlags {
    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
}
