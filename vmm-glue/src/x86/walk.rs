//! Page tables: a bounded walk over all of a tree, and the way down to one address.
//!
//! A table that was visited is not visited again, neither by another way nor from another address space: kernels map the
//! same tables many times over (Linux does for the stacks of `espfix`, Windows maps the top-level table into itself), and
//! a damaged tree may be a circle. So a walk reads each table once per level at most, and [`Bounds`] limit the number.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::guest::{ENTRIES, GuestMemory, Table};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Where an entry points to.
pub(super) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Most tables that [`Tables`] keeps: 16 MiB.
const TABLES_KEPT: usize = 4096;

/// How deep the tree is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Levels {
    /// 48-bit addresses.
    Four,
    /// 57-bit addresses.
    Five,
}

impl Levels {
    /// As a number.
    pub const fn count(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }
}

/// An address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Paging {
    /// Guest-physical address of the top-level table.
    pub root: u64,
    /// How deep it is.
    pub levels: Levels,
}

/// A page that is mapped, of any size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Where, sign-extended.
    pub virt: u64,
    /// What.
    pub gpa: u64,
    /// 4 KiB, 2 MiB or 1 GiB.
    pub bytes: u64,
    /// User programs may use it.
    pub user: bool,
    /// It may be written.
    pub writable: bool,
    /// It may be executed.
    pub executable: bool,
    /// It was used since somebody cleared the bit.
    pub accessed: bool,
    /// It was written since somebody cleared the bit.
    pub dirty: bool,
}

/// What a walk comes across.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// A table, and its level: 1 maps 4 KiB pages.
    Table {
        /// Where it is.
        gpa: u64,
        /// How high.
        level: u8,
    },
    /// A page, in ascending order of virtual addresses.
    Mapping(Mapping),
}

/// What ends a walk that would take too long.
#[derive(Clone, Copy)]
pub struct Bounds<'a> {
    /// Most tables that are read.
    pub tables: usize,
    /// Asked for each table; the walk ends when it says no.
    pub go_on: &'a dyn Fn() -> bool,
}

/// Walks over address spaces, each table once.
pub struct Walker<'a> {
    memory: &'a GuestMemory,
    bounds: Bounds<'a>,
    visited: HashSet<(u64, u8)>,
    ended: bool,
}

/// What the levels above allow, and where they are.
#[derive(Clone, Copy)]
struct Above {
    virt: u64,
    user: bool,
    writable: bool,
    executable: bool,
}

impl<'a> Walker<'a> {
    /// Over this memory.
    pub fn new(memory: &'a GuestMemory, bounds: Bounds<'a>) -> Self {
        Self {
            memory,
            bounds,
            visited: HashSet::new(),
            ended: false,
        }
    }

    /// Whether a bound has ended a walk: what it told is not all.
    pub fn was_ended(&self) -> bool {
        self.ended
    }

    /// Tells the tables of `space` under the entries `top` of its top-level table, and what they map.
    pub fn walk(&mut self, space: Paging, top: Range<usize>, found: &mut dyn FnMut(Found)) {
        let above = Above {
            virt: 0,
            user: true,
            writable: true,
            executable: true,
        };
        let level = space.levels.count();
        // The same table may be walked in two halves.
        let first = self.visited.insert((space.root, level));
        let Some(table) = self.read(space.root) else {
            return;
        };
        if first {
            let gpa = space.root;
            found(Found::Table { gpa, level });
        }
        self.entries(&table, level, above, top, space.levels, found);
    }

    fn read(&mut self, gpa: u64) -> Option<Table> {
        if self.ended || self.bounds.tables == 0 || !(self.bounds.go_on)() {
            self.ended = true;
            return None;
        }
        self.bounds.tables -= 1;
        self.memory.table(gpa)
    }

    fn entries(
        &mut self,
        table: &Table,
        level: u8,
        above: Above,
        range: Range<usize>,
        levels: Levels,
        found: &mut dyn FnMut(Found),
    ) {
        for index in range.start..range.end.min(ENTRIES) {
            let Some(step) = step(table, index, level, above, levels) else {
                continue;
            };
            match step {
                Step::Page(mapping) => found(Found::Mapping(mapping)),
                Step::Down(gpa, above) => {
                    let level = level - 1;
                    if !self.visited.insert((gpa, level)) {
                        continue;
                    }
                    let Some(table) = self.read(gpa) else {
                        continue;
                    };
                    found(Found::Table { gpa, level });
                    self.entries(&table, level, above, 0..ENTRIES, levels, found);
                }
            }
            if self.ended {
                return;
            }
        }
    }
}

enum Step {
    Page(Mapping),
    Down(u64, Above),
}

/// What an entry says; `None` where nothing is mapped.
fn step(table: &Table, index: usize, level: u8, above: Above, levels: Levels) -> Option<Step> {
    let entry = *table.get(index)?;
    if entry & PRESENT == 0 {
        return None;
    }
    let shift = 12 + 9 * u32::from(level - 1);
    let virt = above.virt | (index as u64) << shift;
    let below = Above {
        virt,
        user: above.user && entry & USER != 0,
        writable: above.writable && entry & WRITABLE != 0,
        executable: above.executable && entry & NO_EXECUTE == 0,
    };
    match (level, entry & LARGE != 0) {
        (1, _) | (2 | 3, true) => {
            let bytes = 1 << shift;
            Some(Step::Page(Mapping {
                virt: sign_extended(virt, levels),
                // Bit 12 is no address bit in a large page's entry.
                gpa: entry & ADDRESS & !(bytes - 1),
                bytes,
                user: below.user,
                writable: below.writable,
                executable: below.executable,
                accessed: entry & ACCESSED != 0,
                dirty: entry & DIRTY != 0,
            }))
        }
        (_, false) => Some(Step::Down(entry & ADDRESS, below)),
        // Reserved.
        (_, true) => None,
    }
}

fn sign_extended(virt: u64, levels: Levels) -> u64 {
    let unused = 64 - (12 + 9 * u32::from(levels.count()));
    ((virt << unused) as i64 >> unused) as u64
}

/// Tables on the way to addresses, each read once; for some thousands of addresses of a machine that stands still.
pub struct Tables<'a> {
    memory: &'a GuestMemory,
    read: HashMap<u64, Option<Box<Table>>>,
    order: Vec<u64>,
}

impl<'a> Tables<'a> {
    /// Of this memory.
    pub fn new(memory: &'a GuestMemory) -> Self {
        Self {
            memory,
            read: HashMap::new(),
            order: Vec::new(),
        }
    }

    /// Guest-physical addresses of the tables on all ways so far, in the order of their first use.
    pub fn order(&self) -> &[u64] {
        &self.order
    }

    /// The page at a virtual address.
    pub fn translate(&mut self, space: Paging, virt: u64) -> Option<Mapping> {
        if sign_extended(virt, space.levels) != virt {
            return None;
        }
        let mut gpa = space.root;
        let mut above = Above {
            virt: 0,
            user: true,
            writable: true,
            executable: true,
        };
        for level in (1..=space.levels.count()).rev() {
            let index = (virt >> (12 + 9 * u32::from(level - 1))) as usize % ENTRIES;
            match step(self.table(gpa)?, index, level, above, space.levels)? {
                Step::Page(mapping) => return Some(mapping),
                Step::Down(next, below) => (gpa, above) = (next, below),
            }
        }
        None
    }

    fn table(&mut self, gpa: u64) -> Option<&Table> {
        if self.read.len() >= TABLES_KEPT && !self.read.contains_key(&gpa) {
            return None;
        }
        let (memory, order) = (self.memory, &mut self.order);
        let table = self.read.entry(gpa).or_insert_with(|| {
            let table = memory.table(gpa).map(Box::new);
            if table.is_some() {
                order.push(gpa);
            }
            table
        });
        table.as_deref()
    }
}
