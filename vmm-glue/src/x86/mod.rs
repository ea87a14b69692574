//! What a guest's own tables tell of the pages that it needs first: page tables of x86-64, descriptor tables, stacks,
//! per-CPU data.
//!
//! All of it is read from guest memory, which may hold anything: whatever is there, each walk ends (see [`Bounds`]), and
//! what makes no sense is passed over. Formats as in the AMD64 Architecture Programmer's Manual, volume 2, chapters 4
//! (segmented virtual memory), 5 (page translation) and 8 (interrupts).

mod code;
mod guest;
mod looks;
mod pages;
mod pointers;
mod registers;
mod resume_set;
mod spaces;
mod walk;

pub use guest::{GuestMemory, Table};
pub use looks::{Looks, Touched};
pub use pages::{PageList, PageSet};
pub use registers::{Segment, Vcpu};
pub use resume_set::{Known, resume_set};
pub use spaces::{AddressSpace, find_spaces, keep_live};
pub use walk::{Bounds, Found, Levels, Mapping, Paging, Tables, Walker};
