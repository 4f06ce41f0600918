//! Remote memory: guest memory that cannot be mapped and is reached by messages, each an access of its own.
//!
//! # Theory
//!
//! Some peers keep their memory to themselves and offer to read and write it for us. A remote region stands for such
//! memory: it has no host address, so no pin ever resolves a range of it, and each access to it is a [`Transfer`], also
//! each of a ring word, of 2, 4 or 8 bytes in little endian. What lies in a mapped region is reached as ever.
//!
//! What atomics promise does not hold over messages, and need not: a transfer ends before the next one of its thread
//! begins, so the other side sees our accesses in the order in which we make them, and it is the other side who
//! serialises them with its own. It has to move a word of a ring whole, as its processor would.
//!
//! A transfer can fail, or take long, in the middle of anything, while the table is pinned and perhaps a queue is locked:
//! it is the one foreign code that runs there. A thread inside a transfer therefore must neither pin the memory that it
//! serves, which could wait for a change of the table that waits for this pin, nor change its table, which would wait for
//! itself, nor use a queue, whose lock it may hold. Each thread knows what it is inside of, so that all of this is
//! refused, by [`transferring`] and [`GuestMemory::in_transfer`](super::GuestMemory::in_transfer), rather than waited for.
//! Two memories of which each is reached through the other, by other threads, are beyond that: do not build them.

use std::cell::RefCell;
use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of one transfer at most; longer accesses are made in pieces.
pub const MAX_TRANSFER: usize = 1 << 20;

/// The other side did not do it; whoever made the transfer knows why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransferFailed;

/// The way to one remote region.
pub trait Transfer: Debug + Send + Sync {
    /// Fill `dst`, at most [`MAX_TRANSFER`] bytes, from guest address `gpa` on; all lie in the region.
    ///
    /// # Errors
    /// When not all of it could be read.
    fn read(&self, gpa: u64, dst: &mut [u8]) -> Result<(), TransferFailed>;

    /// Write `src`, at most [`MAX_TRANSFER`] bytes, to guest address `gpa`; only for regions that are writable.
    ///
    /// # Errors
    /// When not all of it could be written, or it is not known whether it was.
    fn write(&self, gpa: u64, src: &[u8]) -> Result<(), TransferFailed>;
}

thread_local! {
    /// The memories whose transfers this thread is inside of, innermost last.
    static INSIDE: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Transfers of all threads that have not ended. Who asks first asks here, which costs next to nothing: a thread sees
/// what it has counted itself, and the others' are none of its business.
static UNDERWAY: AtomicUsize = AtomicUsize::new(0);

/// Whether this thread is inside a transfer, of whatever memory.
#[inline]
#[must_use]
pub fn transferring() -> bool {
    UNDERWAY.load(Ordering::Relaxed) != 0 && INSIDE.with_borrow(|inside| !inside.is_empty())
}

/// Whether this thread is inside a transfer of `memory`.
#[inline]
pub(super) fn inside(memory: u64) -> bool {
    UNDERWAY.load(Ordering::Relaxed) != 0 && INSIDE.with_borrow(|inside| inside.contains(&memory))
}

/// This thread is inside a transfer of one memory while this lives.
pub(super) struct Inside;

impl Inside {
    pub(super) fn of(memory: u64) -> Self {
        UNDERWAY.fetch_add(1, Ordering::Relaxed);
        INSIDE.with_borrow_mut(|inside| inside.push(memory));
        Self
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with_borrow_mut(Vec::pop);
        UNDERWAY.fetch_sub(1, Ordering::Relaxed);
    }
}
