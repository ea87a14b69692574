//! A machine that writes to its memory, and the source's view of it.

use lazyvm_vmm_glue::kvm::{RemoteMachine, TouchConfig};
use lazyvm_wire::Backing;

use super::{Home, Running};

/// See the module. The home is what the others lie in.
pub struct Busy {
    pub remote: RemoteMachine,
    pub running: Running,
    pub home: Home,
}

impl Busy {
    /// Each of its vCPUs has shown a sign of life.
    pub fn start(backing: Backing, cpus: u32, touch: TouchConfig) -> Self {
        let home = Home::new();
        let running = home.touch_on(backing, cpus, touch);
        running.wait_ticks(1, cpus.into());
        let remote = RemoteMachine::connect(&running.control).unwrap();
        Self {
            remote,
            running,
            home,
        }
    }
}
