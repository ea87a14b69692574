//! The ticket's text.

use std::net::{IpAddr, SocketAddr};

use data_encoding::BASE64URL_NOPAD;
use lazyvm_wire::trust::Fingerprint;
use lazyvm_wire::{ADDRESSES_MAX, Secret, SessionId, TICKET_TEXT_MAX, Ticket, TicketError};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::samples;

fn assert_same(one: &Ticket, other: &Ticket) {
    assert_eq!(one.addresses, other.addresses);
    assert_eq!(one.server, other.server);
    assert_eq!(one.session, other.session);
    assert!(one.secret.matches(&other.secret));
    assert_eq!(one.expires_at_s, other.expires_at_s);
}

fn any_ticket() -> impl Strategy<Value = Ticket> {
    let address = any::<(IpAddr, u16)>().prop_map(SocketAddr::from);
    (
        prop::collection::vec(address, 1..=ADDRESSES_MAX),
        any::<([u8; 32], [u8; 16], [u8; 32], u64)>(),
    )
        .prop_map(
            |(addresses, (server, session, secret, expires_at_s))| Ticket {
                addresses,
                server: Fingerprint(server),
                session: SessionId(session),
                secret: Secret::from_bytes(secret),
                expires_at_s,
            },
        )
}

proptest! {
    #[test]
    fn any_ticket_comes_back(ticket in any_ticket(), white in "[ \t\r\n]{0,3}") {
        let text = ticket.to_text();
        prop_assert!(text.len() <= TICKET_TEXT_MAX);
        prop_assert!(text.is_ascii() && !text.contains(char::is_whitespace));
        assert_same(&Ticket::parse(&format!("{white}{text}{white}")).unwrap(), &ticket);
    }

    #[test]
    fn any_text_is_a_ticket_or_an_error(text in "\\PC*|lazyvm-ticket-1\\.[A-Za-z0-9_-]*") {
        prop_assert!(Ticket::parse(&text).is_err());
    }

    #[test]
    fn a_ticket_with_two_characters_swapped_is_damaged(
        ticket in any_ticket(), one in any::<Index>(), other in any::<Index>(),
    ) {
        let mut text = ticket.to_text().into_bytes();
        let body = "lazyvm-ticket-1.".len();
        let (one, other) = (one.index(text.len() - body), other.index(text.len() - body));
        prop_assume!(text[body + one] != text[body + other]);
        text.swap(body + one, body + other);
        let text = String::from_utf8(text).unwrap();
        prop_assert_eq!(Ticket::parse(&text).unwrap_err(), TicketError::Damaged);
    }
}

#[test]
fn a_ticket_cut_short_anywhere_is_damaged() {
    let text = samples::ticket().to_text();
    for end in 1..text.len() {
        let error = Ticket::parse(&text[..end]).unwrap_err();
        assert_eq!(error, TicketError::Damaged, "{}", &text[..end]);
    }
    for start in 1..text.len() {
        let error = Ticket::parse(&text[start..]).unwrap_err();
        assert_eq!(error, TicketError::NotATicket, "{}", &text[start..]);
    }
}

#[test]
fn a_ticket_with_any_character_flipped_is_refused() {
    let text = samples::ticket().to_text();
    let version = text.find("1.").unwrap();
    for at in 0..text.len() {
        for flip in [0x01, 0x02, 0x20] {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= flip;
            let flipped = String::from_utf8(bytes).unwrap();
            let expected = match at.cmp(&version) {
                std::cmp::Ordering::Less => TicketError::NotATicket,
                // 0x20 gives no digit.
                std::cmp::Ordering::Equal if flip != 0x20 => TicketError::Version,
                _ => TicketError::Damaged,
            };
            assert_eq!(Ticket::parse(&flipped).unwrap_err(), expected, "{flipped}");
        }
    }
}

#[test]
fn other_texts_are_told_apart() {
    let body = samples::ticket()
        .to_text()
        .split_off("lazyvm-ticket-1.".len());
    for (text, expected) in [
        (String::new(), TicketError::NotATicket),
        ("hello".to_owned(), TicketError::NotATicket),
        (format!("lazyvm-ticket-2.{body}"), TicketError::Version),
        (format!("lazyvm-ticket-10.{body}"), TicketError::Version),
        (format!("lazyvm-ticket-.{body}"), TicketError::Damaged),
        (format!("lazyvm-ticket-1.{body}="), TicketError::Damaged),
        (format!("lazyvm-ticket-1.{body}A"), TicketError::Damaged),
        (
            format!("lazyvm-ticket-1.{}", "A".repeat(1 << 20)),
            TicketError::Damaged,
        ),
        ("lazyvm-ticket-1.ü".to_owned(), TicketError::Damaged),
    ] {
        assert_eq!(Ticket::parse(&text).unwrap_err(), expected, "{text:.40}");
    }
}

/// A text with a right checksum over `body`, as a peer without bounds writes it.
fn checked_text(body: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, body);
    let bytes = [body, &digest.as_ref()[..4]].concat();
    format!("lazyvm-ticket-1.{}", BASE64URL_NOPAD.encode(&bytes))
}

#[test]
fn a_ticket_names_one_to_sixteen_addresses() {
    let with_addresses = |count: usize| {
        let addresses = vec![SocketAddr::from(([192, 0, 2, 1], 4747)); count];
        let body = (addresses, [0_u8; 32], [0_u8; 16], [0_u8; 32], 7_u64);
        Ticket::parse(&checked_text(&postcard::to_allocvec(&body).unwrap()))
            .map(|ticket| ticket.addresses.len())
    };
    assert_eq!(with_addresses(1), Ok(1));
    assert_eq!(with_addresses(ADDRESSES_MAX), Ok(ADDRESSES_MAX));
    assert_eq!(with_addresses(0), Err(TicketError::Damaged));
    assert_eq!(with_addresses(ADDRESSES_MAX + 1), Err(TicketError::Damaged));
}

#[test]
fn addresses_past_the_limit_are_not_written() {
    let mut ticket = samples::ticket();
    ticket.addresses = (0..40)
        .map(|port| SocketAddr::from(([192, 0, 2, 1], port)))
        .collect();
    let parsed = Ticket::parse(&ticket.to_text()).unwrap();
    assert_eq!(parsed.addresses, ticket.addresses[..ADDRESSES_MAX]);
}

#[test]
fn bytes_left_over_under_a_right_checksum_are_damage() {
    let text = samples::ticket().to_text();
    let bytes = BASE64URL_NOPAD
        .decode(&text.as_bytes()["lazyvm-ticket-1.".len()..])
        .unwrap();
    let body = &bytes[..bytes.len() - 4];
    assert_eq!(checked_text(body), text);
    let longer = checked_text(&[body, &[0]].concat());
    assert_eq!(Ticket::parse(&longer).unwrap_err(), TicketError::Damaged);
}

#[test]
fn secrets_match_only_themselves() {
    let secret = samples::secret();
    assert!(secret.matches(&samples::secret()));
    for at in 0..32 {
        let mut other = [samples::SECRET_BYTE; 32];
        other[at] ^= 1;
        assert!(!secret.matches(&Secret::from_bytes(other)), "byte {at}");
    }
    assert!(
        !Secret::random()
            .unwrap()
            .matches(&Secret::random().unwrap())
    );
    assert_ne!(SessionId::random().unwrap(), SessionId::random().unwrap());
}
