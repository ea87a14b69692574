//! The region table: how the image's pages lie in the guest's physical memory.

use serde::{Deserialize, Serialize};

use crate::bounded;
use crate::page::{Gpa, IMAGE_PAGES_MAX, PAGE_SHIFT, PAGE_SIZE, PageIndex, PageRange};
use crate::text::is_printable;

/// Most regions that a layout may have.
pub const REGIONS_MAX: usize = 256;

/// Longest region name, in bytes.
pub const REGION_NAME_MAX: usize = 64;

/// The size of the pages that back a region at its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Backing {
    /// 4 KiB pages.
    Small,
    /// 2 MiB huge pages; installed in whole huge pages.
    Huge2M,
}

impl Backing {
    /// Image pages (4 KiB) in one page of the backing.
    pub const fn pages(self) -> u64 {
        match self {
            Self::Small => 1,
            Self::Huge2M => 512,
        }
    }

    /// Bytes in one page of the backing.
    pub const fn bytes(self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }
}

/// One run of guest-physical memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// The hypervisor's name for it (`ram`, `pc.ram`), to be told apart in messages: printable, and
    /// [`REGION_NAME_MAX`] bytes at most.
    #[serde(deserialize_with = "bounded::string::<_, REGION_NAME_MAX>")]
    pub name: String,
    /// Where it lies; `None` where the hypervisor tells offsets only (Firecracker).
    pub gpa: Option<Gpa>,
    /// Its length, in 4 KiB pages.
    pub pages: u64,
    /// What backs it at the source.
    pub backing: Backing,
}

/// A layout that can't be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There is no memory at all.
    #[error("the layout has no region")]
    Empty,
    /// More than [`REGIONS_MAX`].
    #[error("the layout has {0} regions, more than the {REGIONS_MAX} allowed")]
    TooManyRegions(usize),
    /// A name longer than [`REGION_NAME_MAX`] or with control characters.
    #[error("the name of region {0} is longer than {REGION_NAME_MAX} bytes or not printable")]
    BadName(usize),
    /// A region without pages, or not a whole number of its backing's pages.
    #[error("region {name} has {pages} pages, which is no whole number of its backing's pages")]
    BadLength {
        /// The region.
        name: String,
        /// Its length in 4 KiB pages.
        pages: u64,
    },
    /// A guest-physical address that is not aligned to the backing's pages, or out of the address space.
    #[error("region {name} starts at {gpa}, which its pages cannot")]
    BadAddress {
        /// The region.
        name: String,
        /// Its start.
        gpa: Gpa,
    },
    /// Regions overlap or are not in ascending order.
    #[error("region {0} begins before the one ahead of it ends")]
    OutOfOrder(String),
    /// More than [`IMAGE_PAGES_MAX`].
    #[error("the image has more than {IMAGE_PAGES_MAX} pages")]
    TooLarge,
}

/// A checked region table: at least one region, in ascending order, whole backing pages, no overlap.
///
/// ```
/// use lazyvm_wire::{Backing, Gpa, Layout, PageIndex, Region};
///
/// // 2 GiB below the hole for devices, and one huge page above 4 GiB.
/// let region = |name: &str, gpa, pages, backing| Region {
///     name: name.to_owned(),
///     gpa: Some(Gpa(gpa)),
///     pages,
///     backing,
/// };
/// let layout = Layout::new(vec![
///     region("low", 0, 512 * 1024, Backing::Small),
///     region("high", 4 << 30, 512, Backing::Huge2M),
/// ])?;
///
/// let page = PageIndex(512 * 1024 + 3);
/// assert_eq!(layout.gpa(page), Some(Gpa((4 << 30) + 3 * 4096)));
/// assert_eq!(layout.page_of(Gpa((4 << 30) + 3 * 4096 + 17)), Some(page));
/// assert_eq!(layout.page_of(Gpa(3 << 30)), None);
/// assert_eq!(layout.unit_of(page).map(|unit| unit.count), Some(512));
/// # Ok::<(), lazyvm_wire::LayoutError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RegionTable", into = "RegionTable")]
pub struct Layout {
    regions: Vec<Region>,
    /// Image page at which each region starts; as long as `regions`.
    starts: Vec<u64>,
    pages: u64,
}

/// A layout's form on the wire.
#[derive(Serialize, Deserialize)]
struct RegionTable(#[serde(deserialize_with = "bounded::vec::<_, _, REGIONS_MAX>")] Vec<Region>);

impl Layout {
    /// Checks `regions` and numbers their pages.
    ///
    /// # Errors
    /// [`LayoutError`] names the region that is wrong.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        if regions.is_empty() {
            return Err(LayoutError::Empty);
        }
        if regions.len() > REGIONS_MAX {
            return Err(LayoutError::TooManyRegions(regions.len()));
        }
        let mut starts = Vec::with_capacity(regions.len());
        let mut pages = 0_u64;
        let mut gpa_end = 0_u64;
        for (number, region) in regions.iter().enumerate() {
            check_name(number, region)?;
            if region.pages == 0 || region.pages % region.backing.pages() != 0 {
                return Err(LayoutError::BadLength {
                    name: region.name.clone(),
                    pages: region.pages,
                });
            }
            starts.push(pages);
            pages = pages
                .checked_add(region.pages)
                .filter(|&pages| pages <= IMAGE_PAGES_MAX)
                .ok_or(LayoutError::TooLarge)?;
            if let Some(gpa) = region.gpa {
                let end = gpa
                    .0
                    .checked_add(region.pages * PAGE_SIZE as u64)
                    .filter(|_| gpa.0 % region.backing.bytes() == 0)
                    .ok_or_else(|| LayoutError::BadAddress {
                        name: region.name.clone(),
                        gpa,
                    })?;
                if gpa.0 < gpa_end {
                    return Err(LayoutError::OutOfOrder(region.name.clone()));
                }
                gpa_end = end;
            }
        }
        Ok(Self {
            regions,
            starts,
            pages,
        })
    }

    /// One region of `pages` small pages from guest-physical address 0, for memory that is no machine's.
    ///
    /// # Errors
    /// [`LayoutError`] when `pages` is 0 or too many.
    pub fn flat(pages: u64) -> Result<Self, LayoutError> {
        Self::new(vec![Region {
            name: "ram".to_owned(),
            gpa: Some(Gpa(0)),
            pages,
            backing: Backing::Small,
        }])
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Pages in the image.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Bytes in the image.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }

    /// All pages of the image.
    pub fn range(&self) -> PageRange {
        PageRange::new(PageIndex(0), self.pages)
    }

    /// The pages of region number `region`, or `None` where there is no such region.
    pub fn region_range(&self, region: usize) -> Option<PageRange> {
        let start = *self.starts.get(region)?;
        Some(PageRange::new(PageIndex(start), self.regions[region].pages))
    }

    /// The region number of a page and the page's number within it; `None` past the image's end.
    pub fn locate(&self, page: PageIndex) -> Option<(usize, u64)> {
        if page.0 >= self.pages {
            return None;
        }
        let region = self.starts.partition_point(|&start| start <= page.0) - 1;
        Some((region, page.0 - self.starts[region]))
    }

    /// Whether all of `range` is in the image (an empty range is not).
    pub fn contains(&self, range: PageRange) -> bool {
        range.count != 0
            && range
                .first
                .0
                .checked_add(range.count)
                .is_some_and(|end| end <= self.pages)
    }

    /// The page's guest-physical address, where the hypervisor told any.
    pub fn gpa(&self, page: PageIndex) -> Option<Gpa> {
        let (region, offset) = self.locate(page)?;
        Some(Gpa(self.regions[region].gpa?.0 + offset * PAGE_SIZE as u64))
    }

    /// The page that holds a guest-physical address; `None` in a hole.
    pub fn page_of(&self, gpa: Gpa) -> Option<PageIndex> {
        self.regions
            .iter()
            .zip(&self.starts)
            .find_map(|(region, start)| {
                let offset = gpa.0.checked_sub(region.gpa?.0)? >> PAGE_SHIFT;
                (offset < region.pages).then_some(PageIndex(start + offset))
            })
    }

    /// The unit in which `page` is asked for and installed: itself, or the huge page it is part of.
    pub fn unit_of(&self, page: PageIndex) -> Option<PageRange> {
        let (region, offset) = self.locate(page)?;
        let unit = self.regions[region].backing.pages();
        Some(PageRange::new(PageIndex(page.0 - offset % unit), unit))
    }
}

fn check_name(number: usize, region: &Region) -> Result<(), LayoutError> {
    if region.name.len() > REGION_NAME_MAX || !is_printable(&region.name) {
        return Err(LayoutError::BadName(number));
    }
    Ok(())
}

impl TryFrom<RegionTable> for Layout {
    type Error = LayoutError;

    fn try_from(RegionTable(regions): RegionTable) -> Result<Self, LayoutError> {
        Self::new(regions)
    }
}

impl From<Layout> for RegionTable {
    fn from(layout: Layout) -> Self {
        Self(layout.regions)
    }
}
