//! The source: serves a machine's pages, on demand and pushed.
pub mod port;
