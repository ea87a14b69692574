//! Telling a packet's lane by its connection ID.
//!
//! A server drives the connections of each lane on a thread with a socket of its own, at the same port: bulk data that
//! went through the fault lane's thread would cost it half its rate, and the faults their latency. The kernel gives each
//! packet to the right socket by one bit of the destination connection ID ([`crate::bind_lanes`]). A destination sets it
//! in the ID that it makes up for its first packet (RFC 9000, section 7.2), the server in those that it issues
//! (section 5.1). It tells an observer no more than the packets' sizes do. A wrong bit costs speed, nothing else.

use std::sync::Arc;
use std::time::Duration;

use lazyvm_wire::control::Lane;
use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};

const FIRST_ID_LEN: usize = 20;
const ISSUED_ID_LEN: usize = 8;

/// Set in the first byte of a connection ID of the bulk lane.
pub(crate) const LANE_BIT: u8 = 1;

/// A server endpoint's settings for one lane.
pub fn endpoint_config(lane: Lane) -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.cid_generator(move || Box::new(IssuedIds(lane)));
    config
}

/// Makes the random connection IDs of a destination's first packets.
pub(crate) fn first_ids(lane: Lane) -> Arc<dyn Fn() -> ConnectionId + Send + Sync> {
    Arc::new(move || random_id::<FIRST_ID_LEN>(lane))
}

/// Makes the random connection IDs that a server issues.
struct IssuedIds(Lane);

impl ConnectionIdGenerator for IssuedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        random_id::<ISSUED_ID_LEN>(self.0)
    }

    fn cid_len(&self) -> usize {
        ISSUED_ID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn random_id<const LEN: usize>(lane: Lane) -> ConnectionId {
    let mut id = [0; LEN];
    if let Err(error) = getrandom::fill(&mut id) {
        // The handshake itself then fails for want of random bytes: TLS needs far better ones than this ID.
        tracing::warn!(%error, "no random bytes for a connection ID");
    }
    id[0] = match lane {
        Lane::Fault => id[0] & !LANE_BIT,
        Lane::Bulk => id[0] | LANE_BIT,
    };
    ConnectionId::new(&id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_ids_tell_their_lane_and_differ() {
        for (lane, bit) in [(Lane::Fault, 0), (Lane::Bulk, LANE_BIT)] {
            let first = first_ids(lane);
            let mut issued = IssuedIds(lane);
            for _ in 0..64 {
                assert_eq!(first()[0] & LANE_BIT, bit);
                assert_eq!(issued.generate_cid()[0] & LANE_BIT, bit);
            }
            assert_ne!(first(), first());
            assert_ne!(issued.generate_cid(), issued.generate_cid());
        }
    }
}
