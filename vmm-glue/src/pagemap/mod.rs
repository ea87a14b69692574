//! Which pages of a process are there.

mod sys;

pub(crate) use sys::{scan_entries, scan_mapped, scan_present, scan_written};
