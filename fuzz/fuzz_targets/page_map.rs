//! A page map: as the bytes that a peer sent, and as pages that a source has.

#![no_main]

use bitvec::prelude::{BitSlice, Lsb0};
use lazyvm_wire::{PageIndex, PageMap, PageRange};
use libfuzzer_sys::fuzz_target;

/// Pages in a block of the encoding.
const BLOCK: u64 = 32 * 1024;

fuzz_target!(|data: (u8, u32, &[u8])| {
    let (mode, pages, bytes) = data;
    match mode % 3 {
        0 => {
            // 2 GiB at most: more pages show nothing new, and slow the fuzzer down.
            let pages = u64::from(pages) % (1 << 19);
            if let Ok(map) = PageMap::decode(bytes, pages) {
                assert_eq!(map.bits().len() as u64, pages);
                check(&map);
            }
        }
        1 => {
            // Bits from within a word on.
            let bits = BitSlice::<u8, Lsb0>::from_slice(bytes);
            let start = (pages as usize).min(bits.len());
            let model: Vec<bool> = bits[start..].iter().by_vals().collect();
            let map = PageMap::from_bits(model.iter().copied().collect());
            assert!(map.bits().iter().by_vals().eq(model));
            check(&map);
        }
        _ => {
            // Runs, of which some are past the image.
            let mut map = PageMap::zeroed(u64::from(pages) % (4 * BLOCK));
            for run in bytes.chunks_exact(5) {
                let first = u64::from(u32::from_le_bytes([run[0], run[1], run[2], 0]));
                let count = u64::from(u16::from_le_bytes([run[3], run[4]]));
                map.set_data(PageRange::new(PageIndex(first), count));
            }
            check(&map);
        }
    }
});

fn check(map: &PageMap) {
    let pages = map.bits().len() as u64;
    let bytes = map.encode();
    assert!(bytes.len() as u64 <= pages.div_ceil(BLOCK) * (BLOCK / 8 + 1));
    assert_eq!(PageMap::decode(&bytes, pages).as_ref(), Ok(map));
    // Nothing but the bits themselves is in the bytes.
    let bits = map.bits().to_bitvec();
    assert_eq!(PageMap::from_bits(bits).encode(), bytes);
}
