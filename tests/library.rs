//! Server and pager as libraries, over real UDP sockets and userfaultfd: every byte arrives, however it is asked for.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use lazyvm_pager::{InstallMode, LazyMemory, Options};
use lazyvm_server::{Phase, Server, SessionConfig, SessionHandle};
use lazyvm_vmm_glue::plain::PlainMachine;
use lazyvm_wire::trust::Identity;
use lazyvm_wire::{Layout, PAGE_SIZE, Ticket};
use nix::sys::memfd::{MFdFlags, memfd_create};

const MIB: u64 = 1 << 20;

/// A memfd of `bytes`, with a pattern in each page for which `filled` says so, and holes elsewhere.
fn image(bytes: u64, filled: impl Fn(u64) -> bool) -> File {
    let file = File::from(memfd_create("image", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    for page in (0..bytes / PAGE_SIZE as u64).filter(|&page| filled(page)) {
        file.write_all_at(&pattern(page), page * PAGE_SIZE as u64)
            .unwrap();
    }
    file
}

fn pattern(page: u64) -> [u8; PAGE_SIZE] {
    let mut bytes = [0; PAGE_SIZE];
    let mut word = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes.chunks_exact_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        chunk.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

struct Source {
    server: Server,
    session: SessionHandle,
    ticket: Ticket,
}

fn serve(file: File) -> Source {
    // What goes wrong on the lanes is in their log, which the test runner shows when a test fails.
    let _ = tracing_subscriber::fmt()
        .with_test_writer()
        .with_max_level(tracing_subscriber::filter::LevelFilter::INFO)
        .try_init();
    let identity = Identity::generate().unwrap();
    let server = Server::bind((Ipv4Addr::LOCALHOST, 0).into(), &identity).unwrap();
    let session = add(&server, file);
    let address: SocketAddr = server.local_addr().unwrap();
    let ticket = server.ticket(&session, vec![address]);
    Source {
        server,
        session,
        ticket,
    }
}

fn add(server: &Server, file: File) -> SessionHandle {
    server
        .add_session(SessionConfig::new(Arc::new(
            PlainMachine::new(file).unwrap(),
        )))
        .unwrap()
}

fn memory(layout: &Layout, mode: Option<InstallMode>) -> Arc<LazyMemory> {
    Arc::new(match mode {
        Some(mode) => LazyMemory::shared(layout, mode).unwrap(),
        None => LazyMemory::anonymous(layout).unwrap(),
    })
}

fn phase(session: &SessionHandle) -> Phase {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(session.outcome())
}

fn compare(memory: &LazyMemory, pages: impl Iterator<Item = u64>, filled: impl Fn(u64) -> bool) {
    let mut bytes = [0; PAGE_SIZE];
    for page in pages {
        memory.read_at(page * PAGE_SIZE as u64, &mut bytes).unwrap();
        let expected = if filled(page) {
            pattern(page)
        } else {
            [0; PAGE_SIZE]
        };
        assert!(bytes == expected, "page {page} differs");
    }
}

#[test]
fn every_byte_arrives_in_every_kind_of_memory() {
    let filled = |page: u64| page % 7 != 3 && !(2000..5000).contains(&page);
    for mode in [None, Some(InstallMode::Missing), Some(InstallMode::Minor)] {
        let source = serve(image(64 * MIB, filled));
        let offer = lazyvm_pager::connect(
            &source.ticket,
            Options {
                verify: true,
                removals: false,
            },
        )
        .unwrap();
        let memory = memory(offer.layout(), mode);
        let filling = offer.fill(memory.clone()).unwrap();
        // Touches go backwards while the push goes forwards.
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let memory = &memory;
                scope.spawn(move || {
                    compare(
                        memory,
                        (0..64 * MIB / 4096).rev().skip(thread).step_by(4),
                        filled,
                    )
                });
            }
        });
        let report = filling.wait().unwrap();
        assert_eq!(report.verified, Some(true), "{mode:?}");
        assert_eq!(
            report.pages_zero + report.pages_demand + report.pages_pushed,
            report.pages_total
        );
        assert!(
            report.pages_demand > 0 && report.pages_pushed > 0,
            "{report:?}"
        );
        compare(&memory, 0..64 * MIB / 4096, filled);
        assert_eq!(phase(&source.session), Phase::Moved);
        drop(source.server);
    }
}

#[test]
fn several_sessions_of_one_endpoint_move_at_the_same_time() {
    let filled = |page: u64| !page.is_multiple_of(3);
    let first = serve(image(8 * MIB, filled));
    let address = first.server.local_addr().unwrap();
    let mut sessions = vec![(first.session.clone(), first.ticket.clone())];
    for _ in 0..7 {
        let session = add(&first.server, image(8 * MIB, filled));
        let ticket = first.server.ticket(&session, vec![address]);
        sessions.push((session, ticket));
    }
    std::thread::scope(|scope| {
        for (session, ticket) in &sessions {
            scope.spawn(move || {
                let offer = lazyvm_pager::connect(
                    ticket,
                    Options {
                        verify: true,
                        removals: false,
                    },
                )
                .unwrap();
                let memory = memory(offer.layout(), Some(InstallMode::Minor));
                let filling = offer.fill(memory.clone()).unwrap();
                compare(&memory, 0..8 * MIB / 4096, filled);
                assert_eq!(filling.wait().unwrap().verified, Some(true));
                assert_eq!(phase(session), Phase::Moved);
            });
        }
    });
}
