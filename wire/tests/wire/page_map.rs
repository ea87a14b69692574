//! The page map against a plain vector of bools.

use bitvec::prelude::{BitVec, Lsb0};
use lazyvm_wire::control::switchover_max;
use lazyvm_wire::{
    Backing, Gpa, IMAGE_PAGES_MAX, Layout, PAGE_MAP_BYTES_MAX, PageIndex, PageMap, PageMapError,
    PageRange, Region, STATE_MAX,
};
use proptest::prelude::*;

/// Pages in a block of the encoding, as the protocol fixes it.
const BLOCK: u64 = 32 * 1024;

/// Pages of 1 TiB.
const TIB_PAGES: u64 = 1 << 28;

fn range(first: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex(first), count)
}

/// Sizes around the edges of words and blocks.
fn any_size() -> impl Strategy<Value = u64> {
    (
        0..3_u64,
        prop_oneof![Just(0), 1..130_u64, 0..BLOCK, BLOCK - 65..BLOCK],
    )
        .prop_map(|(blocks, rest)| blocks * BLOCK + rest)
}

/// Runs of data: none, few and long, many and short, every other page, some past the image.
fn any_runs() -> impl Strategy<Value = Vec<PageRange>> {
    let run = |most| (0..3 * BLOCK + 100, 0..most).prop_map(|(first, count)| range(first, count));
    prop_oneof![
        Just(vec![range(0, u64::MAX)]),
        prop::collection::vec(run(2 * BLOCK), 0..4),
        prop::collection::vec(run(300), 0..40),
        prop::collection::vec(run(3), 0..4000),
        (0..BLOCK, 2..20_u64, 1..20_u64).prop_map(|(first, step, length)| {
            (0..20_000)
                .map(|n| range(first + n * step, length.min(step - 1)))
                .collect()
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_map_is_its_model_and_comes_back(pages in any_size(), runs in any_runs()) {
        let mut map = PageMap::zeroed(pages);
        let mut model = vec![false; pages as usize];
        for run in runs {
            map.set_data(run);
            for page in run.intersect(range(0, pages)).pages() {
                model[page.as_usize()] = true;
            }
        }
        prop_assert!(map.bits().iter().by_vals().eq(model.iter().copied()));
        prop_assert_eq!(map.data_pages(), model.iter().filter(|&&data| data).count() as u64);

        let bytes = map.encode();
        prop_assert!(bytes.len() as u64 <= pages.div_ceil(BLOCK) * (BLOCK / 8 + 1));
        prop_assert_eq!(PageMap::decode(&bytes, pages), Ok(map));

        // It is the map of this image and of no other, and of nothing that was cut short.
        prop_assert!(PageMap::decode(&bytes, pages + BLOCK).is_err());
        if pages > 0 {
            prop_assert!(PageMap::decode(&bytes[..bytes.len() - 1], pages).is_err());
        }
    }

    #[test]
    fn bytes_that_are_accepted_are_a_map(
        bytes in prop::collection::vec(prop_oneof![0..4_u8, any::<u8>()], 0..60),
        pages in any_size(),
    ) {
        if let Ok(map) = PageMap::decode(&bytes, pages) {
            prop_assert_eq!(map.bits().len() as u64, pages);
            prop_assert_eq!(PageMap::decode(&map.encode(), pages), Ok(map));
        }
    }
}

#[test]
fn a_uniform_image_of_any_size_takes_a_few_bytes() {
    for pages in [
        1,
        63,
        64,
        65,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        TIB_PAGES,
        TIB_PAGES + 7,
    ] {
        let mut map = PageMap::zeroed(pages);
        assert!(map.encode().len() <= 4, "{pages}");
        map.set_data(range(0, pages));
        let bytes = map.encode();
        assert!(bytes.len() <= 4, "{pages}");
        assert_eq!(PageMap::decode(&bytes, pages).unwrap().data_pages(), pages);
    }
}

#[test]
fn a_sparse_tebibyte_takes_a_few_bytes_a_run() {
    const RUNS: u64 = 1000;
    let mut map = PageMap::zeroed(TIB_PAGES);
    let mut first = 0;
    for number in 0..RUNS {
        // Scattered, and of 1 to 200 pages: a multiplicative hash, the same in every run of the test.
        first = (first + number.wrapping_mul(0x9e37_79b9_7f4a_7c15)) % TIB_PAGES;
        map.set_data(range(first, 1 + first % 200));
    }
    let bytes = map.encode();
    assert!(bytes.len() as u64 <= 16 * RUNS, "{} bytes", bytes.len());
    assert_eq!(PageMap::decode(&bytes, TIB_PAGES), Ok(map));
}

#[test]
fn the_worst_tebibyte_takes_a_bit_a_page_and_fits_a_switchover() {
    // Every other page of every block.
    let block = [vec![3], vec![0x55; BLOCK as usize / 8]].concat();
    let bytes = block.repeat((TIB_PAGES / BLOCK) as usize);
    let map = PageMap::decode(&bytes, TIB_PAGES).unwrap();
    assert_eq!(map.data_pages(), TIB_PAGES / 2);
    assert!(map.encode() == bytes, "the bytes differ");
    assert!(bytes.len() + STATE_MAX < switchover_max(TIB_PAGES));
    assert_eq!(
        PAGE_MAP_BYTES_MAX as u64,
        IMAGE_PAGES_MAX / BLOCK * (BLOCK / 8 + 1)
    );
}

#[test]
fn broken_rows_are_refused_where_they_break() {
    let bits = |last: u8| [vec![3], vec![0; 12], vec![last]].concat();
    // 100 pages, or as many as are given: the bytes, and where they break.
    let cases: [(&str, u64, Vec<u8>, usize); 13] = [
        ("nothing", 100, vec![], 0),
        ("an unknown tag", 100, vec![4, 1], 1),
        ("no block", 100, vec![0, 0, 0, 1], 2),
        ("more blocks than there are", 100, vec![1, 2], 2),
        ("a count without its end", 100, vec![0, 0x80], 2),
        (
            "a count of more than five bytes",
            100,
            vec![0, 0x80, 0x80, 0x80, 0x80, 0x80, 0],
            6,
        ),
        ("no runs", 100, vec![2, 0], 2),
        ("runs that end too early", 100, vec![2, 2, 50, 49], 4),
        ("runs that end too late", 100, vec![2, 2, 50, 51], 4),
        ("an empty run in between", 100, vec![2, 4, 50, 0, 25, 25], 4),
        ("bits cut short", 100, vec![3, 0, 0], 1),
        ("bits past the image", 100, bits(0x10), 14),
        ("bytes behind the last row", 100, vec![0, 1, 0], 2),
    ];
    for (what, pages, bytes, at) in cases {
        assert_eq!(
            PageMap::decode(&bytes, pages),
            Err(PageMapError { at }),
            "{what}"
        );
    }
    assert!(PageMap::decode(&bits(0x08), 100).is_ok());
    assert!(PageMap::decode(&[2, 2, 0, 100], 100).is_ok());
    assert_eq!(
        PageMap::decode(&[0, 1], IMAGE_PAGES_MAX + 1),
        Err(PageMapError { at: 0 })
    );
    assert_eq!(PageMap::decode(&[], u64::MAX), Err(PageMapError { at: 0 }));
}

#[test]
fn runs_past_the_image_are_left_out() {
    let mut map = PageMap::zeroed(10);
    map.set_data(range(1000, 1));
    map.set_data(range(u64::MAX, u64::MAX));
    map.set_data(range(3, 0));
    assert_eq!(map.data_pages(), 0);
    map.set_data(range(8, u64::MAX));
    assert_eq!(map.data_pages(), 2);
}

#[test]
fn a_map_of_bits_that_begin_within_a_word_is_theirs() {
    let third = |page: usize| page.is_multiple_of(3);
    let bits: BitVec<u64, Lsb0> = (0..300).map(third).collect();
    // Copies of slices keep the place within the word at which the slice began.
    let map = PageMap::from_bits(bits[69..200].to_bitvec());

    let mut expected = PageMap::zeroed(131);
    for page in (0..131).filter(|&page| third(page as usize)) {
        expected.set_data(range(page, 1));
    }
    assert_eq!(map, expected);
    assert_eq!(map.encode(), expected.encode());
}

#[test]
fn a_block_of_runs_is_never_longer_than_its_bits() {
    // Every eighth page: a byte a run, behind a tag and a count of two bytes; three for the zeros that are left.
    let with_runs = |runs: u64| {
        let mut map = PageMap::zeroed(BLOCK);
        for data in 0..runs / 2 {
            map.set_data(range(8 * data + 7, 1));
        }
        map.encode()
    };
    let longest = with_runs(4091);
    assert_eq!((longest[0], longest.len()), (2, 4096));
    let bits = with_runs(4093);
    assert_eq!((bits[0], bits.len()), (3, 4097));
}

proptest! {
    /// Of a huge page, all or nothing is data; what is taken from a map is no data, and nothing else changes.
    #[test]
    fn a_map_goes_by_whole_units_and_forgets(
        data in prop::collection::vec((0..1400_u64, 1..80_u64), 0..12),
        zero in prop::collection::vec((0..1400_u64, 1..80_u64), 0..12),
    ) {
        let region = |gpa, pages, backing| Region {
            name: String::new(),
            gpa: Some(Gpa(gpa)),
            pages,
            backing,
        };
        let regions = vec![
            region(0, 100, Backing::Small),
            region(1 << 30, 1024, Backing::Huge2M),
            region(2 << 30, 50, Backing::Small),
        ];
        let layout = Layout::new(regions).unwrap();
        let mut map = PageMap::zeroed(layout.pages());
        let mut expected = vec![false; layout.pages() as usize];
        let mut set = |ranges: &[(u64, u64)], value| {
            for page in ranges.iter().flat_map(|&(first, count)| range(first, count).pages()) {
                if let Some(bit) = expected.get_mut(page.as_usize()) {
                    *bit = value;
                }
            }
        };
        data.iter().for_each(|&(first, count)| map.set_data(range(first, count)));
        set(&data, true);
        zero.iter().for_each(|&(first, count)| map.set_zero(range(first, count)));
        set(&zero, false);
        prop_assert_eq!(map.bits().iter().by_vals().collect::<Vec<_>>(), expected.clone());
        map.round_to_units(&layout);
        for page in layout.range().pages() {
            let mut unit = layout.unit_of(page).unwrap().pages();
            let any = unit.any(|page| expected[page.as_usize()]);
            prop_assert_eq!(map.bits()[page.as_usize()], any, "{}", page);
        }
    }
}
