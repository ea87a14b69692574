//! A region table, with page numbers and addresses looked up in it.

#![no_main]

use lazyvm_wire::{
    Gpa, IMAGE_PAGES_MAX, Layout, PAGE_SIZE, PageIndex, REGION_NAME_MAX, REGIONS_MAX, printable,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: (u64, &[u8])| {
    let (anywhere, bytes) = data;
    let Ok(layout) = postcard::from_bytes::<Layout>(bytes) else {
        return;
    };
    let again = postcard::to_allocvec(&layout).expect("what was read can be written");
    assert_eq!(postcard::from_bytes::<Layout>(&again).as_ref(), Ok(&layout));
    assert_eq!(Layout::new(layout.regions().to_vec()).as_ref(), Ok(&layout));

    assert!((1..=REGIONS_MAX).contains(&layout.regions().len()));
    assert!((1..=IMAGE_PAGES_MAX).contains(&layout.pages()));
    let mut page = 0;
    for (number, region) in layout.regions().iter().enumerate() {
        assert!(region.name.len() <= REGION_NAME_MAX && printable(&region.name) == region.name);
        let range = layout.region_range(number).expect("a region has pages");
        assert_eq!((range.first.0, range.count), (page, region.pages));
        page += region.pages;
        check_page(&layout, range.first);
        check_page(&layout, PageIndex(page - 1));
    }
    assert_eq!(layout.pages(), page);
    check_page(&layout, PageIndex(anywhere));
    if let Some(page) = layout.page_of(Gpa(anywhere)) {
        let start = layout
            .gpa(page)
            .expect("a page found by its address has one");
        assert!(start.0 <= anywhere && anywhere - start.0 < PAGE_SIZE as u64);
    }
});

fn check_page(layout: &Layout, page: PageIndex) {
    let located = layout.locate(page);
    assert_eq!(located.is_some(), page.0 < layout.pages());
    let Some((region, offset)) = located else {
        assert_eq!((layout.gpa(page), layout.unit_of(page)), (None, None));
        return;
    };
    let range = layout.region_range(region).expect("the region was found");
    assert_eq!(range.first.0 + offset, page.0);
    if let Some(gpa) = layout.gpa(page) {
        assert_eq!(layout.page_of(gpa), Some(page));
    }
    let unit = layout
        .unit_of(page)
        .expect("a page of the image has a unit");
    assert!(unit.contains(page) && layout.contains(unit));
    assert_eq!(range.intersect(unit), unit);
}
