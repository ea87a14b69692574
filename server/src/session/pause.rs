//! From the pause to the push: what is taken of the machine, and what goes first.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use lazyvm_quic::describe;
use lazyvm_wire::control::Switchover;
use lazyvm_wire::held;
use lazyvm_wire::{PageMap, PageMapError, PageRange};

use super::{Session, lock};
use crate::port::Hints;
use crate::scheduler::{Policy, PushScheduler, VirtualOrder};
use crate::trace::Trace;

/// What the pause gave.
#[derive(Clone)]
pub(crate) struct Paused {
    pub switchover: Arc<Switchover>,
    pub map: Arc<PageMap>,
    /// Where digests are wanted: the pages that are read for them. What was found zero ahead of the pause is among them, to be
    /// verified too.
    pub to_verify: Option<Arc<PageMap>>,
    /// The pages that the destination has already.
    pub held: Arc<PageMap>,
    /// When the machine began to stop.
    pub at: Instant,
}

/// What the last look gave.
#[derive(Debug, Default)]
pub(crate) struct Look {
    /// What goes first, in this order.
    pub lead: Vec<PageRange>,
    /// That was recorded, and is what the machine needs in that order.
    pub is_exact: bool,
    /// Which pages stand together in virtual memory.
    pub order: Arc<VirtualOrder>,
}

impl Session {
    /// Stops the machine, takes its state and finds its data. Blocks.
    pub fn pause(&self) -> Result<(), String> {
        let machine = &self.config.machine;
        machine
            .prepare_pause()
            .map_err(|error| describe(error.as_ref()))?;
        let at = Instant::now();
        let state = machine.pause().map_err(|error| describe(error.as_ref()))?;
        let paused = at.elapsed();
        let mut map = self.look_through().inspect_err(|_| self.resume())?;
        let looked = at.elapsed();
        let verify = self.verify.load(Ordering::Relaxed);
        let to_verify = verify.then(|| Arc::new(map.clone()));
        let mut runs = lock(&self.early).held(machine.memory().as_ref(), &mut map);
        self.counters
            .data
            .store(map.data_pages(), Ordering::Relaxed);
        if let Some(recorder) = &self.config.trace {
            let held = map_of(&map, &runs);
            recorder.paused(Trace::at_pause(&map, &held, state.len() as u64), at);
            runs.clear();
        }
        let (held, told) = held::encode(&runs);
        runs.truncate(told);
        let switchover = Switchover {
            state,
            page_map: map.encode(),
            held,
            wait: self.config.mode.waits(),
        };
        let held = map_of(&map, &runs);
        tracing::debug!(
            session = %self.id,
            state_us = paused.as_micros() as u64,
            map_us = (looked - paused).as_micros() as u64,
            held_us = (at.elapsed() - looked).as_micros() as u64,
            data_pages = map.data_pages(),
            held_pages = held.data_pages(),
            residual_pages = lock(&self.residual).len(),
            "the machine is paused"
        );
        *lock(&self.paused) = Some(Paused {
            switchover: Arc::new(switchover),
            map: Arc::new(map),
            to_verify,
            held: Arc::new(held),
            at,
        });
        Ok(())
    }

    /// Takes in the last writes and finds what holds data, both at once: the machine stands still meanwhile.
    fn look_through(&self) -> Result<PageMap, String> {
        std::thread::scope(|scope| {
            let map = scope.spawn(|| self.page_map());
            self.last_writes();
            map.join().unwrap_or_else(|_| {
                Err("the search for data in the machine's memory has failed".to_owned())
            })
        })
    }

    fn page_map(&self) -> Result<PageMap, String> {
        let layout = self.config.machine.layout();
        let mut map = PageMap::zeroed(layout.pages());
        self.find_data(&mut |range| map.set_data(range))?;
        map.round_to_units(layout);
        Ok(map)
    }

    pub(super) fn find_data(&self, data: &mut dyn FnMut(PageRange)) -> Result<(), String> {
        let memory = self.config.machine.memory();
        memory
            .data_runs(data)
            .map_err(|error| format!("can't find the data in the machine's memory: {error}"))
    }

    /// What the paused machine needs first. Blocks.
    pub fn last_look(self: &Arc<Self>) -> Look {
        if let Some(profile) = &self.profile {
            return Look {
                lead: profile.lead(),
                is_exact: true,
                ..Look::default()
            };
        }
        let hints = self.look_paused();
        if let Some(recorder) = &self.config.trace {
            recorder.hints(&hints);
            let session = Arc::clone(self);
            recorder.write_later(move || {
                if let Some(paused) = session.paused() {
                    session.begin_push_of(&paused, &Look::default());
                }
            });
        }
        let residual = self.take_residual();
        Look {
            is_exact: false,
            order: Arc::new(VirtualOrder::new(&hints.virtual_order)),
            lead: Policy::lead(&hints, &residual),
        }
    }

    fn look_paused(&self) -> Hints {
        let Some(scout) = &mut *lock(&self.scout) else {
            return Hints::default();
        };
        let hints = scout.look_paused().unwrap_or_else(|error| {
            let error = describe(error.as_ref());
            tracing::warn!(session = %self.id, %error, "can't find out what the machine needs first; the push goes from front to back");
            Hints::default()
        });
        self.config.policy.keep(hints)
    }

    /// Begins the push of all data pages that the destination does not have, these first.
    pub fn begin_first_push(&self, paused: &Paused, look: &Look) {
        // The recorder begins it when it is done; a machine that was refused meanwhile runs here.
        if self.config.trace.is_none() && self.serves_pages() {
            self.begin_push_of(paused, look);
        }
    }

    fn begin_push_of(&self, paused: &Paused, look: &Look) {
        let mut missing = paused.map.bits().to_bitvec();
        // What was on its way when a connection was lost may be held and yet not be there.
        if !lock(&self.early).is_void() {
            missing &= !paused.held.bits().to_bitvec();
        }
        self.begin_push(&PageMap::from_bits(missing), look);
    }

    fn begin_push(&self, map: &PageMap, look: &Look) {
        if !self.config.push {
            return;
        }
        let mut push = PushScheduler::new(map, self.config.machine.layout().clone());
        push.lead_with(look.lead.iter().copied());
        if look.is_exact {
            push.trust_lead();
        }
        push.order_by(look.order.clone());
        push.choose(self.config.policy.neighbours);
        *lock(&self.push) = Some(push);
        self.push_wake.notify_waiters();
    }

    /// Begins the push anew, with the pages that a destination which came back says are missing there.
    pub fn push_missing(&self, missing: &[u8]) -> Result<(), PageMapError> {
        let missing = PageMap::decode(missing, self.config.machine.layout().pages())?;
        if self.serves_pages() {
            let order = lock(&self.push).as_ref().map(|push| push.order().clone());
            let order = order.unwrap_or_default();
            let look = Look {
                order,
                ..Look::default()
            };
            self.begin_push(&missing, &look);
        }
        Ok(())
    }
}

/// A bit for each page of these runs, as many as the image has.
fn map_of(image: &PageMap, runs: &[held::HeldRun]) -> PageMap {
    let mut map = PageMap::zeroed(image.bits().len() as u64);
    for run in runs {
        map.set_data(run.range);
    }
    map
}
