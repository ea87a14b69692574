//! The guest-virtual neighbourhood of pages.

use lazyvm_wire::PageIndex;

/// Most pages of an order: 32 MiB, for 16 GiB of mapped pages. Those behind them have no virtual neighbours.
pub const ORDER_PAGES_MAX: usize = 4 << 20;

/// Mapped pages in the order of their guest-virtual addresses, and the place of each in it. Takes 8 bytes a page.
#[derive(Debug, Default)]
pub struct VirtualOrder {
    pages: Vec<u32>,
    /// Places, ascending by the page that stands there.
    by_page: Vec<u32>,
}

impl VirtualOrder {
    /// Of pages in the order of their virtual addresses; a page that comes twice counts at its first place. Sorts, so
    /// that large ones take some milliseconds.
    pub fn new(order: &[PageIndex]) -> Self {
        let pages = order.iter().filter_map(|page| u32::try_from(page.0).ok());
        let pages: Vec<u32> = pages.take(ORDER_PAGES_MAX).collect();
        let mut by_page: Vec<u32> = (0..pages.len() as u32).collect();
        by_page.sort_unstable_by_key(|&place| (pages[place as usize], place));
        by_page.dedup_by_key(|place| pages[*place as usize]);
        Self { pages, by_page }
    }

    /// Places in it.
    pub(super) fn len(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Which page stands there.
    pub(super) fn page(&self, place: u64) -> Option<PageIndex> {
        let page = self.pages.get(usize::try_from(place).ok()?)?;
        Some(PageIndex(u64::from(*page)))
    }

    /// Where a page stands.
    pub(super) fn place(&self, page: PageIndex) -> Option<u64> {
        let page = u32::try_from(page.0).ok()?;
        let key = |place: &u32| self.pages[*place as usize];
        let found = self.by_page.binary_search_by_key(&page, key).ok()?;
        Some(u64::from(self.by_page[found]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_found_at_its_first_place() {
        let pages = [9, 3, u64::MAX, 3, 7].map(PageIndex);
        let order = VirtualOrder::new(&pages);
        assert_eq!(order.len(), 4);
        assert_eq!(order.place(PageIndex(9)), Some(0));
        assert_eq!(order.place(PageIndex(3)), Some(1));
        assert_eq!(order.place(PageIndex(7)), Some(3));
        assert_eq!(order.place(PageIndex(8)), None);
        assert_eq!(order.page(3), Some(PageIndex(7)));
        assert_eq!(order.page(4), None);
    }
}
