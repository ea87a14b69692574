//! Telling a connection's lane before it is accepted.
//!
//! A server drives each connection on the thread of its lane, and has to choose that thread when the first packet is
//! there, long before the hello says what the connection is for. So a destination marks the connection ID that it
//! makes up for its first packet (RFC 9000, section 7.2: unpredictable, eight bytes or more): one bit of its twenty
//! bytes. It is a hint. A wrong one costs a hop between threads, nothing else.

use std::sync::Arc;

use lazyvm_wire::control::Lane;
use quinn::ConnectionId;

const CONNECTION_ID_LEN: usize = 20;
const LANE_BIT: u8 = 1;

/// The lane that the ID of a connection's first packet hints at.
pub fn lane_of_connection_id(id: &[u8]) -> Lane {
    match id.first() {
        Some(byte) if byte & LANE_BIT != 0 => Lane::Bulk,
        _ => Lane::Fault,
    }
}

/// Makes random connection IDs that hint at `lane`.
pub(crate) fn connection_ids(lane: Lane) -> Arc<dyn Fn() -> ConnectionId + Send + Sync> {
    Arc::new(move || {
        let mut id = [0; CONNECTION_ID_LEN];
        if let Err(error) = getrandom::fill(&mut id) {
            // The handshake itself then fails for want of random bytes: TLS needs far better ones than this ID.
            tracing::warn!(%error, "no random bytes for a connection ID");
        }
        id[0] = match lane {
            Lane::Fault => id[0] & !LANE_BIT,
            Lane::Bulk => id[0] | LANE_BIT,
        };
        ConnectionId::new(&id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_made_id_tells_its_lane() {
        for lane in [Lane::Fault, Lane::Bulk] {
            let make = connection_ids(lane);
            for _ in 0..64 {
                assert_eq!(lane_of_connection_id(&make()), lane);
            }
            assert_ne!(make(), make());
        }
    }
}
