//! The control stream's decoder, fed as a network feeds it.

use lazyvm_wire::control::{
    CONTROL_MAX, ControlError, Decoder, HELLO_MAX, Hello, SWITCHOVER_MAX, ToDestination, ToSource,
    encode,
};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::samples;

fn decode_in_parts(stream: &[u8], cuts: &[Index]) -> Vec<ToDestination> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(stream.len() + 1)).collect();
    cuts.extend([0, stream.len()]);
    cuts.sort_unstable();
    let mut decoder = Decoder::default();
    let mut messages = Vec::new();
    for part in cuts.windows(2) {
        decoder.push(&stream[part[0]..part[1]]);
        while let Some(message) = decoder.next(SWITCHOVER_MAX).unwrap() {
            messages.push(message);
        }
    }
    messages
}

proptest! {
    #[test]
    fn a_stream_gives_the_same_messages_however_it_is_cut(
        picks in prop::collection::vec(any::<Index>(), 0..20),
        cuts in prop::collection::vec(any::<Index>(), 0..40),
    ) {
        let samples = samples::to_destination();
        let sent: Vec<_> = picks.iter().map(|pick| pick.get(&samples).clone()).collect();
        let stream: Vec<u8> = sent.iter().flat_map(|message| encode(message).unwrap()).collect();
        prop_assert_eq!(decode_in_parts(&stream, &cuts), sent);
    }

    #[test]
    fn any_bytes_give_messages_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        while let Ok(Some(message)) = decoder.next::<ToSource>(CONTROL_MAX) {
            let again = crate::messages::carry(&message, CONTROL_MAX);
            prop_assert_eq!(again, message);
        }
    }
}

#[test]
fn a_message_a_byte_at_a_time_is_there_with_the_last_byte() {
    for message in samples::to_destination() {
        let bytes = encode(&message).unwrap();
        let (last, most) = bytes.split_last().unwrap();
        let mut decoder = Decoder::default();
        for &byte in most {
            decoder.push(&[byte]);
            assert_eq!(decoder.next::<ToDestination>(SWITCHOVER_MAX), Ok(None));
        }
        decoder.push(&[*last]);
        assert_eq!(decoder.next(SWITCHOVER_MAX), Ok(Some(message)));
    }
}

#[test]
fn a_length_past_the_limit_is_refused_before_any_of_the_message_is_there() {
    let mut decoder = Decoder::default();
    decoder.push(&(HELLO_MAX as u32 + 1).to_le_bytes());
    let refused = decoder.next::<Hello>(HELLO_MAX);
    let length = HELLO_MAX as u64 + 1;
    assert!(
        matches!(refused, Err(ControlError::TooLong { length: l, limit: HELLO_MAX }) if l == length),
        "{refused:?}"
    );

    let mut decoder = Decoder::default();
    decoder.push(&(HELLO_MAX as u32).to_le_bytes());
    assert!(matches!(decoder.next::<Hello>(HELLO_MAX), Ok(None)));
}

#[test]
fn a_message_with_bytes_left_over_is_refused() {
    let mut bytes = encode(&ToSource::Started).unwrap();
    bytes[0] += 1;
    bytes.push(0);
    let mut decoder = Decoder::default();
    decoder.push(&bytes);
    assert_eq!(
        decoder.next::<ToSource>(CONTROL_MAX),
        Err(ControlError::Malformed)
    );
}

#[test]
fn an_error_stays_whatever_follows() {
    let mut decoder = Decoder::default();
    // No message has the number 0x7f.
    decoder.push(&[1, 0, 0, 0, 0x7f]);
    for _ in 0..2 {
        assert_eq!(
            decoder.next::<ToSource>(CONTROL_MAX),
            Err(ControlError::Malformed)
        );
        decoder.push(&encode(&ToSource::Ready { early: true }).unwrap());
    }
}
