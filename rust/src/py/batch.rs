//! `Batch`: several chains taken at once, with requests in one buffer and responses from one buffer.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyMemoryView};

use super::args::{Input, Int, Output, Raw, invalid};
use super::chain::{Rows, Shared};
use super::device::PyDeviceQueue;
use super::errors::{InvalidArgument, StaleChain, either, raise};
use super::guard::{lock, with_queue};
use super::remote::{pending, pressing};
use crate::chain::{Element, Segment};
use crate::error::{Fault, QueueError};
use crate::mem::Access;
use crate::queue::DeviceQueue;

/// Chains that there is room for from the start, with two segments each.
const ROOM: usize = 128;

/// Popped chains and the arena of their segments.
#[derive(Default)]
pub(crate) struct Popped {
    pub(crate) elements: Vec<Element>,
    pub(crate) segments: Vec<Segment>,
}

/// Room that one user of a queue leaves for the next.
#[derive(Default)]
pub(crate) struct Spare(Mutex<Popped>);

impl Spare {
    /// Nothing, with room if some was left.
    pub(crate) fn take(&self) -> Popped {
        self.0
            .try_lock()
            .map_or_else(|_| Popped::default(), |mut spare| std::mem::take(&mut *spare))
    }

    /// Leave the room of what nobody needs any more, unless it is very much.
    pub(crate) fn keep(&self, mut popped: Popped) {
        popped.clear();
        if popped.elements.capacity() <= ROOM && popped.segments.capacity() <= 4 * ROOM {
            if let Ok(mut spare) = self.0.try_lock() {
                *spare = popped;
            }
        }
    }
}

impl Popped {
    /// Pop up to `limit` chains.
    pub(crate) fn take(py: Python<'_>, queue: &PyDeviceQueue, limit: usize) -> PyResult<Self> {
        let mut popped = Self::default();
        let (done, anew) = with_queue!(Some(py), queue.shared(), |mem, queue| {
            let done = popped.pop(mem, queue, limit);
            if pending() {
                popped.put_back(queue, 0);
            }
            (done, queue.waits_anew())
        });
        done.map_err(|fault| raise(py, &fault))?;
        if let Err(error) = queue.tell_of_miss(py, anew) {
            queue.shared().give_back(popped);
            return Err(error);
        }
        Ok(popped)
    }

    /// The same under the queue's lock.
    #[inline]
    pub(crate) fn pop<A: Access>(&mut self, mem: &A, queue: &mut DeviceQueue, limit: usize) -> Result<(), Fault> {
        let room = limit.min(ROOM);
        self.elements.reserve(room);
        self.segments.reserve(2 * room);
        queue
            .pop_many(mem, limit, &mut self.segments, &mut self.elements)
            .map(drop)
    }

    /// Forget all, but keep the room for the next ones.
    pub(crate) fn clear(&mut self) {
        self.elements.clear();
        self.segments.clear();
    }

    /// Copies from and to its chains, with rows of `itemsize` bytes.
    #[inline]
    pub(crate) fn rows(&self, itemsize: usize) -> Rows<'_> {
        Rows {
            segments: &self.segments,
            itemsize,
        }
    }

    /// The segments of one of its chains.
    pub(crate) fn segments_of(&self, element: &Element) -> &[Segment] {
        let segments = self.segments.get(element.first..).unwrap_or_default();
        segments.get(..element.count).unwrap_or_default()
    }

    /// Put the chains from `first` on back into the ring, newest first.
    pub(crate) fn put_back(&mut self, queue: &mut DeviceQueue, first: usize) {
        while self.elements.len() > first {
            let Some(element) = self.elements.pop() else { break };
            queue.put_back(&element, self.segments_of(&element));
        }
    }

    /// Requests of the elements for which `keep` is true, one row each.
    pub(crate) fn gather<'py, A: Access>(
        &self,
        py: Python<'py>,
        mem: &A,
        queue: &mut DeviceQueue,
        itemsize: usize,
        keep: impl Fn(&Element) -> bool,
    ) -> Result<Bound<'py, PyBytes>, Trouble> {
        let kept = self.elements.iter().filter(|element| keep(element));
        let total = room(kept.clone().count(), itemsize)?;
        let rows = self.rows(itemsize);
        // Only an error is moved: it is large.
        let mut trouble = None;
        let bytes = PyBytes::new_with(py, total, |bytes| {
            let target = Raw::of(bytes);
            for (row, element) in kept.enumerate() {
                if let Err(error) = rows.gather(mem, queue, element, target, row) {
                    trouble = Some(error);
                    break;
                }
            }
            Ok(())
        });
        trouble.map_or_else(|| Ok(bytes?), |error| Err(error.into()))
    }

    /// Complete all elements: those for which `keep` is true with their row of `source`, the others with 0;
    /// publish once. A chain whose memory has gone is completed with 0, and the error reported after the others.
    pub(crate) fn respond(
        &self,
        py: Python<'_>,
        shared: &Shared,
        source: Raw,
        itemsize: usize,
        keep: impl Fn(&Element) -> bool,
    ) -> PyResult<Responded> {
        let answered = with_queue!(Some(py), shared, |mem, queue| self
            .answer(mem, queue, source, itemsize, keep));
        answered.map_err(|error| either(py, error))
    }

    fn answer<A: Access>(
        &self,
        mem: &A,
        queue: &mut DeviceQueue,
        source: Raw,
        itemsize: usize,
        keep: impl Fn(&Element) -> bool,
    ) -> Result<Responded, QueueError> {
        let rows = self.rows(itemsize);
        let (mut row, mut responded) = (0, Responded::default());
        let mut trouble = None;
        for element in &self.elements {
            let ticket = element.ticket();
            let kept = keep(element);
            let fits = kept && element.writable >= itemsize as u64;
            let mut written = 0;
            if fits && queue.is_current(&ticket) {
                match rows.scatter(mem, queue, element, source, row) {
                    Ok(()) => written = itemsize as u64,
                    Err(QueueError::Misuse(misuse)) => trouble = trouble.or(Some(misuse)),
                    Err(violation) => return Err(violation),
                }
            }
            let done = queue.complete(mem, &ticket, written)?;
            responded.completed += usize::from(done);
            responded.good += usize::from(done && fits);
            row += usize::from(kept);
            if done && !fits {
                queue.count_rejected(1);
            }
        }
        queue.publish(mem)?;
        trouble.map_or(Ok(responded), |misuse| Err(misuse.into()))
    }
}

/// What stopped a gathering.
pub(crate) enum Trouble {
    /// What the chains or their memory did.
    Queue(QueueError),
    /// No memory for a new object.
    Python(PyErr),
}

impl Trouble {
    /// The exception of it; no lock is held.
    #[cold]
    pub(crate) fn raise(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Queue(error) => either(py, error),
            Self::Python(error) => error,
        }
    }
}

impl From<QueueError> for Trouble {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

impl From<PyErr> for Trouble {
    fn from(error: PyErr) -> Self {
        Self::Python(error)
    }
}

/// What `Popped::respond` did.
#[derive(Clone, Copy, Default)]
pub(crate) struct Responded {
    /// Chains completed, with a response or with 0.
    pub(crate) completed: usize,
    /// Chains completed with a response.
    pub(crate) good: usize,
}

struct State {
    popped: Popped,
    /// Readable bytes that a chain must have to be a row; set by `requests`.
    least: u64,
}

impl State {
    fn rows(&self) -> usize {
        let elements = self.popped.elements.iter();
        elements.filter(|element| element.readable >= self.least).count()
    }
}

/// Several chains taken at once.
#[pyclass(frozen, module = "virtio_test._core", name = "Batch")]
pub struct PyBatch {
    queue: Py<PyDeviceQueue>,
    state: Mutex<Option<State>>,
}

impl PyBatch {
    pub(crate) fn new(queue: Py<PyDeviceQueue>, popped: Popped) -> Self {
        Self {
            queue,
            state: Mutex::new(Some(State { popped, least: 0 })),
        }
    }

    /// Held while requests are read, so also while functions of Python's read remote memory.
    fn state(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, Option<State>>> {
        lock(Some(py), &self.state)
    }
}

fn spent() -> PyErr {
    StaleChain::new_err("the batch was responded to already")
}

#[pymethods]
impl PyBatch {
    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.state(py)?.as_ref().map_or(0, State::rows))
    }

    fn requests<'py>(&self, py: Python<'py>, itemsize: Int<usize>) -> PyResult<Bound<'py, PyMemoryView>> {
        let itemsize = itemsize.0;
        let gathered = {
            let mut state = self.state(py)?;
            let state = state.as_mut().ok_or_else(spent)?;
            let least = itemsize as u64;
            let popped = &state.popped;
            let gathered = with_queue!(Some(py), self.queue.get().shared(), |mem, queue| popped.gather(
                py,
                mem,
                queue,
                itemsize,
                |element| element.readable >= least
            ));
            if gathered.is_ok() {
                state.least = least;
            }
            gathered
        };
        // Without the lock: to make an exception is Python code, during which anything of Python's may run.
        let bytes = gathered.map_err(|trouble| trouble.raise(py))?;
        PyMemoryView::from(&bytes)
    }

    #[pyo3(signature = (responses, *, itemsize = None))]
    #[allow(clippy::needless_pass_by_value, reason = "held until the copies have ended")]
    fn respond(&self, py: Python<'_>, responses: Input<'_>, itemsize: Option<Int<usize>>) -> PyResult<usize> {
        let source = responses.raw();
        let (taken, itemsize) = {
            let mut state = self.state(py)?;
            let rows = state.as_ref().ok_or_else(spent)?.rows();
            let itemsize = match itemsize {
                Some(itemsize) => itemsize.0,
                None => source.len.checked_div(rows).unwrap_or(0),
            };
            if rows.checked_mul(itemsize) != Some(source.len) {
                let text = format!("{} response bytes are not {rows} rows of {itemsize}", source.len);
                return Err(InvalidArgument::new_err(text));
            }
            (state.take().ok_or_else(spent)?, itemsize)
        };
        let State { popped, least } = taken;
        let responded = popped.respond(py, self.queue.get().shared(), source, itemsize, |element| {
            element.readable >= least
        });
        match (responded, self.queue.get().signal(py)) {
            (Ok(responded), Ok(_)) => Ok(responded.good),
            (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
            (Err(first), Err(second)) => Err(pressing(py, second, first)),
        }
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.queue)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.__len__(py).map_or_else(
            |_| "<Batch in a transfer>".to_owned(),
            |chains| format!("<Batch of {chains} chains>"),
        )
    }
}

impl Drop for PyBatch {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(state) = state.take() {
            self.queue.get().shared().give_back(state.popped);
        }
    }
}

/// Bytes of so many rows.
fn room(rows: usize, itemsize: usize) -> PyResult<usize> {
    let total = rows.checked_mul(itemsize);
    total.ok_or_else(|| invalid(format_args!("{rows} rows of {itemsize} bytes are too much")))
}

/// A zeroed bytearray, and the view of it that holds its size while a handler has it.
pub(crate) fn zeroed(py: Python<'_>, rows: usize, itemsize: usize) -> PyResult<(Bound<'_, PyByteArray>, Output)> {
    let bytes = PyByteArray::new_with(py, room(rows, itemsize)?, |_| Ok(()))?;
    let view = bytes.extract()?;
    Ok((bytes, view))
}
