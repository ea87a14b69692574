//! What QEMU's human monitor tells of its memory, which is text and nothing else: there is no command of QMP for it.

use std::collections::BTreeMap;

/// A run of one block that is mapped end to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where the guest sees it.
    pub gpa: u64,
    /// Where in the block it starts.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// Where a block lies, out of `info mtree -f`.
///
/// That shows what the guest's processors see right now, which firmware changes: part of the first megabyte is hidden
/// behind ROMs or video memory at one time, and not at another. All that is mapped with the same distance between
/// address and offset is one piece therefore, with what is hidden in it.
pub fn pieces(tree: &str, name: &str) -> Vec<Piece> {
    let mut by_distance: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    let lines = tree
        .split("FlatView #")
        .find(|view| {
            view.lines()
                .any(|line| line.trim() == "Root memory region: system")
        })
        .unwrap_or("")
        .lines();
    for (start, end, offset) in lines.filter_map(|line| mapped(line, name)) {
        let span = by_distance
            .entry(start.wrapping_sub(offset))
            .or_insert((offset, offset));
        span.0 = span.0.min(offset);
        span.1 = span.1.max(offset.saturating_add(end - start));
    }
    let mut pieces: Vec<_> = by_distance
        .into_iter()
        .map(|(distance, (low, high))| Piece {
            gpa: distance.wrapping_add(low),
            offset: low,
            bytes: high - low,
        })
        .collect();
    pieces.sort_by_key(|piece| piece.offset);
    pieces
}

/// First address, end and offset of a line like
/// `  0000000100000000-000000013fffffff (prio 0, ram): ram0 @00000000c0000000` if it is of this block.
fn mapped(line: &str, name: &str) -> Option<(u64, u64, u64)> {
    let (range, rest) = line.trim().split_once(" (")?;
    let (kind, what) = rest.split_once("): ")?;
    if !(kind.ends_with("ram") || kind.ends_with("rom")) {
        return None;
    }
    let mut words = what.split(' ');
    let block = words.next()?;
    if block != name && block.strip_prefix("/objects/") != Some(name) {
        return None;
    }
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let offset = match words.find_map(|word| word.strip_prefix('@')) {
        Some(offset) => hex(offset)?,
        None => 0,
    };
    let (start, end) = range.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?.checked_add(1)?);
    (start < end).then_some((start, end, offset))
}

/// Whether pieces, ascending by offset, are the whole block, each byte once.
pub fn covers(pieces: &[Piece], bytes: u64) -> bool {
    let mut at = 0;
    for piece in pieces {
        if piece.offset != at {
            return false;
        }
        at += piece.bytes;
    }
    at == bytes && bytes > 0
}

/// `Host virtual address for 0x0 (ram0) is 0x7f0517fff000`.
pub fn host_address(told: &str) -> Option<u64> {
    let (_, address) = told.trim().rsplit_once(" is 0x")?;
    u64::from_str_radix(address, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a booted `pc`, and of one that waits for its state.
    const BOOTED: &str = "\
FlatView #1
 AS \"VGA\", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #2
 AS \"memory\", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram0
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000cafff (prio 0, rom): ram0 @00000000000c0000
  0000000000100000-00000000bfffffff (prio 0, ram): ram0 @0000000000100000
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram
  0000000100000000-000000013fffffff (prio 0, ram): ram0 @00000000c0000000
";
    const WAITING: &str = "\
FlatView #0
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): /objects/ram0 KVM
  00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000
  0000000000100000-00000000bfffffff (prio 0, ram): /objects/ram0 @0000000000100000 KVM
  0000000100000000-000000013fffffff (prio 0, ram): /objects/ram0 @00000000c0000000 KVM
";

    #[test]
    fn what_firmware_hides_does_not_change_the_layout() {
        let expected = [
            Piece {
                gpa: 0,
                offset: 0,
                bytes: 3 << 30,
            },
            Piece {
                gpa: 4 << 30,
                offset: 3 << 30,
                bytes: 1 << 30,
            },
        ];
        // The human monitor ends lines as terminals want it.
        for tree in [BOOTED, WAITING, &BOOTED.replace('\n', "\r\n")] {
            assert_eq!(pieces(tree, "ram0"), expected);
        }
        assert!(covers(&expected, 4 << 30));
    }

    #[test]
    fn a_block_that_is_not_there_as_a_whole_is_noticed() {
        assert!(!covers(&pieces(BOOTED, "ram1"), 4 << 30));
        assert!(!covers(&pieces(BOOTED, "ram0"), 5 << 30));
        assert!(!covers(
            &[Piece {
                gpa: 0,
                offset: 4096,
                bytes: 4096
            }],
            8192
        ));
        assert!(!covers(&[], 0));
        assert!(pieces("", "ram0").is_empty());
    }

    #[test]
    fn addresses_are_read_as_qemu_writes_them() {
        let told = "Host virtual address for 0x0 (ram0) is 0x7f0517fff000\r\n";
        assert_eq!(host_address(told), Some(0x7f05_17ff_f000));
        assert_eq!(
            host_address("No memory is mapped at address 0xc0000000"),
            None
        );
    }
}
