use kvm_bindings::{KVM_IRQCHIP_IOAPIC, Msrs, kvm_clock_data, kvm_irqchip, kvm_regs};
use vmm_sys_util::eventfd::EventFd;

use super::super::hardware::Hardware;
use super::super::serial::{Console, SerialTarget};
use super::super::touch::TouchConfig;
use super::super::{boot, testing};
use super::*;

const MEMORY: u64 = 8 << 20;
const DEADLINE: u64 = 1 << 60;
const CLOCK: u64 = 1_234_567_890_123_456;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const PAT: u32 = 0x277;

/// Where in the local APIC's page a register lies that counts by itself (the timer's current count).
const LAPIC_CURRENT_COUNT: std::ops::Range<usize> = 0x390..0x394;

fn take_of(hardware: &Hardware) -> MachineState {
    let vcpus: Vec<&Vcpu> = hardware.vcpus.iter().collect();
    let irq = EventFd::new(nix::libc::EFD_NONBLOCK).unwrap();
    let console = Console::new(&SerialTarget::Nothing, irq).unwrap().state();
    let shape = Shape {
        layout: hardware.vm.ram().layout().clone(),
        payload: "test".to_owned(),
    };
    let needs = hardware.needs.clone();
    take(
        &hardware.vm,
        &vcpus,
        &hardware.msr_indices,
        shape,
        needs,
        console,
    )
    .unwrap()
}

/// Gives every part of the machine values that a fresh one does not have.
fn mark(hardware: &Hardware) {
    boot::load(hardware, &boot::Payload::Touch(TouchConfig::default())).unwrap();
    for (vcpu, cpu) in hardware.vcpus.iter().zip(1_u64..) {
        mark_vcpu(vcpu, cpu);
    }
    let vm = hardware.vm.fd();
    let mut ioapic = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    vm.get_irqchip(&mut ioapic).unwrap();
    // The redirection entries begin 24 bytes into the chip's state; entry 5: vector 0x55, masked.
    let mut bytes = serde_bytes_of(&ioapic);
    let at = bytes.len() - 512 + 24 + 5 * 8;
    bytes[at] = 0x55;
    vm.set_irqchip(&postcard::from_bytes(&bytes).unwrap())
        .unwrap();
    let mut pit = vm.get_pit2().unwrap();
    pit.channels[0].count = 11932;
    pit.channels[0].mode = 2;
    pit.channels[2].count = 77;
    vm.set_pit2(&pit).unwrap();
    vm.set_clock(&kvm_clock_data {
        clock: CLOCK,
        ..Default::default()
    })
    .unwrap();
}

fn mark_vcpu(vcpu: &Vcpu, cpu: u64) {
    let fd = &vcpu.fd;
    fd.set_regs(&kvm_regs {
        rax: cpu,
        rbx: 0x2222_0000 + cpu,
        r15: u64::MAX - cpu,
        rip: 0x10_0000 + cpu,
        rflags: 0x8d7,
        ..fd.get_regs().unwrap()
    })
    .unwrap();
    let mut xsave = vcpu.xsave().unwrap();
    // The legacy region's control word, MXCSR and XMM7; in the header behind it, that x87 and SSE are in use.
    xsave[0] = 0x27f;
    xsave[6] = 0x1f00;
    xsave[(160 + 7 * 16) / 4] = 0x7777_0000 + cpu as u32;
    xsave[512 / 4] |= 3;
    vcpu.set_xsave(&xsave).unwrap();
    let mut debug = fd.get_debug_regs().unwrap();
    debug.db = [0x1000 + cpu, 0x2000, 0x3000, 0x4000];
    debug.dr7 = 0x401;
    fd.set_debug_regs(&debug).unwrap();
    let mut xcrs = fd.get_xcrs().unwrap();
    xcrs.xcrs[0].value = 3;
    fd.set_xcrs(&xcrs).unwrap();
    let entry = |index, data| kvm_bindings::kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(STAR, 0x0023_0010_0000_0000 + (cpu << 48)),
        entry(LSTAR, 0xffff_8000_0000_0000 + cpu),
        entry(KERNEL_GS_BASE, 0x7000_0000 + cpu),
        entry(PAT, 0x0007_0406_0007_0406),
    ];
    assert_eq!(
        fd.set_msrs(&Msrs::from_entries(&entries).unwrap()).unwrap(),
        entries.len()
    );
    let mut lapic = fd.get_lapic().unwrap();
    lapic.regs[0xf1] = 1; // Software-enabled,
    lapic.regs[0x80] = 0x20; // task priority,
    lapic.regs[0x322] = 4; // the timer in deadline mode, unmasked,
    lapic.regs[0x320] = 0x44; // with this vector.
    fd.set_lapic(&lapic).unwrap();
    let armed = Msrs::from_entries(&[entry(msr::TSC_DEADLINE, DEADLINE)]).unwrap();
    assert_eq!(fd.set_msrs(&armed).unwrap(), 1);
    if let Some(offset) = vcpu.tsc_offset() {
        vcpu.set_tsc_offset(offset.wrapping_add(cpu << 40)).unwrap();
    }
    let mut events = fd.get_vcpu_events().unwrap();
    events.nmi.pending = 1;
    events.nmi.masked = 1;
    fd.set_vcpu_events(&events).unwrap();
}

fn serde_bytes_of<T: Serialize>(part: &T) -> Vec<u8> {
    postcard::to_allocvec(part).unwrap()
}

/// The parts that stand still, each by name.
fn parts(vcpu: &VcpuState) -> Vec<(&'static str, Vec<u8>)> {
    let mut lapic = vcpu.lapic;
    lapic.regs[LAPIC_CURRENT_COUNT].fill(0);
    vec![
        ("multi-processor state", serde_bytes_of(&vcpu.mp_state)),
        ("registers", serde_bytes_of(&vcpu.regs)),
        ("system registers", serde_bytes_of(&vcpu.sregs)),
        ("debug registers", serde_bytes_of(&vcpu.debug_regs)),
        ("extended control registers", serde_bytes_of(&vcpu.xcrs)),
        ("extended state", serde_bytes_of(&vcpu.xsave)),
        ("local APIC", serde_bytes_of(&lapic)),
        ("MSRs", serde_bytes_of(&vcpu.msrs)),
        ("deadline", serde_bytes_of(&vcpu.tsc_deadline)),
        ("events", serde_bytes_of(&vcpu.events)),
    ]
}

#[test]
fn what_is_loaded_is_what_was_taken() {
    let Some(hypervisor) = testing::hypervisor("what_is_loaded_is_what_was_taken") else {
        return;
    };
    let source = testing::hardware(&hypervisor, 2, MEMORY);
    let fresh = take_of(&source);
    mark(&source);
    let taken = take_of(&source);
    for (marked, fresh) in taken.vcpus.iter().zip(&fresh.vcpus) {
        for ((part, marked), (_, fresh)) in parts(marked).iter().zip(parts(fresh)) {
            let same_anyway = part == &"multi-processor state";
            assert!(
                same_anyway || *marked != fresh,
                "the test has not marked the {part}"
            );
        }
    }

    let travelled = decode(&taken.encode().unwrap()).unwrap();
    let destination = testing::hardware(&hypervisor, 2, MEMORY);
    let vcpus: Vec<&Vcpu> = destination.vcpus.iter().collect();
    load(&destination.vm, &vcpus, &travelled).unwrap();
    let retaken = take_of(&destination);
    for (then, now) in taken.vcpus.iter().zip(&retaken.vcpus) {
        for ((part, then), (_, now)) in parts(then).iter().zip(parts(now)) {
            assert_eq!(*then, now, "{part}");
        }
    }
    for (then, now) in taken.vm.irqchips.iter().zip(&retaken.vm.irqchips) {
        assert_eq!(serde_bytes_of(then), serde_bytes_of(now), "{then:?}");
    }
    let channels = |state: &MachineState| {
        state
            .vm
            .pit
            .channels
            .map(|channel| (channel.count, channel.mode, channel.rw_mode, channel.gate))
    };
    assert_eq!(channels(&taken), channels(&retaken));
    assert_eq!(channels(&retaken)[0].0, 11932);
}

#[test]
fn time_goes_on_from_where_it_stood() {
    let Some(hypervisor) = testing::hypervisor("time_goes_on_from_where_it_stood") else {
        return;
    };
    let source = testing::hardware(&hypervisor, 2, MEMORY);
    mark(&source);
    let taken = take_of(&source);
    let destination = testing::hardware(&hypervisor, 2, MEMORY);
    let vcpus: Vec<&Vcpu> = destination.vcpus.iter().collect();
    load(&destination.vm, &vcpus, &taken).unwrap();
    let retaken = take_of(&destination);

    // Both clocks have run on since they were loaded, by far less than this test may take in all.
    let a_minute_ns = 60_000_000_000;
    let elapsed_ns = retaken.vm.clock.clock - taken.vm.clock.clock;
    assert!(
        taken.vm.clock.clock >= CLOCK && elapsed_ns < a_minute_ns,
        "{elapsed_ns} ns"
    );
    let a_minute_cycles = u64::from(taken.needs.tsc_khz) * 60_000;
    for (then, now) in taken.vcpus.iter().zip(&retaken.vcpus) {
        let elapsed = now.tsc.wrapping_sub(then.tsc);
        assert!(elapsed > 0 && elapsed < a_minute_cycles, "{elapsed} cycles");
        assert_eq!(
            now.tsc_ahead, then.tsc_ahead,
            "the vCPUs' distance from each other"
        );
    }
    if source.vcpus[1].tsc_offset() == Some(0) {
        eprintln!(
            "PARTLY SKIPPED: this KVM shows its guests the host's TSC, so no two vCPUs can be set apart"
        );
    } else {
        assert!(
            taken.vcpus[1].tsc > taken.vcpus[0].tsc + (1 << 39),
            "the test set them apart"
        );
    }
}

#[test]
fn a_deadline_that_may_have_been_lost_is_made_up_for() {
    let Some(hypervisor) = testing::hypervisor("a_deadline_that_may_have_been_lost") else {
        return;
    };
    let source = testing::hardware(&hypervisor, 1, MEMORY);
    mark(&source);
    let mut taken = take_of(&source);
    assert_eq!(taken.vcpus[0].tsc_deadline, Some(DEADLINE));
    taken.vcpus[0].tsc_deadline = Some(0);
    let destination = testing::hardware(&hypervisor, 1, MEMORY);
    let vcpus: Vec<&Vcpu> = destination.vcpus.iter().collect();
    load(&destination.vm, &vcpus, &taken).unwrap();
    // Either armed for a moment that is past, or fired by now: never left unarmed and silent. KVM clears the deadline
    // of a timer that fired, and holds the interrupt back until the vCPU runs.
    let lapic = &taken.vcpus[0].lapic;
    assert!(vcpu::awaits_deadline(lapic));
    let mut masked = *lapic;
    masked.regs[0x322] |= 1;
    assert!(!vcpu::awaits_deadline(&masked));
    let mut periodic = *lapic;
    periodic.regs[0x322] = 2;
    assert!(!vcpu::awaits_deadline(&periodic));
}

#[test]
fn a_deadline_keeps_its_distance_where_the_tsc_cannot_be_moved() {
    const KHZ: u32 = 1_000_000;
    let place = |deadline, taken, now| vcpu::place_deadline(deadline, taken, now, KHZ);
    assert_eq!(place(5_000, 1_000, 1_500), 5_000, "the TSC went on");
    assert_eq!(place(5_000, 1_500, 1_000), 5_000);
    let other = 7_000_000_000_000;
    assert_eq!(
        place(5_000, 1_000, other),
        other + 4_000,
        "another host's TSC, ahead"
    );
    assert_eq!(place(other + 4_000, other, 1_000), 5_000, "or behind");
    assert_eq!(
        place(500, 1_000, other),
        other,
        "a deadline that is past stays past"
    );
}

#[test]
fn msrs_that_are_refused_are_told_apart() {
    let Some(hypervisor) = testing::hypervisor("msrs_that_are_refused_are_told_apart") else {
        return;
    };
    let hardware = testing::hardware(&hypervisor, 1, MEMORY);
    let fd = &hardware.vcpus[0].fd;
    const NONE: u32 = 0x4b56_4dff;
    let entry = |index, data| kvm_bindings::kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    // Around the one that is refused, all are read and written.
    let read = msr::read(fd, &[LSTAR, NONE, STAR]).unwrap();
    assert_eq!(
        read.iter().map(|entry| entry.index).collect::<Vec<_>>(),
        [LSTAR, STAR]
    );
    msr::write(fd, 0, &[entry(LSTAR, 5), entry(NONE, 0), entry(STAR, 6)]).unwrap();
    assert_eq!(msr::read_one(fd, LSTAR).unwrap(), Some(5));
    assert_eq!(msr::read_one(fd, STAR).unwrap(), Some(6));
    let refused = msr::write(fd, 0, &[entry(NONE, 7)]).unwrap_err();
    assert!(
        matches!(
            refused,
            TransferError::Msr {
                index: NONE,
                value: 7,
                cpu: 0
            }
        ),
        "{refused}"
    );
}

#[test]
fn damaged_states_are_refused() {
    let Some(hypervisor) = testing::hypervisor("damaged_states_are_refused") else {
        return;
    };
    let hardware = testing::hardware(&hypervisor, 1, MEMORY);
    mark(&hardware);
    let good = take_of(&hardware).encode().unwrap();
    decode(&good).unwrap();

    for length in (0..HEADER_BYTES + 64).chain((HEADER_BYTES + 64..good.len()).step_by(97)) {
        assert!(decode(&good[..length]).is_err(), "cut at {length}");
    }
    for at in (0..HEADER_BYTES + 64).chain((HEADER_BYTES + 64..good.len()).step_by(97)) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(decode(&bad).is_err(), "changed at {at}");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(matches!(decode(&longer), Err(DecodeError::Length { .. })));
    let mut newer = good.clone();
    newer[8] += 1;
    let words = decode(&newer).unwrap_err().to_string();
    assert!(
        words.contains("version 2") && words.contains("reads version 1"),
        "{words}"
    );
    assert!(matches!(
        decode(b"QEVMsomething else"),
        Err(DecodeError::Foreign)
    ));
    assert!(matches!(
        decode(&vec![0; STATE_MAX + 1]),
        Err(DecodeError::TooLong(_))
    ));
}

#[test]
fn bodies_of_any_bytes_are_read_or_refused_but_never_panic() {
    let Some(hypervisor) = testing::hypervisor("bodies_of_any_bytes") else {
        return;
    };
    let hardware = testing::hardware(&hypervisor, 1, MEMORY);
    let good = take_of(&hardware).encode().unwrap();
    let body = &good[HEADER_BYTES..];
    decode_body(body).unwrap();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize
    };
    for _ in 0..500 {
        let mut bad = body.to_vec();
        for _ in 0..1 + next() % 4 {
            let at = next() % bad.len();
            bad[at] = next() as u8;
        }
        bad.truncate(bad.len() - next() % 16);
        let _ = decode_body(&bad);
    }
    let mut none = take_of(&hardware);
    none.vcpus.clear();
    let none = serde_bytes_of(&none);
    assert!(matches!(
        decode_body(&none),
        Err(BodyError::Cpus { cpus: 1, found: 0 })
    ));
}
