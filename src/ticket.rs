//! Tickets, in and out. A ticket is a secret.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::Context;
use lazyvm_wire::{TICKET_TEXT_MAX, Ticket};
use zeroize::Zeroizing;

use crate::exit::{Exit, Problem};
use crate::files;

/// How each ticket's text begins, whatever its version.
const PREFIX: &[u8] = b"lazyvm-ticket-";

/// Whether an argument is a ticket's text, or part of one.
pub fn looks_like_one(argument: &[u8]) -> bool {
    argument.trim_ascii_start().starts_with(PREFIX)
}

/// Reads the ticket that the command line gives as its text, as `@FILE`, or as `-` for standard input.
pub fn read(argument: &str) -> anyhow::Result<Ticket> {
    let text = match (argument, argument.strip_prefix('@')) {
        ("-", _) => from(io::stdin()).context("can't read the ticket from standard input")?,
        (_, Some(path)) => File::open(path).and_then(from).map_err(|error| {
            Problem::new(
                Exit::Usage,
                format!("can't read the ticket from {path}: {error}"),
            )
        })?,
        _ => Zeroizing::new(argument.to_owned()),
    };
    Ok(Ticket::parse(&text)?)
}

/// The first line that is not empty; a pipe may stay open behind it.
fn from(mut reader: impl Read) -> io::Result<Zeroizing<String>> {
    let mut bytes = Zeroizing::new(vec![0; TICKET_TEXT_MAX]);
    let mut length = 0;
    loop {
        let count = reader.read(&mut bytes[length..])?;
        length += count;
        let text = bytes[..length].trim_ascii_start();
        let end = text.iter().position(|&byte| byte == b'\n');
        if count == 0 || end.is_some() {
            let line = &text[..end.unwrap_or(text.len())];
            return Ok(Zeroizing::new(String::from_utf8_lossy(line).into_owned()));
        }
    }
}

/// Writes the ticket alone on standard output, and to a file for its owner alone.
pub fn hand_out(ticket: &Ticket, file: Option<&Path>) -> anyhow::Result<()> {
    let mut line = Zeroizing::new(ticket.to_text());
    line.push('\n');
    if let Some(path) = file {
        files::replace(path, line.as_bytes(), files::PRIVATE)
            .with_context(|| format!("can't write the ticket to {}", path.display()))?;
    }
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())
        .and_then(|()| out.flush())
        .context("can't print the ticket on standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_known_by_how_it_begins() {
        assert!(looks_like_one(b"lazyvm-ticket-1.abc"));
        assert!(looks_like_one(b" lazyvm-ticket-2.abc"));
        assert!(!looks_like_one(b"@lazyvm-ticket-file"));
        assert!(!looks_like_one(b"resume"));
    }

    #[test]
    fn the_first_line_that_is_not_empty_is_read() {
        assert_eq!(*from(&b"\n one \ntwo\n"[..]).unwrap(), "one ");
        assert_eq!(*from(&b"one"[..]).unwrap(), "one");
        let long = vec![b'x'; 2 * TICKET_TEXT_MAX];
        assert_eq!(from(&long[..]).unwrap().len(), TICKET_TEXT_MAX);
    }
}
