use lazyvm_wire::{Backing, Region};
use proptest::prelude::*;

use super::*;

fn map(pages: u64, data: &[(u64, u64)]) -> PageMap {
    let mut map = PageMap::zeroed(pages);
    for &(first, count) in data {
        map.set_data(PageRange::new(PageIndex(first), count));
    }
    map
}

fn scheduler(map: &PageMap) -> PushScheduler {
    PushScheduler::new(map, Layout::flat(map.bits().len() as u64).unwrap())
}

#[test]
fn the_rest_goes_from_front_to_back_without_zero_pages() {
    let mut scheduler = scheduler(&map(100, &[(3, 5), (50, 2)]));
    let ranges: Vec<_> = std::iter::from_fn(|| scheduler.next(4))
        .map(|b| b.range)
        .collect();
    let run = |first, count| PageRange::new(PageIndex(first), count);
    assert_eq!(ranges, [run(3, 4), run(7, 1), run(50, 2)]);
}

#[test]
fn what_lies_around_a_fault_goes_first_and_the_newest_fault_leads() {
    let mut scheduler = scheduler(&map(1000, &[(0, 1000)]));
    scheduler.fault(PageRange::one(PageIndex(500)));
    scheduler.fault(PageRange::one(PageIndex(800)));
    let run = |first, count| PageRange::new(PageIndex(first), count);
    let mut next = || {
        let batch = scheduler.next(64).unwrap();
        (batch.urgency, batch.range)
    };
    for window in [run(801, 16), run(501, 16), run(784, 16), run(484, 16)] {
        assert_eq!(next(), (Urgency::Window, window));
    }
    assert_eq!(next(), (Urgency::Rest, run(0, 64)));
}

#[test]
fn what_of_the_lead_has_gone_counts_whatever_way_it_went() {
    let run = |first, count| PageRange::new(PageIndex(first), count);
    let mut scheduler = scheduler(&map(40, &[(0, 10), (20, 10)]));
    scheduler.choose(Neighbours {
        physical: false,
        virtual_: false,
    });
    scheduler.lead_with([run(20, 4), run(5, 10), run(25, 3)]);
    assert_eq!(scheduler.lead_gone(), Some(0));
    scheduler.next(2).unwrap();
    assert_eq!(scheduler.lead_gone(), Some(2));
    // The next two are gone another way, and of the second run a half holds nothing.
    scheduler.fault(run(22, 2));
    assert_eq!(scheduler.next(3).unwrap().range, run(5, 3));
    assert_eq!(scheduler.lead_gone(), Some(7));
    scheduler.next(3).unwrap();
    assert_eq!(scheduler.next(3).unwrap().range, run(25, 3));
    assert_eq!(scheduler.lead_gone(), None);
}

#[test]
fn a_recorded_lead_is_not_held_up_by_windows_but_they_have_their_share() {
    let mut scheduler = scheduler(&map(10_000, &[(0, 10_000)]));
    let lead = (0..400).map(|page| PageRange::one(PageIndex(9_999 - 2 * page)));
    scheduler.lead_with(lead);
    scheduler.trust_lead();
    for fault in 0..20 {
        scheduler.fault(PageRange::one(PageIndex(100 * fault)));
    }
    let batches: Vec<_> = std::iter::from_fn(|| scheduler.next(64)).collect();
    let at = |urgency| batches.iter().position(|batch| batch.urgency == urgency);
    assert_eq!(at(Urgency::Lead), Some(0));
    let last = batches.iter().rposition(|b| b.urgency == Urgency::Lead);
    let until = &batches[..=last.unwrap()];
    let pages = |urgency| -> u64 {
        let of = until.iter().filter(|batch| batch.urgency == urgency);
        of.map(|batch| batch.range.count).sum()
    };
    let (lead, windows) = (pages(Urgency::Lead), pages(Urgency::Window));
    assert_eq!(lead, 400);
    assert!(windows >= lead / 5 && windows <= lead / 3, "{windows}");
    assert_eq!(pages(Urgency::Rest), 0);
}

#[test]
fn a_page_of_a_recorded_lead_that_is_only_late_moves_nothing() {
    let mut scheduler = scheduler(&map(1000, &[(0, 1000)]));
    let run = |first, count| PageRange::new(PageIndex(first), count);
    scheduler.lead_with([run(500, 8), run(700, 8)]);
    scheduler.trust_lead();
    assert_eq!(scheduler.next(8).unwrap().range, run(500, 8));
    scheduler.fault(run(503, 1));
    assert_eq!(scheduler.next(8).unwrap().range, run(700, 8));
    assert_eq!(scheduler.next(8).unwrap().urgency, Urgency::Rest);
    // One that had not gone is another matter.
    scheduler.fault(run(300, 1));
    assert_eq!(scheduler.next(8).unwrap().urgency, Urgency::Window);
}

#[test]
fn neighbours_in_virtual_memory_go_wherever_they_are() {
    let mut scheduler = scheduler(&map(1000, &[(0, 1000)]));
    scheduler.choose(Neighbours {
        physical: false,
        virtual_: true,
    });
    let order: Vec<_> = [700, 701, 30, 500, 499].map(PageIndex).to_vec();
    scheduler.order_by(Arc::new(VirtualOrder::new(&order)));
    scheduler.fault(PageRange::one(PageIndex(30)));
    let windows: Vec<_> = std::iter::from_fn(|| scheduler.next(64))
        .take_while(|batch| batch.urgency == Urgency::Window)
        .map(|batch| (batch.range.first.0, batch.range.count))
        .collect();
    assert_eq!(windows, [(500, 1), (499, 1), (700, 2)]);
}

#[test]
fn a_fault_at_either_end_keeps_its_window_inside_the_image() {
    let mut scheduler = scheduler(&map(20, &[(0, 20)]));
    scheduler.fault(PageRange::one(PageIndex(0)));
    scheduler.fault(PageRange::one(PageIndex(19)));
    let mut sent = 2;
    while let Some(batch) = scheduler.next(3) {
        sent += batch.range.count;
    }
    assert_eq!(sent, 20);
}

#[test]
fn a_huge_page_goes_whole_and_not_together_with_small_ones() {
    let region = |name: &str, pages, backing| Region {
        name: name.to_owned(),
        gpa: None,
        pages,
        backing,
    };
    let layout = Layout::new(vec![
        region("low", 100, Backing::Small),
        region("huge", 1024, Backing::Huge2M),
    ])
    .unwrap();
    let mut scheduler = PushScheduler::new(&map(1124, &[(90, 20), (1000, 1)]), layout);
    scheduler.fault(PageRange::one(PageIndex(99)));
    let batches: Vec<_> = std::iter::from_fn(|| scheduler.next(64)).collect();
    let shape: Vec<_> = batches
        .iter()
        .map(|b| (b.range.first.0, b.range.count, b.whole))
        .collect();
    assert_eq!(shape, [(100, 512, true), (90, 9, false), (612, 512, true)]);
}

#[derive(Clone, Debug)]
enum Step {
    Fault(u64, u64),
    Next(u64),
}

fn steps(pages: u64) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0..pages, 1..600_u64).prop_map(|(first, count)| Step::Fault(first, count)),
        (1..64_u64).prop_map(Step::Next),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// Against a plain array: every data page goes out exactly once, no other page ever.
    #[test]
    fn each_data_page_goes_once(
        data in proptest::collection::vec((0..700_u64, 1..90_u64), 0..12),
        steps in steps(700),
        order in proptest::collection::vec(0..800_u64, 0..400),
    ) {
        let pages = 700;
        let map = map(pages, &data);
        let mut scheduler = scheduler(&map);
        let order: Vec<_> = order.into_iter().map(PageIndex).collect();
        scheduler.order_by(Arc::new(VirtualOrder::new(&order)));
        let mut model: Vec<bool> = map.bits().iter().by_vals().collect();
        let clip = |first: u64, count: u64| first as usize..(first + count).min(pages) as usize;
        for step in steps {
            match step {
                Step::Fault(first, count) => {
                    scheduler.fault(PageRange::new(PageIndex(first), count));
                    model[clip(first, count)].fill(false);
                }
                Step::Next(pages_max) => match scheduler.next(pages_max) {
                    Some(batch) => {
                        prop_assert!(batch.range.count >= 1 && batch.range.count <= pages_max);
                        for page in batch.range.pages() {
                            prop_assert!(std::mem::take(&mut model[page.as_usize()]));
                        }
                    }
                    None => prop_assert!(model.iter().all(|unsent| !unsent)),
                },
            }
            prop_assert_eq!(scheduler.remaining(), model.iter().filter(|unsent| **unsent).count() as u64);
        }
        while let Some(batch) = scheduler.next(64) {
            for page in batch.range.pages() {
                prop_assert!(std::mem::take(&mut model[page.as_usize()]));
            }
        }
        prop_assert!(model.iter().all(|unsent| !unsent));
    }
}
