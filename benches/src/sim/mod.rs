//! Behind `lazyvm bench sim`: a guest's first touches, recorded once ([`lazyvm_server::trace`]), replayed over a link in
//! virtual time with the scheduler that the server runs.

pub mod link;
pub mod replay;

pub use lazyvm_server::scheduler::Policy;
pub use link::Link;
pub use replay::{Outcome, Replay};
