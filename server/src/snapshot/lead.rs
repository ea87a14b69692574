//! Which pages a machine will need first when it is resumed from its snapshot, as far as that shows while it is taken: what
//! its scout finds, and what it writes. They are the profile that a snapshot begins with.

use std::collections::HashSet;

use lazyvm_wire::{Layout, PageIndex, PageRange};

use super::format::PROFILE_PAGES_MAX;
use crate::port::{Hints, Scout, SourceMachine};

/// See the module.
pub(super) struct Lead {
    scout: Option<Box<dyn Scout>>,
    hints: Hints,
    /// What was written, the oldest first.
    written: Vec<PageRange>,
}

impl Lead {
    /// Begins to watch the machine, before its writes are tracked: what a scout drops from the machine's map would be taken
    /// for written.
    pub fn watch(machine: &dyn SourceMachine) -> Self {
        let mut scout = machine.scout();
        if let Some(found) = &mut scout
            && let Err(error) = found.watch()
        {
            tracing::warn!(%error, "can't watch what the VM uses; its first resume will wait for more pages");
            scout = None;
        }
        Self {
            scout,
            hints: Hints::default(),
            written: Vec::new(),
        }
    }

    /// Has the scout look at the running machine, once.
    pub fn look(&mut self) {
        if let Some(mut scout) = self.scout.take() {
            match scout.look() {
                Ok(hints) => self.hints = hints,
                Err(error) => {
                    tracing::warn!(%error, "can't find out what the VM uses; its first resume will wait for more pages");
                }
            }
        }
    }

    /// These pages were written, after all that were told before.
    pub fn written(&mut self, ranges: &[PageRange]) {
        self.written.extend_from_slice(ranges);
    }

    /// The pages, the first needed first.
    pub fn pages(self, layout: &Layout) -> Vec<PageIndex> {
        let Hints {
            tables,
            processor,
            code,
            hot,
            ..
        } = self.hints;
        let written = self.written.into_iter().rev();
        let ranges = [tables, processor].into_iter().flatten();
        let ranges = ranges.chain(written).chain(code).chain(hot);
        let mut seen = HashSet::new();
        ranges
            .map(|range| range.intersect(layout.range()))
            .flat_map(|range| range.pages())
            .filter(|&page| seen.insert(page))
            .take(PROFILE_PAGES_MAX)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_last_comes_first_and_each_page_once() {
        let range = |first, count| PageRange::new(PageIndex(first), count);
        let lead = Lead {
            scout: None,
            hints: Hints {
                tables: vec![range(9, 1)],
                hot: vec![range(0, 4), range(90, 100)],
                ..Hints::default()
            },
            written: vec![range(2, 1), range(5, 2), range(9, 1)],
        };
        let pages = lead.pages(&Layout::flat(92).unwrap());
        let pages: Vec<u64> = pages.into_iter().map(|page| page.0).collect();
        assert_eq!(pages, [9, 5, 6, 2, 0, 1, 3, 90, 91]);
    }
}
