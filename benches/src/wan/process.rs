//! Processes of a run, and waiting for what they do.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::namespace::Namespace;
use super::{WanError, sys};

/// How often is looked at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Bytes of a log that are shown.
const LOG_BYTES_SHOWN: usize = 1500;

/// A process, which is killed when this is dropped.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command` in a namespace, with what it writes to standard error in `folder`.
    pub fn start(
        namespace: &Namespace,
        folder: &Path,
        name: &str,
        mut command: Command,
    ) -> Result<Self, WanError> {
        let log = folder.join(format!("{name}.log"));
        let child = namespace.within(|| {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(File::create(&log)?)
                .spawn()
        });
        Ok(Self {
            name: name.to_owned(),
            child: child.map_err(|source| WanError::Start {
                name: name.to_owned(),
                source,
            })?,
            log,
        })
    }

    /// The end of what it wrote.
    pub fn last_words(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let from = text.len().saturating_sub(LOG_BYTES_SHOWN);
        String::from_utf8_lossy(&text[from..]).trim().to_owned()
    }

    /// Whether it has ended well.
    ///
    /// # Errors
    /// [`WanError::Ended`] when it has ended in any other way.
    pub fn has_ended(&mut self) -> Result<bool, WanError> {
        match self.child.try_wait()? {
            None => Ok(false),
            Some(status) if status.success() => Ok(true),
            Some(status) => Err(self.ended(&status.to_string())),
        }
    }

    /// That it goes on.
    ///
    /// # Errors
    /// [`WanError::Ended`].
    pub fn check(&mut self) -> Result<(), WanError> {
        match self.has_ended()? {
            true => Err(self.ended("exit status: 0")),
            false => Ok(()),
        }
    }

    /// Waits until `look` finds something, for as long as it goes on.
    ///
    /// # Errors
    /// [`WanError::TooLate`], [`WanError::Ended`], and those of `look`.
    pub fn wait_for<T>(
        &mut self,
        what: &'static str,
        within: Duration,
        mut look: impl FnMut() -> Result<Option<T>, WanError>,
    ) -> Result<T, WanError> {
        wait_for(what, within, || match look()? {
            Some(found) => Ok(Some(found)),
            None => match self.check() {
                Ok(()) => Ok(None),
                // It may have done it last of all.
                Err(ended) => look()?.map(Some).ok_or(ended),
            },
        })
        .map_err(|error| match error {
            WanError::TooLate { what, seconds, .. } => WanError::TooLate {
                what,
                seconds,
                log: format!("{} says: {}", self.name, self.last_words()),
            },
            other => other,
        })
    }

    /// Waits until it has ended well.
    ///
    /// # Errors
    /// [`WanError::TooLate`], [`WanError::Ended`].
    pub fn wait_for_end(&mut self, what: &'static str, within: Duration) -> Result<(), WanError> {
        wait_for(what, within, || Ok(self.has_ended()?.then_some(())))
    }

    fn ended(&self, status: &str) -> WanError {
        WanError::Ended {
            name: self.name.clone(),
            status: status.to_owned(),
            log: self.last_words(),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until `look` finds something.
///
/// # Errors
/// [`WanError::TooLate`], [`WanError::Interrupted`], and those of `look`.
pub fn wait_for<T>(
    what: &'static str,
    within: Duration,
    mut look: impl FnMut() -> Result<Option<T>, WanError>,
) -> Result<T, WanError> {
    let started_at = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if started_at.elapsed() > within {
            return Err(WanError::TooLate {
                what,
                seconds: within.as_secs(),
                log: String::new(),
            });
        }
        pause(LOOK_EVERY)?;
    }
}

/// Sleeps.
///
/// # Errors
/// [`WanError::Interrupted`].
pub fn pause(time: Duration) -> Result<(), WanError> {
    let until = Instant::now() + time;
    loop {
        if sys::interrupted() {
            return Err(WanError::Interrupted);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(Duration::from_millis(100)));
    }
}
