//! A line on a machine's control socket: a request as the machine reads it, a reply as its client does.

#![no_main]

use lazyvm_vmm_glue::kvm::control::{REPLY_MAX, REQUEST_MAX, rewrite_reply, rewrite_request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| {
    if line.len() < REQUEST_MAX {
        check(line, rewrite_request);
    }
    if line.len() < REPLY_MAX {
        check(line, rewrite_reply);
    }
});

fn check(line: &[u8], rewrite: fn(&[u8]) -> Result<Vec<u8>, String>) {
    if let Ok(written) = rewrite(line) {
        let (end, written_line) = written.split_last().expect("a line has an end");
        assert_eq!(*end, b'\n');
        assert!(!written_line.contains(&b'\n'));
        assert_eq!(rewrite(written_line).as_ref(), Ok(&written));
    }
}
