//! `lazyvm bench push`: how fast memory streams from the source into the destination's.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lazyvm_pager::install::{Installer, Registration};
use lazyvm_pager::memory::MemoryError;
use lazyvm_pager::uffd::Uffd;
use lazyvm_pager::{InstallMode, LazyMemory, Options};
use lazyvm_wire::control::Lane;
use lazyvm_wire::{Layout, PAGE_SIZE, PageIndex, PageRange};
use serde::Serialize;

use crate::bare::{Client, Flavour};
use crate::error::BenchError;
use crate::image::Content;
use crate::source::Source;
use crate::sys::{BareUffd, warm_free_memory};

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct PushConfig {
    /// Memory, in bytes.
    pub bytes: u64,
    /// What it holds.
    pub content: Content,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct PushReport {
    /// From the source's memory to the destination's, in MiB of memory a second.
    pub push_mib_s: f64,
    /// One stream of as many bytes, no pages, with the library as it comes: its default settings and sockets, and
    /// tokio's default runtime, in MiB a second. Same run.
    pub bare_quinn_mib_s: f64,
    /// The same with lazyvm's settings, sockets and threads.
    pub tuned_quinn_mib_s: f64,
    /// Putting a page in place in runs of 64, in nanoseconds; shared memory, as the push fills it.
    pub install_ns_page: f64,
    /// The bare `UFFDIO_COPY` ioctl in runs of 64 into the same kind of memory, in nanoseconds a page.
    pub raw_uffd_copy_ns_page: f64,
    /// [`PushReport::install_ns_page`] for private memory.
    pub install_private_ns_page: f64,
    /// [`PushReport::raw_uffd_copy_ns_page`] for private memory.
    pub raw_uffd_copy_private_ns_page: f64,
    /// The most that the source's process took beyond the memory itself and what it had before, in MiB.
    pub server_rss_extra_mib: f64,
    /// The same of the destination's.
    pub pager_rss_extra_mib: f64,
}

/// Pages of an install: what the push takes at a time.
const RUN_PAGES: u64 = 64;

/// Both ways in turn, so often; the medians count.
const ROUNDS: usize = 3;

/// Memory that the install figures are taken from.
const INSTALL_BYTES: u64 = 256 << 20;

/// How often resident memory is read.
const SAMPLE_EVERY: Duration = Duration::from_millis(10);

const MIB: f64 = (1 << 20) as f64;

/// Runs it.
///
/// # Errors
/// [`BenchError`].
pub fn run(config: PushConfig) -> Result<PushReport, BenchError> {
    let mut source = Source::start(Ipv4Addr::LOCALHOST.into())?;
    source.image(config.bytes, config.content)?;
    // The first move is not counted: code, sockets and buffers get warm.
    push(&mut source)?;
    let (mut stock, mut tuned, mut pushes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut server_rss, mut pager_rss) = (0, 0);
    for _ in 0..ROUNDS {
        // As much as the move will need. The same ahead of both, so that neither has an advantage.
        warm_free_memory(config.bytes)?;
        stock.push(bare_bulk(&mut source, config.bytes, Flavour::Stock)?);
        tuned.push(bare_bulk(&mut source, config.bytes, Flavour::Tuned)?);
        warm_free_memory(config.bytes)?;
        let (server_memory, pager_memory) = (
            Sampler::start(source.pid())?,
            Sampler::start(std::process::id())?,
        );
        pushes.push(push(&mut source)?);
        server_rss = server_rss.max(server_memory.stop());
        pager_rss = pager_rss.max(pager_memory.stop());
    }
    let mib_s = |times: Vec<Duration>| {
        median(
            times
                .iter()
                .map(|time| config.bytes as f64 / MIB / time.as_secs_f64())
                .collect(),
        )
    };
    let (install, raw) = install_costs(|layout| LazyMemory::shared(layout, InstallMode::Minor))?;
    let (install_private, raw_private) = install_costs(LazyMemory::anonymous)?;
    Ok(PushReport {
        push_mib_s: mib_s(pushes),
        bare_quinn_mib_s: mib_s(stock),
        tuned_quinn_mib_s: mib_s(tuned),
        install_ns_page: install,
        raw_uffd_copy_ns_page: raw,
        install_private_ns_page: install_private,
        raw_uffd_copy_private_ns_page: raw_private,
        server_rss_extra_mib: server_rss as f64 / 1024.0,
        pager_rss_extra_mib: pager_rss as f64 / 1024.0,
    })
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures.get(figures.len() / 2).copied().unwrap_or_default()
}

fn bare_bulk(source: &mut Source, bytes: u64, flavour: Flavour) -> Result<Duration, BenchError> {
    let (address, fingerprint) = source.bare(flavour, Lane::Bulk)?;
    Client::connect(address, fingerprint, Lane::Bulk, flavour)?.bulk(bytes)
}

/// From the hand-over until the last page is in place.
fn push(source: &mut Source) -> Result<Duration, BenchError> {
    let ticket = source.session(true)?;
    let offer = lazyvm_pager::connect(&ticket, Options::default())?;
    let memory = Arc::new(LazyMemory::shared(offer.layout(), InstallMode::Minor)?);
    let start = Instant::now();
    offer.fill(memory)?.wait()?;
    Ok(start.elapsed())
}

/// Nanoseconds a page of the installer, and of the bare ioctl, each into fresh memory that `make` gives.
fn install_costs(
    make: impl Fn(&Layout) -> Result<LazyMemory, MemoryError>,
) -> Result<(f64, f64), BenchError> {
    let layout = Layout::flat(INSTALL_BYTES / PAGE_SIZE as u64)
        .map_err(|error| BenchError::SourceSays(error.to_string()))?;
    let data: Vec<u8> = (0..RUN_PAGES as usize * PAGE_SIZE)
        .map(|number| (number % 255) as u8 + 1)
        .collect();
    let ns_page = |start: Instant| start.elapsed().as_nanos() as f64 / layout.pages() as f64;
    let (mut installs, mut raws) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        warm_free_memory(2 * INSTALL_BYTES)?;
        let memory = Arc::new(make(&layout)?);
        let uffd = Uffd::open(&memory, false).map_err(lazyvm_pager::PagerError::from)?;
        let installer = Installer::new(&layout, memory, uffd, Registration::Register)
            .map_err(lazyvm_pager::PagerError::from)?;
        let start = Instant::now();
        for run in runs(&layout) {
            installer
                .install(run, &data)
                .map_err(|error| io::Error::other(error.to_string()))?;
        }
        installs.push(ns_page(start));

        let memory = make(&layout)?;
        let bare = BareUffd::register(&memory)?;
        let start = Instant::now();
        for run in runs(&layout) {
            bare.copy(run.first.byte_offset(), &data)?;
        }
        raws.push(ns_page(start));
    }
    Ok((median(installs), median(raws)))
}

fn runs(layout: &Layout) -> impl Iterator<Item = PageRange> {
    (0..layout.pages())
        .step_by(RUN_PAGES as usize)
        .map(|first| PageRange::new(PageIndex(first), RUN_PAGES))
}

/// Reads a process's private memory (anonymous and file pages, not the shared ones that are the guest's) again and
/// again, and keeps the most.
struct Sampler {
    stop: Arc<AtomicBool>,
    most_kib: Arc<AtomicU64>,
    base_kib: u64,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Sampler {
    fn start(pid: u32) -> Result<Self, BenchError> {
        let base_kib = private_kib(pid)?;
        let stop = Arc::new(AtomicBool::new(false));
        let most_kib = Arc::new(AtomicU64::new(base_kib));
        let thread = std::thread::spawn({
            let (stop, most_kib) = (stop.clone(), most_kib.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(kib) = private_kib(pid) {
                        most_kib.fetch_max(kib, Ordering::Relaxed);
                    }
                    std::thread::sleep(SAMPLE_EVERY);
                }
            }
        });
        Ok(Self {
            stop,
            most_kib,
            base_kib,
            thread: Some(thread),
        })
    }

    /// What it was more than at the start, in KiB.
    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.most_kib
            .load(Ordering::Relaxed)
            .saturating_sub(self.base_kib)
    }
}

/// `RssAnon`, `RssFile` and page tables of a process, in KiB (proc(5)).
fn private_kib(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    ["RssAnon:", "RssFile:", "VmPTE:"]
        .into_iter()
        .map(|name| field(name).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData)))
        .sum()
}
