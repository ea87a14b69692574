//! 64-bit mode from the first instruction on: descriptor table, page tables, system registers.
//!
//! ```text
//! 0x0500  GDT                            0x9000  PML4
//! 0x7000  zero page (Linux)              0xa000  PDPT of the identity map
//! 0x8ff0  the first stack's top          0xb000  its four page directories: 4 GiB in pages of 2 MiB
//!                                        0x10000 PDPTs of the image window, one for each 512 GiB
//! ```
//!
//! The *image window* maps the whole image (all memory, without the gap for devices) at [`IMAGE_WINDOW`], for the
//! bundled payload.

use kvm_bindings::{kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

use super::super::memory::GuestRam;
use super::{LoadError, write};

const GDT: u64 = 0x500;
pub(super) const ZERO_PAGE: u64 = 0x7000;
pub(super) const STACK_TOP: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const IDENTITY_PDPT: u64 = 0xa000;
const IDENTITY_DIRECTORIES: u64 = 0xb000;
const WINDOW_PDPTS: u64 = 0x1_0000;
/// Where page directories of the window lie on a CPU without pages of 1 GiB.
const WINDOW_DIRECTORIES: u64 = 2 << 20;

/// Virtual address at which the image lies.
pub(in crate::kvm) const IMAGE_WINDOW: u64 = 1 << 39;

/// Memory that the window's page directories take for each GiB of the image, from 2 MiB on, on a CPU without pages
/// of 1 GiB.
pub(in crate::kvm) const TABLES_2M_BYTES: u64 = PAGE;

const PAGE: u64 = 4096;
const GIB: u64 = 1 << 30;
const ENTRIES: u64 = 512;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

// Flat segments in the GDT's encoding (Intel SDM volume 3, 3.4.5).
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x008f_8b00_0000_ffff;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// Writes the descriptor table and the page tables.
pub(super) fn write_tables(ram: &GuestRam, pages_1g: bool) -> Result<(), LoadError> {
    // The 64-bit boot protocol of Linux wants code at 0x10 and data at 0x18.
    write_words(
        ram,
        "the descriptor table",
        GDT,
        &[0, 0, CODE_64, DATA, TSS],
    )?;

    let mut pml4 = vec![0; ENTRIES as usize];
    pml4[0] = IDENTITY_PDPT | PRESENT_WRITABLE;
    let gib_count = ram.layout().bytes().div_ceil(GIB);
    for (slot, pdpt) in
        (0..gib_count.div_ceil(ENTRIES)).zip((WINDOW_PDPTS..).step_by(PAGE as usize))
    {
        pml4[(IMAGE_WINDOW >> 39) as usize + slot as usize] = pdpt | PRESENT_WRITABLE;
    }
    write_words(ram, "page tables", PML4, &pml4)?;

    let identity: Vec<u64> = (0..4)
        .map(|n| (IDENTITY_DIRECTORIES + n * PAGE) | PRESENT_WRITABLE)
        .collect();
    write_words(ram, "page tables", IDENTITY_PDPT, &identity)?;
    let directories: Vec<u64> = (0..4 * ENTRIES)
        .map(|n| (n << 21) | PRESENT_WRITABLE | LARGE)
        .collect();
    write_words(ram, "page tables", IDENTITY_DIRECTORIES, &directories)?;
    write_window(ram, gib_count, pages_1g)
}

fn write_window(ram: &GuestRam, gib_count: u64, pages_1g: bool) -> Result<(), LoadError> {
    if pages_1g {
        let entries: Vec<u64> = (0..gib_count)
            .map(|gib| gib_address(gib) | PRESENT_WRITABLE | LARGE)
            .collect();
        return write_words(ram, "page tables", WINDOW_PDPTS, &entries);
    }
    let needed = WINDOW_DIRECTORIES + gib_count * TABLES_2M_BYTES;
    if needed > ram.layout().bytes() {
        return Err(LoadError::MemoryTooSmall {
            memory: ram.layout().bytes(),
            what: "the page tables",
            needed,
        });
    }
    let entries: Vec<u64> = (0..gib_count)
        .map(|gib| (WINDOW_DIRECTORIES + gib * PAGE) | PRESENT_WRITABLE)
        .collect();
    write_words(ram, "page tables", WINDOW_PDPTS, &entries)?;
    for gib in 0..gib_count {
        let directory: Vec<u64> = (0..ENTRIES)
            .map(|n| (gib_address(gib) + (n << 21)) | PRESENT_WRITABLE | LARGE)
            .collect();
        write_words(
            ram,
            "page tables",
            WINDOW_DIRECTORIES + gib * PAGE,
            &directory,
        )?;
    }
    Ok(())
}

/// The guest-physical address of the image's GiB number `gib`: the gap is 1 GiB at 3 GiB.
fn gib_address(gib: u64) -> u64 {
    if gib < 3 { gib * GIB } else { (gib + 1) * GIB }
}

/// 64-bit mode on those tables, interrupts off.
pub(super) fn set(sregs: &mut kvm_sregs) {
    const CR0_PE_ET_NE_PG: u64 = 1 | (1 << 4) | (1 << 5) | (1 << 31);
    const CR4_PAE_OSFXSR: u64 = (1 << 5) | (1 << 9);
    const EFER_LME_LMA: u64 = (1 << 8) | (1 << 10);
    let code = segment(CODE_SELECTOR, CODE_64);
    let data = segment(DATA_SELECTOR, DATA);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS_SELECTOR, TSS);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr3 = PML4;
    sregs.cr0 = CR0_PE_ET_NE_PG;
    sregs.cr4 = CR4_PAE_OSFXSR;
    sregs.efer = EFER_LME_LMA;
}

/// A descriptor's bits, spread out as KVM takes them.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |n: u32| (descriptor >> n) as u8 & 1;
    let granular = bit(55);
    let limit = ((descriptor & 0xffff) | ((descriptor >> 32) & 0xf_0000)) as u32;
    kvm_segment {
        base: 0,
        limit: if granular == 1 {
            (limit << 12) | 0xfff
        } else {
            limit
        },
        selector,
        type_: (descriptor >> 40) as u8 & 0xf,
        present: bit(47),
        dpl: (descriptor >> 45) as u8 & 3,
        db: bit(54),
        s: bit(44),
        l: bit(53),
        g: granular,
        ..Default::default()
    }
}

/// Passes the PIC's interrupts on to the CPU, as firmware leaves it ("virtual wire mode").
pub(super) fn wire_local_apic(vcpu: &VcpuFd) -> Result<(), errno::Error> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const MODE_SHIFT: u32 = 8;
    const MODE_NMI: u8 = 4;
    const MODE_EXTERNAL: u8 = 7;
    let mut lapic = vcpu.get_lapic()?;
    for (register, mode) in [(LINT0, MODE_EXTERNAL), (LINT1, MODE_NMI)] {
        // Unmasked, and only the mode set.
        lapic.regs[register..register + 4].fill(0);
        lapic.regs[register + (MODE_SHIFT / 8) as usize] = mode as _;
    }
    vcpu.set_lapic(&lapic)
}

fn write_words(
    ram: &GuestRam,
    what: &'static str,
    gpa: u64,
    words: &[u64],
) -> Result<(), LoadError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    write(ram, what, gpa, &bytes)
}

#[cfg(test)]
mod tests {
    use super::super::super::{cpuid, testing};
    use super::*;

    #[test]
    fn descriptors_are_spread_as_the_manual_says() {
        let code = segment(CODE_SELECTOR, CODE_64);
        assert_eq!(
            (code.type_, code.s, code.l, code.db, code.present),
            (0xb, 1, 1, 0, 1)
        );
        assert_eq!(code.limit, 0xffff_ffff);
        let data = segment(DATA_SELECTOR, DATA);
        assert_eq!((data.type_, data.s, data.l, data.db), (3, 1, 0, 1));
        assert_eq!(segment(TSS_SELECTOR, TSS).s, 0);
    }

    #[test]
    fn the_window_shows_the_whole_image_without_the_gap() {
        let Some(hypervisor) = testing::hypervisor("the_window_shows_the_whole_image") else {
            return;
        };
        for pages_1g in [false, true] {
            let hardware = testing::hardware(&hypervisor, 1, 5 * GIB);
            if pages_1g && !cpuid::has_pages_1g(&hardware.needs.cpuid) {
                continue;
            }
            write_tables(hardware.vm.ram(), pages_1g).unwrap();
            let vcpu = &hardware.vcpus[0].fd;
            let mut sregs = vcpu.get_sregs().unwrap();
            set(&mut sregs);
            vcpu.set_sregs(&sregs).unwrap();
            let translate = |address| {
                let found = vcpu.translate_gva(address).unwrap();
                (found.valid == 1).then_some(found.physical_address)
            };
            for (address, gpa) in [
                (0, 0),
                (4 * GIB - 1, 4 * GIB - 1),
                (IMAGE_WINDOW, 0),
                (IMAGE_WINDOW + 3 * GIB - 1, 3 * GIB - 1),
                (IMAGE_WINDOW + 3 * GIB, 4 * GIB),
                (IMAGE_WINDOW + 5 * GIB - 1, 6 * GIB - 1),
            ] {
                assert_eq!(translate(address), Some(gpa), "{address:#x}");
            }
            assert_eq!(translate(4 * GIB), None);
            assert_eq!(translate(IMAGE_WINDOW + 5 * GIB), None);
        }
    }
}
