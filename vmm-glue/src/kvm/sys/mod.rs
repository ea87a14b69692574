//! What cannot be said to KVM in safe Rust.
#![allow(unsafe_code)]

mod kick;
mod lazy;
mod touches;
mod vcpu;
mod vm;

pub(super) use kick::ImmediateExit;
pub(super) use lazy::lazy_memory;
pub(super) use touches::drop_entries;
pub(super) use vcpu::Vcpu;
pub(super) use vm::GuestVm;
