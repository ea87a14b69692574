//! Moves of virtual machines, as a user makes them: real programs, real KVM, real sockets.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;

mod bad_input;
mod commands;
mod moving;
mod reconnecting;
mod signals;
mod to_and_fro;
mod trust;
