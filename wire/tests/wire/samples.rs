//! One value of each message, the same for all tests. The golden bytes are these values'.

use lazyvm_wire::control::{Hello, Lane, Rejection, Switchover, ToDestination, ToSource, Welcome};
use lazyvm_wire::ledger::{Version, VersionRange};
use lazyvm_wire::trust::Fingerprint;
use lazyvm_wire::{
    Backing, Gpa, Layout, MachineOffer, PageIndex, PageMap, PageRange, Region, Secret, SessionId,
    Ticket,
};

/// The byte of every sample secret, nowhere else in the samples: 0xa5 is 165.
pub const SECRET_BYTE: u8 = 0xa5;

pub const VERSIONS: VersionRange = VersionRange {
    min: Version(1),
    max: Version(300),
};

pub fn secret() -> Secret {
    Secret::from_bytes([SECRET_BYTE; 32])
}

pub fn session() -> SessionId {
    SessionId(*b"0123456789abcdef")
}

pub fn ticket() -> Ticket {
    Ticket {
        addresses: vec![
            "192.0.2.7:4747".parse().unwrap(),
            "[2001:db8::7]:4748".parse().unwrap(),
        ],
        server: Fingerprint([0x11; 32]),
        session: session(),
        secret: secret(),
        expires_at_s: 1_800_000_000,
    }
}

pub fn hello(lane: Lane, verify: bool) -> Hello {
    Hello {
        versions: VERSIONS,
        session: session(),
        secret: secret(),
        lane,
        verify,
    }
}

pub fn layout() -> Layout {
    Layout::new(vec![
        Region {
            name: "low".to_owned(),
            gpa: Some(Gpa(0)),
            pages: 160,
            backing: Backing::Small,
        },
        Region {
            name: "high".to_owned(),
            gpa: Some(Gpa(4 << 30)),
            pages: 1024,
            backing: Backing::Huge2M,
        },
        Region {
            name: "vram".to_owned(),
            gpa: None,
            pages: 16,
            backing: Backing::Small,
        },
    ])
    .unwrap()
}

/// Of the sample layout's 1200 pages: the first, a run, and the last.
pub fn page_map() -> PageMap {
    let mut map = PageMap::zeroed(1200);
    for (first, count) in [(0, 1), (160, 512), (1199, 1)] {
        map.set_data(PageRange::new(PageIndex(first), count));
    }
    map
}

pub fn welcome() -> Welcome {
    Welcome {
        version: Version(1),
        layout: layout(),
        offer: MachineOffer {
            kind: "kvm".to_owned(),
            state_version: 2,
            compatibility: vec![0xde, 0xad, 0xbe, 0xef],
        },
        mode: "postcopy".to_owned(),
    }
}

pub fn to_source() -> Vec<ToSource> {
    vec![
        ToSource::Ready { early: true },
        ToSource::Refused {
            reason: "no room".to_owned(),
        },
        ToSource::Started,
        ToSource::Progress { pages_here: 1000 },
        ToSource::Complete { verified: None },
        ToSource::Complete {
            verified: Some(true),
        },
        ToSource::Rejoin {
            missing: page_map().encode(),
        },
        ToSource::Touched {
            pages: [7, 300, 1].map(PageIndex).to_vec(),
        },
    ]
}

pub fn to_destination() -> Vec<ToDestination> {
    let mut messages = vec![
        ToDestination::Welcome(Box::new(welcome())),
        ToDestination::Joined,
        ToDestination::Switchover(Box::new(Switchover {
            state: vec![1, 2, 3, 4, 5],
            page_map: page_map().encode(),
            held: vec![3, 2, 1, 0, 1, 2],
            wait: true,
        })),
        ToDestination::Running {
            downtime_us: 12_345,
        },
        ToDestination::Released,
        ToDestination::RecordTouches,
        ToDestination::SwitchoverPacked(Box::new(Switchover {
            state: vec![9, 8, 7],
            page_map: page_map().encode(),
            held: Vec::new(),
            wait: false,
        })),
    ];
    messages.extend(rejections().into_iter().map(ToDestination::Rejected));
    messages
}

pub fn rejections() -> Vec<Rejection> {
    vec![
        Rejection::WrongSecret,
        Rejection::Expired,
        Rejection::Used,
        Rejection::Version(VERSIONS),
        Rejection::Protocol("two hellos".to_owned()),
        Rejection::Machine("paused by hand".to_owned()),
    ]
}
