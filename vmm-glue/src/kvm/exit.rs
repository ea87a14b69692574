//! How a machine came to its end.

use std::fmt;

/// Why a machine does not run any more.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// Someone asked for it.
    Quit,
    /// It was moved: it runs elsewhere now.
    Released,
    /// The guest asked for a reset, which ends a machine of this monitor.
    Reset,
    /// The guest switched itself off.
    PowerOff,
    /// The guest crashed: a triple fault.
    TripleFault {
        /// Which vCPU.
        cpu: u32,
    },
    /// Every vCPU halted with interrupts off: nothing can wake it again.
    HaltedForEver,
    /// KVM could not go on.
    Failed {
        /// Which vCPU.
        cpu: u32,
        /// What happened, in words.
        cause: String,
    },
}

impl ExitReason {
    /// Whether the machine ended as someone, the guest included, wanted.
    pub fn is_orderly(&self) -> bool {
        matches!(
            self,
            Self::Quit | Self::Released | Self::Reset | Self::PowerOff
        )
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quit => f.write_str("quit as asked"),
            Self::Released => f.write_str("moved away"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::PowerOff => f.write_str("the guest switched itself off"),
            Self::TripleFault { cpu } => {
                write!(f, "the guest crashed with a triple fault on vCPU {cpu}")
            }
            Self::HaltedForEver => f.write_str("the guest halted for ever, with interrupts off"),
            Self::Failed { cpu, cause } => write!(f, "vCPU {cpu} cannot go on: {cause}"),
        }
    }
}
