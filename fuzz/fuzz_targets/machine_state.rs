//! The state of a built-in machine. Half of the inputs are bodies, since no input gets past the checksum by chance.

#![no_main]

use lazyvm_vmm_glue::kvm::state::{decode, decode_body};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((is_body, bytes)) = data.split_first() else {
        return;
    };
    let state = if is_body % 2 == 1 {
        decode_body(bytes).ok()
    } else {
        decode(bytes).ok()
    };
    if let Some(state) = state {
        let written = state.encode().expect("what was read can be written");
        let again = decode(&written).expect("what was written can be read");
        assert_eq!(
            again.encode().expect("what was read can be written"),
            written
        );
        let mut damaged = written;
        if let Some(last) = damaged.last_mut() {
            *last ^= 1;
        }
        assert!(decode(&damaged).is_err());
    }
});
