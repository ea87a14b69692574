//! A machine of another process, as the source of a move.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use lazyvm_server::port::{
    DirtyTracker, MachineError, Scout, SourceMachine, SourceMemory, TouchRecorder,
};
use lazyvm_wire::{Backing, Layout, MachineOffer, PAGE_SIZE, PageIndex, PageRange};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::control::{ControlClient, ControlError};
use super::lock;
use super::scout::KvmScout;
use super::tracker::KvmTracker;
use crate::attach::{Mapping, Process};
use crate::record::{Piece, Recorder};

/// A machine that runs in another process, reached by its control socket.
///
/// Dropping it leaves the machine as it is: a paused one stays paused.
#[derive(Debug)]
pub struct RemoteMachine {
    path: PathBuf,
    id: String,
    layout: Layout,
    offer: MachineOffer,
    memory: Arc<MemfdMemory>,
    /// `None` after the conversation broke.
    client: Mutex<Option<ControlClient>>,
}

/// The machine at the socket can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The conversation failed, or the machine refused.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The descriptor that came is not the memory that was described.
    #[error("the machine's memory file is {found} bytes long where its layout has {expected}")]
    Length {
        /// The file's length.
        found: u64,
        /// The layout's.
        expected: u64,
    },
    /// The descriptor can't be used.
    #[error("cannot use the machine's memory file")]
    File(#[source] io::Error),
    /// Another machine has taken the socket.
    #[error("another machine answers at {} now", path.display())]
    Replaced {
        /// Where.
        path: PathBuf,
    },
}

impl RemoteMachine {
    /// Connects to the machine whose control socket is at `path` and asks for its memory.
    ///
    /// # Errors
    /// [`RemoteError`]. The machine is not disturbed.
    pub fn connect(path: &Path) -> Result<Self, RemoteError> {
        let mut client = ControlClient::connect(path)?;
        let (info, file) = client.memory()?;
        let found = file.metadata().map_err(RemoteError::File)?.len();
        let expected = info.layout.bytes();
        if found != expected {
            return Err(RemoteError::Length { found, expected });
        }
        Ok(Self {
            path: path.to_owned(),
            id: info.id,
            layout: info.layout,
            offer: info.offer,
            memory: Arc::new(MemfdMemory {
                file,
                bytes: expected,
            }),
            client: Mutex::new(Some(client)),
        })
    }

    /// Which machine this is, of all that ever had the socket's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Makes a request, once more over a new connection if the old one broke: every request may be repeated.
    fn request<T>(
        &self,
        request: impl Fn(&mut ControlClient) -> Result<T, ControlError>,
    ) -> Result<T, RemoteError> {
        let mut kept = lock(&self.client);
        if let Some(client) = kept.as_mut() {
            match request(client) {
                Err(ControlError::Lost { source, .. }) => {
                    tracing::debug!(%source, "the machine's connection broke; making another");
                    *kept = None;
                }
                result => return Ok(result?),
            }
        }
        let mut client = ControlClient::connect(&self.path)?;
        if client.status()?.id != self.id {
            return Err(RemoteError::Replaced {
                path: self.path.clone(),
            });
        }
        let result = request(&mut client)?;
        *kept = Some(client);
        Ok(result)
    }
}

impl RemoteMachine {
    /// The machine's process, and where that has the memory mapped, as far as it is of small pages.
    fn find_memory(&self) -> Result<(Process, Vec<Piece>), MachineError> {
        let status = self.request(ControlClient::status)?;
        let process = Process::open(i32::try_from(status.pid)?)?;
        let mappings = process.mappings()?;
        let file = self.memory.file.metadata()?;
        let mut pieces = Vec::new();
        let mut first = PageIndex(0);
        for region in self.layout.regions() {
            let pages = PageRange::new(first, region.pages);
            let covers = |mapping: &&Mapping| {
                let bytes = mapping.end - mapping.start;
                mapping.is_of(&file)
                    && mapping.offset <= pages.first.byte_offset()
                    && mapping.offset + bytes >= pages.end().byte_offset()
            };
            if region.backing == Backing::Small
                && let Some(mapping) = mappings.iter().find(covers)
            {
                pieces.push(Piece {
                    host: mapping.start + (pages.first.byte_offset() - mapping.offset),
                    bytes: pages.bytes(),
                    first,
                });
            }
            first = pages.end();
        }
        Ok((process, pieces))
    }
}

impl SourceMachine for RemoteMachine {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn offer(&self) -> MachineOffer {
        self.offer.clone()
    }

    fn memory(&self) -> Arc<dyn SourceMemory> {
        Arc::clone(&self.memory) as _
    }

    fn scout(&self) -> Option<Box<dyn Scout>> {
        Some(Box::new(KvmScout::new(
            self.path.clone(),
            self.id.clone(),
            &self.layout,
            self.memory(),
        )))
    }

    fn recorder(&self) -> Option<Box<dyn TouchRecorder>> {
        match self.find_memory() {
            Ok((process, pieces)) => match Recorder::new(&process, pieces) {
                Ok(recorder) => return Some(Box::new(recorder)),
                Err(error) => tracing::debug!(%error, "the machine's touches can't be recorded"),
            },
            Err(error) => {
                tracing::debug!(%error, "the machine's memory is not found in its process")
            }
        }
        None
    }

    fn tracker(&self) -> Option<Box<dyn DirtyTracker>> {
        Some(Box::new(KvmTracker::new(
            self.path.clone(),
            self.id.clone(),
            self.layout.pages(),
        )))
    }

    fn pause(&self) -> Result<Vec<u8>, MachineError> {
        Ok(self.request(ControlClient::state)?)
    }

    /// By force: that the machine does not run elsewhere is what the server calls this for.
    fn resume(&self) -> Result<(), MachineError> {
        Ok(self.request(|client| client.resume(true))?)
    }

    /// A machine that is gone already is what this is for.
    fn release(&self) -> Result<(), MachineError> {
        match self.request(ControlClient::release) {
            Ok(()) | Err(RemoteError::Replaced { .. }) => Ok(()),
            Err(RemoteError::Control(ControlError::NotThere { .. })) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A machine's memory file, read without mapping it: neither page tables nor resident memory here.
#[derive(Debug)]
struct MemfdMemory {
    file: File,
    bytes: u64,
}

impl SourceMemory for MemfdMemory {
    fn read(&self, range: PageRange, out: &mut [u8]) -> io::Result<()> {
        if out.len() as u64 != range.bytes() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "buffer of another length",
            ));
        }
        self.file.read_exact_at(out, range.first.byte_offset())
    }

    fn data_runs(&self, data: &mut dyn FnMut(PageRange)) -> io::Result<()> {
        let mut offset = 0;
        while offset < self.bytes {
            let start = match lseek(&self.file, offset as i64, Whence::SeekData) {
                Ok(start) => start as u64,
                // No data from here to the end.
                Err(Errno::ENXIO) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            };
            let end = lseek(&self.file, start as i64, Whence::SeekHole)? as u64;
            let first = PageIndex::of_byte(start);
            let past = end.min(self.bytes).div_ceil(PAGE_SIZE as u64);
            data(PageRange::new(first, past.saturating_sub(first.0)));
            offset = end.max(start + 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::Backing;

    use super::super::memory::GuestRam;
    use super::*;

    #[test]
    fn holes_are_left_out_and_data_reads_as_written() {
        let ram = GuestRam::new(64 << 20, Backing::Small).unwrap();
        ram.write_image(3 * 4096 + 100, &[1; 4096]).unwrap();
        ram.write_image((64 << 20) - 1, &[2]).unwrap();
        let memory = MemfdMemory {
            file: ram.open_read_only().unwrap(),
            bytes: ram.layout().bytes(),
        };
        let mut runs = Vec::new();
        memory.data_runs(&mut |range| runs.push(range)).unwrap();
        assert_eq!(
            runs,
            [
                PageRange::new(PageIndex(3), 2),
                PageRange::new(PageIndex(16383), 1)
            ]
        );
        let mut page = vec![0; 4096];
        memory
            .read(PageRange::one(PageIndex(16383)), &mut page)
            .unwrap();
        assert_eq!(page[4095], 2);
        assert!(
            memory
                .read(PageRange::one(PageIndex(0)), &mut [0; 100])
                .is_err()
        );
        assert!(
            memory
                .read(PageRange::one(PageIndex(16384)), &mut page)
                .is_err()
        );
    }

    #[test]
    fn empty_memory_has_no_runs() {
        let ram = GuestRam::new(8 << 20, Backing::Small).unwrap();
        let memory = MemfdMemory {
            file: ram.open_read_only().unwrap(),
            bytes: 8 << 20,
        };
        memory.data_runs(&mut |range| panic!("{range}")).unwrap();
    }
}
