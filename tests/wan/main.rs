//! The rig of `lazyvm bench wan`: the emulated path by what sockets see of it, and a whole run.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod loss;
mod path;
mod push;
mod run;
