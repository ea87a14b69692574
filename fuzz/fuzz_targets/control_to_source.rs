//! What a destination sends: a hello before the source knows who it is, other messages after that.

#![no_main]

use lazyvm_fuzz::{check_text, checked_messages};
use lazyvm_wire::PageMap;
use lazyvm_wire::control::{HELLO_MAX, Hello, TOUCHED_MAX, ToSource, to_source_max};
use libfuzzer_sys::fuzz_target;

const IMAGE_PAGES: u64 = 1 << 18;

fuzz_target!(|data: &[u8]| {
    let [is_hello, piece, stream @ ..] = data else {
        return;
    };
    let piece = usize::from(*piece);
    if is_hello % 2 == 1 {
        checked_messages::<Hello>(stream, piece, HELLO_MAX);
        return;
    }
    for message in checked_messages(stream, piece, to_source_max(IMAGE_PAGES)) {
        match message {
            ToSource::Refused { reason } => check_text(&reason),
            ToSource::Rejoin { missing } => {
                if let Ok(map) = PageMap::decode(&missing, IMAGE_PAGES) {
                    assert_eq!(map.bits().len() as u64, IMAGE_PAGES);
                }
            }
            ToSource::Touched { pages } => assert!(pages.len() <= TOUCHED_MAX),
            ToSource::Ready { .. }
            | ToSource::Started
            | ToSource::Progress { .. }
            | ToSource::Complete { .. } => {}
        }
    }
});
