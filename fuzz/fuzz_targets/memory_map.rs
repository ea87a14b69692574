//! The memory map of a process, and pieces looked for in it.

#![no_main]

use lazyvm_vmm_glue::attach::Mappings;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u64, u64, &[u8])| {
    let (start, bytes, table) = data;
    let text = String::from_utf8_lossy(table);
    let Ok(mappings) = Mappings::parse(&text) else {
        return;
    };
    check_piece(&mappings, start, bytes);
    for mapping in mappings.iter() {
        assert!(mapping.start < mapping.end);
        check_piece(&mappings, mapping.start, mapping.end - mapping.start);
        check_piece(&mappings, mapping.start, bytes);
        check_piece(&mappings, mapping.end - 1, bytes);
    }
});

fn check_piece(mappings: &Mappings, start: u64, bytes: u64) {
    if let Some((first, offset)) = mappings.piece(start, bytes) {
        assert!(first.start <= start && start < first.end && offset >= first.offset);
        assert!(start.checked_add(bytes).is_some());
    }
}
