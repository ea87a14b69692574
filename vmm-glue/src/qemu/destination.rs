//! A QEMU that is started to take a VM over.
//!
//! The order of steps, which decides what the guest sees:
//!
//! 1. QEMU is started with `-incoming defer`. At its reset it writes firmware, option ROMs and a `-kernel` image into its
//!    RAM; from then on it waits and touches RAM no more.
//! 2. Its RAM is registered with a userfaultfd of its own, and then emptied through the file behind it. Emptying takes
//!    the pages out of every mapping, so that from there on each touch is a fault. The other order would leave a gap in
//!    which a page could come back unnoticed.
//! 3. The pager serves faults, the source pauses, and its state is loaded: QEMU touches RAM while it loads, and gets
//!    the source's pages.
//!
//! QEMU keeps a descriptor of the userfaultfd: when lazyvm dies, absent pages stay absent, and who touches one waits.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_pager::install::Registration;
use lazyvm_pager::port::{DestinationMachine, MachineError};
use lazyvm_pager::uffd::RegisterError;
use lazyvm_pager::{InstallMode, LazyMemory};
use lazyvm_wire::{Layout, MachineOffer};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::PollTimeout;
use serde_json::json;

use super::memory::{self, MemoryError};
use super::offer::{Offer, OfferError};
use super::qmp::{Qmp, QmpError};
use super::ram;
use super::transfer::{self, TransferError};
use crate::attach::{self, AttachError, Process};

/// How long QEMU may take until it answers: it may have to find gigabytes of huge pages first.
const ANSWERS_WITHIN: Duration = Duration::from_secs(120);

/// How long one may take that is to be ended.
const UNUSED_ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// How long one that says that it went into the background (`-daemonize`) may take.
const DAEMON_ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// How often is looked whether it answers.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Its socket, in a directory of its own.
const SOCKET: &str = "qmp";

/// How long a VM may take to be running after `cont`.
const RUN_WITHIN: Duration = Duration::from_secs(10);

/// A command that starts a QEMU.
#[derive(Clone, Debug)]
pub struct Command {
    /// The program.
    pub program: OsString,
    /// Its arguments, without `-incoming`.
    pub arguments: Vec<OsString>,
}

/// A VM that can't be taken over. It runs on at the source.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// An argument that can't be.
    #[error("leave {0} out of QEMU's arguments: lazyvm adds what it needs itself")]
    Argument(String),
    /// A device that reads RAM behind QEMU's back.
    #[error(
        "{0}: vhost-user devices run in a process of their own, which would not wait for pages that are still to come; \
         leave them out"
    )]
    VhostUser(String),
    /// The RAM is somebody's already.
    #[error(
        "the RAM file {} is in use by process {pid}; name another file with mem-path, since QEMU would write over that \
         process's memory", path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// By whom.
        pid: i32,
    },
    /// Not startable.
    #[error("can't start {program}")]
    Start {
        /// What.
        program: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It ended.
    #[error("QEMU ended before the VM was there ({0}); its own messages say why")]
    Ended(ExitStatus),
    /// It does not come up.
    #[error("QEMU does not answer on its QMP socket")]
    Silent(#[source] QmpError),
    /// It does not wait for a VM.
    #[error("this QEMU is {0}, where it should wait for a VM")]
    NotWaiting(String),
    /// The conversation.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// It is no QEMU like the source's.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// Its RAM.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its RAM, for the pager.
    #[error("this QEMU's RAM cannot be filled lazily")]
    LazyMemory(#[from] lazyvm_pager::memory::MemoryError),
    /// Its RAM is not like the source's.
    #[error(
        "this QEMU's RAM is {here}, and the source's is {there}; start it with the source's -m, -object and -machine"
    )]
    Layout {
        /// The source's.
        there: String,
        /// This one's.
        here: String,
    },
    /// Attaching.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// Registering.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The state.
    #[error("QEMU does not take the VM's device state; is it started with the source's devices?")]
    Transfer(#[from] TransferError),
    /// The steps were mixed up.
    #[error("there is no QEMU yet")]
    NotPrepared,
    /// It does not run.
    #[error("the VM is {0} after cont; look at QEMU's own messages")]
    DidNotRun(String),
}

impl DestinationError {
    fn start(command: &Command, source: io::Error) -> Self {
        Self::Start {
            program: command.program.to_string_lossy().into_owned(),
            source,
        }
    }
}

/// See the module. Dropped before the VM runs, it ends QEMU.
#[derive(Debug)]
pub struct Destination {
    command: Command,
    install: InstallMode,
    running: Running,
    starting: Starting,
    qemu: Option<Qemu>,
}

/// A QEMU that was started ahead and that nobody has taken a VM into. Dropped, it ends that.
#[derive(Debug)]
pub struct Ahead {
    starting: Starting,
    command: Command,
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Some(waiting) = self.starting.take() {
            // It may have gone into the background, or a wrapper may have started it: who answers is the one to be ended.
            drop(Qemu::of(waiting, &self.command, UNUSED_ANSWERS_WITHIN));
        }
    }
}

/// Where a QEMU that was started ahead waits to be used.
#[derive(Clone, Debug, Default)]
struct Starting(Arc<Mutex<Option<Waiting>>>);

impl Starting {
    fn take(&self) -> Option<Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The QEMU process, for whoever goes on with it after the move.
#[derive(Clone, Debug, Default)]
pub struct Running(Arc<Mutex<Option<Started>>>);

#[derive(Debug)]
struct Started {
    child: Child,
    /// Where it is not the child: a wrapper started it, or it went into the background.
    process: Process,
}

impl Running {
    /// Whether it has ended, and how where that can be told.
    pub fn ended(&self) -> Option<Option<ExitStatus>> {
        let mut started = self.started();
        let started = started.as_mut()?;
        let same = started.child.id() as i32 == started.process.pid();
        match started.child.try_wait() {
            Ok(Some(status)) if same => Some(Some(status)),
            _ if started.process.has_ended() => Some(None),
            _ => None,
        }
    }

    /// Its process number.
    pub fn pid(&self) -> Option<i32> {
        Some(self.started().as_ref()?.process.pid())
    }

    fn started(&self) -> MutexGuard<'_, Option<Started>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Destination {
    /// Nothing is started yet.
    pub fn new(command: Command, install: InstallMode) -> Self {
        Self {
            command,
            install,
            running: Running::default(),
            starting: Starting::default(),
            qemu: None,
        }
    }

    /// Starts QEMU, so that it comes up while the source is still being asked for its offer. Whoever calls this keeps what
    /// it gives for as long as there may be an end without [`DestinationMachine::prepare`].
    ///
    /// # Errors
    /// [`DestinationError`]; nothing was started.
    pub fn start_ahead(&self) -> Result<Ahead, DestinationError> {
        check_arguments(&self.command.arguments)?;
        let waiting = Waiting::start(&self.command)?;
        *self
            .starting
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(waiting);
        Ok(Ahead {
            starting: self.starting.clone(),
            command: self.command.clone(),
        })
    }

    /// Where its process will be found once the VM runs.
    pub fn running(&self) -> Running {
        self.running.clone()
    }

    /// What [`DestinationMachine::prepare`] does.
    ///
    /// # Errors
    /// [`DestinationError`]; QEMU has been ended.
    pub fn prepare_qemu(
        &mut self,
        layout: &Layout,
        offer: &MachineOffer,
    ) -> Result<LazyMemory, DestinationError> {
        let there = Offer::decode(offer)?;
        let waiting = match self.starting.take() {
            Some(waiting) => waiting,
            None => {
                check_arguments(&self.command.arguments)?;
                Waiting::start(&self.command)?
            }
        };
        let mut qemu = Qemu::of(waiting, &self.command, ANSWERS_WITHIN)?;
        let qmp = &mut qemu.qmp;
        let status = qmp.status()?;
        if status != "inmigrate" {
            return Err(DestinationError::NotWaiting(status));
        }
        there.check(&Offer::of(qmp)?)?;
        transfer::configure(qmp)?;
        let regions = memory::find(qmp, &qemu.process, true)?;
        memory::check_named(qmp)?;
        let here = memory::layout(&regions).map_err(MemoryError::from)?;
        if here != *layout {
            return Err(DestinationError::Layout {
                there: describe(layout),
                here: describe(&here),
            });
        }
        for region in &regions {
            let others = memory::users(&region.file, &[qemu.process.pid()]);
            if let Some(&pid) = others.first() {
                let path = PathBuf::from(&region.name);
                return Err(DestinationError::InUse { path, pid });
            }
        }
        let lazy = regions.iter().map(memory::RamRegion::lazy).collect();
        let lazy = LazyMemory::in_other_process(lazy, self.install)?;
        // A balloon gives pages back.
        let attached = qemu.process.userfaultfd(&lazy, true)?;
        attached.uffd.register(&lazy)?;
        for region in &regions {
            ram::empty(region)?;
        }
        self.qemu = Some(qemu);
        Ok(lazy.with_userfaultfd(attached.uffd, Registration::Done))
    }

    /// What [`DestinationMachine::load`] does.
    ///
    /// # Errors
    /// [`DestinationError`]; QEMU is of no use then.
    pub fn load_state(&mut self, state: &[u8]) -> Result<(), DestinationError> {
        let qemu = self.qemu.as_mut().ok_or(DestinationError::NotPrepared)?;
        let start = Instant::now();
        let result = transfer::open(&mut qemu.qmp)
            .and_then(|socket| transfer::load(&mut qemu.qmp, socket, state));
        // One that does not like its state ends, and its status says more than a lost connection.
        if let Err(TransferError::Qmp(QmpError::Lost { .. })) = result
            && let Some(status) = qemu.status_soon()
        {
            return Err(DestinationError::Ended(status));
        }
        result?;
        tracing::info!(
            load_us = start.elapsed().as_micros() as u64,
            "the device state is loaded"
        );
        Ok(())
    }

    /// What [`DestinationMachine::start`] does.
    ///
    /// # Errors
    /// [`DestinationError`].
    pub fn start_vm(&mut self) -> Result<(), DestinationError> {
        let qemu = self.qemu.as_mut().ok_or(DestinationError::NotPrepared)?;
        let start = Instant::now();
        let deadline = start + RUN_WITHIN;
        qemu.qmp.run("cont", json!({}))?;
        loop {
            let status = qemu.qmp.status()?;
            if status == "running" {
                break;
            }
            if Instant::now() > deadline {
                return Err(DestinationError::DidNotRun(status));
            }
            thread::sleep(Duration::from_millis(1));
        }
        tracing::debug!(cont_us = start.elapsed().as_micros() as u64, "the VM runs");
        // From here on it is the user's.
        if let Some(qemu) = self.qemu.take() {
            *self.running.started() = qemu.let_go();
        }
        Ok(())
    }
}

impl DestinationMachine for Destination {
    fn prepare(
        &mut self,
        layout: &Layout,
        offer: &MachineOffer,
    ) -> Result<LazyMemory, MachineError> {
        Ok(self.prepare_qemu(layout, offer)?)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), MachineError> {
        Ok(self.load_state(state)?)
    }

    fn start(&mut self) -> Result<(), MachineError> {
        Ok(self.start_vm()?)
    }
}

/// A QEMU that has no VM yet. Dropped, it ends.
#[derive(Debug)]
struct Qemu {
    started: Option<Started>,
    process: Process,
    qmp: Qmp,
}

impl Qemu {
    /// Waits until it answers.
    fn of(
        mut waiting: Waiting,
        command: &Command,
        within: Duration,
    ) -> Result<Self, DestinationError> {
        let start = |source| DestinationError::start(command, source);
        let qmp = waiting.connect(within)?;
        let pid = qmp.peer().map_err(start)?;
        let process = Process::open(pid)?;
        let for_later = Process::open(pid)?;
        Ok(Self {
            started: waiting.child.take().map(|child| Started {
                child,
                process: for_later,
            }),
            process,
            qmp,
        })
    }

    /// How it ended, if it does so now.
    fn status_soon(&mut self) -> Option<ExitStatus> {
        self.process.wait(PollTimeout::from(2000_u16));
        self.started.as_mut()?.child.try_wait().ok()?
    }

    fn let_go(mut self) -> Option<Started> {
        self.started.take()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if let Some(mut started) = self.started.take() {
            // It may wait for a page that does not come, which this ends as well.
            if started.process.pid() != started.child.id() as i32 {
                started.process.kill();
            }
            let _ = started.child.kill();
            let _ = started.child.wait();
        }
    }
}

/// A QEMU that does not answer yet. Dropped, it ends.
#[derive(Debug)]
struct Waiting {
    child: Option<Child>,
    /// Where its socket is.
    home: tempfile::TempDir,
}

impl Waiting {
    fn start(command: &Command) -> Result<Self, DestinationError> {
        let start = |source| DestinationError::start(command, source);
        let home = tempfile::Builder::new()
            .prefix("lazyvm-qemu-")
            .tempdir()
            .map_err(start)?;
        // A comma ends a value, two are one.
        let escaped = home.path().join(SOCKET);
        let escaped = escaped.to_string_lossy().replace(',', ",,");
        let mut spawn = std::process::Command::new(&command.program);
        spawn
            .args(&command.arguments)
            .args(["-incoming", "defer", "-qmp"])
            .arg(format!("unix:{escaped},server=on,wait=off"))
            // Signals to this command's group, as a terminal sends them, are not for the VM.
            .process_group(0);
        if io::IsTerminal::is_terminal(&io::stdin()) {
            // Not of the terminal's group, it would be stopped when it reads.
            spawn.stdin(Stdio::null());
        }
        // QEMU inherits it, so that it gets its userfaultfd with lazyvm's rights and not with its own.
        let device = File::options()
            .read(true)
            .write(true)
            .open(attach::DEVICE)
            .ok();
        if let Some(device) = &device {
            fcntl(device, FcntlArg::F_SETFD(FdFlag::empty()))
                .map_err(|errno| start(errno.into()))?;
        }
        let child = Some(spawn.spawn().map_err(start)?);
        Ok(Self { child, home })
    }

    fn connect(&mut self, within: Duration) -> Result<Qmp, DestinationError> {
        let socket = self.home.path().join(SOCKET);
        let mut deadline = Instant::now() + within;
        let mut in_background = false;
        loop {
            let error = match Qmp::connect(&socket) {
                Ok(qmp) => return Ok(qmp),
                Err(error) => error,
            };
            let ended = self.child.as_mut().and_then(|child| child.try_wait().ok()?);
            match ended {
                Some(status) if !status.success() => return Err(DestinationError::Ended(status)),
                // Into the background, perhaps.
                Some(_) if !in_background => {
                    in_background = true;
                    deadline = Instant::now() + DAEMON_ANSWERS_WITHIN;
                }
                Some(status) if Instant::now() > deadline => {
                    return Err(DestinationError::Ended(status));
                }
                None if Instant::now() > deadline => return Err(DestinationError::Silent(error)),
                _ => {}
            }
            thread::sleep(LOOK_EVERY);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What of the arguments can be told to be wrong before anything is started.
fn check_arguments(arguments: &[OsString]) -> Result<(), DestinationError> {
    for argument in arguments {
        let text = argument.to_string_lossy();
        if matches!(text.as_ref(), "-incoming" | "--incoming") {
            return Err(DestinationError::Argument(text.into_owned()));
        }
        if text.contains("vhost-user") {
            return Err(DestinationError::VhostUser(text.into_owned()));
        }
        for path in text
            .split(',')
            .filter_map(|part| part.strip_prefix("mem-path="))
        {
            let path = PathBuf::from(path);
            let file = File::open(&path).ok();
            let regular = file.filter(|file| file.metadata().is_ok_and(|found| found.is_file()));
            if let Some(&pid) = regular
                .map(|file| memory::users(&file, &[]))
                .unwrap_or_default()
                .first()
            {
                return Err(DestinationError::InUse { path, pid });
            }
        }
    }
    Ok(())
}

/// A layout in words.
fn describe(layout: &Layout) -> String {
    let regions = layout.regions().iter().map(|region| {
        let gpa = region.gpa.map_or(0, |gpa| gpa.0);
        let pages = match region.backing {
            lazyvm_wire::Backing::Small => "",
            lazyvm_wire::Backing::Huge2M => " of huge pages",
        };
        format!(
            "{} ({} MiB{pages} at {gpa:#x})",
            region.name,
            region.pages >> 8
        )
    });
    regions.collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn arguments_that_can_not_be_are_refused_before_anything_is_started() {
        check_arguments(&arguments(
            "-m 512 -object memory-backend-file,mem-path=/nowhere,share=on",
        ))
        .unwrap();
        let incoming = check_arguments(&arguments("-m 1 -incoming defer")).unwrap_err();
        assert!(incoming.to_string().contains("-incoming"), "{incoming}");
        let vhost = check_arguments(&arguments("-device vhost-user-fs-pci,x")).unwrap_err();
        assert!(matches!(vhost, DestinationError::VhostUser(_)), "{vhost}");
    }
}
