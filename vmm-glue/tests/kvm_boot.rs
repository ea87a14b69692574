//! Kernels as files: what is loaded, and what it is told. (That Linux boots is tried where the host is fast enough
//! for it; here it is small programs in the same wrappings.)
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test's helpers fail it"
)]

mod common;

use common::{Home, has_kvm, payload};
use lazyvm_vmm_glue::kvm::{ExitReason, MachineConfig, Payload, SerialTarget};
use lazyvm_wire::Backing;

const COMMAND_LINE: &str = "console=ttyS0 one two";
const RAM_DISK: &str = "a RAM disk of a few bytes";

/// An ELF file with one segment, at 2 MiB, which begins with its entry.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    const PLACE: u64 = 2 << 20;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |value: u64, bytes: usize| file.extend(&value.to_le_bytes()[..bytes]);
    // Executable, for x86-64; entry; program headers behind this one, no sections.
    for (value, bytes) in [(2, 2), (62, 2), (1, 4), (PLACE, 8), (64, 8), (0, 8), (0, 4)] {
        put(value, bytes);
    }
    for (value, bytes) in [(64, 2), (56, 2), (1, 2), (0, 2), (0, 2), (0, 2)] {
        put(value, bytes);
    }
    // Loadable, readable and executable; where in the file, in virtual and in physical memory; how long.
    let length = code.len() as u64;
    for (value, bytes) in [(1, 4), (5, 4), (HEADERS, 8), (PLACE, 8), (PLACE, 8)] {
        put(value, bytes);
    }
    for value in [length, length, 4096] {
        put(value, 8);
    }
    file.extend(code);
    file
}

/// A bzImage with one sector of setup code and, at its 64-bit entry, `code`.
fn bz_image(code: &[u8]) -> Vec<u8> {
    const SECTOR: usize = 512;
    let mut file = vec![0; 2 * SECTOR];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &0xaa55_u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &0x10_0000_u32.to_le_bytes());
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &1_u16.to_le_bytes());
    put(0x260, &0x1_0000_u32.to_le_bytes());
    // The 64-bit entry is 512 bytes into what is loaded.
    file.extend([0; SECTOR]);
    file.extend(code);
    file
}

fn says_what_it_was_told(file: &[u8]) {
    let home = Home::new();
    let (path, disk) = (home.path("kernel"), home.path("initrd"));
    std::fs::write(&path, file).unwrap();
    std::fs::write(&disk, RAM_DISK).unwrap();
    let machine = home.boot(MachineConfig {
        payload: Payload::Kernel {
            path,
            initrd: Some(disk),
            cmdline: COMMAND_LINE.to_owned(),
        },
        memory_bytes: 16 << 20,
        backing: Backing::Small,
        cpus: 1,
        serial: SerialTarget::File(home.path("serial")),
        control: home.path("control"),
    });
    assert_eq!(machine.machine().wait(), ExitReason::Reset);
    assert_eq!(machine.output(), format!("{COMMAND_LINE}\n{RAM_DISK}\n"));
}

#[test]
fn an_elf_kernel_gets_its_command_line_and_ram_disk() {
    if has_kvm("an_elf_kernel_gets_its_command_line_and_ram_disk") {
        says_what_it_was_told(&elf(payload::boot_echo()));
    }
}

#[test]
fn a_bz_image_gets_its_command_line_and_ram_disk() {
    if has_kvm("a_bz_image_gets_its_command_line_and_ram_disk") {
        says_what_it_was_told(&bz_image(payload::boot_echo()));
    }
}
