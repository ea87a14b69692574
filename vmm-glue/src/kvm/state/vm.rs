//! The parts of the state that belong to the machine as a whole: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

use super::TransferError;

/// See the module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::kvm) struct VmState {
    /// PIC master, PIC slave, IOAPIC.
    pub(super) irqchips: [IrqChip; 3],
    pub(super) pit: kvm_pit_state2,
    pub(super) clock: kvm_clock_data,
}

/// `kvm_irqchip` has no `Debug` of its own.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct IrqChip(kvm_irqchip);

impl std::fmt::Debug for IrqChip {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IrqChip({})", self.0.chip_id)
    }
}

impl VmState {
    pub(super) fn take(vm: &VmFd) -> Result<Self, TransferError> {
        let chip = |chip_id, part| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip).map_err(give(part))?;
            Ok(IrqChip(chip))
        };
        Ok(Self {
            irqchips: [
                chip(KVM_IRQCHIP_PIC_MASTER, "master PIC")?,
                chip(KVM_IRQCHIP_PIC_SLAVE, "slave PIC")?,
                chip(KVM_IRQCHIP_IOAPIC, "IOAPIC")?,
            ],
            pit: vm.get_pit2().map_err(give("timer"))?,
            clock: vm.get_clock().map_err(give("clock"))?,
        })
    }

    pub(super) fn load(&self, vm: &VmFd) -> Result<(), TransferError> {
        for (chip, part) in self
            .irqchips
            .iter()
            .zip(["master PIC", "slave PIC", "IOAPIC"])
        {
            vm.set_irqchip(&chip.0).map_err(take(part))?;
        }
        vm.set_pit2(&self.pit).map_err(take("timer"))?;
        // The guest's clock stands still while the machine is on its way, as its TSC does: the two hosts' wall
        // clocks may differ by more than the downtime, so neither is asked.
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(take("clock"))
    }
}

fn give(part: &'static str) -> impl FnOnce(errno::Error) -> TransferError {
    move |source| TransferError::Machine {
        verb: "give",
        part,
        source,
    }
}

fn take(part: &'static str) -> impl FnOnce(errno::Error) -> TransferError {
    move |source| TransferError::Machine {
        verb: "take",
        part,
        source,
    }
}
