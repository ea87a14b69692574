//! A link in virtual time: a rate, a delay, nothing lost. Times are in nanoseconds from the pause.

use lazyvm_wire::PAGE_SIZE;

/// What a page takes of the link besides its bytes: frame header, QUIC, UDP and IP headers of its packets.
const OVERHEAD_BYTES: u64 = 200;

/// From the source to the destination, and requests back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Round trip, in nanoseconds.
    pub rtt_ns: u64,
    /// Bits a second; not 0.
    pub rate_bit_s: u64,
}

impl Link {
    /// How long so many bytes take at its rate.
    pub fn time_of(&self, bytes: u64) -> u64 {
        let bits_ns = u128::from(bytes) * 8 * 1_000_000_000;
        u64::try_from(bits_ns / u128::from(self.rate_bit_s.max(1))).unwrap_or(u64::MAX)
    }

    /// How long a page takes at its rate.
    pub fn page_ns(&self) -> u64 {
        self.time_of(PAGE_SIZE as u64 + OVERHEAD_BYTES)
    }

    /// From one end to the other.
    pub fn one_way_ns(&self) -> u64 {
        self.rtt_ns / 2
    }
}
