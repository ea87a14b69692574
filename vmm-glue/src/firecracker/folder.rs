//! A directory that this process and Firecracker both see, though maybe under different names: a jailed Firecracker has
//! a root directory of its own.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::process::PeerProcess;

/// A directory that can't be shared with Firecracker.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The system's answer.
    #[error("can't {doing} {} for Firecracker", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What came of it.
        #[source]
        source: io::Error,
    },
    /// It is not in the jail.
    #[error("Firecracker does not see {}: it is jailed; name a directory that is in its jail", .0.display())]
    OutsideJail(PathBuf),
}

/// See the module. It goes with this value.
#[derive(Debug)]
pub struct SharedFolder {
    ours: TempDir,
    theirs: PathBuf,
    owner: (u32, u32),
}

impl SharedFolder {
    /// Makes a directory in `parent`, for Firecracker's user alone.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn new(parent: &Path, firecracker: &PeerProcess) -> Result<Self, FolderError> {
        let failed = |doing, path: &Path| {
            let path = path.to_owned();
            move |source| FolderError::Io {
                doing,
                path,
                source,
            }
        };
        let parent = parent.canonicalize().map_err(failed("find", parent))?;
        let seen = as_seen_by(&parent, firecracker)
            .ok_or_else(|| FolderError::OutsideJail(parent.clone()))?;
        let ours = tempfile::Builder::new()
            .prefix("lazyvm-")
            .tempdir_in(&parent)
            .map_err(failed("make a directory in", &parent))?;
        let owner = firecracker.owner();
        give(ours.path(), owner).map_err(failed("give away", ours.path()))?;
        let name = ours.path().file_name().unwrap_or_default();
        Ok(Self {
            theirs: seen.join(name),
            ours,
            owner,
        })
    }

    /// A name in it, as this process sees it.
    pub fn ours(&self, name: &str) -> PathBuf {
        self.ours.path().join(name)
    }

    /// A name in it, as Firecracker sees it.
    pub fn theirs(&self, name: &str) -> PathBuf {
        self.theirs.join(name)
    }

    /// Writes a file, for Firecracker's user alone.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FolderError> {
        let path = self.ours(name);
        let write = || -> io::Result<()> {
            let mut file: File = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(bytes)?;
            give(&path, self.owner)
        };
        write().map_err(|source| FolderError::Io {
            doing: "write",
            path: path.clone(),
            source,
        })
    }

    /// Gives a file in it to Firecracker's user.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn give(&self, name: &str) -> Result<(), FolderError> {
        let path = self.ours(name);
        give(&path, self.owner).map_err(|source| FolderError::Io {
            doing: "give away",
            path,
            source,
        })
    }
}

/// Changes the owner where it is another one.
fn give(path: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
    let found = fs::symlink_metadata(path)?;
    if found.uid() == uid {
        return Ok(());
    }
    chown(path, Some(uid), Some(gid))
}

/// The name under which a process sees a directory: the longest end of our name that is the same directory there; none
/// where it does not see it. Where the process can't be looked at, it is taken to see what this process sees.
fn as_seen_by(folder: &Path, process: &PeerProcess) -> Option<PathBuf> {
    let root = process.root();
    let Some(root) = root.filter(|root| fs::metadata(root).is_ok()) else {
        return Some(folder.to_owned());
    };
    let Ok(wanted) = fs::metadata(folder) else {
        return Some(folder.to_owned());
    };
    let mut rest = folder.components();
    rest.next();
    loop {
        let candidate = rest.as_path();
        let same = fs::metadata(root.join(candidate))
            .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()));
        if same {
            return Some(Path::new("/").join(candidate));
        }
        rest.next()?;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_process_with_the_same_root_sees_the_same_names() {
        let (one, _other) = UnixStream::pair().unwrap();
        let me = PeerProcess::of(&one).unwrap();
        assert!(!me.has_ended());
        let parent = tempfile::tempdir().unwrap();
        let folder = SharedFolder::new(parent.path(), &me).unwrap();
        folder.write("state", b"abc").unwrap();
        assert_eq!(fs::read(folder.theirs("state")).unwrap(), b"abc");
        assert_eq!(
            fs::metadata(folder.ours("state")).unwrap().mode() & 0o777,
            0o600
        );
        let path = folder.ours("state");
        drop(folder);
        assert!(!path.exists());
    }
}
