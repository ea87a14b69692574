//! `lazyvm serve`: the source's side of a move.

mod snapshot;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};
use lazyvm_server::port::SourceMachine;
use lazyvm_server::scheduler::Policy;
use lazyvm_server::trace::Recorder;
use lazyvm_server::{EndReason, Phase, Rival, Server, SessionConfig, SessionHandle, SessionRecord};
use lazyvm_vmm_glue::firecracker::api::Api;
use lazyvm_vmm_glue::firecracker::source::FirecrackerMachine;
use lazyvm_vmm_glue::kvm::RemoteMachine;
use lazyvm_vmm_glue::qemu;
use lazyvm_wire::trust::Identity;
use nix::sys::signal::Signal;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, sleep, timeout};

use crate::exit::{Exit, Problem};
use crate::progress::Meter;
use crate::signals::Signals;
use crate::{addresses, ticket, units};

/// How often progress is looked at.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);

/// Time for a destination to hear that the source has let go, and to come back for it if it was just lost.
const FAREWELL: Duration = Duration::from_secs(20);

/// How long the ticket of a machine lets a destination in, where the user does not say.
const TICKET_LIFETIME: Duration = Duration::from_secs(600);

/// How long destinations are still told that their ticket has expired.
const EXPIRED_LINGER: Duration = Duration::from_secs(300);

/// Flags of `serve`.
#[derive(Args)]
pub struct ServeArgs {
    #[command(flatten)]
    source: Source,
    /// Listen here, on UDP; port 0 takes a free one
    #[arg(long, value_name = "ADDR:PORT", default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)))]
    listen: SocketAddr,
    /// Where the destination reaches this host, for the ticket; may be repeated, the first that answers is taken
    /// [default: the addresses of this host]
    #[arg(long, value_name = "ADDR:PORT")]
    advertise: Vec<SocketAddr>,
    /// Write the ticket to this file too, for its owner alone
    #[arg(long, value_name = "FILE")]
    ticket_file: Option<PathBuf>,
    /// How long the ticket lets a destination in [default: 10m; of a snapshot, as long as this command runs]
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    ticket_lifetime: Option<Duration>,
    /// Record the session here, for its owner alone; lazyvm status reads it
    #[arg(long, value_name = "DIR")]
    session_dir: Option<PathBuf>,
    /// How the VM is moved
    #[arg(long, default_value = "hybrid")]
    mode: Mode,
    /// How long memory goes ahead of the pause at most in hybrid and precopy [default: as long as that pays]
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    precopy_limit: Option<Duration>,
    /// How long the VM may stand still for what is left in precopy
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = units::duration)]
    downtime_limit: Duration,
    /// Limit of the background push; pages that the VM waits for are not limited
    #[arg(long, value_name = "RATE", value_parser = units::rate)]
    max_bandwidth: Option<u64>,
    /// Give way to other traffic on the path [default: take a fair share of it]
    #[arg(long = "yield")]
    yields: bool,
    /// In postcopy: how long the VM is watched before it is paused, while what it uses goes ahead; 0s pauses it at once
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = units::duration)]
    warm_up: Duration,
    /// A disk to move along (not in this release); may be repeated
    #[arg(long, value_name = "NAME=FILE")]
    disk: Vec<String>,
    /// Have a Firecracker write its memory to a file here at the hand-over, and serve that [default: read it from its process]
    #[arg(long, value_name = "DIR", requires = "firecracker")]
    scratch: Option<PathBuf>,
    /// Leave a part of what is sent first out, by the names of `bench sim`, for comparisons
    #[arg(long, value_name = "NAME", default_value = "full", hide = true, value_parser = PossibleValuesParser::new(Policy::ALL.map(|policy| policy.name)))]
    policy: String,
    /// Write to this file which pages the VM touches after the pause, for `bench sim`; nothing is pushed meanwhile
    #[arg(long, value_name = "FILE", hide = true)]
    record_trace: Option<PathBuf>,
    /// For how long
    #[arg(long, value_name = "TIME", default_value = "15s", value_parser = units::duration, hide = true)]
    record_for: Duration,
    #[command(flatten)]
    files: snapshot::Files,
}

/// Where the VM is.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct Source {
    /// The control socket of a `lazyvm run` or `lazyvm resume`
    #[arg(long, value_name = "SOCK")]
    vm: Option<PathBuf>,
    /// A QMP socket of a running QEMU whose RAM is shared memory (share=on)
    #[arg(long, value_name = "QMP_SOCK")]
    qemu: Option<PathBuf>,
    /// The API socket of a Firecracker
    #[arg(long, value_name = "API_SOCK")]
    firecracker: Option<PathBuf>,
    /// A directory with a snapshot that lazyvm snapshot or Firecracker wrote: served to any number of destinations, until a signal comes
    #[arg(long, value_name = "DIR")]
    snapshot: Option<PathBuf>,
}

/// How a VM is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// It runs at the destination at once, and its memory follows
    Postcopy,
    /// Memory goes ahead while it runs at the source; what changed since then follows
    Hybrid,
    /// Memory goes ahead until little is left; then it stops, and the rest goes
    Precopy,
    /// It stops until all memory is there
    Stop,
}

impl From<Mode> for lazyvm_server::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Postcopy => Self::Postcopy,
            Mode::Hybrid => Self::Hybrid,
            Mode::Precopy => Self::Precopy,
            Mode::Stop => Self::Stop,
        }
    }
}

impl ServeArgs {
    fn refuse_what_is_not_there(&self) -> Result<(), Problem> {
        if matches!(self.mode, Mode::Precopy | Mode::Stop) && self.source.snapshot.is_some() {
            return Err(Problem::new(
                Exit::Usage,
                "a snapshot does not run, so nothing of it can go ahead: leave --mode out",
            ));
        }
        if self.disk.is_empty() {
            Ok(())
        } else {
            Err(Problem::not_in_this_release("--disk"))
        }
    }

    /// The machine that runs.
    fn machine(&self) -> anyhow::Result<Arc<dyn SourceMachine>> {
        if let Some(api) = &self.source.firecracker {
            let machine = FirecrackerMachine::connect(Api::at(api), self.scratch.as_deref())
                .with_context(|| format!("can't serve the Firecracker at {}", api.display()))?;
            return Ok(Arc::new(machine));
        }
        if let Some(qmp) = &self.source.qemu {
            let machine = qemu::Source::connect(qmp)
                .with_context(|| format!("can't serve the QEMU at {}", qmp.display()))?;
            return Ok(Arc::new(machine));
        }
        let vm = self
            .source
            .vm
            .as_ref()
            .ok_or_else(|| Problem::new(Exit::Usage, "name the VM with --vm SOCK"))?;
        let machine = RemoteMachine::connect(vm)
            .with_context(|| format!("can't serve the VM at {}", vm.display()))?;
        Ok(Arc::new(machine))
    }

    /// What the push does when others fill the path.
    fn rival(&self) -> Rival {
        if self.yields {
            Rival::Yield
        } else {
            Rival::Share
        }
    }

    /// Limit of the push in bytes a second. One below a byte a second is a byte a second.
    fn bytes_a_second(&self) -> Option<u64> {
        self.max_bandwidth
            .filter(|&bits| bits > 0)
            .map(|bits| (bits / 8).max(1))
    }
}

/// Serves the VM until its destination has all of it, or until it is clear that it stays here.
pub fn serve(args: &ServeArgs) -> anyhow::Result<Exit> {
    args.refuse_what_is_not_there()?;
    if let Some(directory) = &args.source.snapshot {
        return snapshot::serve(args, directory);
    }
    let signals = Signals::hold().context("can't handle signals")?;
    let machine = args.machine()?;
    let ticket_lifetime = args.ticket_lifetime.unwrap_or(TICKET_LIFETIME);
    let identity = Arc::new(Identity::generate()?);
    let record = args
        .session_dir
        .as_ref()
        .map(|dir| SessionRecord::create(dir, Arc::clone(&identity)))
        .transpose()
        .context("can't record the session")?;
    let server = Server::bind_as(args.listen, &identity, args.rival())?;
    let session = server.add_session(SessionConfig {
        ticket_lifetime,
        max_bandwidth: args.bytes_a_second(),
        warm_up: args.warm_up,
        mode: args.mode.into(),
        precopy_limit: args.precopy_limit,
        downtime_limit: args.downtime_limit,
        policy: Policy::named(&args.policy).unwrap_or_default(),
        record,
        trace: args
            .record_trace
            .clone()
            .map(|file| Recorder::new(file, args.record_for)),
        ..SessionConfig::new(machine)
    })?;
    let listening = server.local_addr().context("can't tell where it listens")?;
    let reachable = addresses::advertised(listening, &args.advertise)?;
    tracing::info!(session = %session.id(), %listening, "waiting for the destination");
    ticket::hand_out(
        &server.ticket(&session, reachable),
        args.ticket_file.as_deref(),
    )?;
    let watch = Watch {
        session: &session,
        lifetime: ticket_lifetime,
    };
    wait(signals, |heard| watch.until_over(heard))
}

/// Waits for what hears of signals that come meanwhile.
fn wait<F: Future<Output = anyhow::Result<Exit>>>(
    signals: Signals,
    end: impl FnOnce(mpsc::UnboundedReceiver<Signal>) -> F,
) -> anyhow::Result<Exit> {
    let (heard, signals_heard) = mpsc::unbounded_channel();
    signals
        .tell(move |signal| {
            // Fails only when this command is ending.
            let _ = heard.send(signal);
        })
        .context("can't handle signals")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .context("can't wait for a destination")?
        .block_on(end(signals_heard))
}

struct Watch<'a> {
    session: &'a SessionHandle,
    lifetime: Duration,
}

impl Watch<'_> {
    async fn until_over(
        &self,
        mut signals: mpsc::UnboundedReceiver<Signal>,
    ) -> anyhow::Result<Exit> {
        let mut ticks = tokio::time::interval(PROGRESS_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let unused = self.until_unused();
        tokio::pin!(unused);
        let mut meter = Meter::new();
        let mut warned = false;
        let phase = loop {
            tokio::select! {
                phase = self.session.outcome() => break phase,
                Some(signal) = signals.recv() => {
                    self.session.withdraw();
                    if warned {
                        return Err(self.broken_off().into());
                    }
                    warned = self.warn_if_needed(signal).await;
                }
                () = &mut unused => self.session.withdraw(),
                _ = ticks.tick() => self.show(&mut meter),
            }
        };
        drop(meter);
        self.conclude(phase).await
    }

    /// Returns when the ticket has been of no use for so long that nobody will come.
    async fn until_unused(&self) {
        sleep(self.lifetime).await;
        if self.session.status().phase == Phase::Offered {
            tracing::warn!(
                "the ticket has expired; end this command and start it again for a new one"
            );
        }
        sleep(EXPIRED_LINGER).await;
    }

    /// After the hand-over, a signal only warns once: the VM's memory is still needed.
    async fn warn_if_needed(&self, signal: Signal) -> bool {
        // A pause that is under way ends first, and tells.
        let settled = timeout(Duration::from_millis(100), self.session.outcome()).await;
        if settled.is_ok() {
            return false;
        }
        let status = self.session.status();
        tracing::warn!(
            %signal,
            "the VM runs at the destination and needs its memory from here: {} of {} pages have arrived. This command \
             ends by itself when all have; a second signal ends it now, and leaves the VM there without the rest",
            status.pages_at_destination,
            status.pages_total,
        );
        true
    }

    fn broken_off(&self) -> Problem {
        let status = self.session.status();
        let text = format!(
            "ended by a signal when {} of {} pages had arrived at the destination; the VM is paused here",
            status.pages_at_destination, status.pages_total
        );
        Problem::new(Exit::BrokenOff, text)
    }

    fn show(&self, meter: &mut Meter) {
        let status = self.session.status();
        if matches!(status.phase, Phase::HandedOver | Phase::Started) {
            meter.show(
                status.pages_at_destination,
                status.pages_total,
                status.pages_demand,
            );
        }
    }

    async fn conclude(&self, phase: Phase) -> anyhow::Result<Exit> {
        // A destination that does not hear it can finish all the same, only later.
        let _ = timeout(FAREWELL, self.session.parted()).await;
        let status = self.session.status();
        match phase {
            Phase::Ended(reason) => Err(stays(&reason).into()),
            _ => {
                tracing::info!(
                    downtime_us = status.downtime_us,
                    pages_demand = status.pages_demand,
                    pages_pushed = status.pages_pushed,
                    "moved: the destination has everything"
                );
                Ok(Exit::Done)
            }
        }
    }
}

/// Why the VM stays at the source, in words.
fn stays(reason: &EndReason) -> Problem {
    let exit = match reason {
        EndReason::Refused(_) => Exit::Refused,
        EndReason::PeerLost | EndReason::Withdrawn => Exit::NotMoved,
        EndReason::MachineFailed(_) | EndReason::GaveUp(_) | EndReason::Protocol(_) => Exit::Failed,
    };
    // The machine itself may be what has ended.
    let here = match reason {
        EndReason::MachineFailed(_) => {
            "The VM was not handed over; if it runs here still, start lazyvm serve again to move it"
        }
        _ => "The VM runs on here; start lazyvm serve again to move it",
    };
    Problem::new(exit, format!("{reason}. {here}"))
}
