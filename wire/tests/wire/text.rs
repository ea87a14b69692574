//! Texts from the other side, on their way to a terminal.

use lazyvm_wire::control::{CONTROL_MAX, Rejection, TEXT_MAX, ToSource, short_text};
use lazyvm_wire::printable;
use proptest::prelude::*;

use crate::messages::carry;

#[test]
fn what_a_terminal_acts_on_is_replaced() {
    for (text, shown) in [
        (
            "plain, with spaces and ümlauts 日本",
            "plain, with spaces and ümlauts 日本",
        ),
        ("\x1b]0;title\x07", "?]0;title?"),
        ("\u{9b}31m", "?31m"),
        ("a\r\nforged log line\tb", "a  forged log line b"),
        ("\u{202e}gnp.exe\u{2066}", "?gnp.exe?"),
        ("a\u{200b}b\u{feff}\u{7f}", "a?b??"),
        ("a\u{2028}b", "a b"),
    ] {
        assert_eq!(printable(text), shown);
    }
}

#[test]
fn a_peers_text_is_replaced_where_it_is_read() {
    let reason = "\x1b[2J\x1b[H all is well".to_owned();
    let carried = carry(&ToSource::Refused { reason }, CONTROL_MAX);
    let reason = "?[2J?[H all is well".to_owned();
    assert_eq!(carried, ToSource::Refused { reason });

    let shown = carry(&Rejection::Machine("\x07".to_owned()), CONTROL_MAX).to_string();
    assert!(!shown.contains('\x07'), "{shown:?}");
}

#[test]
fn a_text_that_is_too_long_is_cut_where_it_is_written() {
    // Three bytes each, so that the limit is within a character.
    let reason = "日".repeat(TEXT_MAX);
    let cut = "日".repeat(TEXT_MAX / 3);
    assert_eq!(short_text(&reason), cut);
    let carried = carry(&ToSource::Refused { reason }, CONTROL_MAX);
    assert_eq!(carried, ToSource::Refused { reason: cut });
}

proptest! {
    #[test]
    fn a_printable_text_has_no_control_characters_and_stays(text in any::<String>()) {
        let once = printable(&text).into_owned();
        prop_assert!(!once.chars().any(char::is_control));
        prop_assert!(once.len() <= text.len());
        prop_assert_eq!(once.chars().count(), text.chars().count());
        prop_assert_eq!(printable(&once), once.as_str());
    }

    #[test]
    fn a_short_text_is_the_beginning(text in "\\PC{0,2000}") {
        let short = short_text(&text);
        prop_assert!(text.starts_with(&short));
        prop_assert!(short.len() <= TEXT_MAX);
        prop_assert!(short.len() + 3 >= text.len().min(TEXT_MAX));
    }
}
