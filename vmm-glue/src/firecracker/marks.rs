//! What Firecracker itself writes into the memory of every VM before it starts, by which that memory is known: the MP
//! table behind the EBDA's start, the ACPI tables' root pointer (from 1.8 on), the magic number in Linux's boot
//! parameters, and that of a PVH start. It is in memory that Linux leaves alone. From `src/vmm/src/arch/x86_64/layout.rs`
//! and `mptable.rs`.

use std::io;

/// Where, in guest-physical memory and so in the memory file, and what.
const MARKS: [(u64, &[u8]); 4] = [
    (0x9fc00, b"_MP_"),
    (0xe0000, b"RSD PTR "),
    (0x7202, b"HdrS"),
    (0x6000, &0x336e_c578_u32.to_le_bytes()),
];

/// Whether any of them is in a memory, of which `read` fills a slice from a place on.
pub(super) fn are_in(read: impl Fn(u64, &mut [u8]) -> io::Result<()>) -> bool {
    MARKS.iter().any(|(place, mark)| {
        let mut found = vec![0; mark.len()];
        read(*place, &mut found).is_ok() && found == *mark
    })
}
