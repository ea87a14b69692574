//! What lazyvm's two ends share of QUIC: sockets, transport settings, the control stream.
//!
//! `lazyvm-wire` says what the bytes are and touches no socket; this crate carries them. A destination has two
//! connections to a source, one a [`Lane`](lazyvm_wire::control::Lane), so that the push never shares a send buffer, a congestion window or
//! flow control with a fault.

mod config;
mod congestion;
mod control;
mod lane;
mod socket;
mod sys;
mod text;
mod thread;
mod window;

pub use config::{
    BULK_STREAMS_MAX, FAULT_STREAMS_MAX, IDLE_TIMEOUT, ServerConfigs, SetupError, client_config,
    server_configs, widen_for_path,
};
pub use congestion::{Core as Congestion, Rival, ShortQueue, window};
pub use control::{ControlReceiver, ControlSender, ControlStreamError, control_stream};
pub use lane::endpoint_config;
pub use socket::{bind, bind_lanes};
pub use text::describe;
pub use thread::{LaneThread, Urgency};
pub use window::FixedWindow;

/// Codes that a connection is closed with (RFC 9000, section 20.2).
pub mod close_code {
    use quinn::VarInt;

    /// All is done.
    pub const DONE: VarInt = VarInt::from_u32(0);
    /// The control stream says why.
    pub const REJECTED: VarInt = VarInt::from_u32(1);
    /// A breach of protocol.
    pub const PROTOCOL: VarInt = VarInt::from_u32(2);
    /// This side gives up.
    pub const GONE: VarInt = VarInt::from_u32(3);
}
