//! Text from the other side, made safe to print, and cut to what a message may carry.
//!
//! A reason or a name that a peer sent ends up on a terminal and in logs. There it must not move the cursor, hide or
//! reorder what stands beside it, or begin a line of its own. [`printable`] is the one place that sees to it; the
//! texts of [`crate::control`]'s messages have been through it when they are decoded.

use std::borrow::Cow;

use serde::{Deserializer, Serializer};

use crate::bounded;

/// Longest text in a message, in bytes; longer ones are cut by who writes them.
pub const TEXT_MAX: usize = 1024;

/// `text` on one line and without anything that a terminal would act on: white space becomes a space, other
/// control and invisible formatting characters become `?`. Never longer than `text`.
///
/// ```
/// assert_eq!(lazyvm_wire::printable("no\nroom \x1b[31mleft"), "no room ?[31mleft");
/// ```
pub fn printable(text: &str) -> Cow<'_, str> {
    if is_printable(text) {
        return Cow::Borrowed(text);
    }
    let replaced = text.chars().map(|c| match c {
        '\t' | '\n' | '\r' | '\u{2028}' | '\u{2029}' => ' ',
        c if acts_on_terminal(c) => '?',
        c => c,
    });
    Cow::Owned(replaced.collect())
}

/// Whether [`printable`] leaves `text` as it is.
pub(crate) fn is_printable(text: &str) -> bool {
    !text.chars().any(acts_on_terminal)
}

/// Control characters (category Cc), and the format characters (Cf) that make a text look like another one.
fn acts_on_terminal(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Arabic letter mark, zero widths and directional marks, separators, embeddings and overrides,
            // invisible operators and isolates, byte order mark, interlinear annotation, tags.
            '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

/// `text`, cut to [`TEXT_MAX`] at a character's boundary.
pub(crate) fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_MAX)]
}

/// For `#[serde(with)]`: cuts what is written; refuses what is longer and makes printable what is read.
pub(crate) fn serialize<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(cut(text))
}

/// See [`serialize`].
pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = bounded::string::<D, TEXT_MAX>(deserializer)?;
    Ok(printable(&text).into_owned())
}
