//! Small guests, each for one thing.

mod sys;

#[allow(unused_imports, reason = "each test file uses its own part of it")]
pub use sys::{clocks, halt, port_echo, reset, triple_fault};
