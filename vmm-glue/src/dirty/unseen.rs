//! Who may write to a monitor's RAM without going by its page tables, so that a [`WriteWatch`](crate::dirty::WriteWatch)
//! would not see it.
//!
//! A device or a file system that reads straight into a caller's memory pins its pages first. The pin counts as a write
//! at that moment, and not when the data come. Which descriptors do that can't be told for certain from outside, so
//! whatever may do it is named.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::sys::statfs::statfs;

/// Devices that have guest RAM pinned, or that others write to it through.
const DEVICES: [&str; 8] = [
    "/dev/vfio",
    "/dev/iommu",
    "/dev/vhost-vdpa",
    "/dev/vhost-scsi",
    "/dev/infiniband",
    "/dev/udmabuf",
    "/dev/sg",
    "/dev/bsg",
];

/// File systems that may read past the page cache although nobody asked for it: FUSE, 9p, SMB (`linux/magic.h`).
const DIRECT: [i64; 4] = [0x6573_5546, 0x0102_1997, 0xff53_4d42, 0xfe53_4d42];

/// What a process does with a disk of the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Commands {
    /// It passes a guest's SCSI commands on, or may do so: these read straight into memory, whatever the flags.
    Any,
    /// It reads and writes, which goes by the page cache where it has not asked for `O_DIRECT`.
    ReadAndWrite,
}

/// The name of a file that the process has open and that may be such a way; `None` where there is none.
///
/// # Errors
/// A descriptor that is there and can't be looked at.
pub(crate) fn descriptor(pid: i32, commands: Commands) -> io::Result<Option<String>> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let number = entry?.file_name().to_string_lossy().into_owned();
        // One that is gone by now is nobody's way.
        if let Some(name) = unless_gone(look(pid, &number, commands))?.flatten() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

fn look(pid: i32, number: &str, commands: Commands) -> io::Result<Option<String>> {
    let link = format!("/proc/{pid}/fd/{number}");
    let target = fs::read_link(&link)?.to_string_lossy().into_owned();
    if DEVICES.iter().any(|device| target.starts_with(device)) || target.contains("/dmabuf") {
        return Ok(Some(target));
    }
    // What has no path is a socket, a pipe or the like: their contents are copied.
    if !target.starts_with('/') {
        return Ok(None);
    }
    let information = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}"))?;
    let flags = information
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok())
        .ok_or_else(|| io::Error::new(ErrorKind::InvalidData, format!("no flags of {target}")))?;
    let kind = fs::metadata(&link)?.file_type();
    let direct = flags & libc::O_DIRECT != 0
        || kind.is_block_device() && commands == Commands::Any
        || kind.is_file() && DIRECT.contains(&statfs(Path::new(&link))?.filesystem_type().0);
    Ok(direct.then_some(target))
}

/// A process that has one of `files` mapped, other than `known` and this one. Those that this one may not look at (the
/// first of a container, mostly) count as having none, as everywhere in a move.
///
/// # Errors
/// A process whose memory map can't be read for another reason.
pub(crate) fn process<'a>(
    files: impl Iterator<Item = &'a File>,
    known: i32,
) -> io::Result<Option<i32>> {
    let needles = files.map(needle).collect::<io::Result<Vec<_>>>()?;
    let own = std::process::id() as i32;
    let mut table = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid == own || pid == known {
            continue;
        }
        table.clear();
        let read = File::open(format!("/proc/{pid}/maps"))
            .and_then(|mut maps| maps.read_to_end(&mut table));
        let may_look = !matches!(&read, Err(error) if error.kind() == ErrorKind::PermissionDenied);
        let there = may_look && unless_gone(read)?.is_some();
        let maps_one = |needle: &Vec<u8>| table.windows(needle.len()).any(|part| part == needle);
        if there && needles.iter().any(maps_one) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// Device and inode as a line of `/proc/PID/maps` tells them (`proc_pid_maps(5)`). There are a hundred processes whose
/// tables are read each time, so they are searched and not taken apart.
fn needle(file: &File) -> io::Result<Vec<u8>> {
    let found = file.metadata()?;
    let (major, minor) = (libc::major(found.dev()), libc::minor(found.dev()));
    Ok(format!(" {major:02x}:{minor:02x} {} ", found.ino()).into_bytes())
}

/// `None` where what was looked at is not there any more.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error)
            if error.kind() == ErrorKind::NotFound
                || error.raw_os_error() == Some(Errno::ESRCH as i32) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, RawFd};
    use std::os::unix::fs::OpenOptionsExt;

    use nix::fcntl::OFlag;

    use super::*;

    fn own(number: RawFd) -> io::Result<Option<Option<String>>> {
        unless_gone(look(
            std::process::id() as i32,
            &number.to_string(),
            Commands::ReadAndWrite,
        ))
    }

    #[test]
    fn a_file_is_a_way_past_the_page_tables_only_with_o_direct() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let plain = File::create(&path).unwrap();
        assert_eq!(own(plain.as_raw_fd()).unwrap(), Some(None));
        let direct = File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .unwrap();
        let name = path.to_string_lossy().into_owned();
        assert_eq!(own(direct.as_raw_fd()).unwrap(), Some(Some(name)));
    }

    #[test]
    fn a_pipe_of_packets_is_no_way_and_one_that_is_gone_neither() {
        let (read, _write) = nix::unistd::pipe2(OFlag::O_DIRECT).unwrap();
        assert_eq!(own(read.as_raw_fd()).unwrap(), Some(None));
        assert_eq!(own(RawFd::MAX).unwrap(), None);
    }

    #[test]
    fn what_is_there_and_can_not_be_looked_at_is_an_error() {
        let refused = || Err::<(), _>(ErrorKind::PermissionDenied.into());
        assert!(unless_gone(refused()).is_err());
        let gone = || Err::<(), _>(io::Error::from_raw_os_error(libc::ESRCH));
        assert!(unless_gone(gone()).unwrap().is_none());
    }
}
