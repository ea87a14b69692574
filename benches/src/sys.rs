//! The bare ioctl that installing pages is compared with.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;

use lazyvm_pager::LazyMemory;
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

/// Memory registered with a userfaultfd of its own, and nothing around it.
pub(crate) struct BareUffd<'a> {
    uffd: Uffd,
    memory: &'a LazyMemory,
}

impl<'a> BareUffd<'a> {
    /// Registers all of `memory`.
    pub fn register(memory: &'a LazyMemory) -> io::Result<Self> {
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .require_features(FeatureFlags::empty())
            .create()
            .map_err(io::Error::other)?;
        for region in memory.regions() {
            uffd.register(region.host as *mut c_void, region.bytes() as usize)
                .map_err(io::Error::other)?;
        }
        Ok(Self { uffd, memory })
    }

    /// `UFFDIO_COPY` of `data` to the first region, `offset` bytes from its start.
    pub fn copy(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let region = self.memory.regions().first().filter(|region| {
            offset
                .checked_add(data.len() as u64)
                .is_some_and(|end| end <= region.bytes())
        });
        let region = region.ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the target lies in the region (just checked), which the borrowed `LazyMemory` keeps mapped and which
        // this userfaultfd has registered; `data` is readable for its length.
        let copied = unsafe {
            self.uffd.copy(
                data.as_ptr().cast::<c_void>(),
                (region.host + offset) as *mut c_void,
                data.len(),
                true,
            )
        };
        copied.map(drop).map_err(io::Error::other)
    }
}
