//! Copies to and from memory that other threads, processes or a guest change at the same time.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Bytes of this process's memory that others change at the same time, borrowed from what keeps them mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LocalSpan<'a> {
    address: usize,
    length: usize,
    owner: PhantomData<&'a ()>,
}

impl LocalSpan<'_> {
    /// # Safety
    /// `length` bytes from `address` are mapped, readable and writable, for as long as the lifetime, and this process
    /// touches them in no other way than atomically.
    pub(super) const unsafe fn new(address: usize, length: usize) -> Self {
        Self {
            address,
            length,
            owner: PhantomData,
        }
    }
}

/// Copies `from` to `out`, which is as long.
///
/// Words are read one by one, relaxed: the copy may mix old and new ones, but each is one that was there.
pub(crate) fn copy_out(from: LocalSpan<'_>, out: &mut [u8]) {
    assert_eq!(
        from.length,
        out.len(),
        "a copy between spans of unequal length"
    );
    let head = head_of(from.address).min(out.len());
    let (first, rest) = out.split_at_mut(head);
    let mut at = from.address;
    read_bytes(&mut at, first);
    let mut words = rest.chunks_exact_mut(8);
    for word in &mut words {
        // SAFETY: `LocalSpan` is memory that stays mapped, readable and writable, while it is borrowed, and it covers
        // `at`, which advances with `out` and is aligned to 8 behind the head. Every access to such memory from this
        // process is atomic.
        let value = unsafe { AtomicU64::from_ptr(at as *mut u64) }.load(Ordering::Relaxed);
        word.copy_from_slice(&value.to_ne_bytes());
        at += 8;
    }
    read_bytes(&mut at, words.into_remainder());
}

/// Copies `data` to `to`, which is as long; word by word as [`copy_out`].
pub(crate) fn copy_in(to: LocalSpan<'_>, data: &[u8]) {
    assert_eq!(
        to.length,
        data.len(),
        "a copy between spans of unequal length"
    );
    let head = head_of(to.address).min(data.len());
    let (first, rest) = data.split_at(head);
    let mut at = to.address;
    write_bytes(&mut at, first);
    let mut words = rest.chunks_exact(8);
    for word in &mut words {
        let mut value = [0; 8];
        value.copy_from_slice(word);
        // SAFETY: as in `copy_out`.
        unsafe { AtomicU64::from_ptr(at as *mut u64) }
            .store(u64::from_ne_bytes(value), Ordering::Relaxed);
        at += 8;
    }
    write_bytes(&mut at, words.remainder());
}

/// Bytes up to the next address that is aligned to a word.
fn head_of(address: usize) -> usize {
    address.next_multiple_of(8) - address
}

fn read_bytes(at: &mut usize, out: &mut [u8]) {
    for byte in out {
        // SAFETY: as in `copy_out`; a byte has no alignment.
        *byte = unsafe { AtomicU8::from_ptr(*at as *mut u8) }.load(Ordering::Relaxed);
        *at += 1;
    }
}

fn write_bytes(at: &mut usize, data: &[u8]) {
    for &byte in data {
        // SAFETY: as in `copy_out`; a byte has no alignment.
        unsafe { AtomicU8::from_ptr(*at as *mut u8) }.store(byte, Ordering::Relaxed);
        *at += 1;
    }
}
