//! What a source sends: the page map of a switchover is read for the layout of the welcome ahead of it.

#![no_main]

use lazyvm_fuzz::{check_text, checked_messages};
use lazyvm_wire::control::{Rejection, ToDestination, switchover_max};
use lazyvm_wire::{COMPATIBILITY_MAX, KIND_MAX, PageMap, STATE_MAX, printable};
use libfuzzer_sys::fuzz_target;

/// Pages of the largest image that gets memory here. A destination has memory for the image by then.
const IMAGE_PAGES_MAX: u64 = 1 << 18;

fuzz_target!(|data: &[u8]| {
    let Some((piece, stream)) = data.split_first() else {
        return;
    };
    let mut pages = IMAGE_PAGES_MAX;
    for message in checked_messages(stream, usize::from(*piece), switchover_max(pages)) {
        match message {
            ToDestination::Welcome(welcome) => {
                check_text(&welcome.mode);
                let offer = &welcome.offer;
                assert!(offer.kind.len() <= KIND_MAX && printable(&offer.kind) == offer.kind);
                assert!(offer.compatibility.len() <= COMPATIBILITY_MAX);
                pages = welcome.layout.pages().min(IMAGE_PAGES_MAX);
            }
            ToDestination::Rejected(rejection) => {
                assert_eq!(printable(&rejection.to_string()), rejection.to_string());
                if let Rejection::Protocol(text) | Rejection::Machine(text) = &rejection {
                    check_text(text);
                }
            }
            ToDestination::Switchover(switchover) | ToDestination::SwitchoverPacked(switchover) => {
                assert!(switchover.state.len() <= STATE_MAX);
                if let Ok(map) = PageMap::decode(&switchover.page_map, pages) {
                    assert!(map.data_pages() <= pages);
                }
            }
            ToDestination::Joined
            | ToDestination::Running { .. }
            | ToDestination::Released
            | ToDestination::RecordTouches => {}
        }
    }
});
