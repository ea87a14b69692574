//! `/proc/PID/maps`: what a process has mapped, and from which file.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;

use nix::libc::{major, minor};

/// Longest table that is read, in bytes: far above what a hypervisor has.
const TABLE_MAX: u64 = 32 << 20;

/// A table that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// It can't be read.
    #[error("can't read the memory map of process {pid}")]
    Read {
        /// Whose.
        pid: i32,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// It is longer than any that makes sense.
    #[error("the memory map of process {0} is longer than {TABLE_MAX} bytes")]
    TooLong(i32),
    /// A line of another form.
    #[error("the memory map of process {pid} has a line that can't be read: {line:?}")]
    Malformed {
        /// Whose.
        pid: i32,
        /// The line.
        line: String,
    },
}

/// One line of the table; `proc_pid_maps(5)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
    /// May be read and written.
    pub writable: bool,
    /// May be executed.
    pub executable: bool,
    /// Writes go to the file.
    pub shared: bool,
    /// Where in the file it starts.
    pub offset: u64,
    /// Major and minor number of the file's device.
    pub device: (u64, u64),
    /// The file's inode; 0 where there is no file.
    pub inode: u64,
    /// The file's name, or what the kernel calls it.
    pub name: String,
}

impl Mapping {
    /// Whether it shares this file with others.
    pub fn is_of(&self, file: &Metadata) -> bool {
        let device = (major(file.dev()).into(), minor(file.dev()).into());
        self.shared && self.inode == file.ino() && self.device == device
    }
}

/// All of them, ascending.
#[derive(Clone, Debug, Default)]
pub struct Mappings(Vec<Mapping>);

impl Mappings {
    /// Those of a process.
    ///
    /// # Errors
    /// [`MapsError`].
    pub fn of(pid: i32) -> Result<Self, MapsError> {
        let mut text = Vec::new();
        let read = |source| MapsError::Read { pid, source };
        let file = File::open(format!("/proc/{pid}/maps")).map_err(read)?;
        file.take(TABLE_MAX + 1)
            .read_to_end(&mut text)
            .map_err(read)?;
        if text.len() as u64 > TABLE_MAX {
            return Err(MapsError::TooLong(pid));
        }
        Self::parse(&String::from_utf8_lossy(&text)).map_err(|line| MapsError::Malformed {
            pid,
            line: line.to_owned(),
        })
    }

    /// Reads a table.
    ///
    /// # Errors
    /// The first line that can't be read, or that does not come behind the one before it.
    pub fn parse(text: &str) -> Result<Self, &str> {
        let mut mappings: Vec<Mapping> = Vec::new();
        for line in text.lines() {
            let mapping = parse_line(line).ok_or(line)?;
            if mappings.last().is_some_and(|last| last.end > mapping.start) {
                return Err(line);
            }
            mappings.push(mapping);
        }
        Ok(Self(mappings))
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = &Mapping> {
        self.0.iter()
    }

    /// What covers `bytes` from `start` on as one piece of one file: its first mapping, and the offset of `start` in the
    /// file. The kernel may have split the piece.
    pub fn piece(&self, start: u64, bytes: u64) -> Option<(&Mapping, u64)> {
        let end = start.checked_add(bytes)?;
        let at = self.0.partition_point(|mapping| mapping.end <= start);
        let first = self.0.get(at).filter(|first| first.start <= start)?;
        let offset = first.offset.checked_add(start - first.start)?;
        let mut covered = start;
        for mapping in &self.0[at..] {
            let same = (mapping.device, mapping.inode, mapping.shared)
                == (first.device, first.inode, first.shared);
            let follows = mapping.start <= covered
                && mapping.offset.checked_add(covered - mapping.start)
                    == offset.checked_add(covered - start);
            if !same || !follows {
                return None;
            }
            covered = mapping.end;
            if covered >= end {
                return Some((first, offset));
            }
        }
        None
    }
}

fn parse_line(line: &str) -> Option<Mapping> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes();
    let offset = fields.next()?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mapping = Mapping {
        start: hex(start)?,
        end: hex(end)?,
        writable: permissions.starts_with(b"rw"),
        executable: permissions.get(2) == Some(&b'x'),
        shared: permissions.get(3) == Some(&b's'),
        offset: hex(offset)?,
        device: (hex(major)?, hex(minor)?),
        inode: inode.parse().ok()?,
        name: fields.next().unwrap_or("").trim_start().to_owned(),
    };
    (mapping.start < mapping.end).then_some(mapping)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
7f0000000000-7f0000200000 rw-s 00000000 00:1b 4                          /dev/shm/a b
7f0000200000-7f0000400000 rw-s 00200000 00:1b 4                          /dev/shm/a b
7f0000400000-7f0000600000 rw-s 00000000 00:1b 5                          /memfd:x (deleted)
7f0000700000-7f0000701000 r-xp 00000000 00:00 0                          [vdso]
7f0000800000-7f0000801000 rw-p 00000000 00:00 0 
";

    #[test]
    fn lines_are_read() {
        let mappings = Mappings::parse(TABLE).unwrap();
        let first = mappings.iter().next().unwrap();
        assert_eq!((first.name.as_str(), first.inode), ("/dev/shm/a b", 4));
        assert!(first.shared && !first.executable);
        let code = mappings.iter().find(|mapping| mapping.executable).unwrap();
        assert_eq!(code.name, "[vdso]");
        assert_eq!(mappings.iter().last().unwrap().name, "");
    }

    #[test]
    fn a_table_out_of_order_is_refused() {
        let lines: Vec<_> = TABLE.lines().collect();
        let turned = [lines[1], lines[0]].join("\n");
        assert_eq!(Mappings::parse(&turned).unwrap_err(), lines[0]);
    }

    #[test]
    fn a_piece_may_be_split_but_not_mixed() {
        let mappings = Mappings::parse(TABLE).unwrap();
        let (first, offset) = mappings.piece(0x7f00_0010_0000, 0x30_0000).unwrap();
        assert_eq!((first.inode, offset), (4, 0x10_0000));
        assert!(mappings.piece(0x7f00_0010_0000, 0x30_0001).is_none());
        assert!(mappings.piece(0x7f00_0060_0000, 0x1000).is_none());
        assert!(mappings.piece(0x7f00_0050_0000, 0x11_0000).is_none());
        assert!(mappings.piece(u64::MAX, 2).is_none());
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "x",
            "2-1 rw-p 0 0:0 0",
            "1-2 rw-p 0 0 0",
            "1-2 rw-p 0 0:0 x",
            "1-2",
        ] {
            assert!(Mappings::parse(line).is_err(), "{line}");
        }
    }
}
