//! `DeviceQueue`: the device end in Python, with the four ways to handle its chains.
//!
//! Python code (handlers, notifier callbacks) never runs while the queue's lock or a pin of the memory is held:
//! a batch is popped and gathered under the lock, handled without it, and completed under it again.

use std::sync::{Arc, Mutex, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes, PyMemoryView, PyType};

use super::args::{Input, Int, Raw};
use super::batch::{Popped, PyBatch, zeroed};
use super::chain::{PyChain, Rows, Shared, with_queue};
use super::errors::{self, HandlerError, InvalidArgument, either, raise};
use super::layout::{PyQueueConfig, PyQueueState, PyRingLayout};
use super::mem::PyGuestMemory;
use super::notify::PyNotifier;
use crate::error::{Misuse, QueueError};
use crate::mem::with_access;
use crate::queue::{Counters, DeviceQueue};

/// Chains that `process` takes at once: enough to spread the cost of a publication.
const BURST: usize = 32;

/// Counters of one end of a queue.
#[pyclass(frozen, module = "virtio_test._core", name = "Counters")]
pub struct PyCounters(pub(crate) Counters);

#[pymethods]
impl PyCounters {
    #[getter]
    const fn popped(&self) -> u64 {
        self.0.popped
    }

    #[getter]
    const fn pushed(&self) -> u64 {
        self.0.pushed
    }

    #[getter]
    const fn dropped(&self) -> u64 {
        self.0.dropped
    }

    #[getter]
    const fn rejected(&self) -> u64 {
        self.0.rejected
    }

    #[getter]
    const fn notified(&self) -> u64 {
        self.0.notified
    }

    #[getter]
    const fn suppressed(&self) -> u64 {
        self.0.suppressed
    }

    fn __repr__(&self) -> String {
        let Counters {
            popped,
            pushed,
            dropped,
            rejected,
            notified,
            suppressed,
        } = self.0;
        format!(
            "<Counters popped={popped} pushed={pushed} dropped={dropped} rejected={rejected} \
             notified={notified} suppressed={suppressed}>"
        )
    }
}

/// The device end of one virtqueue.
#[pyclass(frozen, module = "virtio_test._core", name = "DeviceQueue")]
pub struct PyDeviceQueue {
    memory: Py<PyGuestMemory>,
    shared: Arc<Shared>,
    call: Mutex<Option<Py<PyNotifier>>>,
    /// Chains whose handler raised, until they are taken.
    failed: Mutex<Vec<Py<PyChain>>>,
    /// What our own device latched the queue with; a rule the driver broke is kept by the queue itself.
    broken: Mutex<Option<Py<PyAny>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PyDeviceQueue {
    /// Run `f` on the queue, which needs no memory for it.
    fn with<T>(&self, f: impl FnOnce(&mut DeviceQueue, &Shared) -> T) -> T {
        f(&mut self.shared.lock(), &self.shared)
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Complete chain `index` of `popped` with what became of it; whether it was not dropped.
    fn complete(&self, py: Python<'_>, popped: &Popped, index: usize, answer: Answer) -> PyResult<bool> {
        let Some(element) = popped.elements.get(index) else {
            return Ok(false);
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
        let done = with_queue!(&self.shared, |mem, queue| {
            let response = response.filter(|_| queue.is_current(&ticket));
            let copied = response.map_or(Ok(()), |raw| rows.scatter(mem, element, raw, 0));
            copied.map_err(QueueError::from).and_then(|()| {
                let written = if response.is_some() { length as u64 } else { 0 };
                let done = queue.complete(mem, &ticket, written)?;
                if done && !fits {
                    queue.count_rejected(1);
                }
                Ok(done)
            })
        });
        done.map_err(|error| either(py, error))
    }

    fn publish(&self, py: Python<'_>) -> PyResult<()> {
        with_queue!(&self.shared, |mem, queue| queue.publish(mem)).map_err(|fault| raise(py, &fault))
    }

    /// Forget what belongs to a generation that ends. Dropped after the locks: what the traceback of an exception
    /// keeps alive may run any code of Python's.
    fn forget(&self) {
        let broken = locked(&self.broken).take();
        let failed = std::mem::take(&mut *locked(&self.failed));
        drop((broken, failed));
    }

    /// Whether chain `index` of `popped` may still be handled: its queue was not reset or latched meanwhile.
    fn is_current(&self, popped: &Popped, index: usize) -> bool {
        let element = popped.elements.get(index);
        element.is_some_and(|element| self.with(|queue, _| queue.is_current(&element.ticket())))
    }

    /// Requests of as many of the chains as fit `max_request` bytes together; the others are put back. None
    /// stands for a chain that is too long by itself.
    fn gather<'py>(
        &self,
        py: Python<'py>,
        popped: &mut Popped,
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
            if total > max_request {
                break;
            }
            let rows = Rows {
                segments: &popped.segments,
                itemsize: length,
            };
            let request = PyBytes::new_with(py, length, |bytes| {
                let target = Raw::of(bytes);
                let gathered = with_queue!(&self.shared, |mem, queue| rows.gather(mem, queue, element, target, 0));
                Ok(gathered?)
            })?;
            requests.push(Some(request));
        }
        popped.put_back(&self.shared, requests.len());
        Ok(requests)
    }

    /// One burst of `process`: the number of chains taken, 0 when there is nothing to do; `completed` counts those
    /// that were not dropped. Chains of a generation that a handler has ended are not handled any more.
    fn burst(
        &self,
        py: Python<'_>,
        handler: &Bound<'_, PyAny>,
        limit: usize,
        max_request: usize,
        completed: &mut usize,
    ) -> PyResult<usize> {
        let mut popped = Popped::take(py, &self.shared, limit)?;
        let requests = match self.gather(py, &mut popped, max_request) {
            Ok(requests) => requests,
            Err(error) => {
                popped.put_back(&self.shared, 0);
                return Err(error);
            }
        };
        let count = requests.len();
        for (index, request) in requests.into_iter().enumerate() {
            let answered = match request {
                Some(request) if self.is_current(&popped, index) => self.answer(py, handler, &popped, index, request),
                // Too long by itself, or only to be counted as dropped.
                _ => self.complete(py, &popped, index, Answer::Refused),
            };
            match answered {
                Ok(done) => *completed += usize::from(done),
                Err(error) => {
                    let published = self.publish(py);
                    self.keep_failed(py, &mut popped, index)?;
                    return published.and(Err(error));
                }
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
    ) -> PyResult<bool> {
        let response = handler.call1((request,))?;
        if response.is_none() {
            return self.complete(py, popped, index, Answer::Nothing);
        }
        let Ok(bytes) = response.extract::<Input<'_>>() else {
            let name = response.get_type().name()?;
            let text = format!("the handler returned {name}: it returns bytes (or a buffer), or None for no bytes");
            return Err(HandlerError::new_err(text));
        };
        self.complete(py, popped, index, Answer::Bytes(bytes.raw()))
    }

    /// A handler raised at chain `index`: later chains go back, the chain is kept for `take_failed`.
    fn keep_failed(&self, py: Python<'_>, popped: &mut Popped, index: usize) -> PyResult<()> {
        popped.put_back(&self.shared, index + 1);
        if let Some(element) = popped.elements.get(index) {
            let segments = popped
                .segments
                .get(element.first..element.first + element.count)
                .unwrap_or_default();
            let chain = PyChain::new(self.shared.clone(), element.clone(), segments);
            let chain = Py::new(py, chain)?;
            locked(&self.failed).push(chain);
        }
        Ok(())
    }
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

fn positive(limit: usize, name: &str) -> PyResult<usize> {
    if (1..=32768).contains(&limit) {
        Ok(limit)
    } else {
        Err(InvalidArgument::new_err(format!(
            "{name} is {limit}: it is 1 to 32768 chains"
        )))
    }
}

#[pymethods]
impl PyDeviceQueue {
    #[new]
    #[pyo3(signature = (memory, config, *, state = None, call = None))]
    fn new(
        py: Python<'_>,
        memory: Py<PyGuestMemory>,
        config: PyQueueConfig,
        state: Option<PyQueueState>,
        call: Option<Py<PyNotifier>>,
    ) -> PyResult<Self> {
        let guest = memory.get().inner().clone();
        let pin = guest.pin();
        let queue = with_access!(pin, |mem| DeviceQueue::new(mem, config.0, state.map(|state| state.0)));
        drop(pin);
        let queue = queue.map_err(|fault| raise(py, &fault))?;
        let shared = Arc::new(Shared::new(guest, queue));
        Ok(Self {
            memory,
            shared,
            call: Mutex::new(call),
            failed: Mutex::new(Vec::new()),
            broken: Mutex::new(None),
        })
    }

    #[getter]
    fn memory(&self, py: Python<'_>) -> Py<PyGuestMemory> {
        self.memory.clone_ref(py)
    }

    #[getter]
    fn config(&self) -> PyQueueConfig {
        self.with(|queue, _| PyQueueConfig(*queue.config()))
    }

    #[getter]
    fn index(&self) -> u16 {
        self.with(|queue, _| queue.config().index)
    }

    #[getter]
    fn size(&self) -> u16 {
        self.with(|queue, _| queue.layout().size)
    }

    #[getter]
    fn generation(&self) -> u64 {
        self.with(|queue, _| queue.generation())
    }

    #[getter]
    fn in_flight(&self) -> u32 {
        self.with(|queue, _| queue.in_flight())
    }

    #[getter]
    fn latched(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        if let Some(error) = locked(&self.broken).as_ref() {
            return Ok(Some(error.clone_ref(py)));
        }
        let fault = self.with(|queue, _| queue.latched().cloned());
        fault.map(|fault| errors::instance(py, &fault)).transpose()
    }

    #[getter]
    fn stopped(&self) -> bool {
        self.with(|queue, _| queue.stopped())
    }

    #[getter]
    fn state(&self) -> PyQueueState {
        self.with(|queue, _| PyQueueState(queue.state()))
    }

    #[getter]
    fn counters(&self) -> PyCounters {
        self.with(|queue, _| PyCounters(*queue.counters()))
    }

    fn layout(&self) -> PyRingLayout {
        self.with(|queue, _| PyRingLayout(*queue.layout()))
    }

    fn has_work(&self) -> bool {
        with_queue!(&self.shared, |mem, queue| queue.has_work(mem))
    }

    fn pop(&self, py: Python<'_>) -> PyResult<Option<PyChain>> {
        let mut segments = Vec::new();
        let popped = with_queue!(&self.shared, |mem, queue| queue.pop(mem, &mut segments));
        let element = popped.map_err(|fault| raise(py, &fault))?;
        Ok(element.map(|element| PyChain::new(self.shared.clone(), element, &segments)))
    }

    #[pyo3(signature = (limit = Int(32)))]
    #[pyo3(text_signature = "($self, limit=32)")]
    fn pop_many(slf: Bound<'_, Self>, py: Python<'_>, limit: Int<usize>) -> PyResult<PyBatch> {
        let popped = Popped::take(py, slf.get().shared(), positive(limit.0, "limit")?)?;
        Ok(PyBatch::new(slf.unbind(), popped))
    }

    #[pyo3(signature = (chain, written = None))]
    fn push(&self, py: Python<'_>, chain: &Bound<'_, PyChain>, written: Option<Int<u64>>) -> PyResult<bool> {
        let chain = chain.get();
        if !chain.belongs_to(&self.shared) {
            return Err(Misuse::ForeignChain.into());
        }
        let ticket = chain.ticket();
        chain.close()?;
        let done = with_queue!(&self.shared, |mem, queue| {
            let written = written.map_or_else(|| chain.high_water(), |written| written.0);
            queue.complete(mem, &ticket, written).and_then(|done| {
                queue.publish(mem)?;
                Ok(done)
            })
        });
        done.map_err(|error| {
            if matches!(error, QueueError::Misuse(_)) {
                chain.reopen();
            }
            either(py, error)
        })
    }

    fn unpop(&self, chain: &Bound<'_, PyChain>) -> PyResult<()> {
        let chain = chain.get();
        if !chain.belongs_to(&self.shared) {
            return Err(Misuse::ForeignChain.into());
        }
        // Closed first: nobody completes what is being put back.
        chain.close()?;
        self.with(|queue, _| queue.unpop(&chain.ticket())).map_err(|misuse| {
            chain.reopen();
            misuse.into()
        })
    }

    #[pyo3(signature = (handler, *, limit = Int(32768), max_request = Int(16 << 20)))]
    #[pyo3(text_signature = "($self, handler, *, limit=32768, max_request=16777216)")]
    fn process(
        &self,
        py: Python<'_>,
        handler: &Bound<'_, PyAny>,
        limit: Int<usize>,
        max_request: Int<usize>,
    ) -> PyResult<usize> {
        let limit = positive(limit.0, "limit")?;
        let (mut taken, mut done) = (0, 0);
        let outcome = loop {
            if taken == limit {
                break Ok(());
            }
            match self.burst(py, handler, BURST.min(limit - taken), max_request.0, &mut done) {
                Ok(0) => break Ok(()),
                Ok(count) => taken += count,
                Err(error) => break Err(error),
            }
        };
        // What was answered before a failure is announced all the same.
        let signalled = self.signal(py);
        outcome?;
        signalled?;
        Ok(done)
    }

    #[pyo3(signature = (handler, *, request_size, response_size, limit = Int(256)))]
    #[pyo3(text_signature = "($self, handler, *, request_size, response_size, limit=256)")]
    fn process_batch(
        &self,
        py: Python<'_>,
        handler: &Bound<'_, PyAny>,
        request_size: Int<usize>,
        response_size: Int<usize>,
        limit: Int<usize>,
    ) -> PyResult<usize> {
        let (request_size, response_size) = (request_size.0, response_size.0);
        let mut popped = Popped::take(py, &self.shared, positive(limit.0, "limit")?)?;
        if popped.elements.is_empty() {
            return Ok(0);
        }
        let (least, room) = (request_size as u64, response_size as u64);
        let keep = |element: &crate::chain::Element| element.readable >= least && element.writable >= room;
        let rows = popped.elements.iter().filter(|element| keep(element)).count();
        let prepared = popped
            .requests(py, &self.shared, request_size, keep)
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
                popped.put_back(&self.shared, 0);
                return Err(error);
            }
        };
        let responded = popped.respond(py, &self.shared, view.raw(), response_size, keep);
        self.signal(py)?;
        Ok(responded?.completed)
    }

    /// The newest first, which is the one that can be put back.
    fn take_failed(&self) -> Option<Py<PyChain>> {
        locked(&self.failed).pop()
    }

    /// The lock and the pin are free again when the notifier runs: it may be a function of Python's.
    pub(crate) fn signal(&self, py: Python<'_>) -> PyResult<bool> {
        let wants = with_queue!(&self.shared, |mem, queue| queue.wants_call(mem));
        let wants = wants.map_err(|fault| raise(py, &fault))?;
        let call = locked(&self.call).as_ref().map(|call| call.clone_ref(py));
        if let Some(call) = call.filter(|_| wants) {
            call.get().notify(py)?;
        }
        Ok(wants)
    }

    fn enable_kicks(&self, py: Python<'_>) -> PyResult<bool> {
        with_queue!(&self.shared, |mem, queue| queue.enable_kicks(mem)).map_err(|fault| raise(py, &fault))
    }

    fn disable_kicks(&self, py: Python<'_>) -> PyResult<()> {
        with_queue!(&self.shared, |mem, queue| queue.disable_kicks(mem)).map_err(|fault| raise(py, &fault))
    }

    fn latch(&self, violation: &Bound<'_, PyAny>) -> PyResult<()> {
        let class: Bound<'_, PyType> = errors::violation_type(violation.py());
        if !violation.is_instance(&class)? {
            return Err(InvalidArgument::new_err(
                "a queue is latched with a QueueViolation that says why",
            ));
        }
        let fresh = self.with(|queue, _| {
            let fresh = queue.latched().is_none() && !queue.broken();
            queue.break_down();
            fresh
        });
        if fresh {
            *locked(&self.broken) = Some(violation.clone().unbind());
        }
        Ok(())
    }

    fn stop(&self) -> PyQueueState {
        self.with(|queue, _| PyQueueState(queue.stop()))
    }

    fn resume(&self) {
        self.with(|queue, _| queue.resume());
    }

    #[pyo3(signature = (config = None, *, state = None))]
    fn reset(&self, py: Python<'_>, config: Option<PyQueueConfig>, state: Option<PyQueueState>) -> PyResult<()> {
        let (config, state) = (config.map(|config| config.0), state.map(|state| state.0));
        let done = with_queue!(&self.shared, |mem, queue| queue.reset(mem, config, state));
        done.map_err(|fault| raise(py, &fault))?;
        self.forget();
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Waiting for a lock here could wait for ourselves; what is not visited is merely kept alive.
        if let Ok(call) = self.call.try_lock() {
            visit.call(&*call)?;
        }
        if let Ok(failed) = self.failed.try_lock() {
            for chain in &*failed {
                visit.call(chain)?;
            }
        }
        if let Ok(broken) = self.broken.try_lock() {
            visit.call(&*broken)?;
        }
        Ok(())
    }

    fn __clear__(&self) {
        let call = locked(&self.call).take();
        drop(call);
        self.forget();
    }

    fn __repr__(&self) -> String {
        self.with(|queue, _| {
            let state = if queue.broken() {
                "latched"
            } else if queue.stopped() {
                "stopped"
            } else {
                "running"
            };
            let format = if queue.layout().packed { "packed" } else { "split" };
            let (index, size) = (queue.config().index, queue.layout().size);
            format!(
                "<DeviceQueue {index} {format} of {size}, {state}, {} in flight>",
                queue.in_flight()
            )
        })
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
