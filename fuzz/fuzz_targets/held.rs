//! Held pages, as the bytes that a source sent.

#![no_main]

use lazyvm_wire::held;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u32, &[u8])| {
    let (pages, bytes) = data;
    let pages = u64::from(pages);
    if let Ok(runs) = held::decode(bytes, pages) {
        let mut end = 0;
        for run in &runs {
            assert!(run.range.first.0 >= end && run.range.count > 0 && run.round > 0);
            end = run.range.end().0;
        }
        assert!(end <= pages);
        let (again, count) = held::encode(&runs);
        assert_eq!(count, runs.len());
        assert_eq!(held::decode(&again, pages), Ok(runs));
    }
});
