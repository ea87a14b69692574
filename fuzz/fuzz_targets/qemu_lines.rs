//! What QEMU says on its QMP socket, whole and in pieces, and what its monitor tells of memory.

#![no_main]

use lazyvm_vmm_glue::qemu::line::{Lines, Message, version};
use lazyvm_vmm_glue::qemu::tree;
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let Some((&piece, stream)) = data.split_first() else {
        return;
    };
    let whole = lines(stream, stream.len());
    assert_eq!(whole, lines(stream, usize::from(piece)));
    assert!(stream.starts_with(&whole.concat()));
    for line in whole {
        version(&line);
        // Answers of the human monitor are texts.
        if let Ok(Message::Return(Value::String(text))) = Message::parse(&line) {
            check_monitor(&text);
        }
    }
    check_monitor(&String::from_utf8_lossy(stream));
});

fn lines(stream: &[u8], piece: usize) -> Vec<Vec<u8>> {
    let mut decoder = Lines::default();
    let mut lines = Vec::new();
    for part in stream.chunks(piece.max(1)) {
        decoder.push(part);
        while let Some(line) = decoder.next().expect("the stream is short") {
            assert_eq!(
                line.iter().position(|&byte| byte == b'\n'),
                Some(line.len() - 1)
            );
            lines.push(line);
        }
    }
    lines
}

fn check_monitor(text: &str) {
    tree::host_address(text);
    let pieces = tree::pieces(text, "ram0");
    let bytes = pieces
        .iter()
        .fold(0_u64, |sum, piece| sum.saturating_add(piece.bytes));
    if tree::covers(&pieces, bytes) {
        let mut offset = 0;
        for piece in &pieces {
            assert_eq!(piece.offset, offset);
            offset += piece.bytes;
        }
    }
}
