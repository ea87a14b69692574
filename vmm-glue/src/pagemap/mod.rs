//! Which pages of a process are there.

mod sys;

pub(crate) use sys::{Pages, scan};
