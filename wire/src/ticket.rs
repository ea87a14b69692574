//! The ticket: one line of text that `serve` prints and `resume` takes, and all that a destination needs to know.
//!
//! ```text
//! lazyvm-ticket-1.BASE64URL( postcard(addresses, fingerprint, session, secret, expiry) ++ checksum )
//! ```
//!
//! The checksum (first four bytes of SHA-256, over what is ahead of it) tells a ticket that was cut short or mistyped
//! from one that the server refuses. A ticket is a secret: [`std::fmt::Debug`] leaves the secret out, and only
//! [`Ticket::to_text`] writes it.

use std::fmt;
use std::net::SocketAddr;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize, Serializer};
use subtle::ConstantTimeEq;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::bounded;
use crate::trust::{Fingerprint, sha256};

const KIND: &str = "lazyvm-ticket-";
const VERSION: &str = "1";
const CHECKSUM_LEN: usize = 4;

/// Most addresses in a ticket.
pub const ADDRESSES_MAX: usize = 16;

/// Longest ticket, in bytes of text.
pub const TICKET_TEXT_MAX: usize = 2048;

/// Names a session at its server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

/// The random bytes that prove the right to a session.
#[derive(Clone, Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub struct Secret([u8; 32]);

/// Addresses, keys and secret of one session.
///
/// ```
/// use lazyvm_wire::trust::Identity;
/// use lazyvm_wire::{Secret, SessionId, Ticket, TicketError};
///
/// let ticket = Ticket {
///     addresses: vec!["192.0.2.7:4747".parse()?],
///     server: Identity::generate()?.fingerprint(),
///     session: SessionId::random()?,
///     secret: Secret::random()?,
///     expires_at_s: 1_800_000_000,
/// };
/// let line = ticket.to_text();
/// assert!(line.starts_with("lazyvm-ticket-1."));
/// assert_eq!(Ticket::parse(&line)?.addresses, ticket.addresses);
///
/// let cut_short = &line[..line.len() - 1];
/// assert_eq!(Ticket::parse(cut_short).unwrap_err(), TicketError::Damaged);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ticket {
    /// Where the server listens, in the order to try: at least one; [`ADDRESSES_MAX`] are written. An IPv6 scope is not kept, as it
    /// means something on the server's host only.
    #[serde(
        serialize_with = "first_addresses",
        deserialize_with = "bounded::vec::<_, _, ADDRESSES_MAX>"
    )]
    pub addresses: Vec<SocketAddr>,
    /// The server's key.
    pub server: Fingerprint,
    /// The session.
    pub session: SessionId,
    /// Proves the right to it.
    pub secret: Secret,
    /// When the ticket ends, in seconds since 1970-01-01 UTC by the server's clock.
    pub expires_at_s: u64,
}

fn first_addresses<S: Serializer>(
    addresses: &[SocketAddr],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    addresses[..addresses.len().min(ADDRESSES_MAX)].serialize(serializer)
}

/// A text that is no ticket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Without the prefix.
    #[error("this is no lazyvm ticket: one begins with {KIND}{VERSION}.")]
    NotATicket,
    /// Made by a release that this one does not know.
    #[error(
        "this ticket is of a version that this lazyvm does not know; use the release that made it"
    )]
    Version,
    /// Bytes are missing or changed.
    #[error("the ticket is cut short or mistyped; copy the whole line that lazyvm serve printed")]
    Damaged,
}

impl Ticket {
    /// The line of text. It holds the secret.
    pub fn to_text(&self) -> String {
        // Room for all of it at once: bytes that grow leave copies behind that nobody wipes.
        let buffer = Vec::with_capacity(TICKET_TEXT_MAX);
        // Postcard fails only where a sequence has no known length, or a buffer of fixed size is full.
        let mut bytes = postcard::to_extend(self, buffer).unwrap_or_default();
        let checksum = sha256(&bytes);
        bytes.extend_from_slice(&checksum[..CHECKSUM_LEN]);
        let text = format!("{KIND}{VERSION}.{}", BASE64URL_NOPAD.encode(&bytes));
        bytes.zeroize();
        text
    }

    /// Reads a ticket; surrounding white space does no harm.
    ///
    /// # Errors
    /// [`TicketError`] tells the user what is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, TicketError> {
        let text = text.trim();
        let Some(body) = text.strip_prefix(KIND) else {
            // A line may be cut as short as within its prefix.
            return Err(if !text.is_empty() && KIND.starts_with(text) {
                TicketError::Damaged
            } else {
                TicketError::NotATicket
            });
        };
        let (version, body) = body.split_once('.').ok_or(TicketError::Damaged)?;
        if version != VERSION {
            let is_number = !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit());
            return Err(if is_number {
                TicketError::Version
            } else {
                TicketError::Damaged
            });
        }
        if body.len() > TICKET_TEXT_MAX {
            return Err(TicketError::Damaged);
        }
        let mut bytes = BASE64URL_NOPAD
            .decode(body.as_bytes())
            .map_err(|_| TicketError::Damaged)?;
        let ticket = Self::from_checked(&bytes);
        bytes.zeroize();
        ticket
    }

    fn from_checked(bytes: &[u8]) -> Result<Self, TicketError> {
        let (body, checksum) = bytes
            .len()
            .checked_sub(CHECKSUM_LEN)
            .and_then(|end| bytes.split_at_checked(end))
            .ok_or(TicketError::Damaged)?;
        if sha256(body)[..CHECKSUM_LEN] != *checksum {
            return Err(TicketError::Damaged);
        }
        match postcard::take_from_bytes::<Self>(body) {
            Ok((ticket, [])) if !ticket.addresses.is_empty() => Ok(ticket),
            _ => Err(TicketError::Damaged),
        }
    }
}

impl SessionId {
    /// A new, random one.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

impl Secret {
    /// A new, random one.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// One with these bytes, as read from a session's record.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Whether both are the same, in a time that does not depend on where they differ.
    pub fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
