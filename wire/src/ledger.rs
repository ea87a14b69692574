//! The version ledger: what each version of the protocol has.
//!
//! A change of any message's or frame's bytes is a new version with an entry here; the golden bytes in
//! `wire/tests` fail until it is made. The bytes of the hello and of [`crate::control::Rejection`] never change, so
//! that any two versions can at least tell each other that they don't match.

use serde::{Deserialize, Serialize};

/// The application protocol of the QUIC handshake (RFC 7301). Counts generations of the hello, not versions.
pub const ALPN: &[u8] = b"lazyvm/1";

/// A version of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version(pub u16);

/// One line of the ledger.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The version.
    pub version: Version,
    /// What it brought.
    pub changes: &'static str,
}

/// All versions, oldest first. Both ends speak every one in [`SUPPORTED`].
pub const LEDGER: &[Entry] = &[
    Entry {
        version: Version(1),
        changes: "post-copy: hello, welcome, switchover with page map, demand faults on streams of their own, \
                  push of zero and raw extents, digests, progress, completion, rejoining",
    },
    Entry {
        version: Version(2),
        changes: "pages before the pause: early extents, what the destination can take of them (ready), which of \
                  them hold (switchover); version 1 is no longer spoken",
    },
    Entry {
        version: Version(3),
        changes: "pre-copy: early extents of several rounds, which round's copy holds, a start that waits for all \
                  pages (switchover); version 2 is no longer spoken",
    },
    Entry {
        version: SWITCHOVER_AHEAD,
        changes: "a machine that stands still anyway (a snapshot) is handed over at once: a switchover that does not \
                  wait for ready. No bytes have changed, and version 3 is spoken still",
    },
    Entry {
        version: TOUCHES_RECORDED,
        changes: "which pages a machine touches first is recorded for those after it (record touches, touched). Earlier \
                  messages are as they were, and versions 3 and 4 are spoken still",
    },
    Entry {
        version: SWITCHOVER_PACKED,
        changes: "the state of a machine goes compressed (switchover packed). Earlier messages are as they were, and \
                  versions 3 to 5 are spoken still",
    },
];

/// From this version on a destination takes a switchover before it has said that it is ready.
pub const SWITCHOVER_AHEAD: Version = Version(4);

/// From this version on a destination may be asked which pages the machine touches.
pub const TOUCHES_RECORDED: Version = Version(5);

/// From this version on a destination takes a switchover whose state is compressed.
pub const SWITCHOVER_PACKED: Version = Version(6);

/// Versions that a side speaks, from `min` to `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionRange {
    /// The oldest.
    pub min: Version,
    /// The newest.
    pub max: Version,
}

/// What this build speaks.
pub const SUPPORTED: VersionRange = VersionRange {
    min: Version(3),
    max: SWITCHOVER_PACKED,
};

impl VersionRange {
    /// The newest version that both speak.
    pub fn newest_common(self, other: Self) -> Option<Version> {
        let max = self.max.min(other.max);
        (max >= self.min.max(other.min)).then_some(max)
    }
}
