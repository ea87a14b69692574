//! What Linux is told at its start (kernel, `Documentation/arch/x86/zero-page.rst`).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::super::memory::{GuestRam, MMIO_GAP_END, MMIO_GAP_START};
use super::{LoadError, mp_table, write};

const E820_RAM: u32 = 1;
const HIGH_MEMORY: u64 = 1 << 20;

/// The header that an ELF kernel has none of.
pub(super) fn header_of_elf() -> setup_header {
    const BOOT_FLAG: u16 = 0xaa55;
    const MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
    const PROTOCOL: u16 = 0x20f;
    const KERNEL_ALIGNMENT: u32 = 1 << 24;
    setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        version: PROTOCOL,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    }
}

/// Writes the zero page: memory map, command line, RAM disk (address and length).
pub(super) fn write_params(
    ram: &GuestRam,
    gpa: u64,
    mut header: setup_header,
    command_line: u32,
    initrd: Option<(u32, u32)>,
) -> Result<(), LoadError> {
    const LOADER_UNDEFINED: u8 = 0xff;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = command_line;
    if let Some((start, length)) = initrd {
        header.ramdisk_image = start;
        header.ramdisk_size = length;
    }
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    let bytes = ram.layout().bytes();
    let mut map = vec![
        entry(0, mp_table::START),
        entry(HIGH_MEMORY, bytes.min(MMIO_GAP_START) - HIGH_MEMORY),
    ];
    if bytes > MMIO_GAP_START {
        map.push(entry(MMIO_GAP_END, bytes - MMIO_GAP_START));
    }
    params.e820_table[..map.len()].copy_from_slice(&map);
    params.e820_entries = map.len() as u8;
    write(ram, "the zero page", gpa, params.as_slice())
}

fn entry(addr: u64, size: u64) -> boot_e820_entry {
    boot_e820_entry {
        addr,
        size,
        r#type: E820_RAM,
    }
}
