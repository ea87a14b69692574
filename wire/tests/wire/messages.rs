//! Every message comes back as it was sent.

use std::collections::HashSet;
use std::fmt::Debug;
use std::mem::{Discriminant, discriminant};

use lazyvm_wire::control::{
    CONTROL_MAX, Decoder, HELLO_MAX, Hello, Lane, Rejection, SWITCHOVER_MAX, Switchover,
    ToDestination, ToSource, Welcome, encode, switchover_max,
};
use lazyvm_wire::ledger::{LEDGER, SUPPORTED, Version, VersionRange};
use lazyvm_wire::{Layout, MachineOffer, PageIndex};
use proptest::prelude::*;
use serde::{Serialize, de::DeserializeOwned};

use crate::samples;

/// Through the bytes and back. Nothing may be left over.
pub fn carry<M: Serialize + DeserializeOwned>(message: &M, limit: usize) -> M {
    let mut decoder = Decoder::default();
    decoder.push(&encode(message).unwrap());
    let carried = decoder.next(limit).unwrap().expect("the whole message");
    assert!(matches!(decoder.next::<M>(limit), Ok(None)));
    carried
}

fn assert_carried<M: Serialize + DeserializeOwned + PartialEq + Debug>(message: &M, limit: usize) {
    assert_eq!(carry(message, limit), *message);
}

fn kinds<M>(messages: &[M]) -> HashSet<Discriminant<M>> {
    messages.iter().map(discriminant).collect()
}

#[test]
fn every_message_to_the_source_comes_back() {
    let messages = samples::to_source();
    for message in &messages {
        // A new message does not compile here until it has a sample, which the count then demands.
        match message {
            ToSource::Ready { .. }
            | ToSource::Refused { .. }
            | ToSource::Started
            | ToSource::Progress { .. }
            | ToSource::Complete { .. }
            | ToSource::Rejoin { .. }
            | ToSource::Touched { .. } => assert_carried(message, CONTROL_MAX),
        }
    }
    assert_eq!(kinds(&messages).len(), 7);
}

#[test]
fn every_message_to_the_destination_comes_back() {
    let messages = samples::to_destination();
    for message in &messages {
        match message {
            ToDestination::Welcome(_)
            | ToDestination::Joined
            | ToDestination::Rejected(_)
            | ToDestination::Running { .. }
            | ToDestination::Released
            | ToDestination::RecordTouches => assert_carried(message, CONTROL_MAX),
            ToDestination::Switchover(_) | ToDestination::SwitchoverPacked(_) => {
                assert_carried(message, switchover_max(1200));
            }
        }
    }
    assert_eq!(kinds(&messages).len(), 8);
}

#[test]
fn every_rejection_comes_back_and_says_its_own_thing() {
    let rejections = samples::rejections();
    let mut texts = HashSet::new();
    for rejection in &rejections {
        match rejection {
            Rejection::WrongSecret
            | Rejection::Expired
            | Rejection::Used
            | Rejection::Version(_)
            | Rejection::Protocol(_)
            | Rejection::Machine(_) => assert_carried(rejection, CONTROL_MAX),
        }
        assert!(texts.insert(rejection.to_string()), "{rejection}");
    }
    assert_eq!(kinds(&rejections).len(), 6);
}

#[test]
fn the_hello_comes_back() {
    for (lane, verify) in [(Lane::Fault, true), (Lane::Bulk, false)] {
        let carried: Hello = carry(&samples::hello(lane, verify), HELLO_MAX);
        assert_eq!(carried.versions, samples::VERSIONS);
        assert_eq!(carried.session, samples::session());
        assert!(carried.secret.matches(&samples::secret()));
        assert_eq!(carried.lane, lane);
        assert_eq!(carried.verify, verify);
    }
}

#[test]
fn no_debug_output_shows_a_secret_or_a_state() {
    let hello = samples::hello(Lane::Fault, true);
    let mut decoder = Decoder::default();
    decoder.push(&encode(&hello).unwrap());
    let switchover = Switchover {
        state: vec![samples::SECRET_BYTE; 32],
        page_map: Vec::new(),
        held: Vec::new(),
        wait: false,
    };
    for shown in [
        format!("{:?}", samples::secret()),
        format!("{hello:?}"),
        format!("{hello:#?}"),
        format!("{:?}", samples::ticket()),
        format!("{decoder:?}"),
        format!("{switchover:?}"),
    ] {
        let shown = shown.to_lowercase();
        for form in ["165", "a5", "\\xa5"] {
            assert!(!shown.contains(form), "{form} in {shown}");
        }
    }
}

#[test]
fn the_ledger_ends_with_the_newest_version_spoken() {
    assert!(LEDGER.is_sorted_by(|one, next| one.version < next.version));
    assert_eq!(LEDGER.last().unwrap().version, SUPPORTED.max);
    assert!(LEDGER.iter().any(|entry| entry.version == SUPPORTED.min));
}

#[test]
fn the_newest_common_version_is_in_both_ranges() {
    let range = |min, max| VersionRange {
        min: Version(min),
        max: Version(max),
    };
    assert_eq!(range(1, 4).newest_common(range(2, 3)), Some(Version(3)));
    assert_eq!(range(1, 2).newest_common(range(2, 9)), Some(Version(2)));
    assert_eq!(range(1, 2).newest_common(range(3, 9)), None);
    // A range the wrong way round has no version in it.
    assert_eq!(range(1, 9).newest_common(range(5, 3)), None);
}

fn text() -> impl Strategy<Value = String> {
    // Any printable text: what a decoder would replace is tested in `text`.
    "[\\PC&&[^\u{ad}]]{0,60}".prop_map(|text| lazyvm_wire::printable(&text).into_owned())
}

fn any_to_source() -> impl Strategy<Value = ToSource> {
    prop_oneof![
        any::<bool>().prop_map(|early| ToSource::Ready { early }),
        Just(ToSource::Started),
        text().prop_map(|reason| ToSource::Refused { reason }),
        any::<u64>().prop_map(|pages_here| ToSource::Progress { pages_here }),
        any::<Option<bool>>().prop_map(|verified| ToSource::Complete { verified }),
        prop::collection::vec(any::<u8>(), 0..300).prop_map(|missing| ToSource::Rejoin { missing }),
        prop::collection::vec(any::<u64>().prop_map(PageIndex), 0..300)
            .prop_map(|pages| ToSource::Touched { pages }),
    ]
}

fn any_to_destination() -> impl Strategy<Value = ToDestination> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..300);
    let welcome = (
        any::<(u16, u32)>(),
        crate::layout::any_layout(),
        "[ -~]{0,32}",
        bytes(),
        text(),
    )
        .prop_map(
            |((version, state_version), layout, kind, compatibility, mode)| {
                ToDestination::Welcome(Box::new(Welcome {
                    version: Version(version),
                    layout,
                    offer: MachineOffer {
                        kind,
                        state_version,
                        compatibility,
                    },
                    mode,
                }))
            },
        );
    prop_oneof![
        welcome,
        (bytes(), bytes(), bytes(), any::<bool>()).prop_map(|(state, page_map, held, wait)| {
            let packed = held.len() % 2 == 1;
            let switchover = Box::new(Switchover {
                state,
                page_map,
                held,
                wait,
            });
            if packed {
                ToDestination::SwitchoverPacked(switchover)
            } else {
                ToDestination::Switchover(switchover)
            }
        }),
        text().prop_map(|text| ToDestination::Rejected(Rejection::Machine(text))),
        text().prop_map(|text| ToDestination::Rejected(Rejection::Protocol(text))),
        any::<u64>().prop_map(|downtime_us| ToDestination::Running { downtime_us }),
        Just(ToDestination::RecordTouches),
    ]
}

proptest! {
    #[test]
    fn any_message_to_the_source_comes_back(message in any_to_source()) {
        prop_assert_eq!(carry(&message, CONTROL_MAX), message);
    }

    #[test]
    fn any_message_to_the_destination_comes_back(message in any_to_destination()) {
        prop_assert_eq!(carry(&message, SWITCHOVER_MAX), message);
    }
}

#[test]
fn the_largest_welcome_fits_its_limit() {
    let region = |number: usize| lazyvm_wire::Region {
        name: "n".repeat(lazyvm_wire::REGION_NAME_MAX),
        gpa: Some(lazyvm_wire::Gpa(
            u64::MAX / 2 + (number as u64) * (1 << 40) + 1,
        )),
        pages: 1 << 23,
        backing: lazyvm_wire::Backing::Huge2M,
    };
    let welcome = Welcome {
        version: Version(u16::MAX),
        layout: Layout::new((0..lazyvm_wire::REGIONS_MAX).map(region).collect()).unwrap(),
        offer: MachineOffer {
            kind: "k".repeat(lazyvm_wire::KIND_MAX),
            state_version: u32::MAX,
            compatibility: vec![0xff; lazyvm_wire::COMPATIBILITY_MAX],
        },
        mode: "m".repeat(lazyvm_wire::control::TEXT_MAX),
    };
    assert_carried(&ToDestination::Welcome(Box::new(welcome)), CONTROL_MAX);
}
