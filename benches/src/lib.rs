//! The runs behind `lazyvm bench`: latency of faults, throughput of the push, and an emulated wide-area link.
//!
//! Source and destination are two processes. The destination's side runs in the calling process; the source is a child
//! that runs [`source::run`], which the caller's executable has to reach by a command of its own. Every figure that is
//! to be compared comes from the same run: absolute times drift with the machine, ratios do not.

mod bare;
mod cpus;
mod error;
pub mod fault;
mod image;
pub mod link;
pub mod push;
pub mod sim;
pub mod source;
mod sys;
pub mod track;
pub mod wan;
mod way;

pub use error::BenchError;
pub use image::Content;
pub use sys::BareUffd;
