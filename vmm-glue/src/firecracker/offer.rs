//! What a destination hears of a Firecracker before the pause: its release, and whether it keeps a record of the pages
//! that it writes, so that it can go on doing so.

use lazyvm_wire::MachineOffer;

use super::KIND;

/// Follows the release.
const TRACKS: &str = "track_dirty_pages";

/// What is offered of a running one.
pub(super) fn of(release: &str, tracks: bool) -> MachineOffer {
    let mut told = release.to_owned();
    if tracks {
        told.push(' ');
        told.push_str(TRACKS);
    }
    MachineOffer {
        kind: KIND.to_owned(),
        state_version: 1,
        compatibility: told.into_bytes(),
    }
}

/// What is offered of a snapshot, which tells neither.
pub(super) fn of_snapshot() -> MachineOffer {
    of("", false)
}

/// The release, where it is known, and whether it keeps a record. What else a later lazyvm may tell is passed over.
pub(super) fn read(offer: &MachineOffer) -> (String, bool) {
    let told = String::from_utf8_lossy(&offer.compatibility);
    let mut words = told.split(' ');
    let release = words.next().unwrap_or_default();
    (
        lazyvm_wire::printable(release).to_string(),
        words.any(|word| word == TRACKS),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_read() {
        for (release, tracks) in [("1.17.0-dev", true), ("1.1.0", false), ("", false)] {
            assert_eq!(read(&of(release, tracks)), (release.to_owned(), tracks));
        }
        let mut offer = of_snapshot();
        offer.compatibility = b"2.0.0 new track_dirty_pages newer".to_vec();
        assert_eq!(read(&offer), ("2.0.0".to_owned(), true));
    }
}
