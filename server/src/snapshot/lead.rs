//! Which pages a machine will need first when it is resumed from its snapshot, as far as that shows while it is taken. They
//! are the profile that a snapshot begins with.
//!
//! The machine itself goes on from the very pause that a clone goes on from, so the best hint is what it does right after
//! that. It is looked at at short intervals then, which tells in what order it uses its pages: by its scout, or, where it has
//! none, by the tracker of its writes.

use std::collections::HashSet;
use std::thread;
use std::time::Duration;

use lazyvm_wire::{Layout, PageIndex, PageRange};

use super::format::PROFILE_PAGES_MAX;
use crate::port::{DirtyTracker, Hints, Scout, SourceMachine};

/// When a machine that runs on is looked at: after this long each time.
const WATCHED_ON: [Duration; 8] = [
    Duration::from_millis(5),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
    Duration::from_millis(160),
    Duration::from_millis(320),
];

/// Where a machine that no scout looks at has its tables and its first code, most likely: 2.25 MiB, of which pages of zeros
/// cost nothing.
const LOW_MEMORY: PageRange = PageRange {
    first: PageIndex(0),
    count: 576,
};

/// See the module.
pub(super) struct Lead {
    scout: Option<Box<dyn Scout>>,
    hints: Hints,
    /// What was written up to the pause, the oldest first.
    written: Vec<PageRange>,
    /// What was used after it, the oldest first.
    after: Vec<PageRange>,
}

impl Lead {
    /// Of this machine.
    pub fn new(machine: &dyn SourceMachine) -> Self {
        let scout = machine.scout();
        let tables = match &scout {
            Some(_) => Vec::new(),
            None => vec![LOW_MEMORY],
        };
        Self {
            scout,
            hints: Hints {
                tables,
                ..Hints::default()
            },
            written: Vec::new(),
            after: Vec::new(),
        }
    }

    /// Whether what the machine uses is to be seen without a tracker. With one it is not: that marks every page of the
    /// machine's map as used.
    pub fn has_scout(&self) -> bool {
        self.scout.is_some()
    }

    /// Has the scout look at the running machine.
    pub fn look(&mut self) {
        let Some(scout) = &mut self.scout else {
            return;
        };
        match scout.look() {
            Ok(hints) => self.hints = hints,
            Err(error) => {
                tracing::warn!(%error, "can't find out what the VM uses; its first resume will wait for more pages");
                self.scout = None;
            }
        }
    }

    /// The paused machine runs on next: what it touches from then on is to be seen.
    pub fn runs_on_next(&mut self) {
        if let Some(scout) = &mut self.scout
            && let Err(error) = scout.watch()
        {
            tracing::debug!(%error, "not known what the VM uses after the pause");
            self.scout = None;
        }
    }

    /// Hears what the machine uses right after the pause, as its clones will; what it writes, where there is no scout.
    pub fn watch_on(&mut self, mut tracker: Option<&mut dyn DirtyTracker>) {
        for time in WATCHED_ON {
            thread::sleep(time);
            if self.scout.is_some() {
                self.look();
                self.after.extend_from_slice(&self.hints.hot);
            } else if let Some(tracker) = &mut tracker
                && let Err(error) = tracker.collect(&mut |range| self.after.push(range))
            {
                tracing::debug!(%error, "not known what the VM writes after the pause");
                return;
            }
        }
    }

    /// These pages were written up to the pause, after all that were told before.
    pub fn written(&mut self, ranges: &[PageRange]) {
        self.written.extend_from_slice(ranges);
    }

    /// The pages, the first needed first.
    pub fn pages(self, layout: &Layout) -> Vec<PageIndex> {
        let Hints {
            tables,
            processor,
            code,
            ..
        } = self.hints;
        let written = self.written.into_iter().rev();
        let ranges = tables.into_iter().chain(self.after).chain(processor);
        let ranges = ranges.chain(code).chain(written);
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
    fn what_was_written_right_after_the_pause_comes_first_and_each_page_once() {
        let range = |first, count| PageRange::new(PageIndex(first), count);
        let lead = Lead {
            scout: None,
            hints: Hints {
                tables: vec![range(9, 1)],
                code: vec![range(0, 4), range(90, 100)],
                ..Hints::default()
            },
            written: vec![range(2, 1), range(5, 2), range(9, 1)],
            after: vec![range(8, 1), range(7, 1)],
        };
        let pages = lead.pages(&Layout::flat(92).unwrap());
        let pages: Vec<u64> = pages.into_iter().map(|page| page.0).collect();
        assert_eq!(pages, [9, 8, 7, 0, 1, 2, 3, 90, 91, 5, 6]);
    }
}
