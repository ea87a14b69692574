//! What is read from, at each time of a move.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use lazyvm_server::port::SourceMemory;
use lazyvm_wire::PageRange;

/// A machine's memory as it is at the pause and afterwards, and before that only while somebody notes what is written.
#[derive(Default)]
pub(in crate::firecracker) struct ServedMemory(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    Nothing,
    Running(Arc<dyn SourceMemory>),
    Paused(Arc<dyn SourceMemory>),
}

impl std::fmt::Debug for ServedMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServedMemory").finish_non_exhaustive()
    }
}

impl ServedMemory {
    /// The machine runs, and its writes are noted.
    pub fn running(&self, memory: Arc<dyn SourceMemory>) {
        self.change(|_| State::Running(memory));
    }

    /// Its writes are not noted any more. What is there of the pause stays.
    pub fn untracked(&self) {
        self.change(|state| match state {
            State::Running(_) => State::Nothing,
            other => other,
        });
    }

    /// It is paused.
    pub fn paused(&self, memory: Arc<dyn SourceMemory>) {
        self.change(|_| State::Paused(memory));
    }

    /// It runs on, or is not needed any more.
    pub fn end(&self) {
        self.change(|_| State::Nothing);
    }

    fn change(&self, change: impl FnOnce(State) -> State) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = change(std::mem::take(&mut *state));
    }

    fn get(&self) -> io::Result<Arc<dyn SourceMemory>> {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Running(memory) | State::Paused(memory) => Ok(Arc::clone(memory)),
            State::Nothing => Err(io::Error::other("the VM is not paused")),
        }
    }
}

impl SourceMemory for ServedMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        self.get()?.read(range, out)
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        self.get()?.data_runs(data)
    }
}
