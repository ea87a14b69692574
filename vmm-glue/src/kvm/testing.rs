//! What tests of the inside share.

use std::sync::Arc;

use lazyvm_wire::Backing;

use super::hardware::{Hardware, Hypervisor};
use super::memory::GuestRam;

/// This host's KVM. Without it the test tells so and does nothing; where it has to run, it fails.
pub(super) fn hypervisor(test: &str) -> Option<Hypervisor> {
    match Hypervisor::open() {
        Ok(hypervisor) => Some(hypervisor),
        Err(error) => {
            assert!(
                std::env::var_os("CI").is_none(),
                "{test} can't run: {error}"
            );
            eprintln!("SKIPPED {test}: {error}");
            None
        }
    }
}

/// A machine without a payload.
pub(super) fn hardware(hypervisor: &Hypervisor, cpus: u32, memory: u64) -> Hardware {
    let needs = hypervisor.host(cpus).unwrap().has;
    let ram = GuestRam::new(memory, Backing::Small).unwrap();
    hypervisor.build(Arc::new(ram), needs).unwrap()
}
