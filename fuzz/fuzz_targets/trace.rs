//! Bytes that a trace file may hold: decompressed here, so that the fuzzer sees what is inside.
#![no_main]

use lazyvm_server::trace::Trace;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    // The file as it is, and the same as the inside of one.
    let _ = Trace::decode(body);
    if let Ok(trace) = Trace::decode_body(body) {
        assert!(trace.encode().is_ok());
    }
});
