//! Fields that are longer than theirs may be, in messages that are not.

use lazyvm_wire::control::{
    CONTROL_MAX, ControlError, Decoder, SWITCHOVER_MAX, TEXT_MAX, TOUCHED_MAX, ToDestination,
    ToSource, encode, to_source_max,
};
use lazyvm_wire::{
    COMPATIBILITY_MAX, KIND_MAX, Layout, PageIndex, REGION_NAME_MAX, REGIONS_MAX, STATE_MAX,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Decodes as `M` what an ill-meaning peer writes with types that have no bounds.
fn decode_as<M: DeserializeOwned>(written: &impl Serialize) -> Result<M, ControlError> {
    let mut decoder = Decoder::default();
    decoder.push(&encode(written).unwrap());
    Ok(decoder.next(SWITCHOVER_MAX)?.expect("the whole message"))
}

/// `ToSource`'s and `Rejection`'s shape on the wire: a number, and a text.
type NumberedText = (u8, String);

const REFUSED: u8 = 1;

#[test]
fn a_text_is_as_long_as_allowed_and_no_longer() {
    let at_most: NumberedText = (REFUSED, "x".repeat(TEXT_MAX));
    let reason = at_most.1.clone();
    assert_eq!(decode_as(&at_most), Ok(ToSource::Refused { reason }));
    let too_long: NumberedText = (REFUSED, "x".repeat(TEXT_MAX + 1));
    assert_eq!(
        decode_as::<ToSource>(&too_long),
        Err(ControlError::Malformed)
    );
}

#[test]
fn as_many_touched_pages_as_allowed_and_no_more() {
    const TOUCHED: u8 = 6;
    let pages = |count: usize| decode_as::<ToSource>(&(TOUCHED, vec![u64::MAX; count]));
    let most = ToSource::Touched {
        pages: vec![PageIndex(u64::MAX); TOUCHED_MAX],
    };
    assert_eq!(pages(TOUCHED_MAX), Ok(most.clone()));
    assert_eq!(pages(TOUCHED_MAX + 1), Err(ControlError::Malformed));
    assert!(encode(&most).unwrap().len() <= to_source_max(0));
}

#[test]
fn a_length_that_the_message_does_not_hold_is_refused() {
    // A text that says it has 2^63 bytes.
    let claim = [
        REFUSED, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01,
    ];
    let mut decoder = Decoder::default();
    decoder.push(&[claim.len() as u8, 0, 0, 0]);
    decoder.push(&claim);
    assert_eq!(
        decoder.next::<ToSource>(CONTROL_MAX),
        Err(ControlError::Malformed)
    );
}

#[test]
fn a_switchover_has_a_state_of_the_largest_length_and_no_longer() {
    const SWITCHOVER: u8 = 3;
    let lengths = |state: usize| {
        let written = (SWITCHOVER, ByteRun(state), ByteRun(1), ByteRun(1), false);
        decode_as(&written).map(|message| match message {
            ToDestination::Switchover(switchover) | ToDestination::SwitchoverPacked(switchover) => {
                switchover.state.len()
            }
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(lengths(STATE_MAX), Ok(STATE_MAX));
    assert_eq!(lengths(STATE_MAX + 1), Err(ControlError::Malformed));
}

/// So many zeros, written at once.
struct ByteRun(usize);

impl Serialize for ByteRun {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&vec![0; self.0])
    }
}

#[test]
fn an_offer_has_a_short_printable_kind_and_a_bounded_compatibility() {
    let offer = |kind: &str, compatibility: usize| {
        decode_as::<lazyvm_wire::MachineOffer>(&(kind, 1_u32, ByteRun(compatibility))).map(|_| ())
    };
    assert_eq!(offer(&"k".repeat(KIND_MAX), COMPATIBILITY_MAX), Ok(()));
    assert_eq!(
        offer(&"k".repeat(KIND_MAX + 1), 0),
        Err(ControlError::Malformed)
    );
    assert_eq!(offer("k\x1b[2J", 0), Err(ControlError::Malformed));
    assert_eq!(
        offer("k", COMPATIBILITY_MAX + 1),
        Err(ControlError::Malformed)
    );
}

#[test]
fn a_layout_has_a_bounded_number_of_regions_with_bounded_names() {
    // As a region without an address is written: name, none, pages, small pages.
    let region = |name: usize| ("n".repeat(name), None::<u64>, 1_u64, 0_u8);
    let layout = |regions: usize, name: usize| {
        decode_as::<Layout>(&vec![region(name); regions]).map(|layout| layout.pages())
    };
    assert_eq!(layout(REGIONS_MAX, REGION_NAME_MAX), Ok(REGIONS_MAX as u64));
    assert_eq!(layout(REGIONS_MAX + 1, 1), Err(ControlError::Malformed));
    assert_eq!(layout(1, REGION_NAME_MAX + 1), Err(ControlError::Malformed));
}
