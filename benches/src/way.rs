//! The way between a run's source and its destination.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::error::BenchError;
use crate::link::{Link, Relay};
use crate::wan::emulator::{Emulator, SOURCE};
use crate::wan::queue::PathConfig;

/// Which one.
pub(crate) enum Way {
    /// This machine's loopback.
    Loopback,
    /// Loopback with a relay that delays, limits and drops packets one by one: for who is not root.
    Relayed(Link),
    /// Two network namespaces with an emulated path between them.
    Rig(Box<Emulator>),
}

impl Way {
    /// The best one there is for such a link.
    pub fn of(link: Link) -> Result<Self, BenchError> {
        if link.is_plain() {
            return Ok(Self::Loopback);
        }
        if !nix::unistd::geteuid().is_root() {
            tracing::warn!(
                "a relay in this process stands for the link, which fast ones are too much for; root gets an emulated path"
            );
            return Ok(Self::Relayed(link));
        }
        let path = PathConfig {
            rtt: link.rtt,
            rate_bit_s: link.rate_bit_s,
            loss: link.loss,
            ..PathConfig::default()
        };
        Ok(Self::Rig(Box::new(Emulator::start(path)?)))
    }

    /// Whether source and destination are on one CPU's clock: wake-ups then count, and which CPU they end at.
    pub fn is_near(&self) -> bool {
        matches!(self, Self::Loopback)
    }

    /// Packets lost by chance, and dropped by the full queue, so far.
    pub fn lost_packets(&self) -> Option<[u64; 2]> {
        match self {
            Self::Rig(emulator) => {
                let totals = emulator.traffic().totals;
                Some([totals.lost, totals.queue_full])
            }
            _ => None,
        }
    }

    /// Where the source listens.
    pub fn source_address(&self) -> Result<IpAddr, BenchError> {
        Ok(match self {
            Self::Rig(_) => SOURCE.parse().map_err(io::Error::other)?,
            _ => Ipv4Addr::LOCALHOST.into(),
        })
    }

    /// Where the destination finds a server of the source's, for as long as the relay is kept.
    pub fn to(&self, server: SocketAddr) -> Result<(SocketAddr, Option<Relay>), BenchError> {
        Ok(match self {
            Self::Relayed(link) => {
                let relay = Relay::start(server, *link)?;
                (relay.address(), Some(relay))
            }
            _ => (server, None),
        })
    }

    /// Does this where the source is.
    pub fn at_source<T: Send>(
        &self,
        act: impl FnOnce() -> Result<T, BenchError> + Send,
    ) -> Result<T, BenchError> {
        match self {
            Self::Rig(emulator) => emulator.source.within(|| Ok(act()))?,
            _ => act(),
        }
    }

    /// Does this where the destination is. Threads that it starts stay there.
    pub fn at_destination<T: Send>(
        &self,
        act: impl FnOnce() -> Result<T, BenchError> + Send,
    ) -> Result<T, BenchError> {
        match self {
            Self::Rig(emulator) => emulator.destination.within(|| Ok(act()))?,
            _ => act(),
        }
    }
}
