//! Their code: flat, loaded at 1 MiB and entered there in 64-bit mode.
#![allow(unsafe_code)]

use std::arch::global_asm;

macro_rules! payload {
    ($(#[$doc:meta])* $name:ident, $start:ident, $end:ident, $code:expr) => {
        global_asm!(
            concat!(".pushsection .rodata.", stringify!($name), ", \"a\", @progbits"),
            concat!(".globl ", stringify!($start)),
            concat!(".globl ", stringify!($end)),
            concat!(".hidden ", stringify!($start)),
            concat!(".hidden ", stringify!($end)),
            concat!(stringify!($start), ":"),
            $code,
            concat!(stringify!($end), ":"),
            ".popsection",
        );

        $(#[$doc])*
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                static $start: u8;
                static $end: u8;
            }
            let (start, end) = (&raw const $start, &raw const $end);
            // SAFETY: both symbols stand in the assembly above, in this order, in one read-only section.
            unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
        }
    };
}

payload!(
    /// Crashes: an undefined instruction, and no table to say what is to be done about it.
    triple_fault, test_triple_fault, test_triple_fault_end, "ud2"
);

payload!(
    /// Halts with interrupts off.
    halt, test_halt, test_halt_end,
    r#"
    cli
1:  hlt
    jmp 1b
    "#
);

payload!(
    /// Asks for a reset as PCs do, by the keyboard controller.
    reset, test_reset, test_reset_end,
    r#"
    mov al, 0xfe
    out 0x64, al
1:  jmp 1b
    "#
);

payload!(
    /// Says the alphabet, a line each time, for ever. After each letter it reads why the serial port wants an
    /// interrupt, which it tells once: the letter was sent. Says "!" when it is told anything else.
    alphabet, test_alphabet, test_alphabet_end,
    r#"
    mov edx, 0x3f9
    mov al, 2
    out dx, al
    mov ecx, 'a'
1:  mov edx, 0x3f8
    mov eax, ecx
    out dx, al
    mov edx, 0x3fa
    in al, dx
    and al, 15
    cmp al, 2
    mov edx, 0x3f8
    jne 3f
    inc ecx
    cmp ecx, 'z'
    jbe 1b
    mov al, 10
    out dx, al
    mov ecx, 'a'
    jmp 1b
3:  mov al, '!'
    out dx, al
    jmp 1b
    "#
);

payload!(
    /// Says what the boot protocol of Linux told it, a line each: the command line, and the RAM disk as text. Then
    /// resets.
    boot_echo, test_boot_echo, test_boot_echo_end,
    r#"
    cld
    mov rbx, rsi
    mov edx, 0x3f8
    mov esi, [rbx + 0x228]
1:  lodsb
    test al, al
    jz 2f
    out dx, al
    jmp 1b
2:  mov al, 10
    out dx, al
    mov esi, [rbx + 0x218]
    mov ecx, [rbx + 0x21c]
    rep outsb
    mov al, 10
    out dx, al
    mov al, 0xfe
    out 0x64, al
3:  jmp 3b
    "#
);

payload!(
    /// Counts interrupts: of the PIT (100 a second, by PIC line 0, vector 0x20) and of the local APIC's timer
    /// (periodic, vector 0x30). Halts in between. Says "p" at each 10th of the first, "a" at each 10th of the second.
    clocks, test_clocks, test_clocks_end,
    r#"
    // Interrupt table at 0x200000, counters at 0x201000.
    mov edi, 0x200000
    lea rax, [rip + test_clocks_pit]
    mov ecx, 0x20
    call 5f
    lea rax, [rip + test_clocks_apic]
    mov ecx, 0x30
    call 5f
    lea rax, [rip + test_clocks_spurious]
    mov ecx, 0x27
    call 5f
    mov ecx, 0xff
    call 5f
    mov word ptr [rdi + 0x2000], 0xfff
    mov [rdi + 0x2002], rdi
    lidt [rdi + 0x2000]
    // PICs: vectors 0x20 and 0x28, only line 0 let through.
    mov al, 0x11
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xfe
    out 0x21, al
    mov al, 0xff
    out 0xa1, al
    // PIT: channel 0, rate generator, 1193182 / 11932 = 100 Hz.
    mov al, 0x34
    out 0x43, al
    mov al, 0x9c
    out 0x40, al
    mov al, 0x2e
    out 0x40, al
    // Local APIC: on, timer periodic at vector 0x30, divided by 16; KVM's bus runs at 1 GHz: 50 a second.
    mov esi, 0xfee00000
    mov dword ptr [rsi + 0xf0], 0x1ff
    mov dword ptr [rsi + 0x3e0], 3
    mov dword ptr [rsi + 0x320], 0x20030
    mov dword ptr [rsi + 0x380], 1250000
1:  sti
    hlt
    jmp 1b

    // An interrupt gate for vector ecx to rax.
5:  mov edx, ecx
    shl edx, 4
    mov [rdi + rdx], ax
    mov word ptr [rdi + rdx + 2], 0x10
    mov word ptr [rdi + rdx + 4], 0x8e00
    mov rbx, rax
    shr rbx, 16
    mov [rdi + rdx + 6], bx
    shr rbx, 16
    mov [rdi + rdx + 8], rbx
    ret

test_clocks_pit:
    push rax
    push rdx
    inc dword ptr [0x201000]
    cmp dword ptr [0x201000], 10
    jb 2f
    mov dword ptr [0x201000], 0
    mov edx, 0x3f8
    mov al, 'p'
    out dx, al
    mov al, 10
    out dx, al
2:  mov al, 0x20
    out 0x20, al
    pop rdx
    pop rax
    iretq

test_clocks_apic:
    push rax
    push rdx
    inc dword ptr [0x201004]
    cmp dword ptr [0x201004], 10
    jb 2f
    mov dword ptr [0x201004], 0
    mov edx, 0x3f8
    mov al, 'a'
    out dx, al
    mov al, 10
    out dx, al
2:  mov edx, 0xfee000b0
    mov dword ptr [rdx], 0
    pop rdx
    pop rax
    iretq

test_clocks_spurious:
    iretq
    "#
);
