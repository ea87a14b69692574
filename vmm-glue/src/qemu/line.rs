//! The lines of the QEMU machine protocol, as they come. Pure logic.

use serde_json::Value;

/// Longest line that is taken, in bytes: a memory tree of thousands of regions fits.
pub const LINE_MAX: usize = 16 << 20;

/// A line that does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line is longer than {LINE_MAX} bytes")]
pub struct TooLong;

/// Cuts what comes into lines.
#[derive(Debug, Default)]
pub struct Lines {
    pending: Vec<u8>,
    /// So much of it has no line's end.
    searched: usize,
}

impl Lines {
    /// Takes what came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The next whole line with its end, if there is one.
    ///
    /// # Errors
    /// [`TooLong`].
    #[allow(
        clippy::should_implement_trait,
        reason = "more lines may come after none"
    )]
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        let rest = self.pending.get(self.searched..).unwrap_or_default();
        match rest.iter().position(|&byte| byte == b'\n') {
            Some(at) => {
                let behind = self.pending.split_off(self.searched + at + 1);
                self.searched = 0;
                Ok(Some(std::mem::replace(&mut self.pending, behind)))
            }
            None if self.pending.len() > LINE_MAX => Err(TooLong),
            None => {
                self.searched = self.pending.len();
                Ok(None)
            }
        }
    }
}

/// What a line says.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// A command's answer.
    Return(Value),
    /// A command is refused, in QEMU's words.
    Error(String),
    /// An event, or what a later QEMU says.
    Other(Value),
}

impl Message {
    /// Reads a line.
    ///
    /// # Errors
    /// It is no JSON.
    pub fn parse(line: &[u8]) -> Result<Self, serde_json::Error> {
        Self::parse_with_id(line).map(|(_, message)| message)
    }

    /// Reads a line, and the number of the command that it answers: QEMU repeats the command's `id`.
    ///
    /// # Errors
    /// It is no JSON.
    pub fn parse_with_id(line: &[u8]) -> Result<(Option<u64>, Self), serde_json::Error> {
        let mut answer: Value = serde_json::from_slice(line)?;
        let id = answer.get("id").and_then(Value::as_u64);
        if let Some(value) = answer.get_mut("return") {
            return Ok((id, Self::Return(value.take())));
        }
        if let Some(error) = answer.get("error") {
            let text = error.get("desc").and_then(Value::as_str);
            let text = text.unwrap_or("no reason given").to_owned();
            return Ok((id, Self::Error(text)));
        }
        Ok((id, Self::Other(answer)))
    }
}

/// QEMU's version, out of its greeting; `None` where that is none.
pub fn version(line: &[u8]) -> Option<String> {
    let greeting: Value = serde_json::from_slice(line).ok()?;
    let version = greeting.get("QMP")?.get("version")?.get("qemu")?;
    let number = |name: &str| version.get(name).and_then(Value::as_u64);
    Some(format!(
        "{}.{}.{}",
        number("major")?,
        number("minor")?,
        number("micro")?
    ))
}
