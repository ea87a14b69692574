//! Which pages a QEMU touches, its guest's code among them.
//!
//! Under TCG code is read when it is translated, and that was long ago. But translated blocks are found by how they were
//! compiled, too (`curr_cflags` and `tb_lookup` in QEMU's `accel/tcg/cpu-exec.c`), and the log item `nochain` is part of that: while it is set, all that
//! runs is translated anew, and so read. When it is cleared again, the blocks of before are there still, and
//! so are the new ones when it is set a second time: then less is seen. With KVM it changes
//! nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lazyvm_server::port::{MachineError, TouchRecorder};
use lazyvm_wire::PageIndex;

use super::source::Inner;
use crate::record::Recorder;

/// How long QEMU may take to set it: the VM stands still meanwhile.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct QemuRecorder {
    recorder: Recorder,
    inner: Arc<Mutex<Inner>>,
    translates_anew: bool,
}

impl QemuRecorder {
    pub fn new(recorder: Recorder, inner: Arc<Mutex<Inner>>) -> Self {
        Self {
            recorder,
            inner,
            translates_anew: false,
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn chain_again(&mut self) {
        if std::mem::take(&mut self.translates_anew)
            && let Err(error) = self.inner().qmp.human("log none")
        {
            tracing::warn!(%error, "QEMU may be left with its log item nochain, which makes TCG slower; \"log none\" in its monitor clears it");
        }
    }
}

impl TouchRecorder for QemuRecorder {
    fn start(&mut self) -> Result<(), MachineError> {
        self.recorder.start()?;
        let answer = {
            let qmp = &mut self.inner().qmp;
            let limit = qmp.answer_within(ANSWER_WITHIN);
            let answer = qmp.human("log nochain");
            qmp.answer_within(limit);
            answer
        };
        // It may have been done, whatever came of the answer.
        self.translates_anew = true;
        match answer {
            Ok(said) if said.trim().is_empty() => {}
            Ok(said) => tracing::debug!(said, "code that runs is not seen"),
            Err(error) => tracing::debug!(%error, "code that runs is not seen"),
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<PageIndex> {
        // First nobody waits any more, QEMU's main loop, which is to answer, among them.
        let touched = self.recorder.stop();
        self.chain_again();
        touched
    }
}

impl Drop for QemuRecorder {
    fn drop(&mut self) {
        self.stop();
    }
}
