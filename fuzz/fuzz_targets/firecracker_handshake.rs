//! What comes on the page-fault socket, whole and in pieces. What is accepted is memory that the pager takes.

#![no_main]

use lazyvm_vmm_glue::firecracker::handshake::{Decoder, Handshake, HandshakeError};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&piece, message)) = data.split_first() else {
        return;
    };
    let whole = decode(message, message.len());
    let pieces = decode(message, usize::from(piece));
    // Only what is behind the end can be seen in one and not in the other.
    if let (Ok(whole), Ok(pieces)) = (&whole, &pieces) {
        assert_eq!(whole, pieces);
    }
    if let Ok(Some(handshake)) = whole {
        let memory = handshake.memory().expect("what was accepted is memory");
        assert_eq!(memory.bytes(), handshake.bytes());
        if let Ok(layout) = handshake.layout() {
            memory.check_against(&layout).expect("and its own layout's");
        }
    }
});

fn decode(message: &[u8], piece: usize) -> Result<Option<Handshake>, HandshakeError> {
    let mut decoder = Decoder::default();
    for part in message.chunks(piece.max(1)) {
        if let Some(handshake) = decoder.push(part)? {
            return Ok(Some(handshake));
        }
    }
    Ok(None)
}
