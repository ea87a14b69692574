//! `lazyvm resume`: the destination's side of a move.

mod firecracker;
mod machine;
mod qemu;

use std::ffi::OsString;
use std::mem::ManuallyDrop;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use lazyvm_pager::{Filling, InstallMode, Offer, Options, PagerError, Report};
use lazyvm_vmm_glue::kvm::{Destination, DestinationConfig, SerialTarget};
use lazyvm_vmm_glue::qemu::Command;
use lazyvm_wire::Ticket;

use crate::events::{Event, Events};
use crate::exit::{Exit, Problem};
use crate::metrics::StatusPage;
use crate::progress::Meter;
use crate::run::serial_target;
use crate::signals::Signals;
use crate::{files, sys, ticket};
use machine::{Cancel, Cancellable};

/// How often progress is looked at.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Flags of `resume`.
#[derive(Args)]
pub struct ResumeArgs {
    /// The ticket that lazyvm serve printed: its text, @FILE, or - for standard input
    ///
    /// A ticket is a secret. Its text on the command line is overwritten as soon as this command runs, so that lists of
    /// processes do not show it; until then they do, and the shell's history keeps it. @FILE and - have neither flaw.
    ticket: String,
    /// Take the VM into a fresh, idle Firecracker, by its API socket; it runs on there when this command has ended
    #[arg(long, value_name = "API_SOCK", conflicts_with_all = ["qemu", "control", "serial", "stay", "install"])]
    firecracker: Option<PathBuf>,
    /// Take the VM into the QEMU that is started with the command after --
    #[arg(long, requires = "command", conflicts_with_all = ["control", "serial"])]
    qemu: bool,
    /// Make the VM's control socket here; without it, in a directory of its own, which the log names
    #[arg(long, value_name = "SOCK")]
    control: Option<PathBuf>,
    /// Where the guest's serial output goes: appended to a file, or to standard output; without it, nowhere
    #[arg(long, value_name = "FILE|stdio", value_parser = serial_target)]
    serial: Option<SerialTarget>,
    /// Go on after the move until the VM ends or is moved on; without it the VM ends with this command
    #[arg(long)]
    stay: bool,
    /// Write what the move cost to this file, as one JSON object; also when a signal breaks it off
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Compare a hash of every page with the source's, taken at the pause
    #[arg(long)]
    verify: bool,
    /// How pages are put into the VM's memory
    #[arg(long, default_value = "minor")]
    install: Install,
    /// A disk that moved along (not in this release); may be repeated
    #[arg(long, value_name = "NAME=SOCK")]
    disk: Vec<String>,
    /// Serve metrics for Prometheus here, at /metrics; loopback only
    #[arg(long, value_name = "127.0.0.1:PORT")]
    status_addr: Option<SocketAddr>,
    /// The QEMU that takes the VM, and its arguments: the source's, without -incoming, with RAM of its own
    #[arg(last = true, value_name = "QEMU_COMMAND")]
    command: Vec<OsString>,
}

/// How pages are put into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Install {
    /// Copied by the kernel (UFFDIO_COPY)
    Missing,
    /// Written through a second mapping, then mapped (UFFDIO_CONTINUE): the faster one
    Minor,
}

impl From<Install> for InstallMode {
    fn from(install: Install) -> Self {
        match install {
            Install::Missing => Self::Missing,
            Install::Minor => Self::Minor,
        }
    }
}

/// How the hand-over went: the machine runs here, or does not.
struct Resumed {
    result: Result<Filling, PagerError>,
    /// Of the machine's own failure, which the pager knows in words only.
    exit: Option<Exit>,
}

impl ResumeArgs {
    fn refuse_what_is_not_there(&self) -> Result<(), Problem> {
        let later = [(!self.disk.is_empty(), "--disk")];
        match later.iter().find(|(asked, _)| *asked) {
            Some((_, what)) => Err(Problem::not_in_this_release(what)),
            None => Ok(()),
        }
    }

    /// What becomes of a VM whose memory has not arrived when this command ends.
    fn what_an_end_leaves(&self) -> &'static str {
        if self.qemu || self.firecracker.is_some() {
            "the VM waits in its own process, for ever, at the first page that is not there"
        } else {
            "the VM has ended with it"
        }
    }

    /// The command that starts the QEMU that was asked for.
    fn qemu_command(&self) -> Result<Option<Command>, Problem> {
        match (self.qemu, self.command.split_first()) {
            (false, None) => Ok(None),
            (true, Some((program, arguments))) => Ok(Some(Command {
                program: program.clone(),
                arguments: arguments.to_vec(),
            })),
            _ => {
                let text = "a QEMU is started with --qemu -- qemu-system-x86_64 ARGS...";
                Err(Problem::new(Exit::Usage, text))
            }
        }
    }
}

/// Takes the VM over and runs it here.
pub fn resume(args: &ResumeArgs) -> anyhow::Result<Exit> {
    args.refuse_what_is_not_there()?;
    if let Some(api) = &args.firecracker {
        return firecracker::resume(args, api);
    }
    let command = args.qemu_command()?;
    let signals = Signals::hold().context("can't handle signals")?;
    let ticket = ticket::read(&args.ticket)?;
    let page = args.status_addr.map(StatusPage::serve).transpose()?;
    if let Some(command) = command {
        return qemu::resume(args, command, ticket, signals, page.as_ref());
    }
    let home = Home::new(args.control.as_deref())?;
    let destination = Destination::new(DestinationConfig {
        serial: args.serial.clone().unwrap_or(SerialTarget::Nothing),
        control: home.control.clone(),
        install: args.install.into(),
    });
    // A vCPU may wait for a page that does not come, so the machine is taken apart in good order only where all is here.
    let machine = ManuallyDrop::new(destination.machine());
    let events = Events::of(signals)?;
    let cancel = Cancel::default();
    let mut taking = Cancellable::new(destination, cancel.clone());
    let options = Options {
        verify: args.verify,
        removals: false,
    };
    take_over(ticket, options, events.sender(), move |offer| {
        let result = offer.and_then(|offer| lazyvm_pager::resume(offer, &mut taking));
        // With this, `taking` goes: from here on the command alone holds the machine.
        (result, taking.exit())
    })?;
    let filling = wait_for_start(&events, &cancel)?;
    tracing::info!(control = %home.control.display(), "the VM runs here; its memory arrives");
    let report = fill(args, filling, &events, page.as_ref(), || None)?;
    let machine = ManuallyDrop::into_inner(machine);
    if let Some(machine) = machine.get() {
        machine.set_memory_complete();
    }
    let verified = conclude(args, &report);
    // The machine may stay for months; what the move needed is not to stay with it.
    sys::give_back_freed_memory();
    match machine.get().filter(|_| args.stay) {
        Some(machine) => events.until_end_of(machine).and(verified),
        None => {
            tracing::warn!("the VM ends here with this command; --stay keeps it");
            verified
        }
    }
}

/// The control socket, and the directory that was made for it.
struct Home {
    control: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

impl Home {
    fn new(control: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(control) = control {
            return Ok(Self {
                control: control.to_owned(),
                _folder: None,
            });
        }
        let folder = tempfile::Builder::new()
            .prefix("lazyvm-")
            .tempdir()
            .context("can't make a directory for the control socket; name one with --control")?;
        Ok(Self {
            control: folder.path().join("control"),
            _folder: Some(folder),
        })
    }
}

/// Connects and has `take` take the machine over, on a thread of its own since all of that blocks.
fn take_over(
    ticket: Ticket,
    options: Options,
    events: Sender<Event<Resumed>>,
    take: impl FnOnce(Result<Offer, PagerError>) -> (Result<Filling, PagerError>, Option<Exit>)
    + Send
    + 'static,
) -> anyhow::Result<()> {
    thread::Builder::new()
        .name("resume".to_owned())
        .spawn(move || {
            let offer = lazyvm_pager::connect(&ticket, options).inspect(|offer| {
                tracing::info!(
                    session = %ticket.session,
                    memory_bytes = offer.layout().bytes(),
                    kind = offer.machine().kind,
                    "connected to the source"
                );
            });
            let (result, exit) = take(offer);
            drop(events.send(Event::Own(Resumed { result, exit })));
        })
        .context("can't start a thread")?;
    Ok(())
}

/// Waits until the machine runs here. A signal stops that in good order, so that it runs on at the source.
fn wait_for_start(events: &Events<Resumed>, cancel: &Cancel) -> anyhow::Result<Filling> {
    let mut asked = false;
    loop {
        match events.next()? {
            Event::Own(resumed) => {
                return resumed.result.map_err(|error| match resumed.exit {
                    Some(exit) => {
                        Problem::new(exit, format!("{error}. It runs on at the source")).into()
                    }
                    None => error.into(),
                });
            }
            Event::Signal(signal) if !cancel.cancel() => {
                let text =
                    format!("ended by {signal} before the hand-over; the VM runs at the source");
                return Err(Problem::new(Exit::NotMoved, text).into());
            }
            Event::Signal(_) if asked => {
                let text = "ended by a signal during the hand-over; lazyvm status at the source tells where the VM is";
                return Err(Problem::new(Exit::BrokenOff, text).into());
            }
            Event::Signal(signal) => {
                asked = true;
                tracing::warn!(%signal, "giving the VM back to the source; a second signal ends this command at once");
            }
            Event::Ended(_) => {}
        }
    }
}

/// Waits until all memory is here; `has_ended` tells of a VM that ended elsewhere.
fn fill(
    args: &ResumeArgs,
    filling: Filling,
    events: &Events<Resumed>,
    page: Option<&StatusPage>,
    ended: impl Fn() -> Option<String>,
) -> anyhow::Result<Report> {
    let mut meter = Meter::new();
    let mut warned = false;
    loop {
        let progress = filling.progress();
        meter.show(
            progress.pages_here,
            progress.pages_total,
            progress.pages_demand,
        );
        if let Some(page) = page {
            page.show(&progress, &filling.report());
        }
        if progress.done {
            break;
        }
        if let Some(how) = ended() {
            // A failure is logged there, and this one weighs more.
            let _ = write_report(args, &filling.report());
            let text = format!(
                "{how} when {} of {} pages had arrived",
                progress.pages_here, progress.pages_total
            );
            return Err(Problem::new(Exit::BrokenOff, text).into());
        }
        match events.next_within(PROGRESS_EVERY) {
            Some(Event::Signal(_)) if warned => {
                // A failure is logged there, and this one weighs more.
                let _ = write_report(args, &filling.report());
                let text = format!(
                    "ended by a signal when {} of {} pages had arrived; {}",
                    progress.pages_here,
                    progress.pages_total,
                    args.what_an_end_leaves()
                );
                return Err(Problem::new(Exit::BrokenOff, text).into());
            }
            Some(Event::Signal(signal)) => {
                warned = true;
                tracing::warn!(
                    %signal,
                    "the VM runs here and {} of its {} pages have arrived; a second signal ends this command now, and then {}",
                    progress.pages_here,
                    progress.pages_total,
                    args.what_an_end_leaves()
                );
            }
            Some(Event::Ended(_) | Event::Own(_)) | None => {}
        }
    }
    drop(meter);
    Ok(filling.wait()?)
}

/// Reports a move that is over, and says what that means for this command. That the report can't be written is told last:
/// the machine is not to suffer from it.
fn conclude(args: &ResumeArgs, report: &Report) -> anyhow::Result<Exit> {
    let written = write_report(args, report);
    tell(report);
    check(report).and_then(|exit| written.map(|()| exit))
}

/// Writes the report where one was asked for; logs that it can't be.
fn write_report(args: &ResumeArgs, report: &Report) -> anyhow::Result<()> {
    let Some(path) = &args.report else {
        return Ok(());
    };
    let mut text = serde_json::to_vec_pretty(report)?;
    text.push(b'\n');
    files::replace(path, &text, files::SHARED)
        .with_context(|| format!("can't write the report to {}", path.display()))
        .inspect_err(|error| tracing::error!("{error:#}"))
}

fn tell(report: &Report) {
    tracing::info!(
        downtime_us = report.downtime_us,
        faults = report.faults,
        fault_us_p50 = report.fault_us.p50,
        pages_demand = report.pages_demand,
        pages_pushed = report.pages_pushed,
        complete_at_us = report.complete_at_us,
        verified = report.verified,
        "all memory is here, and the source has let go"
    );
}

/// What the comparison of every page means for this command.
fn check(report: &Report) -> anyhow::Result<Exit> {
    if report.verified == Some(false) {
        let text = "pages differ from the source's: this VM's memory is damaged, don't trust it";
        tracing::error!("{text}");
        return Err(Problem::new(Exit::Integrity, text).into());
    }
    Ok(Exit::Done)
}
