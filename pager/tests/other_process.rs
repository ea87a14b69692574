//! Memory of another process, which hands its userfaultfd over, as a hypervisor does.
//!
//! The test program starts itself again for that process: it registers memory, sends descriptor and address over a
//! socket, and touches pages. This side fills them, and then sees what happens when the process is gone.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::expect_used)]

mod common;

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::Arc;

use common::{Handler, Image, Kind, installer, read_page, sys, until};
use lazyvm_pager::install::{InstallError, Installer, Registration};
use lazyvm_pager::memory::{InstallMode, LazyMemory, LazyRegion};
use lazyvm_pager::uffd::Uffd;
use lazyvm_wire::{Backing, PageIndex, PageRange};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

const PAGES: u64 = 512;
const SOCKET: &str = "LAZYVM_TEST_SOCKET";

fn image() -> Image {
    Image::new(Kind::Anonymous.layout(PAGES), |page| page % 9 == 2)
}

#[test]
#[ignore = "the part of the other process, which the other test starts"]
fn the_other_process() {
    let path = std::env::var_os(SOCKET).expect("the name of the socket");
    let socket = UnixStream::connect(path).expect("the socket");
    let image = image();
    let installer = installer("other_process", Kind::Anonymous, &image.layout, false)
        .expect("the test that started this one has a userfaultfd");
    let memory = installer.memory();
    let hosts: Vec<u8> = memory
        .regions()
        .iter()
        .flat_map(|region| region.host.to_ne_bytes())
        .collect();
    let descriptor = [installer.uffd().as_raw_fd()];
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&hosts)],
        &[ControlMessage::ScmRights(&descriptor)],
        MsgFlags::empty(),
        None,
    )
    .expect("sendmsg");
    for page in image.layout.range().pages() {
        assert!(read_page(memory, page.0) == image.page(page.0), "{page}");
    }
    std::io::Write::write_all(&mut &socket, b"ok").expect("a word to the other side");
    // Until it is killed, or the other side is gone.
    let _ = (&socket).read(&mut [0]);
}

/// Takes the descriptor and the addresses of the two regions.
fn receive(socket: &UnixStream) -> (OwnedFd, [u64; 2]) {
    let mut hosts = [0; 16];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut buffers = [IoSliceMut::new(&mut hosts)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )
    .expect("recvmsg");
    let descriptor = message
        .cmsgs()
        .expect("control messages")
        .find_map(|message| match message {
            ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
            _ => None,
        })
        .expect("a descriptor");
    let word = |at: usize| u64::from_ne_bytes(hosts[at..at + 8].try_into().expect("8 bytes"));
    (sys::own(descriptor), [word(0), word(8)])
}

#[test]
fn is_filled_from_here_and_may_go_away() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let image = Arc::new(image());
    // A word beforehand, where there is no userfaultfd at all.
    let test = "is_filled_from_here_and_may_go_away";
    if installer(test, Kind::Anonymous, &image.layout, false).is_none() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--ignored", "--exact", "the_other_process", "--nocapture"])
        .env(SOCKET, &path)
        .stdout(Stdio::null())
        .spawn()
        .expect("the other process");

    listener.set_nonblocking(true).expect("a socket option");
    let mut connection = None;
    until("the other process connects", || {
        connection = listener.accept().ok();
        connection.is_some()
    });
    let (socket, _) = connection.expect("a connection");
    let (descriptor, hosts) = receive(&socket);
    let regions = std::iter::zip(hosts, image.layout.regions())
        .map(|(host, region)| LazyRegion {
            host,
            pages: region.pages,
            backing: Backing::Small,
            file: None,
        })
        .collect();
    let memory = LazyMemory::in_other_process(regions, InstallMode::Missing).expect("memory");
    let uffd = sys::uffd_of_other_process(descriptor);
    assert!(uffd.as_fd().as_raw_fd() >= 0);
    let installer = Installer::new(&image.layout, Arc::new(memory), uffd, Registration::Done)
        .expect("an installer");
    let installer = Arc::new(installer);
    installer.apply_map(&image.map).expect("the page map");
    let handler = Handler::start(&installer, &image);
    let late = PageRange::new(PageIndex(300), 8);
    for first in (0..300).step_by(50) {
        let run = PageRange::new(PageIndex(first), 50);
        installer.install(run, image.of(run)).expect("an install");
    }
    let mut word = [0; 2];
    (&socket).read_exact(&mut word).expect("it has read all");
    assert_eq!(&word, b"ok");
    assert!(installer.table().remaining() <= 1, "the last one's finish");
    handler.stop();
    assert_eq!(installer.table().remaining(), 0);

    child.kill().expect("kill");
    child.wait().expect("wait");
    let gone = gone_from(&installer, late, &image);
    assert!(matches!(gone, InstallError::Gone { .. }), "{gone}");
    assert_eq!(
        gone.to_string(),
        "pages 300..308 can't be installed: the memory's process is gone or has unmapped it"
    );
}

/// What an install into a process that is gone gives. All is in place, so a table that knows nothing is used.
fn gone_from(installer: &Installer, range: PageRange, image: &Image) -> InstallError {
    let memory = installer.memory().clone();
    let descriptor = installer
        .uffd()
        .as_fd()
        .try_clone_to_owned()
        .expect("a descriptor");
    let uffd: Uffd = sys::uffd_of_other_process(descriptor);
    let fresh =
        Installer::new(&image.layout, memory, uffd, Registration::Done).expect("an installer");
    fresh
        .install(range, image.of(range))
        .expect_err("nobody is there")
}
