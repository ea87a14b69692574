//! Putting claimed pages in place: the ioctls, and what to do where they stop half-way.
//!
//! Another process may map something new over its memory without a word (the balloon of Firecracker 1.1 to 1.10 does, after
//! a restore). What was there has been given back, and the new memory is not registered: nothing is to be put there any more.
//! An install over its edge fails as a whole, so it is done unit by unit.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use lazyvm_wire::{Backing, PAGE_SHIFT, PageRange};
use nix::errno::Errno;

use crate::hole::punch_hole;
use crate::install::Shelf;
use crate::memory::{InstallMode, LazyMemory};
use crate::removal::Patience;
use crate::sys::Mapping;
use crate::uffd::{Place, Progress, RegisterError, Uffd};

/// What a run of pages is filled with.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    /// Its bytes, as long as the run.
    Data(&'a [u8]),
    Zeros,
}

impl<'a> Content<'a> {
    pub(crate) fn from(self, offset: u64) -> Self {
        match self {
            Self::Data(data) => Self::Data(data.get(offset as usize..).unwrap_or_default()),
            Self::Zeros => Self::Zeros,
        }
    }
}

/// Why a run was not filled to its end.
#[derive(Debug)]
pub(crate) enum Cause {
    /// An event has to be read before anything can be installed.
    EventUnread,
    /// The kernel answered `EAGAIN` for too long.
    Stuck,
    Gone(Errno),
    Kernel(Errno),
    Write(io::Error),
    Read(io::Error),
}

/// A run that was filled up to some page.
#[derive(Debug)]
pub(crate) struct Stopped {
    /// Pages from its start that are in place.
    pub(crate) pages: u64,
    pub(crate) cause: Cause,
}

/// Memory with its userfaultfd, and the ways to fill it.
pub(crate) struct Filler {
    pub(crate) memory: Arc<LazyMemory>,
    pub(crate) uffd: Uffd,
    /// A second mapping of each region that needs one: hugetlbfs has no `write`.
    aliases: Box<[Option<Mapping>]>,
    /// Where pages lie that came early, if not in the memory's own file.
    pub(crate) shelf: Option<Arc<Shelf>>,
    /// A huge page of zeros, made when it is first needed: hugetlbfs has no `UFFDIO_ZEROPAGE`.
    zeros: OnceLock<Box<[u8]>>,
    /// Whether `EAGAIN` may mean that an event must be read first.
    removals: bool,
    /// Whether what is not registered any more is no reason to stop: private memory of another process.
    may_be_mapped_over: bool,
}

/// A claimed run's place in host memory and in its file.
#[derive(Clone, Copy)]
struct Target {
    region: usize,
    host: u64,
    /// From the region's start.
    offset: u64,
    bytes: u64,
    backing: Backing,
}

impl Filler {
    pub(crate) fn new(memory: Arc<LazyMemory>, uffd: Uffd) -> Result<Self, RegisterError> {
        let mut aliases = Vec::with_capacity(memory.regions().len());
        for (number, region) in memory.regions().iter().enumerate() {
            let alias = match (memory.mode(), region.backing, &region.file) {
                (InstallMode::Minor, Backing::Huge2M, Some((file, offset))) => {
                    let alias = Mapping::shared(file, *offset, region.bytes());
                    Some(alias.map_err(|source| RegisterError::Alias {
                        region: number,
                        source,
                    })?)
                }
                _ => None,
            };
            aliases.push(alias);
        }
        Ok(Self {
            removals: uffd.reports_removals(),
            may_be_mapped_over: memory.place == Place::OtherProcess
                && memory.mode() == InstallMode::Missing,
            memory,
            uffd,
            aliases: aliases.into(),
            shelf: None,
            zeros: OnceLock::new(),
        })
    }

    /// Installs `content` in a claimed run (whole units of one region) and wakes who waits there.
    ///
    /// A page that somebody else installed is left as it is, and its waiters are woken.
    pub(crate) fn fill(&self, run: PageRange, content: Content<'_>) -> Result<(), Stopped> {
        let Some(target) = self.target(run) else {
            return Err(Stopped {
                pages: 0,
                cause: Cause::Gone(Errno::ENOENT),
            });
        };
        let mut done = 0;
        self.fill_target(target, content, &mut done)
            .map_err(|cause| Stopped {
                pages: done >> PAGE_SHIFT,
                cause,
            })
    }

    /// Serves a touch of a unit that was installed before, and that the kernel reports again.
    ///
    /// Mostly the touch was just slower than the install, and needs waking. But the kernel may also have taken the
    /// page out of the map since: it unmaps shared pages to reclaim or migrate them, and gives back to the system
    /// what a guest discards while removals are not reported. What the file holds is mapped again; a hole is zero.
    pub(crate) fn settle(&self, unit: PageRange) -> Result<(), Cause> {
        let Some(target) = self.target(unit) else {
            return Err(Cause::Gone(Errno::ENOENT));
        };
        let mut patience = Patience::new();
        loop {
            let mut progress = match self.memory.mode() {
                InstallMode::Minor => self.uffd.map_existing(target.host, target.bytes),
                InstallMode::Missing => Progress::Hole,
            };
            if progress == Progress::Hole {
                progress = self.put_around_gaps(target, Content::Zeros, 0);
            }
            match progress {
                Progress::Bytes(_) => return Ok(()),
                Progress::Exists => return self.wake(target.host, target.bytes),
                other => self.go_on_after(other, &mut patience)?,
            }
        }
    }

    /// Writes to the file behind pages that are not mapped, nor will be while this runs.
    pub(crate) fn write_aside(&self, run: PageRange, data: &[u8]) -> Result<(), Cause> {
        if let Some(shelf) = &self.shelf {
            return shelf.write(run, data).map_err(Cause::Write);
        }
        let Some(target) = self.target(run) else {
            return Err(Cause::Gone(Errno::ENOENT));
        };
        self.write(target, Content::Data(data), 0)
    }

    /// Copies a claimed run from the shelf to its place, and wakes who waits there. After a failure all of it is on the
    /// shelf still, some of it maybe in place too.
    fn unshelve(&self, shelf: &Shelf, run: PageRange) -> Result<(), Cause> {
        let mut bytes = vec![0; run.bytes() as usize];
        shelf.read(run, &mut bytes).map_err(Cause::Write)?;
        self.fill(run, Content::Data(&bytes))
            .map_err(|stopped| stopped.cause)?;
        if let Err(error) = shelf.clear(run) {
            tracing::debug!(%run, %error, "the room of pages that are in place can't be freed");
        }
        Ok(())
    }

    /// Maps what the file holds behind a claimed run, and wakes who waits there; gives the pages up to the first hole.
    pub(crate) fn map_run(&self, run: PageRange) -> Result<u64, Cause> {
        if let Some(shelf) = &self.shelf {
            return self.unshelve(shelf, run).map(|()| run.count);
        }
        let Some(target) = self.target(run) else {
            return Err(Cause::Gone(Errno::ENOENT));
        };
        let unit = target.backing.bytes();
        let mut patience = Patience::new();
        let mut done = 0;
        while done < target.bytes {
            let host = target.host + done;
            match self.uffd.map_existing(host, target.bytes - done) {
                Progress::Bytes(bytes) => done += bytes,
                Progress::Exists => {
                    self.wake(host, unit)?;
                    done += unit;
                }
                Progress::Hole => break,
                other => self.go_on_after(other, &mut patience)?,
            }
        }
        Ok(done >> PAGE_SHIFT)
    }

    /// Reads what the file holds.
    pub(crate) fn read_file(&self, run: PageRange, out: &mut [u8]) -> io::Result<()> {
        if let Some(shelf) = &self.shelf {
            return shelf.read(run, out);
        }
        let target = self.target(run).ok_or(io::ErrorKind::InvalidInput)?;
        match &self.memory.regions()[target.region].file {
            Some((file, start)) => file.read_exact_at(out, start + target.offset),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Makes a hole of claimed pages in their file, so that it holds nothing but zeros there. No-op without a file.
    pub(crate) fn punch(&self, run: PageRange) -> Result<(), Cause> {
        let Some(target) = self.target(run) else {
            return Err(Cause::Gone(Errno::ENOENT));
        };
        let Some((file, start)) = &self.memory.regions()[target.region].file else {
            return Ok(());
        };
        punch_hole(file, start + target.offset, target.bytes).map_err(Cause::Write)
    }

    /// Wakes all who wait for a page of `range`.
    pub(crate) fn wake_range(&self, range: PageRange) -> Result<(), Cause> {
        let mut rest = range;
        while let Some((region, offset)) = self.memory.locate(rest.first) {
            let found = &self.memory.regions()[region];
            let pages = rest.count.min(found.pages - offset);
            if pages == 0 {
                break;
            }
            self.wake(found.host + (offset << PAGE_SHIFT), pages << PAGE_SHIFT)?;
            rest = PageRange::new(PageRange::new(rest.first, pages).end(), rest.count - pages);
        }
        Ok(())
    }

    fn fill_target(
        &self,
        target: Target,
        content: Content<'_>,
        done: &mut u64,
    ) -> Result<(), Cause> {
        let unit = target.backing.bytes();
        let mut patience = Patience::new();
        while *done < target.bytes {
            match self.put_around_gaps(target, content, *done) {
                Progress::Bytes(bytes) => *done += bytes,
                Progress::Exists if self.memory.mode() == InstallMode::Minor => {
                    // The file holds something here that went stale, and maybe behind it too.
                    self.write(target, content, *done)?;
                    return self.map_all(target, done, &mut patience);
                }
                Progress::Exists => {
                    self.wake(target.host + *done, unit)?;
                    *done += unit;
                }
                other => self.go_on_after(other, &mut patience)?,
            }
        }
        Ok(())
    }

    /// Maps what was just written to the file, up to the end of `target`.
    fn map_all(
        &self,
        target: Target,
        done: &mut u64,
        patience: &mut Patience,
    ) -> Result<(), Cause> {
        let unit = target.backing.bytes();
        while *done < target.bytes {
            let host = target.host + *done;
            let mut progress = self.uffd.map_existing(host, target.bytes - *done);
            if progress == Progress::Hole {
                // Somebody discarded it since it was written: it is zero.
                let hole = Target {
                    host,
                    bytes: unit,
                    ..target
                };
                progress = self.put(hole, Content::Zeros, 0);
            }
            match progress {
                Progress::Bytes(bytes) => *done += bytes,
                Progress::Exists => {
                    self.wake(host, unit)?;
                    *done += unit;
                }
                other => self.go_on_after(other, patience)?,
            }
        }
        Ok(())
    }

    /// [`Self::put`], where parts may not be registered any more. Those count as done.
    fn put_around_gaps(&self, target: Target, content: Content<'_>, done: u64) -> Progress {
        let progress = self.put(target, content, done);
        if !self.may_be_mapped_over || progress != Progress::Gone(Errno::ENOENT) {
            return progress;
        }
        let unit = target.backing.bytes();
        let one = Target {
            host: target.host + done,
            offset: target.offset + done,
            bytes: unit,
            ..target
        };
        let content = match content.from(done) {
            Content::Data(data) => Content::Data(data.get(..unit as usize).unwrap_or_default()),
            Content::Zeros => Content::Zeros,
        };
        match self.put(one, content, 0) {
            Progress::Gone(Errno::ENOENT) => match self.uffd.wake(one.host, unit) {
                Ok(()) => Progress::Bytes(unit),
                Err(errno) => Progress::of_errno(errno),
            },
            progress => progress,
        }
    }

    /// Installs over holes, from `done` on, as far as one call gets.
    fn put(&self, target: Target, content: Content<'_>, done: u64) -> Progress {
        let host = target.host + done;
        let progress = match (content.from(done), target.backing) {
            (Content::Data(data), _) => self.uffd.copy(host, data),
            (Content::Zeros, Backing::Small) => self.uffd.zero(host, target.bytes - done),
            (Content::Zeros, Backing::Huge2M) => self.uffd.copy(host, self.zeros()),
        };
        match progress {
            // No kernel reports this; trusting it would loop for ever.
            Progress::Bytes(0) => Progress::Failed(Errno::EIO),
            progress => progress,
        }
    }

    /// Writes to the file behind claimed pages, which are not mapped where the guest could see it.
    fn write(&self, target: Target, content: Content<'_>, done: u64) -> Result<(), Cause> {
        match content.from(done) {
            Content::Data(data) => self.write_bytes(target, done, data),
            Content::Zeros => {
                let zeros = self.zeros();
                let mut at = done;
                while at < target.bytes {
                    let length = (target.bytes - at).min(zeros.len() as u64);
                    self.write_bytes(target, at, &zeros[..length as usize])?;
                    at += length;
                }
                Ok(())
            }
        }
    }

    fn write_bytes(&self, target: Target, at: u64, data: &[u8]) -> Result<(), Cause> {
        if let Some(alias) = self.aliases.get(target.region).and_then(Option::as_ref) {
            let mut patience = Patience::new();
            loop {
                match alias.write(target.offset + at, data) {
                    // Somebody gave the page back meanwhile, and others have taken the pool's last one for a moment.
                    Err(Errno::EFAULT) if patience.wait_briefly() => {}
                    written => return written.map_err(|errno| Cause::Write(errno.into())),
                }
            }
        }
        match &self.memory.regions()[target.region].file {
            Some((file, start)) => file
                .write_all_at(data, start + target.offset + at)
                .map_err(Cause::Write),
            None => Err(Cause::Write(Errno::EBADF.into())),
        }
    }

    /// Waits where the call is worth trying again, and gives the cause where it is not.
    fn go_on_after(&self, progress: Progress, patience: &mut Patience) -> Result<(), Cause> {
        match progress {
            Progress::Again if self.removals => Err(Cause::EventUnread),
            Progress::Again if patience.wait() => Ok(()),
            Progress::Again => Err(Cause::Stuck),
            Progress::Gone(errno) => Err(Cause::Gone(errno)),
            // A pool of huge pages that is just large enough runs out while another install holds one for its copy.
            Progress::Failed(Errno::ENOMEM) if patience.wait_briefly() => Ok(()),
            Progress::Failed(errno) => Err(Cause::Kernel(errno)),
            Progress::Hole => Err(Cause::Kernel(Errno::EFAULT)),
            Progress::Exists | Progress::Bytes(_) => Ok(()),
        }
    }

    fn wake(&self, host: u64, bytes: u64) -> Result<(), Cause> {
        self.uffd.wake(host, bytes).map_err(|errno| match errno {
            Errno::ENOENT | Errno::ESRCH => Cause::Gone(errno),
            errno => Cause::Kernel(errno),
        })
    }

    fn zeros(&self) -> &[u8] {
        self.zeros
            .get_or_init(|| vec![0; Backing::Huge2M.bytes() as usize].into())
    }

    fn target(&self, run: PageRange) -> Option<Target> {
        let (region, page) = self.memory.locate(run.first)?;
        let found = &self.memory.regions()[region];
        let offset = page << PAGE_SHIFT;
        (run.count <= found.pages - page).then(|| Target {
            region,
            host: found.host + offset,
            offset,
            bytes: run.bytes(),
            backing: found.backing,
        })
    }
}

thread_local! {
    /// Where buffers in pieces are joined: `UFFDIO_COPY` takes one source, and a huge page is installed as a whole.
    static STAGING: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Goes through the bytes of several buffers as if they were one.
pub(crate) struct Gather<'a> {
    slices: &'a [IoSlice<'a>],
    /// Bytes of the first slice that are used up.
    used: usize,
}

impl<'a> Gather<'a> {
    pub(crate) fn new(slices: &'a [IoSlice<'a>]) -> Self {
        Self { slices, used: 0 }
    }

    /// Passes the next `length` bytes on, joined only where they are not together already. There must be as many.
    pub(crate) fn take<R>(&mut self, length: usize, take: impl FnOnce(&[u8]) -> R) -> R {
        self.skip_empty();
        if let Some(first) = self.slices.first()
            && first.len() - self.used >= length
        {
            let together = &first[self.used..self.used + length];
            self.used += length;
            return take(together);
        }
        STAGING.with_borrow_mut(|staging| {
            staging.clear();
            while staging.len() < length {
                self.skip_empty();
                let Some(first) = self.slices.first() else {
                    break;
                };
                let piece = (first.len() - self.used).min(length - staging.len());
                staging.extend_from_slice(&first[self.used..self.used + piece]);
                self.used += piece;
            }
            take(staging)
        })
    }

    fn skip_empty(&mut self) {
        while let Some((first, rest)) = self.slices.split_first()
            && self.used == first.len()
        {
            self.slices = rest;
            self.used = 0;
        }
    }
}
