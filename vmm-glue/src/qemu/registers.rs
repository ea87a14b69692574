//! Registers as QEMU's monitor shows them (`info registers -a`; `x86_cpu_dump_state` in QEMU's
//! `target/i386/cpu-dump.c`). KERNEL_GS_BASE is not among them.

use crate::x86::{Segment, Vcpu};

/// Most vCPUs that are looked at.
const VCPUS_MAX: usize = 1024;

/// The vCPUs of this text. What can't be read is left at zero.
pub fn parse(text: &str) -> Vec<Vcpu> {
    let mut vcpus: Vec<Vcpu> = Vec::new();
    for line in text.lines().map(str::trim_end) {
        if line.starts_with("CPU#") {
            if vcpus.len() == VCPUS_MAX {
                break;
            }
            vcpus.push(Vcpu::default());
        } else if line.starts_with("RAX=") || line.starts_with("EAX=") {
            // Without `-a` there is no heading.
            if vcpus.is_empty() {
                vcpus.push(Vcpu::default());
            }
        }
        if let Some(vcpu) = vcpus.last_mut() {
            take(vcpu, line);
        }
    }
    vcpus
}

fn take(vcpu: &mut Vcpu, line: &str) {
    let fields = |text: &str| -> Vec<u64> {
        text.split_whitespace()
            .map(|field| hex(field).unwrap_or_default())
            .collect()
    };
    let segment = |base: Option<&u64>, limit: Option<&u64>| Segment {
        base: base.copied().unwrap_or_default(),
        limit: limit.copied().unwrap_or_default(),
    };
    if let Some((name, rest)) = line.split_at_checked(4) {
        let fields = fields(rest);
        match name {
            // Selector, base, limit, flags.
            "FS =" => vcpu.fs_base = fields.get(1).copied().unwrap_or_default(),
            "GS =" => vcpu.gs_base = fields.get(1).copied().unwrap_or_default(),
            "TR =" => vcpu.task = segment(fields.get(1), fields.get(2)),
            "GDT=" => vcpu.gdt = segment(fields.first(), fields.get(1)),
            "IDT=" => vcpu.idt = segment(fields.first(), fields.get(1)),
            _ => {}
        }
    }
    for (name, value) in line
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
    {
        let Some(value) = hex(value) else {
            continue;
        };
        match name {
            "RIP" | "EIP" => vcpu.rip = value,
            "RSP" | "ESP" => vcpu.rsp = value,
            "CPL" => vcpu.privilege = (value & 3) as u8,
            "CR0" => vcpu.cr0 = value,
            "CR3" => vcpu.cr3 = value,
            "CR4" => vcpu.cr4 = value,
            "EFER" => vcpu.efer = value,
            _ => {}
        }
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// QEMU 7.2, a Linux guest that runs a program.
    const SHOWN: &str = "\r
CPU#0\r
RAX=0000000000000000 RBX=ffffffff82a1b480 RCX=0000000000000000 RDX=4000000000000000\r
RSI=0000000000000083 RDI=000000000001e5e4 RBP=ffff888003a53cc0 RSP=ffffffff82a03e38\r
RIP=ffffffff81c0a0cb RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
ES =0000 0000000000000000 ffffffff 00c00000\r
CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\r
FS =0000 00007f0a12345740 ffffffff 00c00000\r
GS =0000 ffff88801f600000 ffffffff 00c00000\r
LDT=0000 0000000000000000 00000000 00008200 DPL=0 LDT\r
TR =0040 fffffe0000003000 00004087 00008b00 DPL=0 TSS64-busy\r
GDT=     fffffe0000001000 0000007f\r
IDT=     fffffe0000000000 00000fff\r
CR0=80050033 CR2=00007f0a11111000 CR3=0000000002a0a000 CR4=000006f0\r
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000\r
EFER=0000000000000d01\r
\r
CPU#1\r
RIP=0000000000401000 RFL=00000246 [---Z-P-] CPL=3 II=0 A20=1 SMM=0 HLT=0\r
";

    #[test]
    fn what_the_monitor_shows_is_read() {
        let vcpus = parse(SHOWN);
        assert_eq!(vcpus.len(), 2);
        let first = vcpus[0];
        assert_eq!(first.rip, 0xffff_ffff_81c0_a0cb);
        assert_eq!(first.rsp, 0xffff_ffff_82a0_3e38);
        assert_eq!(first.gs_base, 0xffff_8880_1f60_0000);
        assert_eq!(first.fs_base, 0x7f0a_1234_5740);
        assert_eq!(
            (first.task.base, first.task.limit),
            (0xffff_fe00_0000_3000, 0x4087)
        );
        assert_eq!(
            (first.gdt.base, first.gdt.limit),
            (0xffff_fe00_0000_1000, 0x7f)
        );
        assert_eq!(
            (first.idt.base, first.idt.limit),
            (0xffff_fe00_0000_0000, 0xfff)
        );
        assert_eq!((first.cr3, first.efer), (0x2a0_a000, 0xd01));
        assert!(first.paging().is_some() && !first.is_user());
        assert!(vcpus[1].is_user() && vcpus[1].paging().is_none());
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,400}", lines in proptest::collection::vec("(CPU#|GDT=|TR =|CR3=|FS =)[ 0-9a-fg]{0,40}", 0..40)) {
            let _ = parse(&text);
            prop_assert!(parse(&lines.join("\n")).len() <= lines.len());
        }
    }
}
