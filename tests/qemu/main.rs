//! Moves of unmodified QEMUs with a Linux guest that checks its own memory: real programs, real kernels.
//!
//! The guest's only program is `init.c`; it writes a line every 50 ms that tells how many pages it has touched and how
//! many were wrong, and another one of the same kind about its disk and network where it uses these.

// Clippy allows these in tests only, not in what tests share.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
// What is compared is the same for every monitor.
#[path = "../../vmm-glue/tests/common/at_pause.rs"]
mod at_pause;
#[path = "../../vmm-glue/tests/common/copy.rs"]
mod copy;
mod guest;
mod hosts;
mod huge_pages;
mod images;
mod kills;
mod load;
mod modes;
mod moves;
mod recorder;
mod refusals;
mod snapshots;
mod surroundings;
mod tracker;
