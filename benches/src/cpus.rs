//! Which CPUs a run's threads may use.
//!
//! A vCPU has a CPU to itself where a guest is run in earnest, and the pager works on another: a fault is two wake-ups
//! between CPUs. Left to itself, the scheduler now and then puts the touching thread and the pager on the same CPU, and
//! a local fault takes a tenth of the time; which of the two happens changes from run to run. So the touching thread
//! gets the first CPU for itself, and all else, the source's process included, shares the others.

use std::io;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The calling thread; threads and processes that it starts inherit its CPUs.
const THIS_THREAD: Pid = Pid::from_raw(0);

/// The CPUs of this process, divided.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Split {
    guest: CpuSet,
    host: CpuSet,
    /// The guest's threads run ahead of all else.
    guest_first: bool,
}

impl Split {
    /// Divides what the calling thread may use; on a single CPU both are that one.
    pub fn of_this_process() -> io::Result<Self> {
        let all = sched_getaffinity(THIS_THREAD)?;
        let allowed = |cpu: &usize| all.is_set(*cpu).unwrap_or(false);
        let mut guest = CpuSet::new();
        let mut host = CpuSet::new();
        let mut cpus = (0..CpuSet::count()).filter(allowed);
        if let Some(first) = cpus.next() {
            guest.set(first)?;
        }
        let mut others = 0;
        for cpu in cpus {
            host.set(cpu)?;
            others += 1;
        }
        if others == 0 {
            host = guest;
        }
        Ok(Self {
            guest,
            host,
            guest_first: false,
        })
    }

    /// All of them for all, and the guest's threads first: for more vCPUs than there are CPUs, which hardly ever run.
    pub fn undivided() -> io::Result<Self> {
        let all = sched_getaffinity(THIS_THREAD)?;
        Ok(Self {
            guest: all,
            host: all,
            guest_first: true,
        })
    }

    /// The calling thread is a guest's vCPU from now on.
    pub fn enter_guest(&self) -> io::Result<()> {
        if self.guest_first
            && let Err(error) = crate::wan::sys::run_first()
        {
            tracing::warn!(%error, "no real-time priority for what touches; it waits for a CPU as well");
        }
        Ok(sched_setaffinity(THIS_THREAD, &self.guest)?)
    }

    /// The calling thread is none.
    pub fn enter_host(&self) -> io::Result<()> {
        Ok(sched_setaffinity(THIS_THREAD, &self.host)?)
    }
}
