use proptest::prelude::*;

use super::*;

/// The message of each shape that a release since 1.1 sends, as it goes over the socket.
const GOLDEN: [(&str, &str); 4] = [
    (
        "1.1",
        r#"[{"base_host_virt_addr":140161384087552,"size":3221225472,"offset":0},{"base_host_virt_addr":140157089120256,"size":1073741824,"offset":3221225472}]"#,
    ),
    (
        "1.7",
        r#"[{"base_host_virt_addr":140161384087552,"size":3221225472,"offset":0,"page_size_kib":4096},{"base_host_virt_addr":140157089120256,"size":1073741824,"offset":3221225472,"page_size_kib":4096}]"#,
    ),
    (
        "1.12",
        r#"[{"base_host_virt_addr":140161384087552,"size":3221225472,"offset":0,"page_size":4096,"page_size_kib":4096},{"base_host_virt_addr":140157089120256,"size":1073741824,"offset":3221225472,"page_size":4096,"page_size_kib":4096}]"#,
    ),
    (
        "2.0, with page_size_kib gone and a field that nobody knows",
        r#" [{"base_host_virt_addr":140161384087552,"size":3221225472,"offset":0,"page_size":4096,"new":{"a":["]"]}},{"base_host_virt_addr":140157089120256,"size":1073741824,"offset":3221225472,"page_size":4096,"new":"\"]"}] "#,
    ),
];

#[test]
fn every_released_shape_is_understood() {
    for (version, message) in GOLDEN {
        let mut decoder = Decoder::default();
        let handshake = decoder.push(message.as_bytes()).expect(version);
        let handshake = handshake.expect(version);
        assert_eq!(
            handshake.regions(),
            [
                HandedRegion {
                    host: 140_161_384_087_552,
                    bytes: 3 << 30,
                    offset: 0,
                    backing: Backing::Small,
                },
                HandedRegion {
                    host: 140_157_089_120_256,
                    bytes: 1 << 30,
                    offset: 3 << 30,
                    backing: Backing::Small,
                }
            ],
            "{version}"
        );
        assert_eq!(handshake.layout().expect(version).bytes(), 4 << 30);
        assert_eq!(handshake.memory().expect(version).bytes(), 4 << 30);
    }
}

#[test]
fn huge_pages_are_told_in_bytes_by_both_fields() {
    for fields in [
        r#""page_size_kib":2097152"#,
        r#""page_size":2097152"#,
        r#""page_size":2097152,"page_size_kib":2097152"#,
    ] {
        let message =
            format!(r#"[{{"base_host_virt_addr":1073741824,"size":4194304,"offset":0,{fields}}}]"#);
        let handshake = Handshake::parse(message.as_bytes()).expect(fields);
        assert_eq!(handshake.regions()[0].backing, Backing::Huge2M);
    }
}

#[test]
fn regions_are_put_in_the_order_of_the_file() {
    let message = r#"[{"base_host_virt_addr":4096,"size":4096,"offset":8192},{"base_host_virt_addr":65536,"size":8192,"offset":0}]"#;
    let handshake = Handshake::parse(message.as_bytes()).expect("a handshake");
    assert_eq!(handshake.regions()[0].host, 65536);
    assert_eq!(handshake.regions()[1].host, 4096);
}

#[test]
fn what_can_not_be_is_refused_in_words() {
    let region = |address: u64, size: u64, offset: u64, more: &str| {
        format!(r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset}{more}}}"#)
    };
    let one = |address, size, offset, more| format!("[{}]", region(address, size, offset, more));
    let two = |second: String| format!("[{},{second}]", region(1 << 20, 8192, 0, ""));
    for (message, words) in [
        ("[]".to_owned(), "0 memory regions"),
        ("{}".to_owned(), "does not begin with ["),
        ("[1]".to_owned(), "not Firecracker's list"),
        ("[{}]".to_owned(), "missing field `base_host_virt_addr`"),
        ("[}".to_owned(), "not Firecracker's list"),
        (one(1, 4096, 0, ""), "its address 0x1 is not a whole"),
        (one(4096, 4097, 0, ""), "its size 0x1001 is not a whole"),
        (one(4096, 0, 0, ""), "its size 0x0"),
        (one(4096, 4096, 1, ""), "its offset 0x1 is not a whole"),
        (one(4096, 4096, 4096, ""), "where 0x0 comes next"),
        (one(0xffff_ffff_ffff_f000, 8192, 0, ""), "out of range"),
        (one(4096, 0xffff_ffff_ffff_f000, 0, ""), "out of range"),
        (
            one(4096, 4096, 0, r#","page_size":8192"#),
            "pages of 8192 bytes",
        ),
        (
            one(4096, 4096, 0, r#","page_size":4096,"page_size_kib":4"#),
            "two page sizes",
        ),
        (
            one(4096, 4096, 0, r#","page_size_kib":2097152"#),
            "its size 0x1000 is not a whole",
        ),
        (two(region((1 << 20) + 4096, 4096, 8192, "")), "overlap"),
        (
            two(region(1 << 30, 4096, 4096, "")),
            "where 0x2000 comes next",
        ),
        (
            two(region(1 << 30, 4096, 12288, "")),
            "where 0x2000 comes next",
        ),
        ("[] []".to_owned(), "more follows"),
    ] {
        let error = Decoder::default().push(message.as_bytes());
        let error = error.expect_err(&message).to_string();
        assert!(error.contains(words), "{message}: {error}");
    }
}

#[test]
fn a_message_that_does_not_end_is_cut_off() {
    let mut decoder = Decoder::default();
    assert_eq!(decoder.push(b"[").expect("a begin"), None);
    assert_eq!(decoder.end(), HandshakeError::CutShort(1));
    let spaces = vec![b' '; MESSAGE_MAX];
    assert_eq!(decoder.push(&spaces), Err(HandshakeError::TooLong));
}

#[test]
fn too_many_regions_are_refused() {
    let regions: Vec<String> = (0..=REGIONS_MAX)
        .map(|n| {
            format!(
                r#"{{"base_host_virt_addr":{},"size":4096,"offset":{}}}"#,
                n * 8192,
                n * 4096
            )
        })
        .collect();
    let message = format!("[{}]", regions.join(","));
    assert_eq!(
        Decoder::default().push(message.as_bytes()),
        Err(HandshakeError::RegionCount(REGIONS_MAX + 1))
    );
}

proptest! {
    #[test]
    fn pieces_give_what_the_whole_gives(which in 0..GOLDEN.len(), cuts in prop::collection::vec(1_usize..40, 1..40)) {
        let message = GOLDEN[which].1.trim_end().as_bytes();
        let whole = Decoder::default().push(message);
        let mut decoder = Decoder::default();
        let mut rest = message;
        let mut found = Ok(None);
        for cut in cuts.iter().cycle() {
            let (piece, after) = rest.split_at((*cut).min(rest.len()));
            found = decoder.push(piece);
            rest = after;
            if rest.is_empty() {
                break;
            }
            prop_assert_eq!(&found, &Ok(None));
        }
        prop_assert_eq!(found, whole);
    }

    #[test]
    fn any_bytes_give_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Decoder::default().push(&bytes);
        let mut list = b"[".to_vec();
        list.extend(bytes);
        let _ = Decoder::default().push(&list);
    }

    #[test]
    fn any_numbers_give_memory_or_words(
        regions in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()), 1..4),
        shift in 0_u32..52,
    ) {
        let told: Vec<String> = regions.iter().map(|(address, size, offset, huge)| {
            let page = if *huge { 2_097_152 } else { 4096 };
            format!(
                r#"{{"base_host_virt_addr":{},"size":{},"offset":{},"page_size":{page}}}"#,
                (address >> shift) << 12, (size >> shift) << 12, (offset >> shift) << 12,
            )
        }).collect();
        let message = format!("[{}]", told.join(","));
        if let Ok(handshake) = Handshake::parse(message.as_bytes()) {
            let memory = handshake.memory().expect("what was checked is memory");
            if let Ok(layout) = handshake.layout() {
                memory.check_against(&layout).expect("and its layout's");
            }
        }
    }
}
