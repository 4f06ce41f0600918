//! `Chain`: one popped chain in Python's hands, and what it shares with its queue.
//!
//! A chain may be touched while its generation is current and its queue is not latched; each copy checks that
//! under the queue's lock, so that a reset is answered only after running copies have ended.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use smallvec::SmallVec;

use super::args::{Input, Int, Output, Raw};
use super::batch::Popped;
use super::errors::{StaleChain, either};
use super::guard::{Gil, Guarded, detached, with_queue};
use crate::chain::{Element, Segment};
use crate::error::{Misuse, QueueError};
use crate::iov::Iov;
use crate::mem::{Access, At, GuestMemory, Pin, any_lost};
use crate::queue::{DeviceQueue, Ticket};

/// A device queue and its memory, shared with the chains that were popped from it. Holds nothing of Python's but what
/// reads and writes remote memory, so that a chain keeps no cycle alive.
pub(crate) struct Shared {
    guarded: Guarded<DeviceQueue>,
    /// Chains of dropped batches, which go back into the ring before the queue is used again: an object may be dropped
    /// anywhere, also where the lock is held.
    orphans: Mutex<Vec<Popped>>,
    orphaned: AtomicBool,
    uses: AtomicU64,
}

impl Shared {
    pub(crate) fn new(guest: Arc<GuestMemory>, queue: DeviceQueue) -> Self {
        Self {
            guarded: Guarded::new(guest, queue),
            orphans: Mutex::new(Vec::new()),
            orphaned: AtomicBool::new(false),
            uses: AtomicU64::new(0),
        }
    }

    /// The queue, for what needs no memory.
    #[allow(clippy::inline_always, reason = "as what it calls")]
    #[inline(always)]
    pub(crate) fn lock(&self, gil: Gil<'_>) -> PyResult<MutexGuard<'_, DeviceQueue>> {
        let mut queue = self.guarded.lock(gil)?;
        self.used();
        self.adopt(&mut queue);
        Ok(queue)
    }

    /// The memory pinned and the queue locked.
    #[allow(clippy::inline_always, reason = "as what it calls")]
    #[inline(always)]
    pub(crate) fn enter(&self, gil: Gil<'_>) -> PyResult<(Pin<'_>, MutexGuard<'_, DeviceQueue>)> {
        let (pin, mut queue) = self.guarded.enter(gil)?;
        self.used();
        self.adopt(&mut queue);
        Ok((pin, queue))
    }

    /// Count a use, under the lock.
    #[inline]
    fn used(&self) {
        let before = self.uses.load(Ordering::Relaxed);
        self.uses.store(before.wrapping_add(1), Ordering::Relaxed);
    }

    /// How often the queue was locked: as long as that is the same, nobody has reset it, or done anything else to it.
    #[inline]
    pub(crate) fn uses(&self) -> u64 {
        self.uses.load(Ordering::Relaxed)
    }

    /// Put all chains of `popped` back now, or before the queue is used again; never waits.
    pub(crate) fn give_back(&self, mut popped: Popped) {
        if let Some(mut queue) = self.guarded.try_lock() {
            self.adopt(&mut queue);
            popped.put_back(&mut queue, 0);
        } else {
            self.orphans().push(popped);
            self.orphaned.store(true, Ordering::Release);
        }
    }

    fn orphans(&self) -> MutexGuard<'_, Vec<Popped>> {
        self.orphans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn adopt(&self, queue: &mut DeviceQueue) {
        if self.orphaned.load(Ordering::Acquire) {
            self.adopt_all(queue);
        }
    }

    #[cold]
    fn adopt_all(&self, queue: &mut DeviceQueue) {
        self.orphaned.store(false, Ordering::Relaxed);
        let orphans = std::mem::take(&mut *self.orphans());
        for mut popped in orphans {
            popped.put_back(queue, 0);
        }
    }
}

/// One validated descriptor chain.
#[pyclass(frozen, module = "virtio_test._core", name = "Chain")]
pub struct PyChain {
    shared: Arc<Shared>,
    element: Element,
    segments: SmallVec<[Segment; 4]>,
    written: AtomicU64,
    done: AtomicBool,
}

impl PyChain {
    pub(crate) fn new(shared: Arc<Shared>, element: Element, segments: &[Segment]) -> Self {
        Self {
            shared,
            element,
            segments: SmallVec::from_slice(segments),
            written: AtomicU64::new(0),
            done: AtomicBool::new(false),
        }
    }

    pub(crate) fn belongs_to(&self, shared: &Arc<Shared>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    pub(crate) fn ticket(&self) -> Ticket {
        self.element.ticket()
    }

    pub(crate) fn high_water(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Take the right to complete it or to put it back; only one caller gets it.
    pub(crate) fn close(&self) -> PyResult<()> {
        if self.done.swap(true, Ordering::AcqRel) {
            return Err(StaleChain::new_err("the chain was completed or put back already"));
        }
        Ok(())
    }

    /// Put it back, whichever it is; for who has the right to.
    pub(crate) fn put_back(&self, queue: &mut DeviceQueue) {
        queue.put_back(&self.element, &self.segments);
    }

    /// Give the right back: what it was taken for was refused.
    pub(crate) fn reopen(&self) {
        self.done.store(false, Ordering::Release);
    }

    /// The chain's segments, when it may still be touched; asked under the queue's lock, before each copy.
    fn current(&self, queue: &DeviceQueue) -> Result<Iov<'_>, QueueError> {
        if self.done.load(Ordering::Acquire) || !queue.is_current(&self.element.ticket()) {
            return Err(Misuse::StaleChain.into());
        }
        Ok(Iov::new(&self.segments, self.element.epoch))
    }

    fn gather(&self, py: Python<'_>, offset: u64, target: Raw) -> PyResult<usize> {
        let copied: PyResult<_> = detached(py, target.len, move |gil| {
            let Raw { ptr, len } = { target };
            Ok(with_queue!(gil, self.shared, |mem, queue| self
                .current(queue)
                .and_then(|iov| {
                    // SAFETY: `target` comes from a buffer of Python's that its owner keeps alive over this call, or
                    // from memory that we allocated (M6).
                    let copied = unsafe { iov.gather(mem, offset, ptr, len) };
                    queue.copied(copied)
                })))
        });
        copied?.map_err(|error| either(py, error))
    }

    /// Note how far a copy to `offset` went: under the lock of the copy, so that a completion after it knows.
    fn note(&self, offset: u64, copied: usize) -> usize {
        if copied > 0 {
            self.written.fetch_max(offset + copied as u64, Ordering::Relaxed);
        }
        copied
    }
}

#[pymethods]
impl PyChain {
    #[getter]
    const fn head(&self) -> u16 {
        self.element.head
    }

    #[getter]
    fn queue_index(&self, py: Python<'_>) -> PyResult<u16> {
        Ok(self.shared.lock(Some(py))?.config().index)
    }

    #[getter]
    const fn generation(&self) -> u64 {
        self.element.generation
    }

    #[getter]
    const fn descriptors(&self) -> u32 {
        self.element.descriptors
    }

    #[getter]
    const fn readable(&self) -> u64 {
        self.element.readable
    }

    #[getter]
    const fn writable(&self) -> u64 {
        self.element.writable
    }

    #[getter]
    fn written(&self) -> u64 {
        self.high_water()
    }

    #[getter]
    fn segments(&self) -> Vec<(u64, u32, bool)> {
        self.segments
            .iter()
            .map(|segment| (segment.at.gpa, segment.len, segment.writable))
            .collect()
    }

    #[pyo3(signature = (length = None, *, offset = Int(0)))]
    #[pyo3(text_signature = "($self, length=None, *, offset=0)")]
    fn read<'py>(&self, py: Python<'py>, length: Option<Int<u64>>, offset: Int<u64>) -> PyResult<Bound<'py, PyBytes>> {
        let (length, offset) = (length.map(|length| length.0), offset.0);
        let rest = self.element.readable.saturating_sub(offset);
        let length = usize::try_from(length.unwrap_or(rest).min(rest)).unwrap_or(usize::MAX);
        PyBytes::new_with(py, length, |bytes| self.gather(py, offset, Raw::of(bytes)).map(drop))
    }

    #[pyo3(signature = (buffer, *, offset = Int(0)))]
    #[pyo3(text_signature = "($self, buffer, *, offset=0)")]
    #[allow(clippy::needless_pass_by_value, reason = "held until the copy has ended")]
    fn read_into(&self, py: Python<'_>, buffer: Output, offset: Int<u64>) -> PyResult<usize> {
        self.gather(py, offset.0, buffer.raw())
    }

    #[pyo3(signature = (data, *, offset = Int(0)))]
    #[pyo3(text_signature = "($self, data, *, offset=0)")]
    #[allow(clippy::needless_pass_by_value, reason = "held until the copy has ended")]
    fn write(&self, py: Python<'_>, data: Input<'_>, offset: Int<u64>) -> PyResult<usize> {
        let (source, offset) = (data.raw(), offset.0);
        let copied: PyResult<_> = detached(py, source.len, |gil| {
            let Raw { ptr, len } = { source };
            Ok(with_queue!(gil, self.shared, |mem, queue| self
                .current(queue)
                .and_then(|iov| {
                    // SAFETY: `source` comes from a buffer that `data` keeps alive (M6).
                    let copied = unsafe { iov.scatter(mem, offset, ptr, len) };
                    queue.copied(copied.map(|copied| self.note(offset, copied)))
                })))
        });
        copied?.map_err(|error| either(py, error))
    }

    #[pyo3(signature = (value = Int(0), *, offset = Int(0), length = None))]
    #[pyo3(text_signature = "($self, value=0, *, offset=0, length=None)")]
    fn fill(&self, py: Python<'_>, value: Int<u8>, offset: Int<u64>, length: Option<Int<u64>>) -> PyResult<usize> {
        let (value, offset, length) = (value.0, offset.0, length.map(|length| length.0));
        let rest = self.element.writable.saturating_sub(offset);
        let length = usize::try_from(length.unwrap_or(rest).min(rest)).unwrap_or(usize::MAX);
        let set: PyResult<_> = detached(py, length, |gil| {
            Ok(with_queue!(gil, self.shared, |mem, queue| self
                .current(queue)
                .and_then(|iov| {
                    let set = iov.fill(mem, offset, length, value);
                    queue.copied(set.map(|set| self.note(offset, set)))
                })))
        });
        set?.map_err(|error| either(py, error))
    }

    fn __repr__(&self) -> String {
        let Element {
            head,
            readable,
            writable,
            ..
        } = self.element;
        let state = if self.done.load(Ordering::Relaxed) {
            ", done"
        } else {
            ""
        };
        format!("<Chain head={head} readable={readable} writable={writable}{state}>")
    }
}

/// Copies between the chains of one batch and rows of one buffer.
///
/// Mostly a row lies in one segment, whose address is known: that is copied as it is, and only if it may have been lost
/// meanwhile, once more as all others are.
pub(crate) struct Rows<'a> {
    pub(crate) segments: &'a [Segment],
    pub(crate) itemsize: usize,
}

impl<'a> Rows<'a> {
    #[inline]
    fn own(&self, element: &Element) -> &'a [Segment] {
        let segments = self.segments.get(element.first..).unwrap_or_default();
        segments.get(..element.count).unwrap_or_default()
    }

    /// The segment that has the whole row of a chain, if its address still holds.
    #[inline]
    fn single<A: Access>(&self, mem: &A, own: &'a [Segment], epoch: u64, writable: bool) -> Option<At> {
        let first = own.iter().find(|segment| segment.writable == writable)?;
        let whole = self.itemsize > 0 && first.len as usize >= self.itemsize;
        (whole && mem.epoch() == epoch).then_some(first.at)
    }

    /// Gather the first `itemsize` readable bytes of `element` into row `row` of `target`.
    #[inline]
    pub(crate) fn gather<A: Access>(
        &self,
        mem: &A,
        queue: &mut DeviceQueue,
        element: &Element,
        target: Raw,
        row: usize,
    ) -> Result<(), QueueError> {
        if !queue.is_current(&element.ticket()) {
            return Err(Misuse::StaleChain.into());
        }
        let target = target.row(row, self.itemsize).ok_or_else(|| too_few_rows(row))?;
        let own = self.own(element);
        if let Some(at) = self.single(mem, own, element.epoch, false) {
            // SAFETY: `row` proved that the row lies inside the caller's buffer, which is held (M6).
            let copied = unsafe { mem.read_raw(at, 0, target.ptr, target.len) };
            if copied.is_err() || !any_lost() {
                return queue.copied(copied);
            }
        }
        // SAFETY: as above.
        let copied = unsafe { Iov::new(own, element.epoch).gather(mem, 0, target.ptr, target.len) };
        queue.copied(copied.map(drop))
    }

    /// Scatter row `row` of `source` into the writable part of `element`.
    #[inline]
    pub(crate) fn scatter<A: Access>(
        &self,
        mem: &A,
        queue: &mut DeviceQueue,
        element: &Element,
        source: Raw,
        row: usize,
    ) -> Result<(), QueueError> {
        let source = source.row(row, self.itemsize).ok_or_else(|| too_few_rows(row))?;
        let own = self.own(element);
        if let Some(at) = self.single(mem, own, element.epoch, true) {
            // SAFETY: as in `gather`.
            let copied = unsafe { mem.write_raw(at, 0, source.ptr, source.len) };
            if copied.is_err() || !any_lost() {
                return queue.copied(copied);
            }
        }
        // SAFETY: as in `gather`.
        let copied = unsafe { Iov::new(own, element.epoch).scatter(mem, 0, source.ptr, source.len) };
        queue.copied(copied.map(drop))
    }
}

#[cold]
fn too_few_rows(row: usize) -> Misuse {
    Misuse::Invalid(format!("the buffer has no row {row}"))
}
