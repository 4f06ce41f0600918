//! Two ways to handle the chains of a `DeviceQueue`: request by request, and a whole batch at once.
//!
//! # Theory
//!
//! A burst is popped and gathered in one go, under the queue's lock, handled without it, and completed in one go again:
//! while Python code runs, no lock and no pin is held, so a handler may use the queue, or reset it. What a handler
//! answers waits until the burst is completed, if it is `bytes`, which nobody can change; any other buffer may be another
//! one after the next call, so it is copied at once, and what waits before it goes with it.
//!
//! Before each call the chain must still be current. That is asked under the lock, but only when somebody used the queue
//! since it was asked last (`Shared::uses`): mostly, nobody did.

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyMemoryView};
use smallvec::SmallVec;

use super::args::{Input, Output, Raw};
use super::batch::{Popped, Trouble, zeroed};
use super::chain::PyChain;
use super::device::PyDeviceQueue;
use super::errors::{HandlerError, either, raise};
use super::guard::{DETACH_ABOVE, with_queue};
use super::remote::{no_buffer, pending, pressing};
use crate::chain::Element;
use crate::error::QueueError;
use crate::mem::Access;
use crate::queue::DeviceQueue;

/// Chains taken at once: enough to spread the cost of a publication.
const BURST: usize = 32;

/// What one call of `process` may do at most.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    pub(super) chains: usize,
    /// Bytes of one request that a handler still gets.
    pub(super) request: usize,
    /// Bytes read and written in all, and whatever the handlers charge; the chain that reaches it is the last one.
    pub(super) bytes: usize,
}

/// What has been done.
#[derive(Default)]
struct Progress {
    taken: usize,
    /// Chains that were not dropped.
    completed: usize,
    bytes: usize,
}

/// A chain of a burst, on its way.
enum Step<'py> {
    /// Its handler was not called yet.
    Asks(Bound<'py, PyBytes>),
    /// 0 bytes, as the handler wanted.
    Nothing,
    /// The handler's bytes; 0 bytes and counted as rejected, when they do not fit.
    Answered(Bound<'py, PyBytes>),
    /// The same of a buffer, which its owner holds until it is copied.
    Copied(Raw),
    /// 0 bytes and counted as rejected: no handler sees it.
    Refused,
}

/// Chains taken together, and how far each has come.
#[derive(Default)]
struct Burst<'py> {
    popped: Popped,
    steps: SmallVec<[Step<'py>; BURST]>,
    /// So many of them, from the first on, are completed (or kept for `take_failed`).
    settled: usize,
    /// Bytes of the answers that wait.
    waiting: usize,
}

impl<'py> Burst<'py> {
    /// Take requests of as many of the chains as fit `most` bytes together, and of one in any case.
    fn gather<A: Access>(
        &mut self,
        py: Python<'py>,
        mem: &A,
        queue: &mut DeviceQueue,
        most: usize,
        max_request: usize,
    ) -> Result<(), Trouble> {
        let mut total = 0;
        for element in &self.popped.elements {
            let length = usize::try_from(element.readable).unwrap_or(usize::MAX);
            if length > max_request {
                self.steps.push(Step::Refused);
                continue;
            }
            total += length;
            if total > most && !self.steps.is_empty() {
                break;
            }
            let rows = self.popped.rows(length);
            // Only an error is moved: it is large.
            let mut trouble = None;
            let request = PyBytes::new_with(py, length, |bytes| {
                if let Err(error) = rows.gather(mem, queue, element, Raw::of(bytes), 0) {
                    trouble = Some(error);
                }
                Ok(())
            });
            if let Some(error) = trouble {
                return Err(error.into());
            }
            self.steps.push(Step::Asks(request?));
        }
        Ok(())
    }

    /// Complete the chains before `end` that are not, in their order.
    fn complete<A: Access>(
        &mut self,
        mem: &A,
        queue: &mut DeviceQueue,
        end: usize,
        progress: &mut Progress,
    ) -> Result<(), QueueError> {
        while let (true, Some(element), Some(step)) = (
            self.settled < end,
            self.popped.elements.get(self.settled),
            self.steps.get(self.settled),
        ) {
            let ticket = element.ticket();
            let (fits, response) = match step {
                Step::Nothing => (true, None),
                Step::Answered(bytes) => within(Raw::of_bytes(bytes), element),
                Step::Copied(raw) => within(*raw, element),
                Step::Asks(_) | Step::Refused => (false, None),
            };
            let mut written = 0;
            if let Some(raw) = response.filter(|_| queue.is_current(&ticket)) {
                self.popped.rows(raw.len).scatter(mem, queue, element, raw, 0)?;
                written = raw.len as u64;
            }
            let done = queue.complete(mem, &ticket, written)?;
            if done && !fits {
                queue.count_rejected(1);
            }
            progress.completed += usize::from(done);
            self.settled += 1;
        }
        Ok(())
    }
}

/// Whether a response fits its chain, and the response if it does.
fn within(raw: Raw, element: &Element) -> (bool, Option<Raw>) {
    let fits = raw.len as u64 <= element.writable;
    (fits, fits.then_some(raw))
}

/// `outcome` after one more error.
fn worse(py: Python<'_>, outcome: PyResult<()>, error: PyErr) -> PyResult<()> {
    Err(match outcome {
        Ok(()) => error,
        Err(before) => pressing(py, before, error),
    })
}

impl PyDeviceQueue {
    /// Call `handler(request)` for as many chains as the bounds allow; the number completed.
    pub(super) fn one_by_one(&self, py: Python<'_>, handler: &Bound<'_, PyAny>, bounds: Bounds) -> PyResult<usize> {
        let mut progress = Progress::default();
        let mut burst = Burst {
            popped: self.spare().take(),
            ..Burst::default()
        };
        self.take_charge();
        let outcome = loop {
            if progress.taken >= bounds.chains || progress.bytes >= bounds.bytes {
                break Ok(());
            }
            match self.burst(py, handler, bounds, &mut burst, &mut progress) {
                Ok(0) => break Ok(()),
                Ok(count) => progress.taken += count,
                Err(error) => break Err(error),
            }
        };
        self.spare().keep(burst.popped);
        // What was answered before a failure is announced all the same.
        match (outcome, self.signal(py)) {
            (Ok(()), Ok(_)) => Ok(progress.completed),
            (Err(error), Ok(_)) | (Ok(()), Err(error)) => Err(error),
            (Err(first), Err(second)) => Err(pressing(py, first, second)),
        }
    }

    /// Call `handler(requests, responses)` once for up to `limit` chains, with rows of the two `sizes`; the number
    /// completed.
    pub(super) fn at_once(
        &self,
        py: Python<'_>,
        handler: &Bound<'_, PyAny>,
        sizes: (usize, usize),
        limit: usize,
    ) -> PyResult<usize> {
        let (request_size, response_size) = sizes;
        let (least, room) = (request_size as u64, response_size as u64);
        let keep = |element: &Element| element.readable >= least && element.writable >= room;
        let mut popped = self.spare().take();
        let (done, gathered, anew) = with_queue!(Some(py), self.shared(), |mem, queue| {
            let done = popped.pop(mem, queue, limit);
            let gathered = popped.gather(py, mem, queue, request_size, keep);
            if gathered.is_err() || pending() {
                popped.put_back(queue, 0);
            }
            (done, gathered, queue.waits_anew())
        });
        done.map_err(|fault| raise(py, &fault))?;
        let told = self.tell_of_miss(py, anew);
        let answered = told
            .and_then(|()| gathered.map_err(|trouble| trouble.raise(py)))
            .and_then(|requests| match popped.elements.as_slice() {
                [] => Ok(None),
                elements => {
                    let rows = requests.as_bytes().len().checked_div(request_size);
                    let rows = rows.unwrap_or_else(|| elements.iter().filter(|element| keep(element)).count());
                    call_batch(handler, &requests, rows, response_size).map(Some)
                }
            });
        let (_bytes, view) = match answered {
            Ok(Some(answered)) => answered,
            Ok(None) => {
                self.spare().keep(popped);
                return Ok(0);
            }
            Err(error) => {
                self.shared().give_back(popped);
                return Err(error);
            }
        };
        let responded = popped.respond(py, self.shared(), view.raw(), response_size, keep);
        self.spare().keep(popped);
        match (responded, self.signal(py)) {
            (Ok(responded), Ok(_)) => Ok(responded.completed),
            (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
            (Err(first), Err(second)) => Err(pressing(py, second, first)),
        }
    }

    /// Pop and gather the next burst; the stamp of this use of the queue. A chain that cannot be read is kept for
    /// `take_failed`, when it is the first.
    fn take_burst<'py>(
        &self,
        py: Python<'py>,
        bounds: Bounds,
        burst: &mut Burst<'py>,
        progress: &Progress,
    ) -> PyResult<u64> {
        let limit = BURST.min(bounds.chains - progress.taken);
        let most = bounds.bytes.saturating_sub(progress.bytes).min(bounds.request);
        burst.steps.clear();
        burst.popped.clear();
        (burst.settled, burst.waiting) = (0, 0);
        let (popped, gathered, anew, stamp) = with_queue!(Some(py), self.shared(), |mem, queue| {
            let popped = burst.popped.pop(mem, queue, limit);
            let gathered = burst.gather(py, mem, queue, most, bounds.request);
            // The chains beyond the bound are put back, and from one on that cannot be read, unless that is the first;
            // all of them, where that is not the chain's fault.
            let taken = match &gathered {
                _ if pending() => 0,
                Ok(()) => burst.steps.len(),
                Err(Trouble::Queue(QueueError::Violation(_))) => 0,
                Err(_) => burst.steps.len().max(1),
            };
            burst.popped.put_back(queue, taken);
            (popped, gathered, queue.waits_anew(), self.shared().uses())
        });
        popped.map_err(|fault| raise(py, &fault))?;
        if let Err(error) = self.tell_of_miss(py, anew) {
            self.shared().give_back(std::mem::take(&mut burst.popped));
            return Err(error);
        }
        let Err(trouble) = gathered else { return Ok(stamp) };
        match trouble {
            Trouble::Queue(QueueError::Violation(_)) => Err(trouble.raise(py)),
            // Those before it come first; then it is the first itself.
            _ if !burst.steps.is_empty() => Ok(stamp),
            _ => {
                let error = trouble.raise(py);
                self.keep_chain(py, &burst.popped, 0)?;
                Err(error)
            }
        }
    }

    /// One burst of `process`: the number of chains taken, 0 when there is nothing to do. Chains of a generation that a
    /// handler has ended are not handled any more.
    fn burst<'py>(
        &self,
        py: Python<'py>,
        handler: &Bound<'py, PyAny>,
        bounds: Bounds,
        burst: &mut Burst<'py>,
        progress: &mut Progress,
    ) -> PyResult<usize> {
        let mut stamp = self.take_burst(py, bounds, burst, progress)?;
        let (mut count, mut current) = (0, true);
        for index in 0..burst.steps.len() {
            if progress.bytes >= bounds.bytes {
                break;
            }
            count = index + 1;
            if self.shared().uses() != stamp {
                (current, stamp) = self.ask_current(py, &burst.popped, index)?;
            }
            let answered = self.step(py, handler, burst, index, current, progress);
            progress.bytes = progress.bytes.saturating_add(self.take_charge());
            if let Err(error) = answered {
                // Earlier responses stay.
                let settled = self.settle(py, burst, index, true, progress);
                self.put_back_from(py, burst, count)?;
                if burst.settled == index {
                    self.keep_chain(py, &burst.popped, index)?;
                }
                return Err(match settled {
                    Ok(()) => error,
                    Err(violation) => pressing(py, violation, error),
                });
            }
        }
        if count == 0 {
            return Ok(0);
        }
        let settled = self.settle(py, burst, count, true, progress);
        self.put_back_from(py, burst, count)?;
        settled.map(|()| count)
    }

    /// Whether chain `index` may still be handled: its queue was not reset or latched meanwhile; and the stamp.
    fn ask_current(&self, py: Python<'_>, popped: &Popped, index: usize) -> PyResult<(bool, u64)> {
        let ticket = popped.elements.get(index).map(Element::ticket);
        self.with(py, |queue| {
            let current = ticket.is_some_and(|ticket| queue.is_current(&ticket));
            (current, self.shared().uses())
        })
    }

    /// Call the handler for chain `index`, unless nobody shall see it. What it answers waits, or is written at once.
    fn step<'py>(
        &self,
        py: Python<'py>,
        handler: &Bound<'py, PyAny>,
        burst: &mut Burst<'py>,
        index: usize,
        current: bool,
        progress: &mut Progress,
    ) -> PyResult<()> {
        let (Some(step), Some(element)) = (burst.steps.get_mut(index), burst.popped.elements.get(index)) else {
            return Ok(());
        };
        // Too long by itself, or only to be counted as dropped.
        let Step::Asks(request) = std::mem::replace(step, Step::Refused) else {
            return Ok(());
        };
        if !current {
            return Ok(());
        }
        progress.bytes = progress.bytes.saturating_add(request.as_bytes().len());
        let response = handler.call1((request,))?;
        if response.is_none() {
            *step = Step::Nothing;
            return Ok(());
        }
        let response = match response.cast_into::<PyBytes>() {
            Ok(bytes) => {
                let length = bytes.as_bytes().len();
                *step = Step::Answered(bytes);
                if length as u64 <= element.writable {
                    progress.bytes = progress.bytes.saturating_add(length);
                }
                burst.waiting = burst.waiting.saturating_add(length);
                // Answers are kept in bounds, however large each of them is.
                return if burst.waiting > DETACH_ABOVE {
                    self.settle(py, burst, index + 1, false, progress)
                } else {
                    Ok(())
                };
            }
            Err(other) => other.into_inner(),
        };
        let buffer = response.extract::<Input<'_>>().map_err(|error| {
            no_buffer(&response, error, |name| {
                HandlerError::new_err(format!(
                    "the handler returned {name}: it returns bytes (or a buffer), or None for no bytes"
                ))
            })
        })?;
        let raw = buffer.raw();
        if raw.len as u64 <= element.writable {
            progress.bytes = progress.bytes.saturating_add(raw.len);
        }
        *step = Step::Copied(raw);
        self.settle(py, burst, index + 1, false, progress)
    }

    /// Complete the chains of `burst` before `end`, each with what became of it, and show them to the driver if `publish`.
    ///
    /// One whose memory has gone is kept for `take_failed`; any further one is completed with 0 bytes, for their handlers
    /// were called and must not be again. The first error is returned after all are done.
    fn settle<'py>(
        &self,
        py: Python<'py>,
        burst: &mut Burst<'py>,
        end: usize,
        publish: bool,
        progress: &mut Progress,
    ) -> PyResult<()> {
        let (begin, mut outcome) = (burst.settled, Ok(()));
        while let Err(error) = self.settle_some(py, burst, end, publish, progress) {
            let first = outcome.is_ok();
            outcome = worse(py, outcome, error);
            let at = burst.settled;
            let Some(step) = burst.steps.get_mut(at).filter(|_| at < end) else {
                break;
            };
            if !first && matches!(step, Step::Answered(_) | Step::Copied(_)) {
                *step = Step::Nothing;
                continue;
            }
            burst.settled += 1;
            if let Err(error) = if first {
                self.keep_chain(py, &burst.popped, at)
            } else {
                Ok(())
            } {
                outcome = worse(py, outcome, error);
            }
        }
        // Objects of Python's go only here, where nothing is locked; and nothing may speak of a buffer any more.
        for step in burst.steps.iter_mut().take(end).skip(begin) {
            *step = Step::Nothing;
        }
        burst.waiting = 0;
        outcome
    }

    fn settle_some(
        &self,
        py: Python<'_>,
        burst: &mut Burst<'_>,
        end: usize,
        publish: bool,
        progress: &mut Progress,
    ) -> PyResult<()> {
        let done = with_queue!(Some(py), self.shared(), |mem, queue| {
            let completed = burst.complete(mem, queue, end, progress);
            completed.and_then(|()| if publish { Ok(queue.publish(mem)?) } else { Ok(()) })
        });
        done.map_err(|error| either(py, error))
    }

    fn put_back_from(&self, py: Python<'_>, burst: &mut Burst<'_>, index: usize) -> PyResult<()> {
        if burst.popped.elements.len() <= index {
            return Ok(());
        }
        self.with(py, |queue| burst.popped.put_back(queue, index))
    }

    /// Keep chain `index`, whose handler raised or whose memory has gone, for `take_failed`.
    fn keep_chain(&self, py: Python<'_>, popped: &Popped, index: usize) -> PyResult<()> {
        if let Some(element) = popped.elements.get(index) {
            let segments = popped.segments_of(element);
            let chain = PyChain::new(self.shared().clone(), element.clone(), segments);
            self.keep(Py::new(py, chain)?);
        }
        Ok(())
    }
}

/// Call a batch handler, if there are rows, with a view of the requests, which is read-only as `bytes` are, and a writable
/// one of the responses; these, held.
fn call_batch<'py>(
    handler: &Bound<'py, PyAny>,
    requests: &Bound<'py, PyBytes>,
    rows: usize,
    response_size: usize,
) -> PyResult<(Bound<'py, PyByteArray>, Output)> {
    let (responses, held) = zeroed(handler.py(), rows, response_size)?;
    if rows > 0 {
        handler.call1((PyMemoryView::from(requests)?, PyMemoryView::from(&responses)?))?;
    }
    Ok((responses, held))
}
