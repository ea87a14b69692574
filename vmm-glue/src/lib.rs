//! The hypervisors: what the page server and the pager need of each.
//!
//! [`kvm`] is lazyvm's own.

pub mod kvm;
pub mod plain;
