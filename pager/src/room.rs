//! Whether there is room for what comes before the memory it is for.

use std::fs;
use std::sync::Arc;

use lazyvm_wire::{Backing, Layout, PAGE_SHIFT};

use crate::install::Shelf;

/// A [`Shelf`] for the memory of this layout, where there is room.
///
/// A page that is put in place is taken off the shelf, so both together take little more than the memory alone. But huge
/// pages are taken from a pool that nothing else can use, and what lies on the shelf takes ordinary memory besides.
pub(crate) fn shelf_for(layout: &Layout) -> Option<Arc<Shelf>> {
    let huge = layout
        .regions()
        .iter()
        .filter(|region| region.backing == Backing::Huge2M);
    let needed = huge.map(|region| region.pages << PAGE_SHIFT).sum::<u64>();
    // Not told anywhere but on Linux with /proc, where everything else works too.
    let available = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available_in(&text))
        .unwrap_or(0);
    if needed > 0 && !fits(needed, available) {
        tracing::warn!(
            needed_mib = needed >> 20,
            available_mib = available >> 20,
            "the VM's memory is in huge pages, and what comes before the pause takes as much ordinary memory besides, for which \
             there is no room: nothing comes before the pause"
        );
        return None;
    }
    Shelf::new(layout.pages())
        .inspect_err(|error| {
            tracing::warn!(%error, "no room for pages that come before the machine");
        })
        .ok()
        .map(Arc::new)
}

/// An eighth is left to others.
fn fits(needed: u64, available: u64) -> bool {
    needed <= available - available / 8
}

/// Bytes that may be taken without anything being swapped out (`proc_meminfo(5)`).
fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::Region;

    use super::*;

    #[test]
    fn what_is_available_is_read() {
        let text = "MemTotal:       24684264 kB\nMemFree: 1 kB\nMemAvailable:   21795136 kB\nBuffers: 3 kB\n";
        assert_eq!(available_in(text), Some(21_795_136 * 1024));
        for text in [
            "",
            "MemAvailable: x kB",
            "MemAvailable: 7",
            "MemAvailable: 99999999999999999 kB",
        ] {
            assert_eq!(available_in(text), None);
        }
        let this = fs::read_to_string("/proc/meminfo").unwrap();
        assert!(available_in(&this).unwrap() > 1 << 20);
    }

    #[test]
    fn a_shelf_for_huge_pages_leaves_something_to_others() {
        assert!(fits(7 << 30, 8 << 30));
        assert!(!fits((7 << 30) + 1, 8 << 30));
        let layout = |pages| {
            let region = Region {
                name: "memory".to_owned(),
                gpa: None,
                pages,
                backing: Backing::Huge2M,
            };
            Layout::new(vec![region]).unwrap()
        };
        assert!(shelf_for(&layout(512)).is_some());
        // 1 TiB.
        assert!(shelf_for(&layout(1 << 28)).is_none());
    }
}
