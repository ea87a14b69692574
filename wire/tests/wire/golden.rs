//! The bytes on the wire, written down.
//!
//! When one of these fails, a peer of an earlier release no longer understands this one. So don't just change the
//! bytes: make a new version, with an entry in `wire/src/ledger.rs`, and then new bytes here beside the entry. The
//! hello and the rejections may not change at all; with them any two versions tell each other that they don't match.

use data_encoding::HEXLOWER;
use lazyvm_wire::control::{Lane, encode};
use lazyvm_wire::frame::{FaultRequest, FrameHeader};
use lazyvm_wire::{PageIndex, PageMap, PageRange};

use crate::samples;

/// Compares with hex in which white space means nothing.
#[track_caller]
fn assert_golden(what: &str, bytes: &[u8], golden: &str) {
    let golden: String = golden.split_whitespace().collect();
    let found = HEXLOWER.encode(bytes);
    assert_eq!(found, golden, "{what}: read the head of this file first");
}

#[test]
fn ticket() {
    assert_eq!(
        samples::ticket().to_text(),
        "lazyvm-ticket-1.AgDAAAIHiyUBIAENuAAAAAAAAAAAAAAAB4wlEREREREREREREREREREREREREREREREREREREREREREw\
         MTIzNDU2Nzg5YWJjZGVmpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWlpaWApKfaBmME2so"
    );
}

#[test]
fn hello() {
    // length | versions 1 to 300 | session | secret | lane | verify
    for (lane, verify, golden) in [
        (
            Lane::Fault,
            true,
            "35000000 01 ac02 30313233343536373839616263646566
             a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5 00 01",
        ),
        (
            Lane::Bulk,
            false,
            "35000000 01 ac02 30313233343536373839616263646566
             a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5 01 00",
        ),
    ] {
        assert_golden(
            "hello",
            &encode(&samples::hello(lane, verify)).unwrap(),
            golden,
        );
    }
}

#[test]
fn to_source() {
    // length | number of the message | fields
    let golden = [
        "02000000 00 01",
        "09000000 01 07 6e6f20726f6f6d",
        "01000000 02",
        "03000000 03 e807",
        "02000000 04 00",
        "03000000 04 01 01",
        "0d000000 05 0b 0206 00 01 9f01 8004 8f04 01",
        "06000000 06 03 07 ac02 01",
    ];
    let messages = samples::to_source();
    assert_eq!(messages.len(), golden.len());
    for (message, golden) in messages.iter().zip(golden) {
        assert_golden(&format!("{message:?}"), &encode(message).unwrap(), golden);
    }
}

#[test]
fn to_destination() {
    let golden = [
        // version | layout, as below | kind, state's version, compatibility | mode
        "35000000 00 01
         03 036c6f77 0100 a001 00 0468696768 018080808010 8008 01 047672616d 00 10 00
         036b766d 02 04deadbeef 08706f7374636f7079",
        "01000000 01",
        "1b000000 03 05 0102030405 0b 0206 00 01 9f01 8004 8f04 01 06 030201 000102 01",
        "03000000 04 b960",
        "01000000 05",
        "01000000 06",
        "13000000 07 03 090807 0b 0206 00 01 9f01 8004 8f04 01 00 00",
        // The rejections, which are the same for ever.
        "02000000 02 00",
        "02000000 02 01",
        "02000000 02 02",
        "05000000 02 03 01 ac02",
        "0d000000 02 04 0a 74776f2068656c6c6f73",
        "11000000 02 05 0e 7061757365642062792068616e64",
    ];
    let messages = samples::to_destination();
    assert_eq!(messages.len(), golden.len());
    for (message, golden) in messages.iter().zip(golden) {
        assert_golden(&format!("{message:?}"), &encode(message).unwrap(), golden);
    }
}

#[test]
fn layout() {
    // regions | name, address, pages, backing of each
    assert_golden(
        "layout",
        &postcard::to_allocvec(&samples::layout()).unwrap(),
        "03
         036c6f77   01 00         a001 00
         0468696768 01 8080808010 8008 01
         047672616d 00            10   00",
    );
}

#[test]
fn fault_request() {
    // first page | pages | reserved
    let request = FaultRequest(PageRange::new(PageIndex(0x0102_0304_0506_0708), 3));
    assert_golden(
        "request",
        &request.encode(),
        "0807060504030201 03000000 00000000",
    );
}

#[test]
fn frame_headers() {
    // first page | pages | payload | kind, encoding, round, reserved
    let golden = [
        "0807060504030201 03000000 00000000 00 00000000000000",
        "0807060504030201 03000000 00300000 01 00000000000000",
        "0807060504030201 03000000 18000000 02 00000000000000",
        "0807060504030201 03000000 00000000 03 00000000000000",
        "0807060504030201 03000000 00000000 04 00000000000000",
        "0807060504030201 03000000 00300000 05 00 01 0000000000",
    ];
    let range = PageRange::new(PageIndex(0x0102_0304_0506_0708), 3);
    for (kind, golden) in crate::frame::KINDS.into_iter().zip(golden) {
        let header = FrameHeader::new(range, kind);
        assert_golden(&format!("{kind:?}"), &header.encode(), golden);
    }
}

/// First page and length of each.
type Runs = Vec<(u64, u64)>;

#[test]
fn page_maps() {
    const BLOCK: u64 = 32 * 1024;
    let alternating = format!("03 {} 03 5555", "55".repeat(4096));
    let every_other = (0..BLOCK + 16).step_by(2).map(|page| (page, 1)).collect();
    // Pages of the image, runs of data, bytes.
    let shapes: [(&str, u64, Runs, &str); 7] = [
        ("no page", 0, vec![], ""),
        ("all zero, 1 TiB", 1 << 28, vec![], "00 8040"),
        (
            "all data, a block and a page",
            BLOCK + 1,
            vec![(0, BLOCK + 1)],
            "01 02",
        ),
        ("data first", 100, vec![(0, 30)], "02 03 00 1e 46"),
        (
            "one page far behind",
            3 * BLOCK,
            vec![(2 * BLOCK + 7, 1)],
            "00 02 02 03 07 01 f8ff01",
        ),
        (
            "zero, data, mixed",
            3 * BLOCK,
            vec![(BLOCK, BLOCK + 1)],
            "00 01 01 01 02 03 00 01 ffff01",
        ),
        ("every other page", BLOCK + 16, every_other, &alternating),
    ];
    for (what, pages, runs, golden) in shapes {
        let mut map = PageMap::zeroed(pages);
        for (first, count) in runs {
            map.set_data(PageRange::new(PageIndex(first), count));
        }
        assert_golden(what, &map.encode(), golden);
    }
}
