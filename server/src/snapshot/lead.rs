//! Which pages a machine will need first when it is resumed from its snapshot, as far as that shows while it is taken. They
//! are the profile that a snapshot begins with.
//!
//! The machine itself goes on from the very pause that a clone goes on from, so the best hint is what it does right after
//! that. For the first moments each page is recorded when it touches it. Then it is looked at at short intervals, by its scout, or,
//! where it has none, by the tracker of its writes.

use std::collections::HashSet;
use std::thread;
use std::time::Duration;

use lazyvm_wire::{Layout, PageIndex, PageRange};

use super::format::PROFILE_PAGES_MAX;
use super::take::SMALL_PAGES;
use crate::port::{DirtyTracker, Hints, Scout, SourceMachine, TouchRecorder};

/// For how long each page that the machine touches is recorded, although it is held up at each page: long enough for what its
/// timers wake. The slowest that was seen in every clone, Linux's watchdog of its clocks, comes twice a second.
const RECORDED: Duration = Duration::from_millis(600);

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

/// Pages that were seen to be used, to each that may be.
const SEEN_TURN: usize = 16;

/// Pages of code that go ahead of the machine's work, whether they were seen to be used or not.
const CODE_AHEAD: usize = 384;

/// Where a machine that no scout looks at has its tables and its first code, most likely: 2.25 MiB, of which pages of zeros
/// cost nothing.
const LOW_MEMORY: PageRange = PageRange {
    first: PageIndex(0),
    count: 576,
};

/// See the module.
pub(super) struct Lead {
    scout: Option<Box<dyn Scout>>,
    recorder: Option<Box<dyn TouchRecorder>>,
    hints: Hints,
    /// What was written up to the pause, the oldest first.
    written: Vec<PageRange>,
    /// What the look behind the first pass showed: what was hot, and of that what is the system's.
    before: Hints,
    /// What was used in the first moments after the pause, and behind those; the oldest first.
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
        let is_large = machine.layout().pages() > SMALL_PAGES;
        Self {
            recorder: scout
                .as_ref()
                .filter(|_| is_large)
                .and_then(|_| machine.recorder()),
            scout,
            hints: Hints {
                tables,
                ..Hints::default()
            },
            written: Vec::new(),
            before: Hints::default(),
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

    /// Whether it is to be recorded what the machine touches, with no tracker noting its writes meanwhile.
    pub fn records(&self) -> bool {
        self.recorder.is_some()
    }

    /// The paused machine runs on next: what it touches from then on is to be seen.
    pub fn runs_on_next(&mut self) {
        // No more than that while the machine stands still.
        self.before = Hints {
            processor: self.hints.processor.clone(),
            code: self.hints.code.clone(),
            hot: std::mem::take(&mut self.hints.hot),
            ..Hints::default()
        };
        self.forget();
        if let Some(recorder) = &mut self.recorder
            && let Err(error) = recorder.start()
        {
            tracing::debug!(%error, "not known in what order the VM touches its pages");
            self.recorder = None;
        }
    }

    fn forget(&mut self) {
        if let Some(scout) = &mut self.scout
            && let Err(error) = scout.watch()
        {
            tracing::debug!(%error, "not known what the VM uses after the pause");
            self.scout = None;
            self.recorder = None;
        }
    }

    /// Hears what the machine uses right after the pause, as its clones will; what it writes, where there is no scout.
    pub fn watch_on(&mut self, mut tracker: Option<&mut dyn DirtyTracker>) {
        if let Some(mut recorder) = self.recorder.take() {
            thread::sleep(RECORDED);
            let pages = recorder.stop();
            tracing::debug!(
                pages = pages.len(),
                "touched in the first moments after the pause"
            );
            self.at_once
                .extend(pages.into_iter().map(|page| PageRange::new(page, 1)));
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
        let (processor, code) = (pages(processor), pages(code));
        let system = of_the_system(&at_once, &processor, &code);
        let before = of_the_system(
            &pages(self.before.hot),
            &pages(self.before.processor),
            &pages(self.before.code),
        );
        let code_ahead = code.iter().copied().take(CODE_AHEAD).collect();
        let parts = [
            pages(tables),
            system,
            before,
            code_ahead,
            in_turns(at_once, processor, code),
            pages(self.later),
        ];
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

/// Of what was seen to be used, what is the operating system's and code, in the same order. A clone that waits for its pages
/// falls behind in its work, but not in time: timers come due as early as they did in the VM, when it has done a tenth of the work that
/// the VM had done by then. So what they need goes ahead of all work. It is little.
fn of_the_system(
    seen: &[PageIndex],
    processor: &[PageIndex],
    code: &[PageIndex],
) -> Vec<PageIndex> {
    let known: HashSet<_> = processor.iter().chain(code).collect();
    let known = seen.iter().filter(|page| known.contains(page));
    known.copied().collect()
}

/// What was seen to be used at once, what the processors point to, and the code that was ever used, in turns. What was seen is what
/// a clone needs, but no clone runs as its VM did, and what else it needs is among the others. Pages that stand ahead of all this
/// have their turns too, so that at first nearly all is what was seen.
fn in_turns(
    seen: Vec<PageIndex>,
    processor: Vec<PageIndex>,
    code: Vec<PageIndex>,
) -> Vec<PageIndex> {
    let mut lists = [
        (seen.into_iter(), SEEN_TURN),
        (processor.into_iter(), 1),
        (code.into_iter(), 1),
    ];
    let mut all = Vec::new();
    loop {
        let before = all.len();
        for (list, count) in &mut lists {
            all.extend(list.take(*count));
        }
        if all.len() == before {
            return all;
        }
    }
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
    fn what_is_used_right_after_the_pause_comes_before_all_else_and_each_page_once() {
        let lead = Lead {
            scout: None,
            recorder: None,
            hints: Hints {
                tables: vec![range(9, 1)],
                processor: vec![range(0, 4), range(90, 100)],
                ..Hints::default()
            },
            before: Hints::default(),
            written: vec![range(2, 1), range(5, 2), range(9, 1)],
            at_once: vec![range(8, 1), range(7, 1)],
            later: vec![range(8, 1), range(1, 1), range(6, 1)],
        };
        let pages = lead.pages(&Layout::flat(92).unwrap());
        assert_eq!(numbers(pages), [9, 8, 7, 0, 1, 2, 3, 90, 91, 6, 5]);
    }

    #[test]
    fn what_was_seen_of_the_system_and_code_go_ahead_of_all_work() {
        let lead = Lead {
            scout: None,
            recorder: None,
            hints: Hints {
                tables: vec![range(9, 1)],
                processor: vec![range(30, 2)],
                code: vec![range(3, 2)],
                ..Hints::default()
            },
            before: Hints {
                processor: vec![range(4, 1), range(60, 1)],
                code: vec![range(40, 60)],
                hot: vec![range(0, 41), range(92, 1)],
                ..Hints::default()
            },
            written: Vec::new(),
            at_once: [50, 31, 51, 4, 9].map(|page| range(page, 1)).to_vec(),
            later: Vec::new(),
        };
        let pages = lead.pages(&Layout::flat(92).unwrap());
        assert_eq!(numbers(pages), [9, 31, 4, 40, 3, 50, 51, 30]);
    }

    #[test]
    fn what_was_seen_and_what_may_be_needed_take_turns() {
        let pages = |range: PageRange| range.pages().collect::<Vec<_>>();
        let (seen, processor, code) = (range(10, 20), range(100, 2), range(0, 4));
        let all = in_turns(pages(seen), pages(processor), pages(code));
        let expected = (10..26).chain([100, 0, 26, 27, 28, 29, 101, 1, 2, 3]);
        assert_eq!(numbers(all), expected.collect::<Vec<_>>());
        assert_eq!(in_turns(Vec::new(), Vec::new(), pages(code)), pages(code));
    }
}
