//! Several looks at one machine, put together.

use std::time::{Duration, Instant};

use lazyvm_server::port::{Hints, MachineError};
use lazyvm_wire::PageRange;

use super::guest::GuestMemory;
use super::pages::PageList;
use super::registers::Vcpu;
use super::resume_set::{Known, resume_set};
use super::spaces::{AddressSpace, find_spaces, keep_live};
use super::walk::Bounds;

/// Most page tables that are read in a look: those of 16 GiB in small pages.
const TABLES_MAX: usize = 16 * 1024;

/// How long a look at the running guest may take, and one at a guest that stands still.
const LOOK_TIME: Duration = Duration::from_millis(500);
const PAUSED_TIME: Duration = Duration::from_millis(5);

/// Tells which pages were touched since the machine's map was dropped, ascending.
pub type Touched<'a> = dyn FnMut() -> Result<Vec<PageRange>, MachineError> + 'a;

/// What looks at a machine have given so far.
///
/// Who is touched often is touched soon: what an earlier look found touched is hotter than what only a later one did. So
/// each look asks several times, and the touched pages stay in the order in which they showed.
#[derive(Debug)]
pub struct Looks {
    memory: GuestMemory,
    /// Address spaces besides the current ones: looked for once, since that reads all memory.
    spaces: Option<Vec<AddressSpace>>,
    /// Touched since the watch began, the first first; `None` without a watch.
    touched: Option<PageList>,
    last: Hints,
}

impl Looks {
    /// At the machine with this memory.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            spaces: None,
            touched: None,
            last: Hints::default(),
        }
    }

    /// The machine's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The map was dropped: what shows as touched from now on is.
    pub fn watch(&mut self) {
        self.touched = Some(PageList::new(self.memory.layout().pages()));
    }

    /// At the running machine, whose processors these are. `touched` is asked only where there is a watch. The virtual
    /// order, which is large, is told at the pause only.
    ///
    /// # Errors
    /// Those of `touched`.
    pub fn look(
        &mut self,
        vcpus: &[Vcpu],
        touched: &mut Touched<'_>,
    ) -> Result<Hints, MachineError> {
        // One at a time.
        self.last = Hints::default();
        self.last = self.find(vcpus, touched, LOOK_TIME, None)?;
        let virtual_order = std::mem::take(&mut self.last.virtual_order);
        let hints = self.last.clone();
        self.last.virtual_order = virtual_order;
        Ok(hints)
    }

    /// At the machine when it is paused: what is there now, and behind it what was there before.
    ///
    /// # Errors
    /// Those of `touched`.
    pub fn look_paused(
        &mut self,
        vcpus: &[Vcpu],
        touched: &mut Touched<'_>,
    ) -> Result<Hints, MachineError> {
        let last = std::mem::take(&mut self.last);
        let now = self.find(vcpus, touched, PAUSED_TIME, Some(&last.code))?;
        Ok(Hints {
            tables: [now.tables, last.tables].concat(),
            processor: [now.processor, last.processor].concat(),
            code: now.code,
            hot: now.hot,
            virtual_order: last.virtual_order,
        })
    }

    fn find(
        &mut self,
        vcpus: &[Vcpu],
        touched: &mut Touched<'_>,
        time: Duration,
        code: Option<&[PageRange]>,
    ) -> Result<Hints, MachineError> {
        let start = Instant::now();
        let go_on = || start.elapsed() < time;
        self.ask(touched)?;
        if let Some(paging) = vcpus.iter().find_map(Vcpu::paging) {
            let current = AddressSpace::of(&self.memory, paging);
            if self.spaces.is_none() {
                self.spaces = Some(find_spaces(&self.memory, current, &go_on));
                // Which took a while.
                self.ask(touched)?;
            } else if let Some(spaces) = &mut self.spaces {
                keep_live(&self.memory, current, spaces);
            }
        }
        let hot = self.touched.as_ref();
        let known = Known {
            spaces: self.spaces.as_deref().unwrap_or_default(),
            hot,
            rings: &[],
            code,
        };
        let bounds = Bounds {
            tables: TABLES_MAX,
            go_on: &go_on,
        };
        let hints = Hints {
            hot: self
                .touched
                .as_ref()
                .map_or_else(Vec::new, |list| list.ranges().to_vec()),
            ..resume_set(&self.memory, vcpus, known, bounds)
        };
        let pages = |ranges: &[PageRange]| ranges.iter().map(|range| range.count).sum::<u64>();
        tracing::debug!(
            us = start.elapsed().as_micros() as u64,
            spaces = known.spaces.len(),
            tables = pages(&hints.tables),
            processor = pages(&hints.processor),
            code = pages(&hints.code),
            hot = hot.map_or(0, |hot| hot.set().count()),
            "looked at what the guest uses"
        );
        Ok(hints)
    }

    fn ask(&mut self, touched: &mut Touched<'_>) -> Result<(), MachineError> {
        if let Some(list) = &mut self.touched {
            let ranges = touched()?;
            list.extend(ranges.iter().flat_map(|range| range.pages()));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use lazyvm_server::port::SourceMemory;
    use lazyvm_wire::{Layout, PageIndex};

    use super::*;

    struct Empty;

    impl SourceMemory for Empty {
        fn read(&self, _: PageRange, out: &mut [u8]) -> io::Result<()> {
            out.fill(0);
            Ok(())
        }

        fn data_runs(&self, _: &mut dyn FnMut(PageRange)) -> io::Result<()> {
            Ok(())
        }
    }

    fn range(first: u64, count: u64) -> PageRange {
        PageRange::new(PageIndex(first), count)
    }

    #[test]
    fn what_shows_first_is_hottest_and_a_new_watch_begins_again() {
        let layout = Layout::flat(100).unwrap();
        let mut looks = Looks::new(GuestMemory::new(layout, Arc::new(Empty)));
        let unasked = &mut || panic!("there is no watch");
        assert!(looks.look(&[], unasked).unwrap().hot.is_empty());
        looks.watch();
        let answers = [
            vec![range(50, 2)],
            vec![range(10, 1), range(49, 4)],
            vec![range(9, 2), range(49, 4)],
        ];
        let mut answers = answers.into_iter();
        let next = &mut || Ok(answers.next().unwrap());
        assert_eq!(looks.look(&[], next).unwrap().hot, [range(50, 2)]);
        let order = [range(50, 2), range(10, 1), range(49, 1), range(52, 1)];
        assert_eq!(looks.look(&[], next).unwrap().hot, order);
        let paused = looks.look_paused(&[], next).unwrap();
        assert_eq!(paused.hot, [&order[..], &[range(9, 1)]].concat());
        looks.watch();
        let hot = looks.look(&[], &mut || Ok(vec![range(3, 1)])).unwrap().hot;
        assert_eq!(hot, [range(3, 1)]);
    }
}
