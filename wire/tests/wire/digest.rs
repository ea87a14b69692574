//! Zero detection and digests.

use lazyvm_wire::{PAGE_SIZE, is_zero, page_digest, zero_digest};

#[test]
fn one_set_bit_anywhere_is_data() {
    let mut page = vec![0; PAGE_SIZE];
    assert!(is_zero(&page));
    for at in 0..PAGE_SIZE {
        page[at] = 0x80;
        assert!(!is_zero(&page), "byte {at}");
        page[at] = 0;
    }
}

#[test]
fn lengths_that_are_no_whole_blocks_are_looked_at_to_the_end() {
    for length in [0, 1, 127, 128, 129, 255] {
        let mut bytes = vec![0; length];
        assert!(is_zero(&bytes));
        if let Some(last) = bytes.last_mut() {
            *last = 1;
            assert!(!is_zero(&bytes), "{length} bytes");
        }
    }
}

#[test]
fn the_digest_is_xxh3_of_the_page() {
    // XXH3_64bits with seed 0, as xxhash's `xxhsum -H3` prints it. Both ends must agree on it.
    assert_eq!(page_digest(b""), 0x2d06_8005_38d3_94c2);
    assert_eq!(zero_digest(), page_digest(&[0; PAGE_SIZE]));
    let mut page = [0; PAGE_SIZE];
    page[PAGE_SIZE - 1] = 1;
    assert_ne!(page_digest(&page), zero_digest());
}
