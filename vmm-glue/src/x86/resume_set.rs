//! The resume set: what a machine touches first where it goes on, small and certain things ahead.

use lazyvm_server::port::Hints;
use lazyvm_wire::{PAGE_SIZE, PageIndex, PageRange};

use super::code::CodeMap;
use super::guest::{ENTRIES, GuestMemory};
use super::pages::{PageList, PageSet};
use super::pointers;
use super::registers::Vcpu;
use super::spaces::{AddressSpace, HALF};
use super::walk::{Bounds, Found, Mapping, Tables, Walker};

/// Most pages of the virtual order: 32 MiB of numbers for 16 GiB.
const ORDER_MAX: usize = 4 << 20;

/// Memory that firmware and devices' ROMs use.
const LOW_MEMORY: u64 = 1 << 20;

/// Linux (`Documentation/arch/x86/x86_64/mm.rst`): descriptor tables, task states and entry stacks of all processors.
const ENTRY_AREA: std::ops::Range<u64> = 0xffff_fe00_0000_0000..0xffff_fe80_0000_0000;

/// The same: the kernel's text and data.
const KERNEL_IMAGE: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;

/// Larger pages than this are the kernel's view of all memory, whatever they allow, or have physical order by themselves.
const CODE_PAGE_MAX: u64 = 2 << 20;

/// Most pages that count as the kernel's own because no program has them mapped: 16 MiB. Where there are more of them, they
/// are a program's whose page tables were not found.
const KERNEL_PAGES_MAX: usize = 4096;

/// What else is known of the machine.
#[derive(Clone, Copy, Default)]
pub struct Known<'a> {
    /// Address spaces of programs that do not run now.
    pub spaces: &'a [AddressSpace],
    /// What was touched of late, the first first; where it is known, it tells which part of large areas is used.
    pub hot: Option<&'a PageList>,
    /// Rings that the machine shares with its devices.
    pub rings: &'a [PageRange],
    /// Code that was found before, the first needed first. With it, pointers to code and data are not followed: that takes a
    /// while, and is not for a machine that stands still.
    pub code: Option<&'a [PageRange]>,
}

/// Finds all of [`Hints`] but the hot pages.
pub fn resume_set(
    memory: &GuestMemory,
    vcpus: &[Vcpu],
    known: Known<'_>,
    bounds: Bounds<'_>,
) -> Hints {
    let pages = memory.layout().pages();
    let mut tables = Tables::new(memory);
    let pointed = pointers::follow(memory, &mut tables, vcpus);
    let mut trees = Trees::new(memory, known.hot);
    let mut current: Vec<AddressSpace> = Vec::new();
    for paging in vcpus.iter().filter_map(Vcpu::paging) {
        let space = AddressSpace::of(memory, paging);
        if !current.contains(&space) {
            current.push(space);
        }
    }
    trees.walk(&current, known.spaces, bounds);

    let mut table_list = PageList::new(pages);
    table_list.extend(tables.order().iter().filter_map(|&gpa| memory.page(gpa)));
    table_list.extend(trees.upper_tables.iter());
    let (hot, cold) = split(trees.lower_tables.iter(), known.hot);
    table_list.extend(hot.into_iter().chain(cold));

    let mut processor = PageList::new(pages);
    processor.extend(pointed.certain);
    processor.extend(trees.entry_area.iter());
    let (hot, cold) = split(pointed.per_cpu.into_iter(), known.hot);
    processor.extend(hot);
    if known.hot.is_none() {
        processor.extend(cold);
    }
    processor.extend(trees.kernel_data.iter());
    processor.extend(known.rings.iter().flat_map(|ring| ring.pages()));
    processor.extend(pointed.code);
    let (hot, cold) = split(memory.pages(0, LOW_MEMORY), known.hot);
    processor.extend(hot);
    processor.extend(trees.kernels_own());
    processor.extend(cold);

    if let (None, Some(space)) = (known.code, current.first()) {
        let used: Vec<_> = processor.iter().collect();
        let next = pointers::data(memory, &mut tables, space.kernel, &used);
        processor.extend(next);
    }

    let mut code = PageList::new(pages);
    let (hot, cold) = split(trees.kernel_code.iter(), known.hot);
    code.extend(hot);
    match known.code {
        Some(before) => code.extend(before.iter().flat_map(|range| range.pages())),
        None => code.extend(trees.code_map.used_next(memory, processor.iter())),
    }
    code.extend(cold);
    let (hot, cold) = split(trees.user_code.iter(), known.hot);
    code.extend(hot.into_iter().chain(cold));
    Hints {
        tables: table_list.into_ranges(),
        processor: processor.into_ranges(),
        code: code.into_ranges(),
        hot: Vec::new(),
        virtual_order: trees.order,
    }
}

/// Whether it is of the kernel's view of all memory, in large pages: its order is the physical one. What runs without a
/// kernel has such a view too, and may execute all of it.
fn is_all_memory(mapping: &Mapping) -> bool {
    mapping.bytes > 4096 && !KERNEL_IMAGE.contains(&mapping.virt)
}

/// The hot ones, and the others, both in their order; all are others where that is not known.
fn split(
    pages: impl Iterator<Item = PageIndex>,
    hot: Option<&PageList>,
) -> (Vec<PageIndex>, Vec<PageIndex>) {
    let is_hot = |page: &PageIndex| hot.is_some_and(|hot| hot.contains(*page));
    pages.partition(is_hot)
}

/// What the page tables tell. Each list holds a page once, so none outgrows the image, whatever the tables hold.
struct Trees<'a> {
    memory: &'a GuestMemory,
    hot: Option<&'a PageList>,
    /// Those that do not map small pages.
    upper_tables: PageList,
    lower_tables: PageList,
    entry_area: PageList,
    kernel_data: PageList,
    kernel_code: PageList,
    code_map: CodeMap,
    user_code: PageList,
    /// All that programs have mapped.
    users: PageSet,
    order: Vec<PageIndex>,
    in_order: PageSet,
}

impl<'a> Trees<'a> {
    fn new(memory: &'a GuestMemory, hot: Option<&'a PageList>) -> Self {
        let list = || PageList::new(memory.layout().pages());
        Self {
            memory,
            hot,
            upper_tables: list(),
            lower_tables: list(),
            entry_area: list(),
            kernel_data: list(),
            kernel_code: list(),
            code_map: CodeMap::default(),
            user_code: list(),
            users: PageSet::new(memory.layout().pages()),
            order: Vec::new(),
            in_order: PageSet::new(memory.layout().pages()),
        }
    }

    /// The kernel's upper half first, from its end: its view of all memory lies at the beginning, and is large.
    fn walk(&mut self, current: &[AddressSpace], others: &[AddressSpace], bounds: Bounds<'_>) {
        let mut walker = Walker::new(self.memory, bounds);
        for top in [ENTRIES - 1..ENTRIES, ENTRIES - 4..ENTRIES - 1] {
            for space in current {
                walker.walk(space.kernel, top.clone(), &mut |found| self.take(found));
            }
        }
        for space in current {
            walker.walk(space.lower(), 0..HALF, &mut |found| self.take(found));
        }
        for space in current {
            let rest = HALF..ENTRIES - 4;
            walker.walk(space.kernel, rest, &mut |found| self.take(found));
            if let Some(user) = space.user {
                walker.walk(user, HALF..ENTRIES, &mut |found| self.take(found));
            }
        }
        for space in others {
            walker.walk(space.lower(), 0..HALF, &mut |found| self.take(found));
        }
    }

    fn take(&mut self, found: Found) {
        match found {
            Found::Table { gpa, level } => {
                let list = if level > 1 {
                    &mut self.upper_tables
                } else {
                    &mut self.lower_tables
                };
                list.extend(self.memory.page(gpa));
            }
            Found::Mapping(mapping) if mapping.user => self.take_user(mapping),
            Found::Mapping(mapping) => self.take_kernel(mapping),
        }
    }

    fn take_user(&mut self, mapping: Mapping) {
        if mapping.executable && mapping.accessed && mapping.bytes <= CODE_PAGE_MAX {
            let pages = self.memory.pages(mapping.gpa, mapping.bytes);
            self.user_code.extend(pages);
        }
        if mapping.bytes <= CODE_PAGE_MAX {
            self.put_in_order(mapping);
        }
        for page in self.memory.pages(mapping.gpa, mapping.bytes) {
            self.users.insert(page);
        }
    }

    fn take_kernel(&mut self, mapping: Mapping) {
        if mapping.bytes > CODE_PAGE_MAX {
            return;
        }
        let pages = self.memory.pages(mapping.gpa, mapping.bytes);
        if ENTRY_AREA.contains(&mapping.virt) {
            self.entry_area.extend(pages);
        } else if mapping.executable {
            if mapping.accessed && !is_all_memory(&mapping) {
                self.take_kernel_code(&mapping);
            }
        } else if KERNEL_IMAGE.contains(&mapping.virt) {
            let hot = self.hot;
            let is_hot = |page: &PageIndex| hot.is_some_and(|hot| hot.contains(*page));
            self.kernel_data.extend(pages.filter(is_hot));
        }
        if !is_all_memory(&mapping) {
            self.put_in_order(mapping);
        }
    }

    fn take_kernel_code(&mut self, mapping: &Mapping) {
        for offset in (0..mapping.bytes).step_by(PAGE_SIZE) {
            let page = self.memory.page(mapping.gpa.saturating_add(offset));
            if let Some(page) = page.filter(|&page| self.kernel_code.push(page)) {
                self.code_map.add(mapping, offset, page);
            }
        }
    }

    /// The hot pages that no program has mapped: a kernel uses little of its own, and whoever runs waits for it. None where
    /// there are no programs.
    fn kernels_own(&self) -> Vec<PageIndex> {
        if self.users.is_empty() {
            return Vec::new();
        }
        let used = self.hot.into_iter().flat_map(PageList::iter);
        let own = used.filter(|&page| !self.users.contains(page));
        let own: Vec<_> = own.take(KERNEL_PAGES_MAX + 1).collect();
        if own.len() > KERNEL_PAGES_MAX {
            return Vec::new();
        }
        own
    }

    fn put_in_order(&mut self, mapping: Mapping) {
        for page in self.memory.pages(mapping.gpa, mapping.bytes) {
            if self.order.len() >= ORDER_MAX {
                return;
            }
            if self.in_order.insert(page) {
                self.order.push(page);
            }
        }
    }
}
