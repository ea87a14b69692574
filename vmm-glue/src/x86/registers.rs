//! The registers that point at memory.

use serde::{Deserialize, Serialize};

use super::walk::{Levels, Paging};

/// Protected mode and paging are on.
const CR0_PAGING: u64 = 1 << 31;
/// Five levels of page tables.
const CR4_FIVE_LEVELS: u64 = 1 << 12;
/// Long mode is active.
const EFER_LONG: u64 = 1 << 10;
/// Where the top-level table is, in CR3; the rest is a process-context identifier and flags.
const CR3_TABLE: u64 = 0x000f_ffff_ffff_f000;

/// A segment's base and limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// First byte, in linear addresses.
    pub base: u64,
    /// Last byte, from there.
    pub limit: u64,
}

/// A virtual processor's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vcpu {
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Privilege level, 0 to 3.
    pub privilege: u8,
    /// FS: of user programs, their thread's data.
    pub fs_base: u64,
    /// GS: of the kernel, its per-CPU data.
    pub gs_base: u64,
    /// The base that `swapgs` brings, where it is known.
    pub kernel_gs_base: Option<u64>,
    /// The global descriptor table.
    pub gdt: Segment,
    /// The interrupt descriptor table.
    pub idt: Segment,
    /// The task state.
    pub task: Segment,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3: the top-level page table.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended features.
    pub efer: u64,
}

impl Vcpu {
    /// Its page tables; `None` where it is not in long mode (firmware, 32-bit guests), which is not looked into.
    pub fn paging(&self) -> Option<Paging> {
        if self.cr0 & CR0_PAGING == 0 || self.efer & EFER_LONG == 0 {
            return None;
        }
        let levels = if self.cr4 & CR4_FIVE_LEVELS == 0 {
            Levels::Four
        } else {
            Levels::Five
        };
        Some(Paging {
            root: self.cr3 & CR3_TABLE,
            levels,
        })
    }

    /// Whether a user program runs.
    pub fn is_user(&self) -> bool {
        self.privilege == 3
    }
}
