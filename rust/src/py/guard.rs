//! Locks and pins, and how Python's threads wait for them.
//!
//! # Theory
//!
//! Remote memory is reached through functions of Python's, which run while the table is pinned and a queue locked. So
//! whoever holds a pin or a lock may need the GIL, and whoever waits for one must not hold it: a wait is always detached.
//! To hold a pin or a lock while waiting for the GIL is then harmless.
//!
//! In the same thread there is nobody else to wait for: a function that reads or writes remote memory for us is refused
//! queues altogether, and the memory that it serves (`StateError`).
//!
//! Always the pin first: a change of the memory table waits for pins and holds newer ones back, so a thread that held a
//! lock and asked for a pin could wait for one that has a pin and asks for the lock.

#![allow(
    clippy::inline_always,
    reason = "what is not cold here is done several times for each request, and is less than a call"
)]

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use super::errors::StateError;
use super::remote;
use crate::mem::{GuestMemory, Pin, transferring};

/// Copies of more bytes than this release the GIL: coming back beside a busy thread can take 5 ms.
pub(crate) const DETACH_ABOVE: usize = 64 * 1024;

/// The GIL, if this thread holds it.
pub(crate) type Gil<'py> = Option<Python<'py>>;

/// Do `work` on `bytes` bytes, without the GIL if that is worth it.
pub(crate) fn detached<T: Send>(py: Python<'_>, bytes: usize, work: impl FnOnce(Gil<'_>) -> T + Send) -> T {
    if bytes > DETACH_ABOVE {
        py.detach(|| work(None))
    } else {
        work(Some(py))
    }
}

#[cold]
fn refused<T>(text: &'static str) -> PyResult<T> {
    Err(StateError::new_err(text))
}

/// Lock what is never locked inside a transfer.
#[inline(always)]
pub(crate) fn lock<'a, T>(gil: Gil<'_>, mutex: &'a Mutex<T>) -> PyResult<MutexGuard<'a, T>> {
    if transferring() {
        return refused("queues cannot be used by the functions that read and write remote memory");
    }
    if let Ok(guard) = mutex.try_lock() {
        return Ok(guard);
    }
    Ok(lock_slowly(gil, mutex))
}

#[cold]
fn lock_slowly<'a, T>(gil: Gil<'_>, mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
    let locked = match gil {
        Some(py) => mutex.lock_py_attached(py),
        None => mutex.lock(),
    };
    // A panic under a lock is a bug of ours that was reported; what it protects is still consistent, since every
    // operation validates before it changes anything.
    locked.unwrap_or_else(PoisonError::into_inner)
}

/// Pin `guest`.
#[inline(always)]
pub(crate) fn pin<'a>(gil: Gil<'_>, guest: &'a GuestMemory) -> PyResult<Pin<'a>> {
    if guest.in_transfer() {
        return refused("memory cannot be used by the functions that read and write it");
    }
    if let Some(pin) = guest.try_pin() {
        return Ok(pin);
    }
    Ok(pin_slowly(gil, guest))
}

#[cold]
fn pin_slowly<'a>(gil: Gil<'_>, guest: &'a GuestMemory) -> Pin<'a> {
    let Some(py) = gil else { return guest.pin() };
    loop {
        // Somebody changes the table: pins share, so this is not repeated for long.
        py.detach(|| drop(guest.pin()));
        if let Some(pin) = guest.try_pin() {
            return pin;
        }
    }
}

/// One end of a queue and its memory.
pub(crate) struct Guarded<Q> {
    guest: Arc<GuestMemory>,
    queue: Mutex<Q>,
}

impl<Q> Guarded<Q> {
    pub(crate) fn new(guest: Arc<GuestMemory>, queue: Q) -> Self {
        Self {
            guest,
            queue: Mutex::new(queue),
        }
    }

    /// The queue, for what needs no memory.
    #[inline(always)]
    pub(crate) fn lock(&self, gil: Gil<'_>) -> PyResult<MutexGuard<'_, Q>> {
        lock(gil, &self.queue)
    }

    /// The queue, unless somebody has it.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, Q>> {
        self.queue.try_lock().ok()
    }

    /// The memory pinned and the queue locked.
    #[inline(always)]
    pub(crate) fn enter(&self, gil: Gil<'_>) -> PyResult<(Pin<'_>, MutexGuard<'_, Q>)> {
        remote::begin()?;
        let pin = pin(gil, &self.guest)?;
        Ok((pin, self.lock(gil)?))
    }
}

/// Run `$body` with the memory of `$queue` pinned as `$mem` and itself locked as `$locked`. `$gil` says whether this
/// thread holds the GIL. What cannot be, and what interrupted it, is returned from the function around it.
///
/// No Python code runs inside but that of remote memory; making the exception for a broken rule is Python code, so errors
/// are raised outside.
macro_rules! with_queue {
    ($gil:expr, $queue:expr, |$mem:ident, $locked:ident| $body:expr) => {{
        let (pin, mut guard) = $queue.enter($gil)?;
        let $locked = &mut *guard;
        let done = $crate::mem::with_access!(pin, |$mem| $body);
        drop(guard);
        drop(pin);
        $crate::py::remote::interrupted()?;
        done
    }};
}
pub(crate) use with_queue;

/// Run `$body` with `$guest` pinned as `$mem`, as `with_queue!` does.
macro_rules! with_memory {
    ($gil:expr, $guest:expr, |$mem:ident| $body:expr) => {{
        $crate::py::remote::begin()?;
        let pin = $crate::py::guard::pin($gil, $guest)?;
        let done = $crate::mem::with_access!(pin, |$mem| $body);
        drop(pin);
        $crate::py::remote::interrupted()?;
        done
    }};
}
pub(crate) use with_memory;
