//! Which pages a machine writes, noted by KVM's dirty log.
//!
//! That is all of them: this monitor's devices have no way into guest memory.

use lazyvm_wire::PAGE_SIZE;

use super::super::lock;
use super::super::sys::GuestVm;
use super::{OperationError, Shared};

/// Whom writes are noted for.
#[derive(Debug, Default)]
pub(super) struct Writes {
    /// The last session's number.
    last: u64,
    /// Whether that goes on.
    noted: bool,
}

impl Shared {
    /// Begins to note writes; all pages are clean. Gives a number that tells this from an earlier or a later time: an
    /// earlier one ends.
    pub(in crate::kvm) fn track(&self) -> Result<u64, OperationError> {
        let mut writes = lock(&self.writes);
        self.check_movable()?;
        writes.noted = false;
        writes.last += 1;
        if let Err(error) = self.vm.note_writes(true) {
            let _ = self.vm.note_writes(false);
            return Err(OperationError::Track(error));
        }
        writes.noted = true;
        Ok(writes.last)
    }

    /// The pages that were written since the last time, as a bitmap of the image: page `n` is bit `n % 8` of byte
    /// `n / 8`. They are clean from now on.
    pub(in crate::kvm) fn take_written(&self, session: u64) -> Result<Vec<u8>, OperationError> {
        let mut writes = lock(&self.writes);
        if !writes.noted || writes.last != session {
            return Err(OperationError::NotTracked);
        }
        image_bitmap(&self.vm).map_err(|error| {
            // A part may be cleared and will not be told.
            writes.noted = false;
            OperationError::Track(error)
        })
    }

    /// Ends it, unless it has ended.
    pub(in crate::kvm) fn untrack(&self, session: u64) -> Result<(), OperationError> {
        let mut writes = lock(&self.writes);
        if writes.last == session {
            writes.noted = false;
            self.vm.note_writes(false).map_err(OperationError::Track)?;
        }
        Ok(())
    }
}

fn image_bitmap(vm: &GuestVm) -> Result<Vec<u8>, vmm_sys_util::errno::Error> {
    let layout = vm.ram().layout();
    let mut image = vec![0_u8; (layout.bytes() / PAGE_SIZE as u64).div_ceil(8) as usize];
    let mut first = 0;
    for (region, bitmap) in layout.regions().iter().zip(vm.take_written()?) {
        for (at, word) in (0..).step_by(64).zip(bitmap) {
            let mut left = word;
            while left != 0 {
                let page = first + at + u64::from(left.trailing_zeros());
                image[(page / 8) as usize] |= 1 << (page % 8);
                left &= left - 1;
            }
        }
        first += region.pages;
    }
    Ok(image)
}
