//! Two ways to handle the chains of a `DeviceQueue`: request by request, and a whole batch at once.
//!
//! A burst is popped and gathered under the queue's lock, handled without it, and completed under it again: while
//! Python code runs, no lock and no pin is held, so a handler may use the queue, or reset it.

use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyMemoryView};

use super::args::{Input, Raw};
use super::batch::{Popped, zeroed};
use super::chain::{PyChain, Rows};
use super::device::PyDeviceQueue;
use super::errors::{HandlerError, either, raise};
use super::guard::with_queue;
use super::remote::pressing;
use crate::chain::Element;

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

/// What becomes of a chain.
#[derive(Clone, Copy)]
enum Answer {
    /// 0 bytes, as the handler wanted.
    Nothing,
    /// The handler's bytes; 0 bytes and counted as rejected, when they do not fit.
    Bytes(Raw),
    /// 0 bytes and counted as rejected: no handler saw it.
    Refused,
}

impl PyDeviceQueue {
    /// Call `handler(request)` for as many chains as the bounds allow; the number completed.
    pub(super) fn one_by_one(&self, py: Python<'_>, handler: &Bound<'_, PyAny>, bounds: Bounds) -> PyResult<usize> {
        let mut progress = Progress::default();
        self.take_charge();
        let outcome = loop {
            if progress.taken >= bounds.chains || progress.bytes >= bounds.bytes {
                break Ok(());
            }
            match self.burst(py, handler, bounds, &mut progress) {
                Ok(0) => break Ok(()),
                Ok(count) => progress.taken += count,
                Err(error) => break Err(error),
            }
        };
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
        let popped = Popped::take(py, self, limit)?;
        if popped.elements.is_empty() {
            return Ok(0);
        }
        let (least, room) = (request_size as u64, response_size as u64);
        let keep = |element: &Element| element.readable >= least && element.writable >= room;
        let rows = popped.elements.iter().filter(|element| keep(element)).count();
        let prepared = popped
            .requests(py, self.shared(), request_size, keep)
            .and_then(|requests| Ok((requests, zeroed(py, rows, response_size)?)))
            .and_then(|(requests, responses)| {
                if rows > 0 {
                    call_batch(handler, &requests, &responses.0)?;
                }
                Ok(responses)
            });
        let (_bytes, view) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                self.shared().give_back(popped);
                return Err(error);
            }
        };
        let responded = popped.respond(py, self.shared(), view.raw(), response_size, keep);
        match (responded, self.signal(py)) {
            (Ok(responded), Ok(_)) => Ok(responded.completed),
            (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
            (Err(first), Err(second)) => Err(pressing(py, second, first)),
        }
    }

    /// Complete chain `index` of `popped` with what became of it.
    fn complete(
        &self,
        py: Python<'_>,
        popped: &Popped,
        index: usize,
        answer: Answer,
        progress: &mut Progress,
    ) -> PyResult<()> {
        let Some(element) = popped.elements.get(index) else {
            return Ok(());
        };
        let ticket = element.ticket();
        let (fits, response) = match answer {
            Answer::Nothing => (true, None),
            Answer::Bytes(raw) if raw.len as u64 <= element.writable => (true, Some(raw)),
            Answer::Bytes(_) | Answer::Refused => (false, None),
        };
        let length = response.map_or(0, |raw| raw.len);
        let rows = Rows {
            segments: &popped.segments,
            itemsize: length,
        };
        let done = with_queue!(Some(py), self.shared(), |mem, queue| {
            let response = response.filter(|_| queue.is_current(&ticket));
            let copied = response.map_or(Ok(()), |raw| rows.scatter(mem, queue, element, raw, 0));
            copied.and_then(|()| {
                let written = if response.is_some() { length as u64 } else { 0 };
                let done = queue.complete(mem, &ticket, written)?;
                if done && !fits {
                    queue.count_rejected(1);
                }
                Ok(done)
            })
        });
        progress.completed += usize::from(done.map_err(|error| either(py, error))?);
        progress.bytes = progress.bytes.saturating_add(length);
        Ok(())
    }

    fn publish(&self, py: Python<'_>) -> PyResult<()> {
        let done = with_queue!(Some(py), self.shared(), |mem, queue| queue.publish(mem));
        done.map_err(|fault| raise(py, &fault))
    }

    /// Whether chain `index` of `popped` may still be handled: its queue was not reset or latched meanwhile.
    fn is_current(&self, py: Python<'_>, popped: &Popped, index: usize) -> PyResult<bool> {
        let element = popped.elements.get(index);
        element.map_or(Ok(false), |element| {
            self.with(py, |queue| queue.is_current(&element.ticket()))
        })
    }

    /// Requests of as many of the chains as fit `most` bytes together, and of one in any case; the others are put back.
    /// None stands for a chain that is too long by itself.
    fn gather<'py>(
        &self,
        py: Python<'py>,
        popped: &mut Popped,
        most: usize,
        max_request: usize,
    ) -> PyResult<Vec<Option<Bound<'py, PyBytes>>>> {
        let mut requests = Vec::with_capacity(popped.elements.len());
        let mut total = 0;
        for element in &popped.elements {
            let length = usize::try_from(element.readable).unwrap_or(usize::MAX);
            if length > max_request {
                requests.push(None);
                continue;
            }
            total += length;
            if total > most && !requests.is_empty() {
                break;
            }
            let rows = Rows {
                segments: &popped.segments,
                itemsize: length,
            };
            let request = PyBytes::new_with(py, length, |bytes| {
                let target = Raw::of(bytes);
                let gathered = with_queue!(Some(py), self.shared(), |mem, queue| rows
                    .gather(mem, queue, element, target, 0));
                gathered.map_err(|error| either(py, error))
            })?;
            requests.push(Some(request));
        }
        self.with(py, |queue| popped.put_back(queue, requests.len()))?;
        Ok(requests)
    }

    /// One burst of `process`: the number of chains taken, 0 when there is nothing to do. Chains of a generation that a
    /// handler has ended are not handled any more.
    fn burst(
        &self,
        py: Python<'_>,
        handler: &Bound<'_, PyAny>,
        bounds: Bounds,
        progress: &mut Progress,
    ) -> PyResult<usize> {
        let mut popped = Popped::take(py, self, BURST.min(bounds.chains - progress.taken))?;
        let left = bounds.bytes.saturating_sub(progress.bytes);
        let requests = match self.gather(py, &mut popped, left.min(bounds.request), bounds.request) {
            Ok(requests) => requests,
            Err(error) => {
                self.shared().give_back(popped);
                return Err(error);
            }
        };
        let mut count = 0;
        for (index, request) in requests.into_iter().enumerate() {
            if progress.bytes >= bounds.bytes {
                self.with(py, |queue| popped.put_back(queue, index))?;
                break;
            }
            count = index + 1;
            let answered = match request {
                Some(request) if self.is_current(py, &popped, index)? => {
                    let length = request.as_bytes().len();
                    progress.bytes = progress.bytes.saturating_add(length);
                    self.answer(py, handler, &popped, index, request, progress)
                }
                // Too long by itself, or only to be counted as dropped.
                _ => self.complete(py, &popped, index, Answer::Refused, progress),
            };
            progress.bytes = progress.bytes.saturating_add(self.take_charge());
            if let Err(error) = answered {
                let published = self.publish(py);
                self.keep_failed(py, &mut popped, index)?;
                return Err(match published {
                    Ok(()) => error,
                    Err(violation) => pressing(py, violation, error),
                });
            }
        }
        self.publish(py)?;
        Ok(count)
    }

    fn answer<'py>(
        &self,
        py: Python<'py>,
        handler: &Bound<'py, PyAny>,
        popped: &Popped,
        index: usize,
        request: Bound<'py, PyBytes>,
        progress: &mut Progress,
    ) -> PyResult<()> {
        let response = handler.call1((request,))?;
        if response.is_none() {
            return self.complete(py, popped, index, Answer::Nothing, progress);
        }
        let Ok(bytes) = response.extract::<Input<'_>>() else {
            let name = response.get_type().name()?;
            let text = format!("the handler returned {name}: it returns bytes (or a buffer), or None for no bytes");
            return Err(HandlerError::new_err(text));
        };
        self.complete(py, popped, index, Answer::Bytes(bytes.raw()), progress)
    }

    /// A handler raised at chain `index`: later chains go back, the chain is kept for `take_failed`.
    fn keep_failed(&self, py: Python<'_>, popped: &mut Popped, index: usize) -> PyResult<()> {
        self.with(py, |queue| popped.put_back(queue, index + 1))?;
        if let Some(element) = popped.elements.get(index) {
            let segments = popped
                .segments
                .get(element.first..element.first + element.count)
                .unwrap_or_default();
            let chain = PyChain::new(self.shared().clone(), element.clone(), segments);
            let chain = Py::new(py, chain)?;
            self.keep(chain);
        }
        Ok(())
    }
}

/// Call a batch handler with a read-only view of the requests and a writable one of the responses.
fn call_batch<'py>(
    handler: &Bound<'py, PyAny>,
    requests: &Bound<'py, PyByteArray>,
    responses: &Bound<'py, PyByteArray>,
) -> PyResult<()> {
    let requests = PyMemoryView::from(requests)?.call_method0("toreadonly")?;
    handler.call1((requests, PyMemoryView::from(responses)?)).map(drop)
}
