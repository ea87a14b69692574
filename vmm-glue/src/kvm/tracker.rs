//! Which pages a machine of another process writes, as its monitor tells over the control socket.

use std::path::PathBuf;

use lazyvm_server::port::{DirtyTracker, MachineError};
use lazyvm_wire::{PageIndex, PageRange};

use super::control::{ControlClient, ControlError};
use super::source::RemoteError;

/// See the module. It has a conversation of its own: one that broke can't be taken up again, because what was told in it
/// may be lost.
pub(super) struct KvmTracker {
    path: PathBuf,
    id: String,
    pages: u64,
    session: Option<(ControlClient, u64)>,
}

#[derive(Debug, thiserror::Error)]
#[error("writes are not being noted")]
struct NotStarted;

impl KvmTracker {
    /// Of the machine `id` with the control socket `path` and so many pages.
    pub(super) fn new(path: PathBuf, id: String, pages: u64) -> Self {
        Self {
            path,
            id,
            pages,
            session: None,
        }
    }

    fn end(&mut self) -> Result<(), ControlError> {
        match self.session.take() {
            Some((mut client, session)) => client.untrack(session),
            None => Ok(()),
        }
    }
}

impl DirtyTracker for KvmTracker {
    fn start(&mut self) -> Result<(), MachineError> {
        self.end()?;
        let mut client = ControlClient::connect(&self.path)?;
        if client.status()?.id != self.id {
            return Err(RemoteError::Replaced {
                path: self.path.clone(),
            }
            .into());
        }
        let session = client.track()?;
        self.session = Some((client, session));
        Ok(())
    }

    fn collect(&mut self, dirty: &mut dyn FnMut(PageRange)) -> Result<(), MachineError> {
        let (client, session) = self.session.as_mut().ok_or(NotStarted)?;
        match client.written(*session, self.pages) {
            Ok(bitmap) => {
                runs(&bitmap, self.pages, dirty);
                Ok(())
            }
            Err(error) => {
                // What it took would never be reported.
                self.session = None;
                Err(error.into())
            }
        }
    }

    fn stop(&mut self) -> Result<(), MachineError> {
        Ok(self.end()?)
    }
}

impl Drop for KvmTracker {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::debug!(%error, "the machine may go on noting its writes");
        }
    }
}

/// Calls `each` with each run of set bits among the first `pages`.
pub(super) fn runs(bitmap: &[u8], pages: u64, each: &mut dyn FnMut(PageRange)) {
    let mut start = None;
    for page in 0..pages {
        let byte = bitmap.get((page / 8) as usize).copied().unwrap_or(0);
        let set = byte & 1 << (page % 8) != 0;
        match start {
            None if set => start = Some(page),
            Some(first) if !set => {
                each(PageRange::new(PageIndex(first), page - first));
                start = None;
            }
            _ => {}
        }
    }
    if let Some(first) = start {
        each(PageRange::new(PageIndex(first), pages - first));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn page_n_is_bit_n_of_the_bytes_in_order() {
        let mut found = Vec::new();
        runs(&[0b1000_0001, 0b0000_0011, 0xff], 18, &mut |run| {
            found.push((run.first.0, run.count));
        });
        assert_eq!(found, [(0, 1), (7, 3), (16, 2)]);
    }

    proptest! {
        #[test]
        fn runs_are_the_set_bits_and_are_apart(
            bitmap in prop::collection::vec(any::<u8>(), 0..64),
            pages in 0_u64..600,
        ) {
            let mut bits = [0_u8; 75];
            let mut end = None;
            runs(&bitmap, pages, &mut |run| {
                assert!(run.count > 0 && end.is_none_or(|end| run.first.0 > end));
                end = Some(run.end().0);
                for page in run.first.0..run.end().0 {
                    bits[(page / 8) as usize] |= 1 << (page % 8);
                }
            });
            for page in 0..600_u64 {
                let at = (page / 8) as usize;
                let bit = 1_u8 << (page % 8);
                let given = page < pages && bitmap.get(at).is_some_and(|byte| byte & bit != 0);
                prop_assert_eq!(bits[at] & bit != 0, given, "page {}", page);
            }
        }
    }
}
