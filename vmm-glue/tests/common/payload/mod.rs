//! Small guests, each for one thing.

mod sys;

#[allow(unused_imports, reason = "each test file uses its own part of it")]
pub use sys::{alphabet, boot_echo, clocks, halt, reset, triple_fault};
