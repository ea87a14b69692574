use lazyvm_wire::{Layout, MachineOffer};
use proptest::prelude::*;

use super::*;

const ID: SnapshotId = SnapshotId(*b"0123456789abcdef");

fn manifest(pages: u64, base: bool, index: &[u8]) -> Manifest {
    Manifest {
        id: ID,
        taken_at_s: 1_700_000_000,
        layout: Layout::flat(pages).unwrap(),
        offer: MachineOffer {
            kind: "memory".to_owned(),
            state_version: 1,
            compatibility: vec![7, 8],
        },
        state: Part::of(b"state"),
        index: Part::of(index),
        memory_bytes: 1 << 30,
        base: base.then(|| Base {
            path: "../base".to_owned(),
            id: SnapshotId([1; 16]),
            digest: 5,
        }),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// When this fails, an earlier release can no longer read what this one writes: make a new version.
#[test]
fn the_bytes_are_as_written_down() {
    let entries = [
        Entry {
            chunk: 1,
            data: 3,
            digest: 9,
            place: Place::Zstd(Stored {
                offset: 32,
                length: 100,
                digest: 4,
            }),
        },
        Entry {
            chunk: 2,
            data: 1,
            digest: 10,
            place: Place::Base,
        },
    ];
    let index = encode_index(ID, &entries);
    assert_eq!(
        hex(&index),
        "6c617a79766d4958010000003000000030313233343536373839616263646566\
         0200000000000000\
         01000000000000002000000000000000640000000100030004000000000000000900000000000000\
         0000000000000000\
         02000000000000000000000000000000000000000200010000000000000000000a00000000000000\
         0000000000000000"
    );
    let manifest = manifest(64, true, &index);
    let bytes = manifest.encode().unwrap();
    assert_eq!(
        hex(&bytes),
        concat!(
            "6c617a79766d534e01000000",
            "700000003031323334353637383961626364656680e2cfaa06010372616d01004000066d656d6f7279010207",
            "080592d08cd7e1bf99ca8995d5a6ceada8abb3990388019df7bdf6bdcbbd838ce2fab1faa4ced6984880",
            "8080800401072e2e2f626173650101010101010101010101010101010105bd83bce5be1a93c38e607c818ada2983"
        )
    );
    assert_eq!(
        hex(&memory_header(ID)),
        "6c617a79766d4d45010000000000000030313233343536373839616263646566"
    );
    let profile = encode_profile(ID, &[PageIndex(3), PageIndex(1)]);
    // The checksum behind it is XXH3-64.
    assert_eq!(
        hex(&profile[..profile.len() - 8]),
        "6c617a79766d50520100000002000000303132333435363738396162636465660300000001000000"
    );
}

fn entries(pages: u64) -> impl Strategy<Value = Vec<Entry>> {
    let layout = Layout::flat(pages).unwrap();
    let entry = (
        any::<u16>(),
        any::<u128>(),
        0..3_u8,
        32..1_u64 << 29,
        any::<u64>(),
        1..CHUNK_BYTES as u32,
    );
    proptest::collection::btree_map(0..chunks(&layout), entry, 0..20).prop_map(move |found| {
        let entry = |(chunk, (data, digest, kind, offset, stored, length)): (
            u64,
            (u16, u128, u8, u64, u64, u32),
        )| {
            let range: PageRange = chunk_range(&layout, chunk);
            let data = data & (u32::MAX >> (32 - range.count)) as u16;
            let whole = range.bytes() as u32;
            Entry {
                chunk,
                data: data.max(1),
                digest,
                place: match kind {
                    0 => Place::Raw(Stored {
                        offset,
                        length: whole,
                        digest: stored,
                    }),
                    1 => Place::Zstd(Stored {
                        offset,
                        length: length.min(whole - 1),
                        digest: stored,
                    }),
                    _ => Place::Base,
                },
            }
        };
        found.into_iter().map(entry).collect()
    })
}

proptest! {
    #[test]
    fn what_was_written_is_read_and_damage_is_found(
        entries in entries(1003),
        flip in any::<prop::sample::Index>(),
        bit in 0..8_u8,
        cut in any::<prop::sample::Index>(),
    ) {
        let index = encode_index(ID, &entries);
        let manifest = manifest(1003, true, &index);
        prop_assert_eq!(decode_index(&index, &manifest), Ok(entries));
        let bytes = manifest.encode().unwrap();
        let read = Manifest::decode(&bytes);
        prop_assert_eq!(read.as_ref(), Ok(&manifest));
        for whole in [&bytes, &index] {
            let refused = |damaged: &[u8]| if whole == &bytes {
                Manifest::decode(damaged).is_err()
            } else {
                decode_index(damaged, &manifest).is_err()
            };
            let mut damaged = whole.clone();
            damaged[flip.index(whole.len())] ^= 1 << bit;
            prop_assert!(refused(&damaged));
            prop_assert!(refused(&whole[..cut.index(whole.len())]));
            damaged = whole.clone();
            damaged.push(0);
            prop_assert!(refused(&damaged));
        }
    }

    /// Entries that a checksum would hide are refused for what they say.
    #[test]
    fn an_index_that_lies_is_refused(at in 0..ENTRY_LEN - 24, bytes in any::<u64>()) {
        let entry = Entry {
            chunk: 0,
            data: 1,
            digest: 0,
            place: Place::Zstd(Stored { offset: 32, length: 10, digest: 0 }),
        };
        let mut index = encode_index(ID, &[entry]);
        let at = INDEX_HEADER_LEN + at;
        index[at..at + 8].copy_from_slice(&bytes.to_le_bytes());
        let manifest = manifest(16, false, &index);
        if let Ok(entries) = decode_index(&index, &manifest) {
            for entry in entries {
                prop_assert!(!manifest.chunk_range(entry.chunk).is_empty());
                let (Place::Raw(stored) | Place::Zstd(stored)) = entry.place else {
                    panic!("there is no base");
                };
                prop_assert!(stored.offset >= 32 && stored.length as usize <= CHUNK_BYTES);
                prop_assert!(stored.offset + u64::from(stored.length) <= manifest.memory_bytes);
            }
        }
    }

    #[test]
    fn a_profile_comes_back_or_is_refused(
        pages in proptest::collection::vec(0..1003_u64, 0..50),
        flip in any::<prop::sample::Index>(),
        bit in 0..8_u8,
    ) {
        let manifest = manifest(1003, false, &[]);
        let pages: Vec<_> = pages.into_iter().map(PageIndex).collect();
        let mut bytes = encode_profile(ID, &pages);
        prop_assert_eq!(decode_profile(&bytes, &manifest), Ok(pages));
        let at = flip.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(decode_profile(&bytes, &manifest).is_err());
        prop_assert!(decode_profile(&bytes[..at], &manifest).is_err());
    }

    #[test]
    fn nothing_from_outside_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Manifest::decode(&bytes);
        let manifest = manifest(1003, true, &bytes);
        let _ = decode_index(&bytes, &manifest);
        let _ = decode_profile(&bytes, &manifest);
        let _ = check_memory_header(&bytes, ID);
    }
}
