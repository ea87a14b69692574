//! What one more resume teaches a profile. Pure logic.
//!
//! A profile is an order of need. A resume tells of each page that it waited for how much of the profile had gone by then. The
//! page was needed no later than that, and what was pushed before it may well have been needed earlier; so it goes half of that
//! way ahead. One that comes too late again goes ahead again, until it comes in time: each page finds its place among those
//! that came in time all along, and those that nobody asks for fall back, and off the end in time.

use std::collections::{HashMap, HashSet};

use lazyvm_wire::PageIndex;

/// Part of a profile that is made room in for pages that were needed when all of it had gone.
const LATE_SHARE: usize = 8;

/// Of so many pages that lead, all but one are such that were seen to be touched.
const TOUCHED_SHARE: usize = 4;

/// A page that was waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Demand {
    pub page: PageIndex,
    /// Pages of the profile that had gone by then; `None` when all had.
    pub gone: Option<u64>,
}

/// What a resume has recorded that its machine touched, and ahead of the rest of that what came as a surprise: the machine
/// waited for it when it had not gone yet, for its place in the profile was too far behind, or it had none. The next one may need
/// it at any time. What had gone and was only late stays where it is.
pub(super) fn surprises_first(
    mut touched: Vec<PageIndex>,
    demands: &[Demand],
    profile: &[PageIndex],
) -> Vec<PageIndex> {
    let places: HashMap<_, _> = (0_u64..)
        .zip(profile)
        .map(|(at, page)| (page, at))
        .collect();
    let is_surprise = |demand: &&Demand| match (places.get(&demand.page), demand.gone) {
        (Some(place), Some(gone)) => *place >= gone,
        (Some(_), None) => false,
        (None, _) => true,
    };
    let surprises = demands.iter().filter(is_surprise);
    let surprises: HashSet<_> = surprises.map(|demand| demand.page).collect();
    // Stable: both stay in the order in which they were touched.
    touched.sort_by_key(|page| !surprises.contains(page));
    touched
}

/// The profile led by what a resume has recorded that its machine touched, in this order; of at most `most` pages. A machine
/// that runs a second time does for the most part what it did the first time, but not all of it: so one of every
/// [`TOUCHED_SHARE`] pages goes on with the profile as it was.
pub(super) fn led(old: &[PageIndex], touched: &[PageIndex], most: usize) -> Vec<PageIndex> {
    let mut seen = HashSet::new();
    let (mut old, mut touched) = (old.iter().copied(), touched.iter().copied());
    let mut pages = Vec::new();
    loop {
        let (first, second) = match (pages.len() + 1) % TOUCHED_SHARE {
            0 => (&mut old, &mut touched),
            _ => (&mut touched, &mut old),
        };
        let mut fresh = |page: &PageIndex| seen.insert(*page);
        let next = first.find(&mut fresh).or_else(|| second.find(&mut fresh));
        match next {
            Some(page) if pages.len() < most => pages.push(page),
            _ => return pages,
        }
    }
}

/// The profile with these demands, in the order in which they came; of at most `most` pages.
pub(super) fn merged(old: &[PageIndex], demands: &[Demand], most: usize) -> Vec<PageIndex> {
    let places: HashMap<_, _> = (0_usize..).zip(old).map(|(at, page)| (*page, at)).collect();
    let mut seen = HashSet::new();
    let mut moved: Vec<(usize, PageIndex)> = Vec::new();
    let mut late = Vec::new();
    for demand in demands.iter().filter(|demand| seen.insert(demand.page)) {
        let place = places.get(&demand.page).copied();
        match (demand.gone, place) {
            (Some(gone), _) => {
                let gone = usize::try_from(gone).unwrap_or(usize::MAX).min(old.len());
                let ahead = gone.min(place.unwrap_or(usize::MAX)) / 2;
                moved.push((ahead, demand.page));
            }
            (None, None) => late.push(demand.page),
            // It has its place; that it was missed had other reasons.
            (None, Some(_)) => {}
        }
    }
    // Stable: those with one place stay in the order in which they were needed.
    moved.sort_by_key(|&(place, _)| place);
    let goes: HashSet<_> = moved.iter().map(|&(_, page)| page).collect();
    let mut moved = moved.into_iter().peekable();
    let mut pages = Vec::with_capacity(old.len() + goes.len() + late.len());
    for (at, &page) in old.iter().enumerate() {
        while let Some((_, ahead)) = moved.next_if(|&(place, _)| place <= at) {
            pages.push(ahead);
        }
        if !goes.contains(&page) {
            pages.push(page);
        }
    }
    pages.extend(moved.map(|(_, page)| page));
    late.truncate(most / LATE_SHARE);
    pages.truncate(most - late.len());
    pages.extend(late);
    pages
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pages(numbers: impl IntoIterator<Item = u64>) -> Vec<PageIndex> {
        numbers.into_iter().map(PageIndex).collect()
    }

    fn demand(page: u64, gone: Option<u64>) -> Demand {
        Demand {
            page: PageIndex(page),
            gone,
        }
    }

    #[test]
    fn the_first_demands_are_the_profile_where_there_was_none() {
        let demands = [demand(7, Some(0)), demand(3, None), demand(5, Some(0))];
        assert_eq!(merged(&[], &demands, 100), pages([7, 5, 3]));
    }

    #[test]
    fn a_page_goes_half_the_way_ahead_and_a_late_one_behind() {
        let old = pages(0..8);
        let demands = [
            demand(90, Some(4)),
            demand(6, Some(8)),
            demand(91, None),
            demand(1, None),
        ];
        let expected = pages([0, 1, 90, 2, 6, 3, 4, 5, 7, 91]);
        let found = merged(&old, &demands, 100);
        assert_eq!(found, expected);
        // The end makes room, for an eighth at most.
        assert_eq!(merged(&old, &demands, 8).last(), Some(&PageIndex(91)));
        assert_eq!(merged(&old, &demands, 7), pages([0, 1, 90, 2, 6, 3, 4]));
    }

    #[test]
    fn a_surprise_goes_ahead_and_what_was_only_late_stays() {
        let profile = pages([1, 4, 3, 2]);
        let demands = [
            demand(5, None),    // never touched, as far as is known
            demand(8, Some(3)), // no place
            demand(2, Some(3)), // its place was next
            demand(3, Some(3)), // under way
            demand(4, None),    // so is all
        ];
        let touched = pages([1, 2, 3, 8, 4]);
        let expected = pages([2, 8, 1, 3, 4]);
        assert_eq!(surprises_first(touched, &demands, &profile), expected);
    }

    #[test]
    fn what_was_touched_goes_in_turns_with_the_others_and_each_page_comes_once() {
        let old = pages([1, 2, 3, 4, 5]);
        let touched = pages([9, 3, 9, 8, 7, 1, 6]);
        let expected = pages([9, 3, 8, 1, 7, 6, 2, 4, 5]);
        assert_eq!(led(&old, &touched, 100), expected);
        assert_eq!(led(&old, &touched, 3), expected[..3]);
        assert_eq!(led(&old, &[], 100), old);
        assert_eq!(led(&[], &old, 100), old);
    }

    fn demands() -> impl Strategy<Value = Vec<Demand>> {
        let one = (0..80_u64, prop::option::of(0..100_u64));
        let one = one.prop_map(|(page, gone)| demand(page, gone));
        prop::collection::vec(one, 0..40)
    }

    fn profile() -> impl Strategy<Value = Vec<PageIndex>> {
        let numbers = prop::collection::hash_set(0..80_u64, 0..60);
        numbers.prop_map(pages).prop_shuffle()
    }

    proptest! {
        #[test]
        fn no_page_comes_twice_and_none_comes_of_nothing(
            old in profile(), demands in demands(), most in 0..100_usize,
        ) {
            let found = merged(&old, &demands, most);
            prop_assert!(found.len() <= most);
            let distinct: HashSet<_> = found.iter().collect();
            prop_assert_eq!(distinct.len(), found.len());
            let known = |page: &PageIndex| old.contains(page) || demands.iter().any(|demand| demand.page == *page);
            prop_assert!(found.iter().all(known));
        }

        #[test]
        fn what_nobody_waited_for_keeps_its_order(
            old in profile(), demands in demands(),
        ) {
            let found = merged(&old, &demands, 1000);
            let untouched = |list: &[PageIndex]| -> Vec<PageIndex> {
                let others = list.iter().filter(|page| !demands.iter().any(|demand| demand.page == **page));
                others.copied().collect()
            };
            prop_assert_eq!(untouched(&found), untouched(&old));
        }

        #[test]
        fn demands_of_one_moment_keep_their_order(
            old in profile(), wanted in prop::collection::hash_set(100..200_u64, 0..20), gone in 0..100_u64,
        ) {
            let wanted = pages(wanted);
            let demands: Vec<_> = wanted.iter().map(|page| demand(page.0, Some(gone))).collect();
            let found = merged(&old, &demands, 1000);
            let among: Vec<_> = found.into_iter().filter(|page| page.0 >= 100).collect();
            prop_assert_eq!(among, wanted);
        }

        /// However far behind, a page that is late each time is first in the end, and what is in time stays.
        #[test]
        fn a_page_that_is_always_late_comes_to_the_front(old in profile(), gone in 0..100_u64) {
            let mut found = old;
            for _ in 0..8 {
                found = merged(&found, &[demand(99, Some(gone))], 1000);
            }
            prop_assert_eq!(found[0], PageIndex(99));
        }
    }
}
