//! Where registers point: what every processor touches in its first instructions, found without a walk.

use std::collections::HashSet;

use lazyvm_wire::PageIndex;

use super::guest::GuestMemory;
use super::registers::{Segment, Vcpu};
use super::walk::{Paging, Tables};

const PAGE: u64 = 4096;
/// A kernel stack of Linux (`THREAD_SIZE`), and what is looked at of others.
const STACK: u64 = 16 << 10;
/// What is taken of a task state: without the map of I/O ports but for its first page.
const TASK: u64 = 2 * PAGE;
/// A 64-bit task state without the map of I/O ports.
const TASK_BYTES: usize = 104;
/// Of per-CPU data from its base on: more than Linux has compiled in.
const PER_CPU: u64 = 256 << 10;
/// What lies ahead of the descriptor table in it: the first stacks.
const PER_CPU_AHEAD: u64 = 64 << 10;
/// Most pages of code that the words on a processor's stacks are followed to.
const CALLERS_MAX: usize = 64;
/// Most pages whose words are followed to data, and most pages of that: 8 MiB each.
const SEARCHED_MAX: usize = 2048;
const DATA_MAX: usize = 2048;
/// Where kernels are, as against user programs.
const UPPER_HALF: u64 = 1 << 63;

/// What was found, in the order in which it is needed.
#[derive(Debug, Default)]
pub(super) struct Pointed {
    /// Descriptor tables, task states, code around the instruction pointers, stacks.
    pub certain: Vec<PageIndex>,
    /// Where per-CPU data is: more than is used of it.
    pub per_cpu: Vec<PageIndex>,
    /// Code that interrupts enter, and that stacks return to.
    pub code: Vec<PageIndex>,
}

/// Follows all pointers of these processors.
pub(super) fn follow(memory: &GuestMemory, tables: &mut Tables<'_>, vcpus: &[Vcpu]) -> Pointed {
    let mut pointed = Pointed::default();
    let mut followed: Vec<_> = vcpus
        .iter()
        .map(|vcpu| Follower::new(memory, tables, vcpu))
        .collect();
    // First what all of them need, since one of them may wait for another.
    for follower in &mut followed {
        follower.descriptors(tables, &mut pointed);
        follower.instructions(tables, &mut pointed);
    }
    for follower in &mut followed {
        follower.stacks(tables, &mut pointed);
        follower.data(tables, &mut pointed);
    }
    for follower in &mut followed {
        follower.handlers(tables, &mut pointed);
    }
    pointed
}

/// Data that words of these pages point to, in their order: lists and timers of a kernel lead on there.
pub(super) fn data(
    memory: &GuestMemory,
    tables: &mut Tables<'_>,
    space: Paging,
    from: &[PageIndex],
) -> Vec<PageIndex> {
    let mut seen = HashSet::new();
    let mut found = Vec::new();
    for &page in from.iter().take(SEARCHED_MAX) {
        for word in memory.words(page).iter().flatten() {
            let virt = word & !(PAGE - 1);
            if virt < UPPER_HALF || found.len() >= DATA_MAX || !seen.insert(virt) {
                continue;
            }
            let mapping = tables.translate(space, virt);
            if let Some(mapping) = mapping.filter(|mapping| !mapping.executable) {
                found.extend(memory.page(mapping.gpa + (virt & (mapping.bytes - 1))));
            }
        }
    }
    found
}

struct Follower<'a> {
    memory: &'a GuestMemory,
    vcpu: &'a Vcpu,
    /// `None` without long mode: addresses are taken for physical ones then, which firmware's are.
    space: Option<Paging>,
    /// Stacks that the task state names: their ends.
    stack_ends: Vec<u64>,
}

impl<'a> Follower<'a> {
    fn new(memory: &'a GuestMemory, tables: &mut Tables<'_>, vcpu: &'a Vcpu) -> Self {
        let mut follower = Self {
            memory,
            vcpu,
            space: vcpu.paging(),
            stack_ends: Vec::new(),
        };
        if follower.space.is_some() {
            follower.stack_ends = follower.task_stacks(tables).unwrap_or_default();
        }
        follower
    }

    fn physical(&self, tables: &mut Tables<'_>, virt: u64) -> Option<u64> {
        let Some(space) = self.space else {
            return Some(virt);
        };
        let mapping = tables.translate(space, virt)?;
        mapping.gpa.checked_add(virt & (mapping.bytes - 1))
    }

    fn push(&self, tables: &mut Tables<'_>, virt: u64, bytes: u64, to: &mut Vec<PageIndex>) {
        let first = virt & !(PAGE - 1);
        for virt in (first..virt.saturating_add(bytes)).step_by(PAGE as usize) {
            let page = self.physical(tables, virt);
            to.extend(page.and_then(|gpa| self.memory.page(gpa)));
        }
    }

    /// Part of a page at a virtual address, up to the page's end.
    fn read(&self, tables: &mut Tables<'_>, virt: u64) -> Option<Vec<u8>> {
        let gpa = self.physical(tables, virt)?;
        let page = self.memory.bytes(gpa)?;
        Some(page.get((virt % PAGE) as usize..)?.to_vec())
    }

    fn descriptors(&self, tables: &mut Tables<'_>, pointed: &mut Pointed) {
        let mut push = |segment: Segment, bytes_max: u64| {
            let bytes = segment.limit.saturating_add(1).min(bytes_max);
            self.push(tables, segment.base, bytes, &mut pointed.certain);
        };
        push(self.vcpu.idt, PAGE);
        push(self.vcpu.gdt, 16 * PAGE);
        push(self.vcpu.task, TASK);
    }

    fn instructions(&self, tables: &mut Tables<'_>, pointed: &mut Pointed) {
        for ahead in [0, 1, 2, u64::MAX] {
            let virt = self.vcpu.rip.wrapping_add(ahead.wrapping_mul(PAGE));
            self.push(tables, virt & !(PAGE - 1), 1, &mut pointed.certain);
        }
    }

    /// Stacks that privilege changes and interrupts bring. (Linux up to 6.1 keeps the top of the running task's stack
    /// in the second, unused one.)
    fn task_stacks(&self, tables: &mut Tables<'_>) -> Option<Vec<u64>> {
        let mut bytes = self.read(tables, self.vcpu.task.base)?;
        bytes.extend(
            self.read(
                tables,
                (self.vcpu.task.base & !(PAGE - 1)).wrapping_add(PAGE),
            )
            .unwrap_or_default(),
        );
        let state = bytes.get(..TASK_BYTES)?;
        let pointers = [4, 12, 20].into_iter().chain((36..92).step_by(8));
        let pointer = |at: usize| Some(u64::from_le_bytes(*state.get(at..)?.first_chunk()?));
        let ends = pointers.filter_map(pointer);
        Some(ends.filter(|&end| end >= UPPER_HALF).collect())
    }

    fn stacks(&self, tables: &mut Tables<'_>, pointed: &mut Pointed) {
        let here = self.vcpu.rsp & !(PAGE - 1);
        let mut words = Vec::new();
        // Stacks grow downwards: what is in use lies above.
        self.push(tables, here.wrapping_sub(PAGE), 1, &mut pointed.certain);
        for start in (0..STACK / PAGE).map(|page| here.wrapping_add(page * PAGE)) {
            self.push(tables, start, 1, &mut pointed.certain);
            words.push(start);
        }
        for end in &self.stack_ends {
            let pages =
                (1..=STACK / PAGE).map(|page| (end & !(PAGE - 1)).wrapping_sub(page * PAGE));
            for start in pages {
                self.push(tables, start, 1, &mut pointed.certain);
                words.push(start);
            }
        }
        self.callers(tables, &words, pointed);
    }

    /// Code that words on stacks point to: where calls return to, for the most part.
    fn callers(&self, tables: &mut Tables<'_>, stacks: &[u64], pointed: &mut Pointed) {
        let Some(space) = self.space else {
            return;
        };
        let mut seen = HashSet::new();
        for &stack in stacks {
            let bytes = self.read(tables, stack).unwrap_or_default();
            for word in bytes.as_chunks::<8>().0 {
                let virt = u64::from_le_bytes(*word) & !(PAGE - 1);
                if virt < UPPER_HALF || seen.len() >= CALLERS_MAX || !seen.insert(virt) {
                    continue;
                }
                match tables.translate(space, virt) {
                    Some(mapping) if mapping.executable => {
                        let gpa = mapping.gpa + (virt & (mapping.bytes - 1));
                        pointed.code.extend(self.memory.page(gpa));
                    }
                    // Data: does not count.
                    _ => {
                        seen.remove(&virt);
                    }
                }
            }
        }
    }

    fn data(&self, tables: &mut Tables<'_>, pointed: &mut Pointed) {
        let vcpu = self.vcpu;
        // A thread's control block, and what it has below.
        self.push(
            tables,
            vcpu.fs_base.wrapping_sub(PAGE),
            2 * PAGE,
            &mut pointed.certain,
        );
        let kernel_gs = match vcpu.kernel_gs_base {
            Some(base) if vcpu.is_user() => Some(base),
            _ => (!vcpu.is_user()).then_some(vcpu.gs_base),
        };
        if vcpu.is_user() {
            self.push(tables, vcpu.gs_base, 1, &mut pointed.certain);
        }
        match kernel_gs {
            Some(base) => self.push(tables, base, PER_CPU, &mut pointed.per_cpu),
            // Not known. Linux has each processor's descriptor table in its per-CPU data, which lies in one piece.
            None => {
                let Some(gpa) = self.physical(tables, vcpu.gdt.base) else {
                    return;
                };
                let first = gpa.saturating_sub(PER_CPU_AHEAD);
                let pages = self.memory.pages(first, PER_CPU_AHEAD + PER_CPU);
                pointed.per_cpu.extend(pages);
            }
        }
    }

    /// The code that the gates of the interrupt descriptor table lead to.
    fn handlers(&self, tables: &mut Tables<'_>, pointed: &mut Pointed) {
        if self.space.is_none() {
            return;
        }
        let gates = self.read(tables, self.vcpu.idt.base).unwrap_or_default();
        let mut seen = HashSet::new();
        for gate in gates.as_chunks::<16>().0 {
            let part = |from: usize, bytes: usize| {
                let parts = gate.iter().skip(from).take(bytes).rev();
                parts.fold(0_u64, |sum, &byte| sum << 8 | u64::from(byte))
            };
            let handler = part(0, 2) | part(6, 2) << 16 | part(8, 4) << 32;
            if handler >= UPPER_HALF && seen.insert(handler & !(PAGE - 1)) {
                self.push(tables, handler & !(PAGE - 1), 1, &mut pointed.code);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::PAGE_SIZE;
    use proptest::prelude::*;

    use super::super::guest::ENTRIES;
    use super::super::guest::testing::Pages;
    use super::super::walk::Levels;
    use super::*;

    /// Where a kernel has its view of all memory.
    const ALL: u64 = 0xffff_8880_0000_0000;

    /// What these words point to, which fill the first two pages; the next three are tables that map 2 MiB from [`ALL`] on.
    fn pointed(words: &[u64]) -> Vec<u64> {
        let (present, large, no_execute) = (1, 1 << 7, 1 << 63);
        let mut pages = vec![[0; ENTRIES]; 64];
        for (at, &word) in words.iter().enumerate() {
            pages[at / ENTRIES][at % ENTRIES] = word;
        }
        pages[2][(ALL >> 39) as usize % ENTRIES] = 3 << 12 | present;
        pages[3][0] = 4 << 12 | present;
        pages[4][0] = present | large | no_execute;
        let memory = Pages::guest(pages);
        let space = Paging {
            root: 2 * PAGE_SIZE as u64,
            levels: Levels::Four,
        };
        let from = [PageIndex(0), PageIndex(1)];
        let pages = data(&memory, &mut Tables::new(&memory), space, &from);
        pages.into_iter().map(|page| page.0).collect()
    }

    #[test]
    fn pointers_to_data_are_followed_in_their_order_and_each_page_counts_once() {
        let outside = ALL + (100 << 12);
        let words = [
            7,
            ALL + 0x9123,
            0x9000,
            ALL + 0x9128,
            outside,
            u64::MAX,
            ALL + 0x6000,
        ];
        assert_eq!(pointed(&words), [9, 6]);
        let mut second = vec![0; 512];
        second.push(ALL + 0x1_1000);
        assert_eq!(pointed(&second), [17]);
    }

    proptest! {
        #[test]
        fn any_words_give_pages_of_the_image(
            words in prop::collection::vec(prop_oneof![any::<u64>(), ALL - 9000..ALL + (3 << 20)], 0..1024),
        ) {
            let found = pointed(&words);
            prop_assert!(found.iter().all(|&page| page < 64));
            let distinct: HashSet<_> = found.iter().collect();
            prop_assert_eq!(distinct.len(), found.len());
        }
    }
}
