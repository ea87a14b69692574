//! What has gone through the emulated path, over time.

use serde::Serialize;

use super::queue::Dropped;

/// Length of a bin.
pub const BIN_MS: u64 = 10;

/// Bins that are kept: ten hours.
const BINS_MAX: usize = 3_600_000;

/// Counts of the path. Directions: 0 from the source, 1 from the destination.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// Bytes of IP that arrived in each [`BIN_MS`].
    pub bins: Vec<[u64; 2]>,
    /// Counts since the start.
    pub totals: Totals,
    /// Processor time of the relay.
    pub relay_cpu_us: u64,
    /// Packets that the other end's kernel did not take.
    pub write_failures: u64,
}

/// Counts since the start, both ways where nothing else is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Bytes of IP that arrived from the source.
    pub bytes_from_source: u64,
    /// Bytes of IP that arrived from the destination.
    pub bytes_from_destination: u64,
    /// Packets that arrived.
    pub packets: u64,
    /// Reads and writes of packets by the relay, which may carry many each.
    pub writes: u64,
    /// Packets lost by chance.
    pub lost: u64,
    /// Packets that the full queue dropped.
    pub queue_full: u64,
    /// Packets that a blackout took.
    pub blackout: u64,
}

impl Traffic {
    pub(super) fn took(&mut self, dropped: Vec<Dropped>) {
        for why in dropped {
            match why {
                Dropped::Lost => self.totals.lost += 1,
                Dropped::QueueFull => self.totals.queue_full += 1,
                Dropped::Blackout => self.totals.blackout += 1,
            }
        }
    }

    pub(super) fn delivered(&mut self, from: usize, now_ns: u64, bytes: u64, packets: u64) {
        let bin = ((now_ns / (BIN_MS * 1_000_000)) as usize).min(BINS_MAX);
        if self.bins.len() <= bin {
            self.bins.resize(bin + 1, [0; 2]);
        }
        self.bins[bin][from] += bytes;
        if from == 0 {
            self.totals.bytes_from_source += bytes;
        } else {
            self.totals.bytes_from_destination += bytes;
        }
        self.totals.packets += packets;
        self.totals.writes += 1;
    }
}

impl Totals {
    /// What came since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            bytes_from_source: self.bytes_from_source - before.bytes_from_source,
            bytes_from_destination: self.bytes_from_destination - before.bytes_from_destination,
            packets: self.packets - before.packets,
            writes: self.writes - before.writes,
            lost: self.lost - before.lost,
            queue_full: self.queue_full - before.queue_full,
            blackout: self.blackout - before.blackout,
        }
    }
}
