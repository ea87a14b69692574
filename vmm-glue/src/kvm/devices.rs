//! What the guest finds behind its I/O ports, beside what KVM answers itself (interrupt controllers and timer).

use std::sync::{Mutex, MutexGuard};

use super::exit::ExitReason;
use super::lock;
use super::serial::{self, Console};

/// The keyboard controller's command and status register.
const KEYBOARD_COMMAND: u16 = 0x64;

/// Its command that pulls the CPU's reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// The devices.
pub(super) struct Devices {
    console: Mutex<Console>,
}

impl Devices {
    pub(super) fn new(console: Console) -> Self {
        Self {
            console: Mutex::new(console),
        }
    }

    /// The serial console.
    pub(super) fn console(&self) -> MutexGuard<'_, Console> {
        lock(&self.console)
    }

    /// The guest writes to a port. `data` is one access, or several of a string instruction one after the other.
    pub(super) fn port_out(&self, port: u16, data: &[u8]) -> Option<ExitReason> {
        if let Some(register) = serial_register(port) {
            let mut console = self.console();
            for &value in data {
                console.write(register, value);
            }
        }
        (port == KEYBOARD_COMMAND && data.contains(&KEYBOARD_RESET)).then_some(ExitReason::Reset)
    }

    /// The guest reads a port.
    pub(super) fn port_in(&self, port: u16, data: &mut [u8]) {
        if let Some(register) = serial_register(port) {
            let mut console = self.console();
            data.fill_with(|| console.read(register));
        } else if port == KEYBOARD_COMMAND {
            // Ready for a command, and nothing typed.
            data.fill(0);
        } else {
            // An empty bus.
            data.fill(0xff);
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    port.checked_sub(serial::PORT)
        .filter(|&register| register < 8)
        .map(|register| register as u8)
}
