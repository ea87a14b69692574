//! Which pages a machine will need first when it is resumed from its snapshot, as far as that shows while it is taken. They
//! are the profile that a snapshot begins with.
//!
//! The machine itself goes on from the very pause that a clone goes on from, so the best hint is what it does right after
//! that. It is looked at at short intervals then, which tells in what order it uses its pages: by its scout, or, where it has
//! none, by the tracker of its writes.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use lazyvm_wire::{Layout, PageIndex, PageRange};

use super::format::PROFILE_PAGES_MAX;
use crate::port::{DirtyTracker, Hints, Scout, SourceMachine};

/// The first moments, and how often is asked in them what the machine uses: what it uses until its next sign of life is to be
/// told from what it uses behind that.
const AT_ONCE: Duration = Duration::from_millis(12);
const GLANCE_EVERY: Duration = Duration::from_millis(1);

/// When it is looked at behind them: after this long each time.
const WATCHED_ON: [Duration; 7] = [
    Duration::ZERO,
    Duration::from_millis(8),
    Duration::from_millis(20),
    Duration::from_millis(40),
    Duration::from_millis(80),
    Duration::from_millis(160),
    Duration::from_millis(320),
];

/// Pages of code among what is used at once that show that code is seen where it runs.
const CODE_IS_SEEN: usize = 16;

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
    /// What was used in the first moments after it, and behind those; the oldest first.
    at_once: Vec<PageRange>,
    later: Vec<PageRange>,
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
            at_once: Vec::new(),
            later: Vec::new(),
        }
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

    /// Has the scout forget what the running machine has used so far. It does so once more when the machine stands still,
    /// and has little to forget then.
    pub fn forget_ahead(&mut self) {
        self.forget();
    }

    /// The paused machine runs on next: what it touches from then on is to be seen.
    pub fn runs_on_next(&mut self) {
        self.forget();
    }

    fn forget(&mut self) {
        if let Some(scout) = &mut self.scout
            && let Err(error) = scout.watch()
        {
            tracing::debug!(%error, "not known what the VM uses after the pause");
            self.scout = None;
        }
    }

    /// Hears what the machine uses right after the pause, as its clones will; what it writes, where there is no scout.
    pub fn watch_on(&mut self, mut tracker: Option<&mut dyn DirtyTracker>) {
        let start = Instant::now();
        while start.elapsed() < AT_ONCE {
            thread::sleep(GLANCE_EVERY);
            if let Some(scout) = &mut self.scout
                && let Err(error) = scout.glance()
            {
                tracing::debug!(%error, "not known what the VM uses right after the pause");
                break;
            }
        }
        for time in WATCHED_ON {
            thread::sleep(time);
            let mut used = Vec::new();
            if self.scout.is_some() {
                self.look();
                used.extend_from_slice(&self.hints.hot);
            } else if let Some(tracker) = &mut tracker
                && let Err(error) = tracker.collect(&mut |range| used.push(range))
            {
                tracing::debug!(%error, "not known what the VM writes after the pause");
                return;
            }
            let is_first = self.at_once.is_empty();
            let list = if is_first {
                &mut self.at_once
            } else {
                &mut self.later
            };
            list.append(&mut used);
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
        let pages = |ranges: Vec<PageRange>| -> Vec<PageIndex> {
            let within = ranges
                .into_iter()
                .map(|range| range.intersect(layout.range()));
            within.flat_map(|range| range.pages()).collect()
        };
        let at_once = pages(self.at_once);
        let written = pages(self.written.into_iter().rev().collect());
        let used = used_at_once(at_once, pages(code));
        let parts = [pages(tables), pages(processor), used, pages(self.later)];
        let mut seen = HashSet::new();
        parts
            .into_iter()
            .chain([written])
            .flatten()
            .filter(|&page| seen.insert(page))
            .take(PROFILE_PAGES_MAX)
            .collect()
    }
}

/// What was seen to be used at once, and the code that was ever used. Where some of that was seen, all that is needed was, and
/// the other code waits. Where none was (a machine that is emulated reads code once, when it translates it), it is needed as
/// soon as the rest: both come to their end together, since neither alone is of use.
fn used_at_once(seen: Vec<PageIndex>, code: Vec<PageIndex>) -> Vec<PageIndex> {
    let is_code: HashSet<_> = code.iter().collect();
    if seen.iter().filter(|page| is_code.contains(page)).count() >= CODE_IS_SEEN {
        return [seen, code].concat();
    }
    let every = code.len().div_ceil(seen.len().max(1)).max(1);
    let mut code = code.chunks(every);
    let mut both = Vec::new();
    for page in seen {
        both.push(page);
        both.extend_from_slice(code.next().unwrap_or_default());
    }
    both.extend(code.flatten());
    both
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(first), count)
    }

    fn numbers(pages: Vec<PageIndex>) -> Vec<u64> {
        pages.into_iter().map(|page| page.0).collect()
    }

    #[test]
    fn what_is_used_right_after_the_pause_comes_first_and_each_page_once() {
        let lead = Lead {
            scout: None,
            hints: Hints {
                tables: vec![range(9, 1)],
                code: vec![range(0, 4), range(90, 100)],
                ..Hints::default()
            },
            written: vec![range(2, 1), range(5, 2), range(9, 1)],
            at_once: vec![range(8, 1), range(7, 1)],
            later: vec![range(8, 1), range(1, 1), range(6, 1)],
        };
        let pages = lead.pages(&Layout::flat(92).unwrap());
        assert_eq!(numbers(pages), [9, 8, 0, 1, 2, 7, 3, 90, 91, 6, 5]);
    }

    #[test]
    fn code_that_was_not_seen_waits_where_code_is_seen() {
        let pages = |range: PageRange| range.pages().collect::<Vec<_>>();
        let seen = pages(range(10, CODE_IS_SEEN as u64));
        let all = used_at_once(seen.clone(), pages(range(0, 30)));
        assert_eq!(all[..seen.len()], seen);
        let few = used_at_once(pages(range(29, 2)), pages(range(0, 30)));
        assert_eq!(numbers(few[..3].to_vec()), [29, 0, 1]);
        assert_eq!(few.len(), 32);
        assert_eq!(used_at_once(Vec::new(), pages(range(0, 3))).len(), 3);
    }
}
