//! A frame's header, for an image of any size.

#![no_main]

use lazyvm_wire::frame::{FRAME_HEADER_LEN, FRAME_PAYLOAD_MAX, FrameHeader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u64, [u8; FRAME_HEADER_LEN])| {
    let (image_pages, bytes) = data;
    if let Ok(header) = FrameHeader::decode(&bytes, image_pages) {
        assert_eq!(header.encode(), bytes);
        assert!(header.payload_len() <= FRAME_PAYLOAD_MAX);
        let range = header.range;
        assert!((1..=header.kind.pages_max()).contains(&range.count));
        assert!(range.first.0 < image_pages && range.count <= image_pages - range.first.0);
    }
});
