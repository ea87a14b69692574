//! A snapshot's manifest, its index and its profile.

#![no_main]

use lazyvm_server::snapshot::format::{
    Manifest, Part, Place, check_memory_header, decode_index, decode_profile, encode_index,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (&[u8], &[u8])| {
    let (bytes, other) = data;
    let Ok(mut manifest) = Manifest::decode(bytes) else {
        return;
    };
    assert_eq!(
        Manifest::decode(&manifest.encode().expect("what was read can be written")).as_ref(),
        Ok(&manifest)
    );
    let _ = check_memory_header(other, manifest.id);
    if let Ok(pages) = decode_profile(other, &manifest) {
        assert!(pages.iter().all(|page| page.0 < manifest.layout.pages()));
    }
    // As if its checksum were right.
    manifest.index = Part::of(other);
    if let Ok(entries) = decode_index(other, &manifest) {
        assert_eq!(encode_index(manifest.id, &entries), other);
        for entry in entries {
            assert!(!manifest.chunk_range(entry.chunk).is_empty());
            if let Place::Raw(stored) | Place::Zstd(stored) = entry.place {
                assert!(stored.offset + u64::from(stored.length) <= manifest.memory_bytes);
            }
        }
    }
});
