//! Address spaces: the two tables that one may have, and those of programs that do not run now.
//!
//! A kernel maps itself alike into every address space, so top-level tables of one kernel have their upper half in common
//! (Linux: `pgd_ctor` in `arch/x86/mm/pgtable.c`). That makes them recognisable among all pages. With page-table
//! isolation (`Documentation/arch/x86/pti.rst`) an address space has two: the kernel's, whose lower half forbids execution, at an
//! even page, and what user programs run with, which has little of the kernel, at the page behind it.

use lazyvm_wire::{Gpa, PAGE_SIZE, PageIndex, PageRange};

use super::guest::{ENTRIES, GuestMemory, Table, table_of};
use super::walk::{ADDRESS, Paging};

const PRESENT: u64 = 1;
/// Entries of each half.
pub(super) const HALF: usize = ENTRIES / 2;

/// Entries of the upper half that may differ: Linux has one for each program's own descriptor table, and one for
/// firmware's.
const DIFFERENT_MAX: usize = 2;

/// Fewest entries of the upper half that tell a top-level table from other pages.
const ALIKE_MIN: usize = 3;

/// Most address spaces that are looked for.
const SPACES_MAX: usize = 4096;

/// How much is read at once.
const CHUNK_PAGES: u64 = 256;

/// An address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressSpace {
    /// The kernel's table, which has all.
    pub kernel: Paging,
    /// The user programs' table where they have one of their own.
    pub user: Option<Paging>,
}

impl AddressSpace {
    /// That of a processor with this top-level table, which may be either of two.
    pub fn of(memory: &GuestMemory, paging: Paging) -> Self {
        let single = Self {
            kernel: paging,
            user: None,
        };
        let (even, odd) = (paging.root & !(1 << 12), paging.root | 1 << 12);
        let (Some(kernel), Some(user)) = (memory.table(even), memory.table(odd)) else {
            return single;
        };
        if !is_pair(&kernel, &user) {
            return single;
        }
        Self {
            kernel: Paging {
                root: even,
                ..paging
            },
            user: Some(Paging {
                root: odd,
                ..paging
            }),
        }
    }

    /// The table under which the lower half is to be walked: the kernel's may forbid execution there.
    pub fn lower(&self) -> Paging {
        self.user.unwrap_or(self.kernel)
    }
}

/// What matters of an entry for a comparison: neither its permissions nor whether it was used.
fn target(entry: u64) -> u64 {
    if entry & PRESENT == 0 {
        return 0;
    }
    entry & ADDRESS | PRESENT
}

/// Whether the second table is what user programs use instead of the first.
fn is_pair(kernel: &Table, user: &Table) -> bool {
    let lower = kernel.iter().zip(user).take(HALF);
    let alike = lower.clone().all(|(a, b)| target(*a) == target(*b));
    let used = |table: &Table, from: usize| {
        let entries = table.iter().skip(from).take(HALF);
        entries.filter(|&&entry| target(entry) != 0).count()
    };
    alike && used(kernel, 0) > 0 && used(user, HALF) > 0 && used(user, HALF) < used(kernel, HALF)
}

/// Whether a page is a top-level table of the kernel whose upper half this is.
fn is_like(page: &[u8], reference: &Table, used: &[usize]) -> bool {
    let entry = |index: usize| {
        let bytes = page.get(index * 8..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let mut different = 0;
    for &index in used {
        if target(entry(index)) != target(reference[index]) {
            different += 1;
            if different > DIFFERENT_MAX || used.len() - different < ALIKE_MIN {
                return false;
            }
        }
    }
    // Rare from here on.
    let page = table_of(page);
    let upper = page.iter().zip(reference).skip(HALF);
    let different = upper.filter(|(a, b)| target(**a) != target(**b)).count();
    different <= DIFFERENT_MAX
}

/// Looks at every page of the image that holds data for top-level tables of the same kernel as `known`, until `go_on`
/// says no. `known` itself is not among them. The machine may run meanwhile.
pub fn find_spaces(
    memory: &GuestMemory,
    known: AddressSpace,
    go_on: &dyn Fn() -> bool,
) -> Vec<AddressSpace> {
    let Some(reference) = memory.table(known.kernel.root) else {
        return Vec::new();
    };
    let used: Vec<usize> = (HALF..ENTRIES)
        .filter(|&index| target(reference[index]) != 0)
        .collect();
    if used.len() < ALIKE_MIN {
        return Vec::new();
    }
    let mut roots = Vec::new();
    let mut runs = Vec::new();
    // What can't be read is not searched.
    let _ = memory.memory().data_runs(&mut |run| runs.push(run));
    let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
    for piece in runs.iter().flat_map(|&run| chunks(run)) {
        if !go_on() || roots.len() >= SPACES_MAX {
            break;
        }
        let bytes = &mut buffer[..piece.count as usize * PAGE_SIZE];
        if memory.memory().read(piece, bytes).is_err() {
            continue;
        }
        let pages = piece.pages().zip(bytes.chunks_exact(PAGE_SIZE));
        let like = pages.filter(|(_, page)| is_like(page, &reference, &used));
        roots.extend(like.filter_map(|(page, _)| memory.layout().gpa(page)));
    }
    let levels = known.kernel.levels;
    roots
        .into_iter()
        .filter(|&Gpa(root)| root != known.kernel.root)
        .map(|Gpa(root)| AddressSpace::of(memory, Paging { root, levels }))
        .collect()
}

/// Leaves out what is no address space any more, because its program has ended and its table's page is used for something
/// else: walking that would give anything.
pub fn keep_live(memory: &GuestMemory, known: AddressSpace, spaces: &mut Vec<AddressSpace>) {
    let reference = memory.table(known.kernel.root).unwrap_or([0; ENTRIES]);
    let used: Vec<usize> = (HALF..ENTRIES)
        .filter(|&index| target(reference[index]) != 0)
        .collect();
    spaces.retain(|space| {
        let page = memory.bytes(space.kernel.root);
        used.len() >= ALIKE_MIN && page.is_some_and(|page| is_like(&page, &reference, &used))
    });
}

fn chunks(run: PageRange) -> impl Iterator<Item = PageRange> {
    let starts = (run.first.0..run.end().0).step_by(CHUNK_PAGES as usize);
    starts.map(move |first| {
        let count = (run.end().0 - first).min(CHUNK_PAGES);
        PageRange::new(PageIndex(first), count)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use lazyvm_wire::Layout;

    use super::super::guest::testing::Pages;
    use super::super::walk::Levels;
    use super::*;

    fn root(lower: u64) -> Table {
        let mut table = [0; ENTRIES];
        table[0] = lower << 12 | PRESENT;
        for (index, entry) in table.iter_mut().enumerate().skip(ENTRIES - 6) {
            *entry = (index as u64) << 12 | PRESENT;
        }
        table
    }

    #[test]
    fn spaces_have_the_kernel_in_common_and_one_whose_page_is_used_anew_is_none() {
        let mut pages = vec![[0; ENTRIES]; 16];
        (pages[2], pages[4], pages[8]) = (root(1), root(3), root(5));
        pages[9] = [0x1234_5678; ENTRIES];
        let shared = Arc::new(Pages(Mutex::new(pages)));
        let memory = GuestMemory::new(Layout::flat(16).unwrap(), shared.clone());
        let paging = Paging {
            root: 2 << 12,
            levels: Levels::Four,
        };
        let known = AddressSpace::of(&memory, paging);
        let mut spaces = find_spaces(&memory, known, &|| true);
        let roots = |spaces: &[AddressSpace]| -> Vec<u64> {
            spaces.iter().map(|space| space.kernel.root >> 12).collect()
        };
        assert_eq!(roots(&spaces), [4, 8]);
        keep_live(&memory, known, &mut spaces);
        assert_eq!(roots(&spaces), [4, 8]);
        // It is another program's stack now.
        shared.0.lock().unwrap()[4] = [0x7fff_0000_1235; ENTRIES];
        keep_live(&memory, known, &mut spaces);
        assert_eq!(roots(&spaces), [8]);
    }
}
