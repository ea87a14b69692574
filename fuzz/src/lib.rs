//! What the fuzz targets share.

use lazyvm_wire::control::{ControlError, Decoder, TEXT_MAX, encode};
use lazyvm_wire::printable;
use serde::{Serialize, de::DeserializeOwned};

/// The messages of a stream that comes in pieces of `piece` bytes, and the error at its end, if any.
pub fn messages<M: DeserializeOwned>(
    stream: &[u8],
    piece: usize,
    limit: usize,
) -> (Vec<M>, Option<ControlError>) {
    let mut decoder = Decoder::default();
    let mut messages = Vec::new();
    for part in stream.chunks(piece.max(1)) {
        decoder.push(part);
        loop {
            match decoder.next(limit) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}

/// Decodes the stream whole and in pieces, and demands that both give the same, and that each message comes back as
/// the same when it is sent on.
pub fn checked_messages<M: Serialize + DeserializeOwned>(
    stream: &[u8],
    piece: usize,
    limit: usize,
) -> Vec<M> {
    let (whole, error) = messages::<M>(stream, stream.len(), limit);
    let (pieces, error_in_pieces) = messages::<M>(stream, piece, limit);
    assert_eq!(error, error_in_pieces);
    assert_eq!(whole.len(), pieces.len());
    for (one, other) in whole.iter().zip(&pieces) {
        let bytes = encode(one).expect("what was read can be written");
        assert_eq!(bytes, encode(other).expect("what was read can be written"));
        // Numbers may be longer than they need be where they are read, never where they are written.
        let (again, error) = messages::<M>(&bytes, bytes.len(), bytes.len());
        assert_eq!((again.len(), error), (1, None));
        assert_eq!(
            encode(&again[0]).expect("what was read can be written"),
            bytes
        );
    }
    whole
}

/// Demands what holds of every text that a peer sent.
pub fn check_text(text: &str) {
    assert!(text.len() <= TEXT_MAX);
    assert!(!text.chars().any(char::is_control));
    assert_eq!(printable(text), text);
}
