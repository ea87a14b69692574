//! The table that tells a guest without ACPI of its CPUs and interrupt lines (Intel MultiProcessor Specification
//! 1.4, chapter 4).

use super::super::memory::GuestRam;
use super::{LoadError, write};

/// Where it lies: the last KiB of conventional memory, where guests look for it.
pub(super) const START: u64 = 0x9_fc00;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const APIC_VERSION: u8 = 0x14;
const IRQ_LINES: u8 = 16;
/// "To every local APIC".
const ALL_APICS: u8 = 0xff;
const FLAGS_CONFORM: [u8; 2] = [0, 0];

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

const TYPE_VECTORED: u8 = 0;
const TYPE_NMI: u8 = 1;
const TYPE_EXTERNAL: u8 = 3;

/// Writes the floating pointer and the table behind it.
pub(super) fn write_table(ram: &GuestRam, cpus: u32) -> Result<(), LoadError> {
    // More CPUs than the KiB holds entries for are left for the guest to find by other means, that is, not at all.
    const CPUS_MAX: u32 = 40;
    let table = table(cpus.min(CPUS_MAX) as u8);
    let mut pointer = *b"_MP_\0\0\0\0\x01\x04\0\0\0\0\0\0";
    pointer[4..8].copy_from_slice(&(START as u32 + 16).to_le_bytes());
    pointer[10] = checksum(&pointer);
    write(ram, "the processor table", START, &pointer)?;
    write(ram, "the processor table", START + 16, &table)
}

fn table(cpus: u8) -> Vec<u8> {
    const ENABLED: u8 = 1;
    const BOOT_PROCESSOR: u8 = 2;
    let io_apic_id = cpus;
    let mut entries = Vec::new();
    let mut count = 0_u16;
    let mut push = |entry: &[u8]| {
        entries.extend_from_slice(entry);
        count += 1;
    };
    for cpu in 0..cpus {
        let flags = ENABLED | if cpu == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = [0; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, APIC_VERSION, flags]);
        // Family 6, with an FPU and a local APIC on the chip.
        entry[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        entry[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        push(&entry);
    }
    push(&[BUS, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let address = IO_APIC.to_le_bytes();
    push(&[
        IOAPIC,
        io_apic_id,
        APIC_VERSION,
        1,
        address[0],
        address[1],
        address[2],
        address[3],
    ]);
    for line in 0..IRQ_LINES {
        push(&interrupt(
            IO_INTERRUPT,
            TYPE_VECTORED,
            line,
            io_apic_id,
            line,
        ));
    }
    push(&interrupt(LOCAL_INTERRUPT, TYPE_EXTERNAL, 0, 0, 0));
    push(&interrupt(LOCAL_INTERRUPT, TYPE_NMI, 0, ALL_APICS, 1));

    let mut table = vec![0; 44];
    let length = (table.len() + entries.len()) as u16;
    table[..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = 4;
    table[8..28].copy_from_slice(b"LAZYVM  MICROVM     ");
    table[34..36].copy_from_slice(&count.to_le_bytes());
    table[36..40].copy_from_slice(&LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&entries);
    table[7] = checksum(&table);
    table
}

fn interrupt(entry: u8, kind: u8, line: u8, apic: u8, pin: u8) -> [u8; 8] {
    let [low, high] = FLAGS_CONFORM;
    [entry, kind, low, high, 0, line, apic, pin]
}

/// What makes the bytes add up to 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, &byte| sum.wrapping_add(byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_adds_up_and_counts_its_entries() {
        for cpus in [1_u8, 2, 40] {
            let table = table(cpus);
            assert_eq!(
                table.iter().fold(0_u8, |sum, &byte| sum.wrapping_add(byte)),
                0
            );
            assert_eq!(
                u16::from_le_bytes([table[4], table[5]]) as usize,
                table.len()
            );
            let (mut at, mut count) = (44, 0);
            while at < table.len() {
                at += if table[at] == PROCESSOR { 20 } else { 8 };
                count += 1;
            }
            assert_eq!(at, table.len());
            assert_eq!(u16::from_le_bytes([table[34], table[35]]), count);
            assert!(16 + table.len() <= 1024, "it fits where it lies");
        }
    }
}
