//! What a machine uses: its processors' registers, and the pages that it touches.

use std::fs::File;
use std::io;
use std::time::Duration;

use lazyvm_wire::{Backing, PAGE_SHIFT, PAGE_SIZE};

use super::super::gate::Phase;
use super::super::glance::registers_of;
use super::super::lock;
use super::super::sys;
use super::{OperationError, Shared};
use crate::pagemap::{Pages, scan};
use crate::x86;

/// How long a vCPU may take to tell its registers.
const GLANCE_TIME: Duration = Duration::from_secs(1);

impl Shared {
    /// The registers of all vCPUs that point at memory. A machine that runs is held up for some microseconds.
    pub(in crate::kvm) fn registers(&self) -> Result<Vec<x86::Vcpu>, OperationError> {
        // Nothing but an end can come between.
        let _operation = lock(&self.operation);
        match self.gate.phase() {
            Phase::Incoming => return Err(OperationError::Incoming),
            Phase::Stopped(reason) => return Err(OperationError::Stopped(reason)),
            Phase::Paused => {
                let vcpus = self
                    .slots
                    .iter()
                    .map(|slot| registers_of(&lock(&slot.vcpu)).map_err(OperationError::Registers));
                return vcpus.collect();
            }
            Phase::Running => {}
        }
        self.slots.iter().for_each(|slot| slot.glance.ask());
        self.gate.call(|| self.call_vcpus());
        let answers = self.slots.iter().map(|slot| {
            let answer = slot.glance.wait(GLANCE_TIME);
            let answer = answer.ok_or(OperationError::Silent { cpu: slot.cpu })?;
            answer.map_err(OperationError::Registers)
        });
        answers.collect()
    }

    /// Begins to watch what the machine touches. It is not stopped; each page costs it a fault in the host's kernel once
    /// more.
    pub(in crate::kvm) fn watch(&self) -> Result<(), OperationError> {
        self.check_movable()?;
        // Where the kernel can't tell, nothing is dropped.
        self.touched()?;
        sys::drop_entries(self.ram()).map_err(|errno| OperationError::Watch(errno.into()))
    }

    /// What was touched since, or was never dropped: a bitmap as of [`Shared::take_written`].
    ///
    /// The kernel maps up to 16 pages around one that is read (`fault_around_bytes`).
    pub(in crate::kvm) fn touched(&self) -> Result<Vec<u8>, OperationError> {
        self.check_movable()?;
        self.mapped().map_err(OperationError::Watch)
    }

    fn mapped(&self) -> io::Result<Vec<u8>> {
        let ram = self.ram();
        let layout = ram.layout();
        let mut image = vec![0_u8; (layout.bytes() / PAGE_SIZE as u64).div_ceil(8) as usize];
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut first = 0;
        for (region, host) in layout.regions().iter().zip(ram.host_addresses()) {
            let end = host + region.pages * PAGE_SIZE as u64;
            if region.backing == Backing::Small {
                scan(&pagemap, Pages::Mapped, host, end, &mut |start, end| {
                    for page in (start - host) >> PAGE_SHIFT..(end - host) >> PAGE_SHIFT {
                        let page = first + page;
                        image[(page / 8) as usize] |= 1 << (page % 8);
                    }
                })?;
            }
            first += region.pages;
        }
        Ok(image)
    }
}
