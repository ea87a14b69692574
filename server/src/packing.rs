//! Whether pages are compressed, and how: only where the path is slower than the compression, and only while the content
//! gives way. Pure logic but for the compressors themselves.

use lazyvm_wire::PAGE_SIZE;
use lazyvm_wire::frame::Encoding;

/// Paths below so many bytes a second get LZ4, which one core does at several times that.
const LZ4_BELOW: f64 = 200e6;

/// Paths below so many get Zstandard, which takes a third of a core there and saves more.
const ZSTD_BELOW: f64 = 30e6;

/// Zstandard's level: the fastest of those that give what Zstandard is known for.
const ZSTD_LEVEL: i32 = 1;

/// A compressed run must be at most this part of its pages: less is not worth the destination's work.
const WORTH: f64 = 0.9;

/// Runs that go as they are after one that was not worth it; doubles up to the most.
const REST_MIN: u32 = 1;
const REST_MAX: u32 = 64;

/// Runs of so many bytes are always tried: what is needed first goes in such, code among what gives nothing, and trying costs
/// a tenth of a core on a path of 1 Gbit/s at most.
const SHORT: usize = 4 * PAGE_SIZE;

/// The state of a machine compressed: it stands still until that has arrived. `None` where that brings nothing.
pub(crate) fn pack_state(state: &[u8]) -> Option<Vec<u8>> {
    let packed = zstd::bulk::compress(state, ZSTD_LEVEL).ok()?;
    (packed.len() < state.len()).then_some(packed)
}

/// Decides for each run, and compresses it.
#[derive(Debug)]
pub(crate) struct Packer {
    encoding: Encoding,
    /// Runs until the next try.
    resting: u32,
    rest: u32,
}

impl Default for Packer {
    fn default() -> Self {
        Self {
            encoding: Encoding::Plain,
            resting: 0,
            rest: REST_MIN,
        }
    }
}

impl Packer {
    /// The path carries about so many bytes a second.
    pub fn path_carries(&mut self, bytes_per_s: f64) {
        self.encoding = if bytes_per_s < ZSTD_BELOW {
            Encoding::Zstd
        } else if bytes_per_s < LZ4_BELOW {
            Encoding::Lz4
        } else {
            Encoding::Plain
        };
    }

    /// The pages compressed, where that is worth it.
    pub fn pack(&mut self, pages: &[u8]) -> Option<(Encoding, Vec<u8>)> {
        if self.encoding == Encoding::Plain {
            return None;
        }
        let short = pages.len() <= SHORT;
        if self.resting > 0 && !short {
            self.resting -= 1;
            return None;
        }
        let packed = match self.encoding {
            Encoding::Plain => None,
            Encoding::Lz4 => Some(lz4_flex::block::compress(pages)),
            Encoding::Zstd => zstd::bulk::compress(pages, ZSTD_LEVEL).ok(),
        };
        match packed {
            Some(packed) if (packed.len() as f64) <= WORTH * pages.len() as f64 => {
                self.rest = REST_MIN;
                Some((self.encoding, packed))
            }
            _ if short => None,
            _ => {
                self.resting = self.rest;
                self.rest = (self.rest * 2).min(REST_MAX);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut state = 1_u64;
        (0..length)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
            .collect()
    }

    #[test]
    fn a_fast_path_gets_pages_as_they_are_and_a_slow_one_gets_them_small() {
        let text = b"what stands here twice ".repeat(600);
        let mut packer = Packer::default();
        assert!(packer.pack(&text).is_none());
        packer.path_carries(1e9);
        assert!(packer.pack(&text).is_none());
        packer.path_carries(125e6);
        let (encoding, packed) = packer.pack(&text).unwrap();
        assert_eq!(encoding, Encoding::Lz4);
        assert_eq!(
            lz4_flex::block::decompress(&packed, text.len()).unwrap(),
            text
        );
        packer.path_carries(1e6);
        let (encoding, packed) = packer.pack(&text).unwrap();
        assert_eq!(encoding, Encoding::Zstd);
        assert_eq!(zstd::bulk::decompress(&packed, text.len()).unwrap(), text);
    }

    #[test]
    fn what_does_not_give_way_is_tried_less_and_less_until_something_does() {
        let (noise, text) = (noise(128 << 10), vec![b'x'; 128 << 10]);
        let mut packer = Packer::default();
        packer.path_carries(125e6);
        let mut tries = 0;
        for _ in 0..1000 {
            let before = packer.resting;
            assert!(packer.pack(&noise).is_none());
            tries += u32::from(before == 0);
        }
        assert!(tries < 25, "{tries}");
        let runs = (0..=REST_MAX).position(|_| packer.pack(&text).is_some());
        assert!(runs.is_some());
        assert!(packer.pack(&text).is_some(), "and then at once");
    }

    #[test]
    fn a_short_run_is_tried_whatever_went_before_it() {
        let (noise, text) = (noise(128 << 10), [b'x'; PAGE_SIZE]);
        let mut packer = Packer::default();
        packer.path_carries(125e6);
        for _ in 0..20 {
            assert!(packer.pack(&noise).is_none());
            assert!(packer.pack(&noise[..PAGE_SIZE]).is_none());
            assert!(packer.pack(&text).is_some());
        }
    }
}
