//! The source: serves a machine's pages, on demand and pushed, and hands the machine over.
//!
//! [`Server`] is one UDP port with any number of sessions; each session is one machine for one destination. What a
//! machine must be able to do is in [`port`]. Two parts are pure logic and tested in virtual time: [`handover`], which
//! decides who may run the machine, and [`scheduler`], which decides what is sent next.

#![forbid(unsafe_code)]

mod bulk;
mod early;
mod endpoint;
mod fault;
mod fleet;
mod frames;
pub mod handover;
mod packing;
mod paths;
pub mod port;
mod rate;
mod record;
pub mod rounds;
pub mod scheduler;
mod session;
pub mod snapshot;
pub mod trace;
mod warm_up;

pub use endpoint::{FleetHandle, SESSIONS_MAX, Server, ServerError, SessionHandle};
pub use fleet::FleetConfig;
pub use handover::{EndReason, Phase};
pub use lazyvm_quic::Rival;
pub use rate::RateLimit;
pub use record::{RecordError, RecordFile, RecordedPhase, SessionRecord, read_record};
pub use rounds::Mode;
pub use session::{SessionConfig, SessionStatus, WARM_UP};
