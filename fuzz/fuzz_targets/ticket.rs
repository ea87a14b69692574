//! A ticket as a user pastes it. Half of the inputs get a right checksum, so that they reach what is behind it.

#![no_main]

use data_encoding::BASE64URL_NOPAD;
use lazyvm_wire::{ADDRESSES_MAX, TICKET_TEXT_MAX, Ticket, TicketError};
use libfuzzer_sys::fuzz_target;
use ring::digest::{SHA256, digest};

fuzz_target!(|data: &[u8]| {
    let Some((with_checksum, body)) = data.split_first() else {
        return;
    };
    let text = if with_checksum % 2 == 1 {
        let bytes = [body, &digest(&SHA256, body).as_ref()[..4]].concat();
        format!("lazyvm-ticket-1.{}", BASE64URL_NOPAD.encode(&bytes))
    } else {
        String::from_utf8_lossy(body).into_owned()
    };
    check(&text);
});

fn check(text: &str) {
    let Ok(ticket) = Ticket::parse(text) else {
        return;
    };
    assert!((1..=ADDRESSES_MAX).contains(&ticket.addresses.len()));
    let written = ticket.to_text();
    assert!(written.len() <= TICKET_TEXT_MAX);
    let again = Ticket::parse(&written).expect("what was written can be read");
    assert_eq!(again.addresses, ticket.addresses);
    assert_eq!(again.to_text(), written);
    assert!(again.secret.matches(&ticket.secret));
    let cut = &written[..written.len() - 1];
    assert_eq!(Ticket::parse(cut).unwrap_err(), TicketError::Damaged);
}
