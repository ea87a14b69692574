//! The protocol.
mod layout;
mod machine;
mod page;
pub use layout::*;
pub use machine::*;
pub use page::*;
