//! The region table.

use lazyvm_wire::{
    Backing, Gpa, IMAGE_PAGES_MAX, Layout, LayoutError, PAGE_SIZE, PageIndex, PageRange,
    REGION_NAME_MAX, REGIONS_MAX, Region,
};
use proptest::prelude::*;

fn region(name: &str, gpa: Option<u64>, pages: u64, backing: Backing) -> Region {
    Region {
        name: name.to_owned(),
        gpa: gpa.map(Gpa),
        pages,
        backing,
    }
}

/// Layouts with holes or none, both kinds of backing, with addresses or without.
pub fn any_layout() -> impl Strategy<Value = Layout> {
    let region = (any::<bool>(), 1..40_u64, 0..3_u64, "[ -~]{0,64}");
    (any::<bool>(), prop::collection::vec(region, 1..12)).prop_map(|(has_gpa, regions)| {
        let mut gpa = 0;
        let regions = regions.into_iter().map(|(huge, units, hole, name)| {
            let backing = if huge {
                Backing::Huge2M
            } else {
                Backing::Small
            };
            let start = (gpa + hole * backing.bytes()).next_multiple_of(backing.bytes());
            gpa = start + units * backing.bytes();
            let pages = units * backing.pages();
            region_at(name, has_gpa.then_some(Gpa(start)), pages, backing)
        });
        Layout::new(regions.collect()).unwrap()
    })
}

fn region_at(name: String, gpa: Option<Gpa>, pages: u64, backing: Backing) -> Region {
    Region {
        name,
        gpa,
        pages,
        backing,
    }
}

proptest! {
    #[test]
    fn page_numbers_and_addresses_are_inverses(layout in any_layout()) {
        let mut page = 0;
        for (number, region) in layout.regions().iter().enumerate() {
            let range = PageRange::new(PageIndex(page), region.pages);
            prop_assert_eq!(layout.region_range(number), Some(range));
            for offset in [0, 1, region.pages / 2, region.pages - 1] {
                let offset = offset.min(region.pages - 1);
                let page = PageIndex(page + offset);
                prop_assert_eq!(layout.locate(page), Some((number, offset)));
                let gpa = region.gpa.map(|gpa| Gpa(gpa.0 + offset * PAGE_SIZE as u64));
                prop_assert_eq!(layout.gpa(page), gpa);
                for byte in [0, 1, PAGE_SIZE as u64 - 1] {
                    let found = gpa.and_then(|gpa| layout.page_of(Gpa(gpa.0 + byte)));
                    prop_assert_eq!(found, gpa.map(|_| page));
                }
            }
            page += region.pages;
            // Behind its last byte is the next region, or a hole.
            if let Some(gpa) = region.gpa {
                let end = Gpa(gpa.0 + region.pages * PAGE_SIZE as u64);
                let next = layout.regions().get(number + 1);
                let follows = next.is_some_and(|next| next.gpa == Some(end));
                prop_assert_eq!(layout.page_of(end), follows.then_some(PageIndex(page)));
            }
        }
        prop_assert_eq!(layout.pages(), page);
        prop_assert_eq!(layout.bytes(), page * PAGE_SIZE as u64);
        for past in [page, page + 1, u64::MAX] {
            prop_assert_eq!(layout.locate(PageIndex(past)), None);
            prop_assert_eq!(layout.gpa(PageIndex(past)), None);
            prop_assert_eq!(layout.unit_of(PageIndex(past)), None);
        }
        prop_assert_eq!(layout.region_range(layout.regions().len()), None);
    }

    #[test]
    fn units_divide_the_image(layout in any_layout()) {
        let mut page = 0;
        while let Some(unit) = layout.unit_of(PageIndex(page)) {
            prop_assert_eq!(unit.first, PageIndex(page));
            prop_assert!(layout.contains(unit));
            let last = PageIndex(unit.end().0 - 1);
            prop_assert_eq!(layout.unit_of(last), Some(unit));
            let (region, _) = layout.locate(last).unwrap();
            prop_assert_eq!(unit.count, layout.regions()[region].backing.pages());
            page = unit.end().0;
        }
        prop_assert_eq!(page, layout.pages());
    }

    #[test]
    fn an_address_in_a_hole_has_no_page(layout in any_layout(), gpa in 0..1_u64 << 31) {
        let held = layout.regions().iter().any(|region| {
            region.gpa.is_some_and(|start| {
                (start.0..start.0 + region.pages * PAGE_SIZE as u64).contains(&gpa)
            })
        });
        prop_assert_eq!(layout.page_of(Gpa(gpa)).is_some(), held);
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    use Backing::{Huge2M, Small};
    let refused = |regions: Vec<Region>| Layout::new(regions).unwrap_err();
    let ram = |gpa, pages| region("ram", gpa, pages, Small);

    assert_eq!(refused(vec![]), LayoutError::Empty);
    let too_many = vec![ram(None, 1); REGIONS_MAX + 1];
    assert_eq!(
        refused(too_many),
        LayoutError::TooManyRegions(REGIONS_MAX + 1)
    );
    for name in ["n".repeat(REGION_NAME_MAX + 1), "a\x1b[2J".to_owned()] {
        let regions = vec![ram(None, 1), region(&name, None, 1, Small)];
        assert_eq!(refused(regions), LayoutError::BadName(1));
    }
    for (pages, backing) in [(0, Small), (513, Huge2M)] {
        let name = "ram".to_owned();
        let regions = vec![region("ram", None, pages, backing)];
        assert_eq!(refused(regions), LayoutError::BadLength { name, pages });
    }
    for (gpa, backing) in [(1, Small), (4096, Huge2M), (u64::MAX - 4095, Small)] {
        let (name, pages) = ("ram".to_owned(), backing.pages());
        let regions = vec![region("ram", Some(gpa), pages, backing)];
        let gpa = Gpa(gpa);
        assert_eq!(refused(regions), LayoutError::BadAddress { name, gpa });
    }
    let overlap = vec![ram(Some(0), 2), ram(None, 1), ram(Some(4096), 2)];
    assert_eq!(refused(overlap), LayoutError::OutOfOrder("ram".to_owned()));
    for pages in [
        vec![IMAGE_PAGES_MAX + 1],
        vec![IMAGE_PAGES_MAX, 1],
        vec![1, u64::MAX],
    ] {
        let regions = pages.into_iter().map(|pages| ram(None, pages)).collect();
        assert_eq!(refused(regions), LayoutError::TooLarge);
    }
}

#[test]
fn the_largest_image_is_allowed() {
    let layout = Layout::flat(IMAGE_PAGES_MAX).unwrap();
    assert_eq!(layout.bytes(), 1 << 44);
    let last = PageIndex(IMAGE_PAGES_MAX - 1);
    assert_eq!(layout.locate(last), Some((0, IMAGE_PAGES_MAX - 1)));
    assert!(layout.contains(layout.range()));
}

#[test]
fn a_range_is_in_the_image_as_a_whole() {
    let layout = Layout::flat(10).unwrap();
    for (first, count, inside) in [
        (0, 10, true),
        (9, 1, true),
        (9, 2, false),
        (10, 1, false),
        (3, 0, false),
        (u64::MAX, 2, false),
    ] {
        let range = PageRange::new(PageIndex(first), count);
        assert_eq!(layout.contains(range), inside, "{range}");
    }
}

#[test]
fn a_layout_that_cannot_be_is_refused_on_the_wire_too() {
    let table = |gpas: [u64; 2]| {
        let regions = gpas.map(|gpa| region("ram", Some(gpa), 2, Backing::Small));
        postcard::to_allocvec(&regions.to_vec()).unwrap()
    };
    assert!(postcard::from_bytes::<Layout>(&table([0, 8192])).is_ok());
    assert!(postcard::from_bytes::<Layout>(&table([0, 4096])).is_err());
}
