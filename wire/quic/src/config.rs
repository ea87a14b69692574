//! Transport settings of each lane.

use std::sync::Arc;
use std::time::Duration;

use lazyvm_wire::control::Lane;
use lazyvm_wire::trust::{Fingerprint, Identity, TrustError};
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, IdleTimeout, ServerConfig, TransportConfig,
    VarInt,
};

use crate::congestion::{Rival, ShortQueue};
use crate::lane::first_ids;
use crate::window::FixedWindow;

/// Most demand faults under way at a time; more wait at the destination.
pub const FAULT_STREAMS_MAX: u32 = 256;

/// Most push streams under way at a time.
pub const BULK_STREAMS_MAX: u32 = 128;

/// A peer that is silent for longer is gone.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

const KEEP_ALIVE: Duration = Duration::from_secs(4);

/// The fault lane's congestion window: 1,000 pages under way.
const FAULT_WINDOW: u64 = 4 << 20;

/// How long a packet of the fault lane may wait for its acknowledgement. QUIC's own 25 ms are added to each time-out, and
/// with that to each fault that has lost its last packet.
const FAULT_ACK_DELAY: Duration = Duration::from_millis(1);

/// Round trips after which a packet of the fault lane is lost whose followers have arrived. Whoever comes later than that
/// is sent twice, which costs the path little and no fault anything.
const FAULT_LOST_AFTER: f32 = 1.02;

/// Bytes of the push under way at a time. A pipe of 1 Gbit/s and 100 ms holds 12.5 MB, and what has come behind a lost
/// packet waits for it for as long as it takes to be missed, sent again and there: two round trips and a half in all. The
/// destination may have to keep as much in memory.
const BULK_WINDOW: u32 = 32 << 20;

/// Bytes of the push that are kept until they are acknowledged. What came behind a lost packet is acknowledged all the same.
const BULK_UNACKED: u32 = 24 << 20;

/// The push's first congestion window; QUIC's own of 12 KB needs two seconds to fill a long pipe.
const BULK_INITIAL_WINDOW: u64 = 1 << 20;

/// The same on a path of which is known what it carried a short while ago, at most.
const BULK_KNOWN_WINDOW_MAX: u64 = 8 << 20;

/// Handshakes that may be under way at a time; further ones are refused.
const HANDSHAKES_MAX: usize = 64;

/// A failure to set up QUIC.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The keys.
    #[error("can't set up the keys")]
    Trust(#[from] TrustError),
    /// The cipher suite that QUIC's first packets need is not there.
    #[error("the TLS library lacks a cipher suite that QUIC needs")]
    Suite(#[from] NoInitialCipherSuite),
}

/// The round trip for which the push's bytes under way are meant, and how many times as much a longer path gets.
const BULK_RTT: Duration = Duration::from_millis(100);
const BULK_WIDEST: f64 = 3.0;

/// Lets more of the push be under way where the path is longer than 100 ms, by as much as it is longer: three times at most.
pub fn widen_for_path(connection: &Connection) {
    let times = connection.rtt().as_secs_f64() / BULK_RTT.as_secs_f64();
    let times = times.clamp(1.0, BULK_WIDEST);
    connection.set_send_window((f64::from(BULK_UNACKED) * times) as u64);
    connection.set_receive_window(VarInt::from_u32((f64::from(BULK_WINDOW) * times) as u32));
}

/// A server's settings for each lane.
#[derive(Clone, Debug)]
pub struct ServerConfigs {
    /// For control and faults.
    pub fault: ServerConfig,
    /// For the push.
    pub bulk: ServerConfig,
    rival: Rival,
}

impl ServerConfigs {
    /// For the push on a path that has carried so many bytes a round trip a short while ago: it begins with half of that, as
    /// long as that is more than on any other path (Careful Resume, `draft-ietf-tsvwg-careful-resume`).
    pub fn bulk_on_known_path(&self, window: u64) -> ServerConfig {
        let initial_window = (window / 2).clamp(BULK_INITIAL_WINDOW, BULK_KNOWN_WINDOW_MAX);
        let mut config = self.bulk.clone();
        let transport = bulk_of_peers(transport_from(Lane::Bulk, self.rival, initial_window));
        config.transport_config(Arc::new(transport));
        config
    }
}

/// The settings of a server with this identity, whose push meets others' traffic as `rival` says.
///
/// # Errors
/// [`SetupError`].
pub fn server_configs(identity: &Identity, rival: Rival) -> Result<ServerConfigs, SetupError> {
    let crypto = Arc::new(QuicServerConfig::try_from(identity.server_config()?)?);
    let config = |transport: TransportConfig| {
        let mut config = ServerConfig::with_crypto(crypto.clone());
        config
            .transport_config(Arc::new(transport))
            .max_incoming(HANDSHAKES_MAX);
        config
    };
    // A peer may open its control stream and nothing else until it has shown a ticket.
    let mut fault = transport(Lane::Fault, rival);
    fault
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(0_u32.into());
    Ok(ServerConfigs {
        fault: config(fault),
        bulk: config(bulk_of_peers(transport(Lane::Bulk, rival))),
        rival,
    })
}

fn bulk_of_peers(mut bulk: TransportConfig) -> TransportConfig {
    bulk.max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(0_u32.into());
    bulk
}

/// The settings of a destination's connection to the server with this fingerprint.
///
/// # Errors
/// [`SetupError`].
pub fn client_config(
    identity: &Identity,
    server: Fingerprint,
    lane: Lane,
) -> Result<ClientConfig, SetupError> {
    let crypto = QuicClientConfig::try_from(identity.client_config(server)?)?;
    // A destination sends little on either lane.
    let mut transport = transport(lane, Rival::Share);
    let streams = match lane {
        Lane::Fault => 0,
        Lane::Bulk => BULK_STREAMS_MAX,
    };
    transport
        .max_concurrent_bidi_streams(0_u32.into())
        .max_concurrent_uni_streams(VarInt::from_u32(streams))
        .keep_alive_interval(Some(KEEP_ALIVE));
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    config.initial_dst_cid_provider(first_ids(lane));
    Ok(config)
}

fn transport(lane: Lane, rival: Rival) -> TransportConfig {
    transport_from(lane, rival, BULK_INITIAL_WINDOW)
}

fn transport_from(lane: Lane, rival: Rival, initial_window: u64) -> TransportConfig {
    let mut transport = TransportConfig::default();
    let idle = VarInt::from_u32(IDLE_TIMEOUT.as_millis() as u32);
    transport.max_idle_timeout(Some(IdleTimeout::from(idle)));
    match lane {
        Lane::Fault => {
            let mut acks = AckFrequencyConfig::default();
            acks.ack_eliciting_threshold(0_u32.into())
                .max_ack_delay(Some(FAULT_ACK_DELAY));
            transport
                .ack_frequency_config(Some(acks))
                .time_threshold(FAULT_LOST_AFTER)
                .congestion_controller_factory(Arc::new(FixedWindow {
                    bytes: FAULT_WINDOW,
                }))
                .send_window(2 * FAULT_WINDOW)
                .receive_window(VarInt::from_u32(2 * FAULT_WINDOW as u32))
                .stream_receive_window(VarInt::from_u32(FAULT_WINDOW as u32));
        }
        Lane::Bulk => {
            transport
                .congestion_controller_factory(Arc::new(ShortQueue {
                    initial_window,
                    rival,
                }))
                // Streams go one after the other: packets of many in turn would cost the destination a task switch each.
                .send_fairness(false)
                .send_window(BULK_UNACKED.into())
                .receive_window(VarInt::from_u32(BULK_WINDOW))
                .stream_receive_window(VarInt::from_u32(8 << 20));
        }
    }
    transport
}
