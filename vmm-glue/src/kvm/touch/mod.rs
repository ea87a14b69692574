//! The bundled bare-metal payload: it touches its memory for ever, and notices every byte that is not as it left it.
//!
//! The memory after its own few pages is *filled* from the start: every 64-bit word of filled page `p` is
//!
//! ```text
//! p * PAGE_FACTOR + word * WORD_FACTOR        (modulo 2^64)
//! ```
//!
//! and words 0, 255 and 511 have the page's *version* added, 0 at first. The versions are also kept in a table
//! elsewhere in guest memory. A *touch* picks a page by xorshift (mostly of the hot set, now and then any filled
//! page), checks the three versioned words against the table and two other words against the pattern, then
//! increments the version in all four places. So a page that is lost, stale, misplaced or torn is noticed by its
//! next touch, unless the table is stale in the very same way, which the table's own page being one of many makes
//! unlikely and the words of pages touched since make noticed.
//!
//! With several vCPUs each has its own share of the pages. Each reports on the serial port about every 10 ms of its
//! own progress:
//!
//! ```text
//! tick 123 touches 45678 errors 0
//! tick 123 touches 45678 errors 0 cpu 1          (with several vCPUs)
//! error page 4711 word 255 expected 1a2b3c seen 0     (the first only; numbers after "expected" in hexadecimal)
//! ```
//!
//! Errors are counted and never reset. "Progress" is a number of touches that is measured during the first ticks, so
//! that a tick comes later when touches take longer.

mod sys;

use std::io;
use std::mem::offset_of;

use lazyvm_wire::PAGE_SIZE;
use zerocopy::IntoBytes;

use super::boot::{Entry, IMAGE_WINDOW, TABLES_2M_BYTES};
use super::memory::GuestRam;

/// Multiplies the page number in the pattern; odd, so that no two pages are alike.
pub const PAGE_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Multiplies the word number in the pattern.
pub const WORD_FACTOR: u64 = 0xd1b5_4a32_d192_ed03;

/// Where the code lies, in guest-physical memory.
const CODE: u64 = 1 << 20;
/// Where the vCPUs' parameter pages lie, one after the other.
const PARAMETERS: u64 = CODE + (1 << 16);
/// Where page directories lie on CPUs without pages of 1 GiB. Behind them: version table, then filled pages.
const TABLES: u64 = 2 << 20;

const PAGE: u64 = PAGE_SIZE as u64;
const GIB: u64 = 1 << 30;
/// Bytes of a version in the table.
const VERSION_BYTES: u64 = 8;
/// Parts of which [`TouchConfig::cold_per_million`] becomes some, for the guest's sake.
const COLD_PARTS: u64 = 1 << 20;
/// A tick, in milliseconds.
const TICK_MS: u64 = 10;

const HOT_BYTES_DEFAULT: u64 = 16 << 20;
const COLD_PER_MILLION_DEFAULT: u32 = 10_000;

/// The payload's sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TouchConfig {
    /// Bytes to fill and to touch, in whole pages; `None` is all memory. The rest stays empty.
    pub fill_bytes: Option<u64>,
    /// Bytes of it that are hot; `None` is a quarter of it, at most 16 MiB. Shared among the vCPUs.
    pub hot_bytes: Option<u64>,
    /// Touches of a million that go anywhere in the filled memory.
    pub cold_per_million: u32,
    /// Touches from tick to tick; `None` measures how many take 10 ms.
    pub tick_touches: Option<u64>,
}

impl Default for TouchConfig {
    fn default() -> Self {
        Self {
            fill_bytes: None,
            hot_bytes: None,
            cold_per_million: COLD_PER_MILLION_DEFAULT,
            tick_touches: None,
        }
    }
}

/// Sizes that don't fit.
#[derive(Debug, thiserror::Error)]
pub enum TouchError {
    /// More to fill than there is memory.
    #[error("{asked} bytes cannot be filled: a memory of {memory} bytes has room for {most}")]
    FillTooLarge {
        /// What was asked for.
        asked: u64,
        /// The guest's memory.
        memory: u64,
        /// The most that fits.
        most: u64,
    },
    /// Less than a page for each vCPU.
    #[error("{bytes} bytes to touch are less than a page for each of {cpus} vCPUs")]
    TooSmall {
        /// The filled or hot bytes.
        bytes: u64,
        /// vCPUs.
        cpus: u32,
    },
    /// More than a million of a million.
    #[error("{0} of a million touches cannot be cold")]
    Cold(u32),
    /// No touches in a tick.
    #[error("a tick of no touches cannot be")]
    EmptyTick,
    /// Guest memory can't be written.
    #[error("cannot write guest memory")]
    Write(#[from] io::Error),
}

/// Where everything lies in the image, in bytes, and how many pages there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TouchPlan {
    /// The version table's first byte.
    pub versions: u64,
    /// The first filled byte.
    pub fill: u64,
    /// Filled pages.
    pub fill_pages: u64,
    /// Filled pages of each vCPU: vCPU `n`'s begin at page `n` times this.
    pub share_pages: u64,
    /// Hot pages of each vCPU, the first ones of its share.
    pub hot_pages: u64,
}

impl TouchPlan {
    /// Lays out a memory of `memory` bytes for `cpus` vCPUs.
    ///
    /// # Errors
    /// [`TouchError`] says what does not fit.
    pub fn new(config: &TouchConfig, memory: u64, cpus: u32) -> Result<Self, TouchError> {
        if config.cold_per_million > 1_000_000 {
            return Err(TouchError::Cold(config.cold_per_million));
        }
        if config.tick_touches == Some(0) {
            return Err(TouchError::EmptyTick);
        }
        let tables_end = TABLES + memory.div_ceil(GIB) * TABLES_2M_BYTES;
        let room = memory.saturating_sub(tables_end) / PAGE;
        // A page of versions for every 512 filled ones.
        let most = room * (PAGE / VERSION_BYTES) / (PAGE / VERSION_BYTES + 1);
        let fill_pages = match config.fill_bytes {
            None => most,
            Some(bytes) => bytes.div_ceil(PAGE),
        };
        if fill_pages > most {
            let asked = config.fill_bytes.unwrap_or_default();
            return Err(TouchError::FillTooLarge {
                asked,
                memory,
                most: most * PAGE,
            });
        }
        let share_pages = fill_pages / u64::from(cpus);
        let hot_bytes = config.hot_bytes.unwrap_or_else(|| {
            (fill_pages * PAGE / 4).clamp(PAGE * u64::from(cpus), HOT_BYTES_DEFAULT)
        });
        let hot_pages = (hot_bytes / PAGE / u64::from(cpus)).min(share_pages);
        if hot_pages == 0 {
            let bytes = hot_bytes.min(fill_pages * PAGE);
            return Err(TouchError::TooSmall { bytes, cpus });
        }
        let versions = tables_end;
        let fill = versions + (fill_pages * VERSION_BYTES).next_multiple_of(PAGE);
        Ok(Self {
            versions,
            fill,
            fill_pages,
            share_pages,
            hot_pages,
        })
    }
}

/// The pattern's word `word` of filled page `page`, at version 0.
pub fn pattern(page: u64, word: u64) -> u64 {
    page.wrapping_mul(PAGE_FACTOR)
        .wrapping_add(word.wrapping_mul(WORD_FACTOR))
}

/// A vCPU's parameter page. The code takes the offsets from here (`sys.rs`).
#[repr(C)]
#[derive(Default, zerocopy::IntoBytes, zerocopy::Immutable)]
struct Parameters {
    /// Virtual addresses of its share of the filled pages and of their versions.
    pages: u64,
    versions: u64,
    hot_pages: u64,
    share_pages: u64,
    /// Of 2^20.
    cold: u64,
    page_factor: u64,
    word_factor: u64,
    /// The number of the share's first page.
    first_page: u64,
    /// Not 0.
    random: u64,
    /// 0: to be measured.
    tick_touches: u64,
    /// TSC cycles in a tick.
    tick_cycles: u64,
    cpu: u64,
    cpus: u64,
    /// Address of the word that keeps vCPUs from reporting at the same time: the first page's [`Self::lock_word`].
    lock: u64,
    lock_word: u64,
    // From here on the vCPU's own notes; then the line that it writes; at the page's end its stack.
    ticks: u64,
    errors: u64,
    error_page: u64,
    error_word: u64,
    error_expected: u64,
    error_seen: u64,
    error_reported: u64,
    tick_started: u64,
    touches_per_tick: u64,
    first_pattern: u64,
}

/// Puts the payload into memory, fills the pages, and says where each vCPU begins.
pub(super) fn load(
    ram: &GuestRam,
    config: &TouchConfig,
    cpus: u32,
    tsc_khz: u32,
) -> Result<Vec<Entry>, TouchError> {
    let plan = TouchPlan::new(config, ram.layout().bytes(), cpus)?;
    ram.write_image(CODE, sys::code())?;
    let entries = (0..u64::from(cpus))
        .map(|cpu| {
            let at = PARAMETERS + cpu * PAGE;
            let parameters = parameters(config, &plan, cpu, u64::from(cpus), tsc_khz);
            ram.write_image(at, parameters.as_bytes())?;
            Ok(Entry {
                rip: CODE,
                rsp: at + PAGE,
                rdi: at,
                ..Default::default()
            })
        })
        .collect::<Result<_, TouchError>>()?;
    fill(ram, &plan)?;
    Ok(entries)
}

fn parameters(
    config: &TouchConfig,
    plan: &TouchPlan,
    cpu: u64,
    cpus: u64,
    tsc_khz: u32,
) -> Parameters {
    let first_page = cpu * plan.share_pages;
    Parameters {
        pages: IMAGE_WINDOW + plan.fill + first_page * PAGE,
        versions: IMAGE_WINDOW + plan.versions + first_page * VERSION_BYTES,
        hot_pages: plan.hot_pages,
        share_pages: plan.share_pages,
        cold: u64::from(config.cold_per_million) * COLD_PARTS / 1_000_000,
        page_factor: PAGE_FACTOR,
        word_factor: WORD_FACTOR,
        first_page,
        random: PAGE_FACTOR ^ (cpu + 1),
        tick_touches: config.tick_touches.unwrap_or(0),
        tick_cycles: u64::from(tsc_khz) * TICK_MS,
        cpu,
        cpus,
        lock: PARAMETERS + offset_of!(Parameters, lock_word) as u64,
        ..Parameters::default()
    }
}

/// Writes the pattern. In chunks: the image may be larger than what is worth having twice.
fn fill(ram: &GuestRam, plan: &TouchPlan) -> Result<(), TouchError> {
    const CHUNK_PAGES: u64 = 64;
    const WORDS: usize = PAGE_SIZE / 8;
    let words: Vec<u64> = (0..WORDS as u64).map(|word| pattern(0, word)).collect();
    let mut chunk = vec![0_u64; WORDS * CHUNK_PAGES as usize];
    for first in (0..plan.fill_pages).step_by(CHUNK_PAGES as usize) {
        let count = CHUNK_PAGES.min(plan.fill_pages - first) as usize;
        for (page, out) in (first..).zip(chunk[..count * WORDS].chunks_exact_mut(WORDS)) {
            let base = pattern(page, 0);
            for (out, word) in out.iter_mut().zip(&words) {
                *out = base.wrapping_add(*word).to_le();
            }
        }
        ram.write_image(plan.fill + first * PAGE, chunk[..count * WORDS].as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use lazyvm_wire::Backing;

    use super::*;

    #[test]
    fn all_memory_is_filled_unless_told_otherwise_and_nothing_overlaps() {
        for memory in [4_u64 << 20, 64 << 20, 5 << 30, 1 << 40] {
            let plan = TouchPlan::new(&TouchConfig::default(), memory, 2).unwrap();
            assert!(plan.fill >= plan.versions + plan.fill_pages * VERSION_BYTES);
            assert!(plan.fill + plan.fill_pages * PAGE <= memory);
            assert!(
                memory - (plan.fill + plan.fill_pages * PAGE) < 4 * PAGE,
                "{memory}"
            );
            assert!(plan.hot_pages <= plan.share_pages);
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let plan = |config: TouchConfig| TouchPlan::new(&config, 64 << 20, 2);
        let default = TouchConfig::default;
        let large = plan(TouchConfig {
            fill_bytes: Some(64 << 20),
            ..default()
        });
        assert!(large.unwrap_err().to_string().contains("has room for"));
        let small = plan(TouchConfig {
            fill_bytes: Some(PAGE),
            ..default()
        });
        assert!(matches!(small, Err(TouchError::TooSmall { .. })));
        let cold = plan(TouchConfig {
            cold_per_million: 1_000_001,
            ..default()
        });
        assert!(matches!(cold, Err(TouchError::Cold(_))));
        let tick = plan(TouchConfig {
            tick_touches: Some(0),
            ..default()
        });
        assert!(matches!(tick, Err(TouchError::EmptyTick)));
    }

    #[test]
    fn every_word_is_as_the_pattern_says_and_the_rest_stays_empty() {
        let ram = GuestRam::new(16 << 20, Backing::Small).unwrap();
        let config = TouchConfig {
            fill_bytes: Some(1 << 20),
            ..TouchConfig::default()
        };
        load(&ram, &config, 1, 2_600_000).unwrap();
        let plan = TouchPlan::new(&config, 16 << 20, 1).unwrap();
        let mut page = vec![0; PAGE_SIZE];
        for number in 0..plan.fill_pages {
            ram.file()
                .read_exact_at(&mut page, plan.fill + number * PAGE)
                .unwrap();
            for (word, bytes) in (0..).zip(page.as_chunks::<8>().0) {
                assert_eq!(u64::from_le_bytes(*bytes), pattern(number, word));
            }
        }
        let end = plan.fill + plan.fill_pages * PAGE;
        ram.file().read_exact_at(&mut page, end).unwrap();
        assert!(page.iter().all(|&byte| byte == 0));
        let data = nix::unistd::lseek(ram.file(), end as i64, nix::unistd::Whence::SeekData);
        assert_eq!(
            data,
            Err(nix::errno::Errno::ENXIO),
            "nothing behind the filled pages takes room"
        );
    }
}
