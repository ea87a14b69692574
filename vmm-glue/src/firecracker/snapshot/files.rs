//! Which of the files in a directory are a snapshot's, by the names that users give them.

use std::fs;
use std::path::{Path, PathBuf};

use super::SnapshotError;

/// Names that users give to state files.
const STATE_NAMES: [&str; 8] = [
    "snapshot_file",
    "snapshot",
    "vmstate",
    "vm.state",
    "snapshot.state",
    "state",
    "state_file",
    "vm_state",
];

/// Endings that users give to state files.
const STATE_ENDINGS: [&str; 4] = ["state", "vmstate", "snap", "snapshot"];

/// Names that users give to memory files.
const MEMORY_NAMES: [&str; 7] = [
    "mem_file",
    "memory",
    "mem",
    "vm.mem",
    "memory_file",
    "guest_memory",
    "memfile",
];

/// Endings that users give to memory files.
const MEMORY_ENDINGS: [&str; 3] = ["mem", "memory", "memfile"];

/// Where a snapshot's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFiles {
    /// The state.
    pub state: PathBuf,
    /// The memory.
    pub memory: PathBuf,
}

impl SnapshotFiles {
    /// Finds the two files in a directory, by their names; `state` and `memory` name them instead.
    ///
    /// # Errors
    /// [`SnapshotError::Which`] says what was found and what is looked for.
    pub fn find(
        directory: &Path,
        state: Option<&Path>,
        memory: Option<&Path>,
    ) -> Result<Self, SnapshotError> {
        let unreadable = |source| SnapshotError::Directory {
            path: directory.to_owned(),
            source,
        };
        let mut files = Vec::new();
        for entry in fs::read_dir(directory).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.is_file() {
                files.push(path);
            }
        }
        files.sort();
        let pick = |named: Option<&Path>, what, names: &[&str], endings: &[&str], flag| match named
        {
            Some(named) => Ok(directory.join(named)),
            None => one_of(&files, names, endings).map_err(|found| SnapshotError::Which {
                path: directory.to_owned(),
                what,
                found,
                names: format!("{}, or *.{}", names.join(", "), endings.join(", *.")),
                flag,
            }),
        };
        Ok(Self {
            state: pick(state, "state", &STATE_NAMES, &STATE_ENDINGS, "--state-file")?,
            memory: pick(
                memory,
                "memory",
                &MEMORY_NAMES,
                &MEMORY_ENDINGS,
                "--memory-file",
            )?,
        })
    }
}

fn one_of(files: &[PathBuf], names: &[&str], endings: &[&str]) -> Result<PathBuf, String> {
    let fits = |path: &&PathBuf| {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let ending = path
            .extension()
            .and_then(|ending| ending.to_str())
            .unwrap_or_default();
        names.contains(&name) || endings.contains(&ending)
    };
    let found: Vec<&PathBuf> = files.iter().filter(fits).collect();
    match found[..] {
        [one] => Ok(one.clone()),
        [] => Err("no file".to_owned()),
        _ => {
            let names: Vec<_> = found
                .iter()
                .map(|path| path.file_name().unwrap_or_default().to_string_lossy())
                .collect();
            Err(format!("several files ({})", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(names: &[&str]) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        for name in names {
            fs::write(home.path().join(name), "").unwrap();
        }
        home
    }

    #[test]
    fn the_names_that_users_have_are_found() {
        for (state, memory) in [
            ("snapshot_file", "mem_file"),
            ("vmstate", "memory"),
            ("vm.state", "vm.mem"),
            ("a.snap", "a.mem"),
        ] {
            let home = directory(&[state, memory, "README", "firecracker.log"]);
            let files = SnapshotFiles::find(home.path(), None, None).unwrap();
            assert_eq!(files.state, home.path().join(state));
            assert_eq!(files.memory, home.path().join(memory));
        }
    }

    #[test]
    fn what_is_not_clear_is_asked_for() {
        let home = directory(&["a.state", "b.state", "mem"]);
        let error = SnapshotFiles::find(home.path(), None, None).unwrap_err();
        let words = error.to_string();
        assert!(
            words.contains("several files (a.state, b.state)"),
            "{words}"
        );
        assert!(words.contains("--state-file"), "{words}");
        let named = SnapshotFiles::find(home.path(), Some(Path::new("b.state")), None).unwrap();
        assert_eq!(named.state, home.path().join("b.state"));
        let home = directory(&["a.state"]);
        let words = SnapshotFiles::find(home.path(), None, None)
            .unwrap_err()
            .to_string();
        assert!(
            words.contains("no file") && words.contains("--memory-file"),
            "{words}"
        );
    }
}
