//! Requests and frame headers.

use lazyvm_wire::frame::{
    Encoding, FRAME_HEADER_LEN, FRAME_PAGES_MAX, FRAME_PAYLOAD_MAX, FRAME_ZERO_PAGES_MAX,
    FaultRequest, FrameError, FrameHeader, FrameKind, REQUEST_LEN,
};
use lazyvm_wire::{IMAGE_PAGES_MAX, PageIndex, PageRange};
use proptest::prelude::*;

pub const KINDS: [FrameKind; 6] = [
    FrameKind::Zero,
    FrameKind::Raw,
    FrameKind::Digests,
    FrameKind::ZeroDigests,
    FrameKind::Unreadable,
    FrameKind::Early,
];

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex(first), count)
}

fn decode(header: FrameHeader) -> Result<FrameHeader, FrameError> {
    FrameHeader::decode(&header.encode(), IMAGE_PAGES_MAX)
}

#[test]
fn each_kind_has_its_most_pages_and_no_more() {
    for kind in KINDS {
        let most = FrameHeader::new(range(5, kind.pages_max()), kind);
        assert_eq!(decode(most), Ok(most));
        assert!(most.payload_len() <= FRAME_PAYLOAD_MAX);
        for count in [0, kind.pages_max() + 1, 1 << 32, u64::MAX >> 3, u64::MAX] {
            let refused = decode(FrameHeader::new(range(5, count), kind));
            assert!(
                matches!(refused, Err(FrameError::Range { .. })),
                "{kind:?} {count}"
            );
        }
    }
}

#[test]
fn a_request_has_its_most_pages_and_no_more() {
    let decode = |first, count, image| {
        FaultRequest::decode(&FaultRequest(range(first, count)).encode(), image)
    };
    let most = range(88, FRAME_PAGES_MAX);
    assert_eq!(decode(88, FRAME_PAGES_MAX, 600), Ok(FaultRequest(most)));
    for (first, count, image) in [
        (0, 0, 600),
        (0, FRAME_PAGES_MAX + 1, 600),
        (0, (1 << 32) + 1, 600),
        (89, FRAME_PAGES_MAX, 600),
        (600, 1, 600),
        (u64::MAX, 1, u64::MAX),
    ] {
        let refused = decode(first, count, image);
        assert!(
            matches!(refused, Err(FrameError::Range { .. })),
            "{first} {count} {image}"
        );
    }
}

#[test]
fn reserved_bytes_are_zero() {
    let good = FaultRequest(range(1, 1)).encode();
    for at in 12..REQUEST_LEN {
        let mut bytes = good;
        bytes[at] = 1;
        assert_eq!(FaultRequest::decode(&bytes, 10), Err(FrameError::Reserved));
    }
    let good = FrameHeader::new(range(1, 1), FrameKind::Raw).encode();
    for at in 19..FRAME_HEADER_LEN {
        let mut bytes = good;
        bytes[at] = 1;
        assert_eq!(FrameHeader::decode(&bytes, 10), Err(FrameError::Reserved));
    }
}

#[test]
fn only_early_frames_have_a_round() {
    for kind in KINDS {
        let header = FrameHeader::new(range(1, 1), kind);
        for round in [0, 1, 7, 255] {
            let bytes = header.in_round(round).encode();
            if (round != 0) == (kind == FrameKind::Early) {
                assert_eq!(FrameHeader::decode(&bytes, 10).unwrap().round, round);
            } else {
                let refused = FrameHeader::decode(&bytes, 10);
                assert_eq!(refused, Err(FrameError::Round(round)));
            }
        }
    }
}

#[test]
fn a_payload_is_as_long_as_kind_and_pages_say() {
    for kind in KINDS {
        let header = FrameHeader::new(range(0, 3), kind);
        let mut bytes = header.encode();
        bytes[12] ^= 1;
        let expected = header.payload_len() as u64;
        let found = expected as u32 ^ 1;
        let refused = FrameHeader::decode(&bytes, 10);
        assert_eq!(refused, Err(FrameError::Payload { found, expected }));
    }
}

#[test]
fn only_pages_are_compressed_and_only_where_that_saves_bytes() {
    let plain = 3 * 4096;
    for encoding in [Encoding::Lz4, Encoding::Zstd] {
        for kind in KINDS {
            let packed =
                |payload| decode(FrameHeader::packed(range(0, 3), kind, encoding, payload));
            if matches!(kind, FrameKind::Raw | FrameKind::Early) {
                let header = packed(plain - 1).unwrap();
                assert_eq!(
                    (header.encoding, header.payload_len()),
                    (encoding, plain - 1)
                );
                for payload in [0, plain, plain + 1] {
                    assert!(matches!(packed(payload), Err(FrameError::Payload { .. })));
                }
            } else {
                assert!(matches!(packed(1), Err(FrameError::Encoding(_))));
            }
        }
    }
    let mut bytes = FrameHeader::new(range(0, 1), FrameKind::Raw).encode();
    for encoding in 3..=u8::MAX {
        bytes[17] = encoding;
        assert_eq!(
            FrameHeader::decode(&bytes, 10),
            Err(FrameError::Encoding(encoding))
        );
    }
}

#[test]
fn an_unknown_kind_is_named() {
    let mut bytes = FrameHeader::new(range(0, 1), FrameKind::Zero).encode();
    for kind in 6..=u8::MAX {
        bytes[16] = kind;
        assert_eq!(FrameHeader::decode(&bytes, 10), Err(FrameError::Kind(kind)));
    }
}

#[test]
fn a_range_that_was_not_checked_saturates() {
    let wild = range(u64::MAX, u64::MAX);
    assert_eq!(wild.end(), PageIndex(u64::MAX));
    assert_eq!(wild.bytes(), u64::MAX);
    assert_eq!(wild.first.byte_offset(), u64::MAX);
    assert!(wild.intersect(range(0, 10)).is_empty());
    assert!(!wild.contains(PageIndex(0)));
    assert_eq!(range(u64::MAX - 1, 9).pages().len(), 1);
    assert_eq!(
        FrameHeader::new(wild, FrameKind::Digests).payload_len(),
        u32::MAX as usize
    );
}

proptest! {
    #[test]
    fn a_frame_header_comes_back(
        kind in prop::sample::select(&KINDS),
        first in 0..=u64::MAX - FRAME_ZERO_PAGES_MAX,
        count in any::<prop::sample::Index>(),
    ) {
        let count = 1 + count.index(kind.pages_max() as usize) as u64;
        let header = FrameHeader::new(range(first, count), kind);
        let bytes = header.encode();
        prop_assert_eq!(FrameHeader::decode(&bytes, first + count), Ok(header));
        prop_assert!(FrameHeader::decode(&bytes, first + count - 1).is_err());
    }

    #[test]
    fn a_request_comes_back(first in 0..u64::MAX / 2, count in 1..=FRAME_PAGES_MAX) {
        let request = FaultRequest(range(first, count));
        prop_assert_eq!(FaultRequest::decode(&request.encode(), first + count), Ok(request));
        prop_assert!(FaultRequest::decode(&request.encode(), first + count - 1).is_err());
    }

    #[test]
    fn any_header_that_is_accepted_is_written_the_same(
        bytes in prop::array::uniform24(prop_oneof![Just(0_u8), Just(1), any::<u8>()]),
        image in any::<u64>(),
    ) {
        if let Ok(header) = FrameHeader::decode(&bytes, image) {
            prop_assert_eq!(header.encode(), bytes);
            prop_assert!(header.payload_len() <= FRAME_PAYLOAD_MAX);
            prop_assert!(header.range.end().0 <= image);
        }
    }

    #[test]
    fn ranges_meet_where_their_pages_do(a in 0..50_u64, b in 0..20_u64, c in 0..50_u64, d in 0..20_u64) {
        let (one, other) = (range(a, b), range(c, d));
        let both: Vec<_> = one.pages().filter(|&page| other.contains(page)).collect();
        prop_assert_eq!(one.intersect(other).pages().collect::<Vec<_>>(), both);
    }
}
