//! A demand for pages, for an image of any size.

#![no_main]

use lazyvm_wire::frame::{FRAME_PAGES_MAX, FaultRequest, REQUEST_LEN};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u64, [u8; REQUEST_LEN])| {
    let (image_pages, bytes) = data;
    if let Ok(request) = FaultRequest::decode(&bytes, image_pages) {
        assert_eq!(request.encode(), bytes);
        let range = request.0;
        assert!((1..=FRAME_PAGES_MAX).contains(&range.count));
        assert!(range.first.0 < image_pages && range.count <= image_pages - range.first.0);
    }
});
