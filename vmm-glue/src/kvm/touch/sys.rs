//! The payload's code. Position independent: all addresses come with the parameters.
//!
//! On entry `rdi` is the vCPU's parameter page and `rsp` its end. Registers that stay the same all along:
//!
//! | register | holds |
//! |---|---|
//! | `r15` | the parameter page |
//! | `r14`, `r13` | the share's pages, and their versions |
//! | `r12` | the random state |
//! | `rbx`, `rbp` | the page factor and the word factor |
//! | `r11`, `r10` | touches so far, and until the next tick |
//!
//! KVM on the machines that this is tested on emulates each instruction in about 1.4 µs, so the loop is short: 53
//! instructions a touch, where nothing is wrong.
#![allow(unsafe_code)]

use std::arch::global_asm;
use std::mem::offset_of;

use super::Parameters;

/// Ticks during which the touches in a tick are measured.
const MEASURED_TICKS: u64 = 32;

/// Touches in the first of them.
const FIRST_TICK: u64 = 64;

global_asm!(
    r#"
    .pushsection .rodata.lazyvm_touch, "a", @progbits
    .globl lazyvm_touch_code
    .globl lazyvm_touch_code_end
    .hidden lazyvm_touch_code
    .hidden lazyvm_touch_code_end

lazyvm_touch_code:
    cld
    mov r15, rdi
    mov r14, [r15 + {pages}]
    mov r13, [r15 + {versions}]
    mov r12, [r15 + {random}]
    mov rbx, [r15 + {page_factor}]
    mov rbp, [r15 + {word_factor}]
    mov rax, [r15 + {first_page}]
    imul rax, rbx
    mov [r15 + {first_pattern}], rax
    xor r11d, r11d
    mov r10, [r15 + {tick_touches}]
    test r10, r10
    jnz 1f
    mov r10d, {first_tick}
1:  mov [r15 + {touches_per_tick}], r10
    call .Lnow
    mov [r15 + {tick_started}], rax

.Ltouch:
    // r12: xorshift64.
    mov rax, r12
    shl rax, 13
    xor r12, rax
    mov rax, r12
    shr rax, 7
    xor r12, rax
    mov rax, r12
    shl rax, 17
    xor r12, rax
    // r9: the page, of the whole share if the low 20 bits say "cold", else of the hot ones.
    mov eax, r12d
    and eax, 0xfffff
    mov r9, [r15 + {hot_pages}]
    cmp rax, [r15 + {cold}]
    cmovb r9, [r15 + {share_pages}]
    mov rax, r12
    shr rax, 32
    imul r9, rax
    shr r9, 32
    // rdx: its pattern's first word; rsi: its address; rcx: its version.
    mov rdx, r9
    imul rdx, rbx
    add rdx, [r15 + {first_pattern}]
    mov rsi, r9
    shl rsi, 12
    add rsi, r14
    mov rcx, [r13 + r9*8]
    // Words 0, 255 and 511 carry the version. rdi: what is expected.
    lea rdi, [rdx + rcx]
    cmp [rsi], rdi
    jne .Lbad_0
.Lchecked_0:
    imul r8, rbp, 255
    add rdi, r8
    cmp [rsi + 255*8], rdi
    jne .Lbad_255
.Lchecked_255:
    lea rdi, [rdi + r8]
    add rdi, rbp
    cmp [rsi + 511*8], rdi
    jne .Lbad_511
.Lchecked_511:
    // Two more, of those that never change: words r8 (2 to 256, even) and r8 + 254.
    mov r8, r12
    shr r8, 20
    and r8d, 127
    lea r8, [r8 + r8 + 2]
    mov rdi, r8
    imul rdi, rbp
    add rdi, rdx
    cmp [rsi + r8*8], rdi
    jne .Lbad_low
.Lchecked_low:
    imul rax, rbp, 254
    add rdi, rax
    cmp [rsi + r8*8 + 254*8], rdi
    jne .Lbad_high
.Lchecked_high:
    // The next version, in all four places.
    inc rcx
    mov [r13 + r9*8], rcx
    lea rdi, [rdx + rcx]
    mov [rsi], rdi
    add rdi, rax
    add rdi, rbp
    mov [rsi + 255*8], rdi
    add rdi, rax
    lea rdi, [rdi + rbp*2]
    mov [rsi + 511*8], rdi
    inc r11
    dec r10
    jnz .Ltouch
    call .Ltick
    mov r10, [r15 + {touches_per_tick}]
    jmp .Ltouch

.Lbad_0:
    xor eax, eax
    call .Lbad
    jmp .Lchecked_0
.Lbad_255:
    mov eax, 255
    call .Lbad
    jmp .Lchecked_255
.Lbad_511:
    mov eax, 511
    call .Lbad
    jmp .Lchecked_511
.Lbad_low:
    mov rax, r8
    call .Lbad
    jmp .Lchecked_low
.Lbad_high:
    lea rax, [r8 + 254]
    call .Lbad
    imul rax, rbp, 254
    jmp .Lchecked_high

    // Notes an error. rax: the word; rdi: what was expected. Changes rax only.
.Lbad:
    inc qword ptr [r15 + {errors}]
    cmp qword ptr [r15 + {errors}], 1
    jne 1f
    mov [r15 + {error_word}], rax
    mov [r15 + {error_expected}], rdi
    mov rax, [rsi + rax*8]
    mov [r15 + {error_seen}], rax
    mov rax, r9
    add rax, [r15 + {first_page}]
    mov [r15 + {error_page}], rax
1:  ret

    // Reports, and measures how many touches a tick takes. Keeps what stays the same all along.
.Ltick:
    inc qword ptr [r15 + {ticks}]
    lea rdi, [r15 + {line}]
    lea rsi, [rip + .Ltext_tick]
    call .Ltext
    mov rax, [r15 + {ticks}]
    mov ecx, 10
    call .Lnumber
    lea rsi, [rip + .Ltext_touches]
    call .Ltext
    mov rax, r11
    call .Lnumber
    lea rsi, [rip + .Ltext_errors]
    call .Ltext
    mov rax, [r15 + {errors}]
    call .Lnumber
    call .Lcpu
    cmp qword ptr [r15 + {errors}], 0
    je 1f
    cmp qword ptr [r15 + {error_reported}], 0
    jne 1f
    mov qword ptr [r15 + {error_reported}], 1
    lea rsi, [rip + .Ltext_error_page]
    call .Ltext
    mov rax, [r15 + {error_page}]
    call .Lnumber
    lea rsi, [rip + .Ltext_word]
    call .Ltext
    mov rax, [r15 + {error_word}]
    call .Lnumber
    lea rsi, [rip + .Ltext_expected]
    call .Ltext
    mov ecx, 16
    mov rax, [r15 + {error_expected}]
    call .Lnumber
    lea rsi, [rip + .Ltext_seen]
    call .Ltext
    mov rax, [r15 + {error_seen}]
    call .Lnumber
    mov ecx, 10
    call .Lcpu
1:  call .Lwrite

    // Touches in the next tick: as many as would have taken its time at the speed of the last one.
    call .Lnow
    mov r8, rax
    xchg rax, [r15 + {tick_started}]
    cmp qword ptr [r15 + {tick_touches}], 0
    jne 2f
    cmp qword ptr [r15 + {ticks}], {measured_ticks}
    ja 2f
    sub r8, rax
    jz 2f
    mov rax, [r15 + {touches_per_tick}]
    mul qword ptr [r15 + {tick_cycles}]
    div r8
    // At most twice as many and at least half: one odd tick must not spoil the measure.
    mov rcx, [r15 + {touches_per_tick}]
    lea rdx, [rcx + rcx]
    cmp rax, rdx
    cmova rax, rdx
    shr rcx, 1
    cmp rax, rcx
    cmovb rax, rcx
    add rax, 1
    mov [r15 + {touches_per_tick}], rax
2:  ret

    // rax: the TSC. Changes rdx.
.Lnow:
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

    // Appends the text at rsi, up to a zero, to rdi. Changes rax.
.Ltext:
    lodsb
    test al, al
    jz 1f
    stosb
    jmp .Ltext
1:  ret

    // Appends rax in base rcx to rdi. Changes rax, rdx, r8.
.Lnumber:
    mov r8, rsp
1:  xor edx, edx
    div rcx
    add dl, '0'
    cmp dl, '9'
    jbe 2f
    add dl, 'a' - '9' - 1
2:  push rdx
    test rax, rax
    jnz 1b
3:  pop rax
    stosb
    cmp rsp, r8
    jne 3b
    ret

    // Ends a line, with the vCPU's number ahead if there are several. rcx: 10. Changes rax, rdx, rsi, r8.
.Lcpu:
    cmp qword ptr [r15 + {cpus}], 1
    je 1f
    lea rsi, [rip + .Ltext_cpu]
    call .Ltext
    mov rax, [r15 + {cpu}]
    call .Lnumber
1:  mov al, 10
    stosb
    ret

    // Writes the lines up to rdi to the serial port, one vCPU at a time.
.Lwrite:
    lea rsi, [r15 + {line}]
    mov rcx, rdi
    sub rcx, rsi
    mov r8, [r15 + {lock}]
1:  mov eax, 1
    xchg [r8], eax
    test eax, eax
    jz 2f
    pause
    jmp 1b
2:  mov edx, 0x3f8
    rep outsb
    mov dword ptr [r8], 0
    ret

.Ltext_tick: .asciz "tick "
.Ltext_touches: .asciz " touches "
.Ltext_errors: .asciz " errors "
.Ltext_cpu: .asciz " cpu "
.Ltext_error_page: .asciz "error page "
.Ltext_word: .asciz " word "
.Ltext_expected: .asciz " expected "
.Ltext_seen: .asciz " seen "
lazyvm_touch_code_end:
    .popsection
    "#,
    measured_ticks = const MEASURED_TICKS,
    first_tick = const FIRST_TICK,
    line = const size_of::<Parameters>(),
    pages = const offset_of!(Parameters, pages),
    versions = const offset_of!(Parameters, versions),
    hot_pages = const offset_of!(Parameters, hot_pages),
    share_pages = const offset_of!(Parameters, share_pages),
    cold = const offset_of!(Parameters, cold),
    page_factor = const offset_of!(Parameters, page_factor),
    word_factor = const offset_of!(Parameters, word_factor),
    first_page = const offset_of!(Parameters, first_page),
    random = const offset_of!(Parameters, random),
    tick_touches = const offset_of!(Parameters, tick_touches),
    tick_cycles = const offset_of!(Parameters, tick_cycles),
    cpus = const offset_of!(Parameters, cpus),
    cpu = const offset_of!(Parameters, cpu),
    lock = const offset_of!(Parameters, lock),
    ticks = const offset_of!(Parameters, ticks),
    errors = const offset_of!(Parameters, errors),
    error_page = const offset_of!(Parameters, error_page),
    error_word = const offset_of!(Parameters, error_word),
    error_expected = const offset_of!(Parameters, error_expected),
    error_seen = const offset_of!(Parameters, error_seen),
    error_reported = const offset_of!(Parameters, error_reported),
    tick_started = const offset_of!(Parameters, tick_started),
    touches_per_tick = const offset_of!(Parameters, touches_per_tick),
    first_pattern = const offset_of!(Parameters, first_pattern),
);

/// The code, to be copied to where it runs.
pub(super) fn code() -> &'static [u8] {
    unsafe extern "C" {
        static lazyvm_touch_code: u8;
        static lazyvm_touch_code_end: u8;
    }
    let (start, end) = (
        &raw const lazyvm_touch_code,
        &raw const lazyvm_touch_code_end,
    );
    // SAFETY: both symbols stand in the assembly above, the second behind the first in the same read-only section,
    // and everything between them is initialised.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}
