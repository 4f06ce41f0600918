//! `Chain`: one popped chain in Python's hands, and what it shares with its queue.
//!
//! A chain may be touched while its generation is current and its queue is not latched; each copy checks that
//! under the queue's lock, so that a reset is answered only after running copies have ended. The lock is never
//! held while Python code runs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use smallvec::SmallVec;

use super::args::{Input, Int, Output, Raw, detached};
use super::errors::{InvalidArgument, StaleChain, stale};
use crate::chain::{Element, Segment};
use crate::error::Misuse;
use crate::iov::Iov;
use crate::mem::{GuestMemory, MemoryError, with_access};
use crate::queue::{DeviceQueue, Ticket};

/// A device queue and its memory, shared with the chains that were popped from it. Holds nothing of Python's, so
/// that a chain keeps no cycle alive.
pub(crate) struct Shared {
    pub(crate) guest: Arc<GuestMemory>,
    queue: Mutex<DeviceQueue>,
}

impl Shared {
    pub(crate) fn new(guest: Arc<GuestMemory>, queue: DeviceQueue) -> Self {
        Self {
            guest,
            queue: Mutex::new(queue),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, DeviceQueue> {
        // A panic under the lock is a bug of ours that was reported; the queue's state is still consistent,
        // since every operation validates before it changes anything.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Whether it can still be pushed or put back.
    pub(crate) fn check_open(&self) -> PyResult<()> {
        if self.done.load(Ordering::Acquire) {
            return Err(StaleChain::new_err("the chain was completed or put back already"));
        }
        Ok(())
    }

    /// Take the right to complete it; only one caller gets it.
    pub(crate) fn close(&self) -> PyResult<()> {
        if self.done.swap(true, Ordering::AcqRel) {
            return Err(StaleChain::new_err("the chain was completed or put back already"));
        }
        Ok(())
    }

    /// Give the right back: the completion was refused.
    pub(crate) fn reopen(&self) {
        self.done.store(false, Ordering::Release);
    }

    /// Run a copy while the chain is current, and the queue cannot be reset meanwhile.
    fn copy(&self, f: impl FnOnce(Iov<'_>) -> Result<usize, MemoryError>) -> Result<usize, Misuse> {
        let queue = self.shared.lock();
        if self.done.load(Ordering::Acquire) || !queue.is_current(&self.element.ticket()) {
            return Err(Misuse::StaleChain);
        }
        f(Iov::new(&self.segments, self.element.epoch)).map_err(Misuse::StaleMemory)
    }

    fn gather(&self, py: Python<'_>, offset: u64, target: Raw) -> PyResult<usize> {
        let copied = detached(py, target.len, move || {
            let Raw { ptr, len } = { target };
            let pin = self.shared.guest.pin();
            // SAFETY: `target` comes from a buffer of Python's that its owner keeps alive over this call, or from memory that we allocated (M6).
            self.copy(|iov| with_access!(pin, |mem| unsafe { iov.gather(mem, offset, ptr, len) }))
        });
        Ok(copied?)
    }

    fn wrote(&self, end: u64) {
        self.written.fetch_max(end, Ordering::Relaxed);
    }
}

#[pymethods]
impl PyChain {
    #[getter]
    const fn head(&self) -> u16 {
        self.element.head
    }

    #[getter]
    fn queue_index(&self) -> u16 {
        self.shared.lock().config().index
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
        let copied = detached(py, source.len, || {
            let Raw { ptr, len } = { source };
            let pin = self.shared.guest.pin();
            // SAFETY: `source` comes from a buffer that `data` keeps alive (M6).
            self.copy(|iov| with_access!(pin, |mem| unsafe { iov.scatter(mem, offset, ptr, len) }))
        })?;
        if copied > 0 {
            self.wrote(offset + copied as u64);
        }
        Ok(copied)
    }

    #[pyo3(signature = (value = Int(0), *, offset = Int(0), length = None))]
    #[pyo3(text_signature = "($self, value=0, *, offset=0, length=None)")]
    fn fill(&self, py: Python<'_>, value: Int<u8>, offset: Int<u64>, length: Option<Int<u64>>) -> PyResult<usize> {
        let (value, offset, length) = (value.0, offset.0, length.map(|length| length.0));
        let rest = self.element.writable.saturating_sub(offset);
        let length = usize::try_from(length.unwrap_or(rest).min(rest)).unwrap_or(usize::MAX);
        let set = detached(py, length, || {
            let pin = self.shared.guest.pin();
            self.copy(|iov| with_access!(pin, |mem| iov.fill(mem, offset, length, value)))
        })?;
        if set > 0 {
            self.wrote(offset + set as u64);
        }
        Ok(set)
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
pub(crate) struct Rows<'a> {
    pub(crate) segments: &'a [Segment],
    pub(crate) itemsize: usize,
}

impl Rows<'_> {
    fn iov(&self, element: &Element) -> Iov<'_> {
        let segments = self.segments.get(element.first..).unwrap_or_default();
        Iov::new(segments.get(..element.count).unwrap_or_default(), element.epoch)
    }

    /// Gather the first `itemsize` readable bytes of each element into the rows of `target`.
    pub(crate) fn gather(&self, guest: &GuestMemory, elements: &[&Element], target: Raw) -> PyResult<()> {
        let pin = guest.pin();
        for (row, element) in elements.iter().enumerate() {
            let target = target.row(row, self.itemsize).ok_or_else(|| too_few_rows(row))?;
            // SAFETY: `row` proved that the row lies inside the caller's buffer (M6).
            let copied = with_access!(pin, |mem| unsafe {
                self.iov(element).gather(mem, 0, target.ptr, target.len)
            });
            copied.map_err(stale)?;
        }
        Ok(())
    }

    /// Scatter row `row` of `source` into the writable part of `element`.
    pub(crate) fn scatter(&self, guest: &GuestMemory, element: &Element, source: Raw, row: usize) -> PyResult<()> {
        let source = source.row(row, self.itemsize).ok_or_else(|| too_few_rows(row))?;
        let pin = guest.pin();
        // SAFETY: as in `gather`.
        let copied = with_access!(pin, |mem| unsafe {
            self.iov(element).scatter(mem, 0, source.ptr, source.len)
        });
        copied.map(drop).map_err(stale)
    }
}

fn too_few_rows(row: usize) -> PyErr {
    InvalidArgument::new_err(format!("the buffer has no row {row}"))
}
