//! `lazyvm status`: how a VM or a session is. Shows no secret.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use lazyvm_server::{RecordedPhase, read_record};
use lazyvm_vmm_glue::kvm::ControlClient;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::Serialize;
use serde_json::Value;

use crate::exit::Exit;

/// Flags of `status`.
#[derive(Args)]
pub struct StatusArgs {
    /// The control socket of a VM, or the directory of a session
    #[arg(value_name = "SOCK|SESSION_DIR")]
    target: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What a session's record tells anybody.
#[derive(Serialize)]
struct SessionView {
    session: String,
    phase: RecordedPhase,
    ended: Option<String>,
    pages_total: u64,
    pages_at_destination: u64,
    downtime_us: u64,
    pid: u32,
    /// Whether a process with this number runs.
    pid_runs: bool,
}

/// Prints the status.
pub fn status(args: &StatusArgs) -> anyhow::Result<Exit> {
    let value = if args.target.is_dir() {
        serde_json::to_value(session(&args.target)?)?
    } else {
        serde_json::to_value(ControlClient::connect(&args.target)?.status()?)?
    };
    let text = if args.json {
        format!("{value:#}\n")
    } else {
        lines(&value)
    };
    io::stdout()
        .write_all(text.as_bytes())
        .context("can't print the status")?;
    Ok(Exit::Done)
}

fn session(dir: &Path) -> anyhow::Result<SessionView> {
    let record = read_record(dir)?;
    let pid_runs =
        i32::try_from(record.pid).is_ok_and(|pid| kill(Pid::from_raw(pid), None).is_ok());
    Ok(SessionView {
        session: record.session,
        phase: record.phase,
        ended: record.ended,
        pages_total: record.pages_total,
        pages_at_destination: record.pages_at_destination,
        downtime_us: record.downtime_us,
        pid: record.pid,
        pid_runs,
    })
}

/// One line a field: its name, and its value in words.
fn lines(value: &Value) -> String {
    let Value::Object(fields) = value else {
        return format!("{value}\n");
    };
    let in_words = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.to_owned(),
        Value::String(text) => lazyvm_wire::printable(text).into_owned(),
        other => other.to_string(),
    };
    let width = fields.keys().map(String::len).max().unwrap_or(0) + 1;
    fields
        .iter()
        .map(|(name, value)| {
            format!(
                "{:width$} {}\n",
                format!("{}:", name.replace('_', " ")),
                in_words(value)
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_is_a_line() {
        let value = serde_json::json!({"pid_runs": true, "ended": null, "phase": "ended\u{1b}[2J"});
        let text = lines(&value);
        assert!(
            text.contains("pid runs: yes\n") && text.contains("ended:    -\n"),
            "{text}"
        );
        assert!(text.contains("phase:    ended?[2J\n"), "{text}");
    }
}
