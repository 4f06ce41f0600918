//! `DeviceQueue`: the device end in Python.
//!
//! Python code (handlers, notifier callbacks) never runs while the queue's lock or a pin of the memory is held, but that
//! which reads and writes remote memory (see `guard`).

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::args::Int;
use super::batch::{Popped, PyBatch, Spare};
use super::chain::{PyChain, Shared};
use super::counters::PyCounters;
use super::errors::{self, InvalidArgument, bad_record, either, raise};
use super::guard::{with_memory, with_queue};
use super::inflight::PyInflightPart;
use super::layout::{PyQueueConfig, PyQueueState, PyRingLayout};
use super::mem::PyGuestMemory;
use super::notify::PyNotifier;
use super::process::Bounds;
use super::remote::both;
use crate::error::{Misuse, QueueError};
use crate::mem::{GuestMemory, Want};
use crate::queue::{DeviceQueue, StartError};
use crate::service::Wake;

/// A translation that the next chain of a queue cannot be read without.
#[pyclass(frozen, module = "virtio_test._core", name = "Missing")]
pub struct PyMissing {
    #[pyo3(get)]
    address: u64,
    #[pyo3(get)]
    length: u64,
    #[pyo3(get)]
    writable: bool,
    #[pyo3(get)]
    violation: Py<PyAny>,
}

#[pymethods]
impl PyMissing {
    fn __repr__(&self) -> String {
        let what = if self.writable { "write" } else { "read" };
        format!("<Missing {:#x} + {}, to {what}>", self.address, self.length)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.violation)
    }
}

/// Whom a queue wakes; shared with the workers that serve it.
#[derive(Default)]
pub(crate) struct Wakes {
    call: Mutex<Option<Py<PyNotifier>>>,
    /// Told when a chain lacks a translation.
    miss: Mutex<Option<Py<PyNotifier>>>,
}

impl Wakes {
    /// Wake them in a thread that holds neither the GIL nor a lock or pin. An fd that does not work only harms whoever gave
    /// it.
    pub(crate) fn wake(&self, wake: Wake) {
        let wanted = [(wake.call, &self.call), (wake.miss, &self.miss)];
        for (_, whom) in wanted.into_iter().filter(|(wanted, _)| *wanted) {
            let notifier = locked(whom).as_ref().map(|notifier| Arc::clone(notifier.get().inner()));
            let _ = notifier.map(|notifier| notifier.notify());
        }
    }

    /// As `wake`, with the GIL: what a callback raises is raised here, when both are woken.
    pub(crate) fn wake_attached(&self, py: Python<'_>, wake: Wake) -> PyResult<()> {
        let wanted = [(wake.call, &self.call), (wake.miss, &self.miss)];
        let mut woken = Ok(());
        for (_, whom) in wanted.into_iter().filter(|(wanted, _)| *wanted) {
            let notifier = locked(whom).as_ref().map(|notifier| notifier.clone_ref(py));
            let told = notifier.map_or(Ok(()), |notifier| notifier.get().notify(py));
            woken = both(py, woken, told);
        }
        woken
    }
}

/// The device end of one virtqueue.
#[pyclass(frozen, module = "virtio_test._core", name = "DeviceQueue")]
pub struct PyDeviceQueue {
    memory: Py<PyGuestMemory>,
    shared: Arc<Shared>,
    wakes: Arc<Wakes>,
    /// Chains whose handler raised, until they are taken.
    failed: Mutex<Vec<Py<PyChain>>>,
    /// What our own device latched the queue with; a rule the driver broke is kept by the queue itself.
    broken: Mutex<Option<Py<PyAny>>>,
    /// Work that handlers have charged, in bytes.
    charged: AtomicUsize,
    spare: Spare,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PyDeviceQueue {
    /// Run `f` on the queue, which needs no memory for it.
    pub(super) fn with<T>(&self, py: Python<'_>, f: impl FnOnce(&mut DeviceQueue) -> T) -> PyResult<T> {
        Ok(f(&mut *self.shared.lock(Some(py))?))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn guest(&self) -> &Arc<GuestMemory> {
        self.memory.get().inner()
    }

    pub(crate) const fn wakes(&self) -> &Arc<Wakes> {
        &self.wakes
    }

    pub(super) const fn spare(&self) -> &Spare {
        &self.spare
    }

    /// Keep a chain whose handler raised until it is taken.
    pub(super) fn keep(&self, chain: Py<PyChain>) {
        locked(&self.failed).push(chain);
    }

    /// Tell whoever can get translations that one is missing, if that is new. Neither lock nor pin is held.
    pub(super) fn tell_of_miss(&self, py: Python<'_>, anew: bool) -> PyResult<()> {
        if !anew {
            return Ok(());
        }
        let call = false;
        self.wakes.wake_attached(py, Wake { call, miss: true })
    }

    /// What handlers have charged since the last time.
    pub(super) fn take_charge(&self) -> usize {
        // Mostly there is nothing, and to look costs less than to take.
        match self.charged.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.charged.swap(0, Ordering::Relaxed),
        }
    }

    /// Forget what belongs to a generation that ends. Dropped after the locks: what the traceback of an exception
    /// keeps alive may run any code of Python's.
    fn forget(&self) {
        let broken = locked(&self.broken).take();
        let failed = std::mem::take(&mut *locked(&self.failed));
        drop((broken, failed));
    }
}

pub(crate) fn positive(limit: usize, name: &str) -> PyResult<usize> {
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
    #[pyo3(signature = (memory, config, *, state = None, call = None, miss = None, record = None))]
    fn new(
        py: Python<'_>,
        memory: Py<PyGuestMemory>,
        config: PyQueueConfig,
        state: Option<PyQueueState>,
        call: Option<Py<PyNotifier>>,
        miss: Option<Py<PyNotifier>>,
        record: Option<&Bound<'_, PyInflightPart>>,
    ) -> PyResult<Self> {
        let guest = memory.get().inner().clone();
        let (config, state) = (config.0, state.map(|state| state.0));
        let part = record.map(|part| part.get().inner());
        let queue = with_memory!(Some(py), &guest, |mem| match part {
            Some(part) => DeviceQueue::recorded(mem, config, state, part.clone()),
            None => DeviceQueue::new(mem, config, state).map_err(StartError::Fault),
        });
        let queue = queue.map_err(|error| match error {
            StartError::Fault(fault) => raise(py, &fault),
            StartError::Record(error) => bad_record(py, config.index, &error),
        })?;
        let shared = Arc::new(Shared::new(guest, queue));
        Ok(Self {
            memory,
            shared,
            wakes: Arc::new(Wakes {
                call: Mutex::new(call),
                miss: Mutex::new(miss),
            }),
            failed: Mutex::new(Vec::new()),
            broken: Mutex::new(None),
            charged: AtomicUsize::new(0),
            spare: Spare::default(),
        })
    }

    #[getter]
    fn memory(&self, py: Python<'_>) -> Py<PyGuestMemory> {
        self.memory.clone_ref(py)
    }

    #[getter]
    fn config(&self, py: Python<'_>) -> PyResult<PyQueueConfig> {
        self.with(py, |queue| PyQueueConfig(*queue.config()))
    }

    #[getter]
    fn index(&self, py: Python<'_>) -> PyResult<u16> {
        self.with(py, |queue| queue.config().index)
    }

    #[getter]
    fn size(&self, py: Python<'_>) -> PyResult<u16> {
        self.with(py, |queue| queue.layout().size)
    }

    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |queue| queue.generation())
    }

    #[getter]
    fn in_flight(&self, py: Python<'_>) -> PyResult<u32> {
        self.with(py, |queue| queue.in_flight())
    }

    #[getter]
    fn left(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |queue| queue.left())
    }

    #[getter]
    fn keeps_record(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |queue| queue.keeps_record())
    }

    #[getter]
    fn latched(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        if let Some(error) = locked(&self.broken).as_ref() {
            return Ok(Some(error.clone_ref(py)));
        }
        let fault = self.with(py, |queue| queue.latched().cloned())?;
        fault.map(|fault| errors::instance(py, &fault)).transpose()
    }

    #[getter]
    fn missing(&self, py: Python<'_>) -> PyResult<Option<PyMissing>> {
        let fault = self.with(py, |queue| queue.waits().cloned())?;
        let Some((missing, fault)) = fault.and_then(|fault| Some((fault.missing?, fault))) else {
            return Ok(None);
        };
        Ok(Some(PyMissing {
            address: missing.address,
            length: missing.len,
            writable: missing.want == Want::Write,
            violation: errors::instance(py, &fault)?,
        }))
    }

    #[getter]
    fn stopped(&self, py: Python<'_>) -> PyResult<bool> {
        self.with(py, |queue| queue.stopped())
    }

    #[getter]
    fn state(&self, py: Python<'_>) -> PyResult<PyQueueState> {
        self.with(py, |queue| PyQueueState(queue.state()))
    }

    #[getter]
    fn counters(&self, py: Python<'_>) -> PyResult<PyCounters> {
        self.with(py, |queue| PyCounters(*queue.counters()))
    }

    fn layout(&self, py: Python<'_>) -> PyResult<PyRingLayout> {
        self.with(py, |queue| PyRingLayout(*queue.layout()))
    }

    fn has_work(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(with_queue!(Some(py), self.shared, |mem, queue| queue.has_work(mem)))
    }

    fn pop(&self, py: Python<'_>) -> PyResult<Option<PyChain>> {
        let mut segments = Vec::new();
        let (popped, anew) = with_queue!(Some(py), self.shared, |mem, queue| {
            (queue.pop(mem, &mut segments), queue.waits_anew())
        });
        let element = popped.map_err(|fault| raise(py, &fault))?;
        self.tell_of_miss(py, anew)?;
        Ok(element.map(|element| PyChain::new(self.shared.clone(), element, &segments)))
    }

    #[pyo3(signature = (limit = Int(32)))]
    #[pyo3(text_signature = "($self, limit=32)")]
    fn pop_many(slf: Bound<'_, Self>, py: Python<'_>, limit: Int<usize>) -> PyResult<PyBatch> {
        let popped = Popped::take(py, slf.get(), positive(limit.0, "limit")?)?;
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
        let push = || {
            Ok(with_queue!(Some(py), self.shared, |mem, queue| {
                let written = written.map_or_else(|| chain.high_water(), |written| written.0);
                queue.complete(mem, &ticket, written).and_then(|done| {
                    queue.publish(mem)?;
                    Ok(done)
                })
            }))
        };
        let done: PyResult<_> = push();
        done.inspect_err(|_| chain.reopen())?.map_err(|error| {
            if matches!(error, QueueError::Misuse(_)) {
                chain.reopen();
            }
            either(py, error)
        })
    }

    fn unpop(&self, py: Python<'_>, chain: &Bound<'_, PyChain>) -> PyResult<()> {
        let chain = chain.get();
        if !chain.belongs_to(&self.shared) {
            return Err(Misuse::ForeignChain.into());
        }
        // Closed first: nobody completes what is being put back.
        chain.close()?;
        let put = self.with(py, |queue| queue.unpop(&chain.ticket()));
        put.and_then(|put| Ok(put?)).inspect_err(|_| chain.reopen())
    }

    fn put_back(&self, py: Python<'_>, chain: &Bound<'_, PyChain>) -> PyResult<()> {
        let chain = chain.get();
        if !chain.belongs_to(&self.shared) {
            return Err(Misuse::ForeignChain.into());
        }
        chain.close()?;
        let put = self.with(py, |queue| chain.put_back(queue));
        put.inspect_err(|_| chain.reopen())
    }

    #[pyo3(signature = (handler, *, limit = Int(32768), max_request = Int(16 << 20), max_bytes = None))]
    #[pyo3(text_signature = "($self, handler, *, limit=32768, max_request=16777216, max_bytes=None)")]
    fn process(
        &self,
        py: Python<'_>,
        handler: &Bound<'_, PyAny>,
        limit: Int<usize>,
        max_request: Int<usize>,
        max_bytes: Option<Int<usize>>,
    ) -> PyResult<usize> {
        let bounds = Bounds {
            chains: positive(limit.0, "limit")?,
            request: max_request.0,
            bytes: max_bytes.map_or(usize::MAX, |bytes| bytes.0),
        };
        self.one_by_one(py, handler, bounds)
    }

    /// From any thread; what is charged outside of `process` is forgotten when that begins.
    fn charge(&self, count: Int<usize>) {
        let add = |charged: usize| Some(charged.saturating_add(count.0));
        let _ = self.charged.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
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
        self.at_once(
            py,
            handler,
            (request_size.0, response_size.0),
            positive(limit.0, "limit")?,
        )
    }

    /// The newest first, which is the one that can be put back.
    fn take_failed(&self) -> Option<Py<PyChain>> {
        locked(&self.failed).pop()
    }

    /// The lock and the pin are free again when the notifier runs: it may be a function of Python's.
    pub(crate) fn signal(&self, py: Python<'_>) -> PyResult<bool> {
        let wants = with_queue!(Some(py), self.shared, |mem, queue| queue.wants_call(mem));
        let wants = wants.map_err(|fault| raise(py, &fault))?;
        let (call, miss) = (wants, false);
        self.wakes.wake_attached(py, Wake { call, miss })?;
        Ok(wants)
    }

    fn set_call(&self, call: Option<Py<PyNotifier>>) {
        let before = std::mem::replace(&mut *locked(&self.wakes.call), call);
        drop(before);
    }

    fn enable_kicks(&self, py: Python<'_>) -> PyResult<bool> {
        let done = with_queue!(Some(py), self.shared, |mem, queue| queue.enable_kicks(mem));
        done.map_err(|fault| raise(py, &fault))
    }

    fn disable_kicks(&self, py: Python<'_>) -> PyResult<()> {
        let done = with_queue!(Some(py), self.shared, |mem, queue| queue.disable_kicks(mem));
        done.map_err(|fault| raise(py, &fault))
    }

    fn latch(&self, violation: &Bound<'_, PyAny>) -> PyResult<()> {
        let class: Bound<'_, PyType> = errors::violation_type(violation.py());
        if !violation.is_instance(&class)? {
            return Err(InvalidArgument::new_err(
                "a queue is latched with a QueueViolation that says why",
            ));
        }
        let fresh = self.with(violation.py(), |queue| {
            let fresh = queue.latched().is_none() && !queue.broken();
            queue.break_down();
            fresh
        })?;
        if fresh {
            let before = locked(&self.broken).replace(violation.clone().unbind());
            drop(before);
        }
        Ok(())
    }

    fn stop(&self, py: Python<'_>) -> PyResult<PyQueueState> {
        self.with(py, |queue| PyQueueState(queue.stop()))
    }

    fn resume(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, DeviceQueue::resume)
    }

    #[pyo3(signature = (config = None, *, state = None))]
    fn reset(&self, py: Python<'_>, config: Option<PyQueueConfig>, state: Option<PyQueueState>) -> PyResult<()> {
        let (config, state) = (config.map(|config| config.0), state.map(|state| state.0));
        let done = with_queue!(Some(py), self.shared, |mem, queue| queue.reset(mem, config, state));
        done.map_err(|fault| raise(py, &fault))?;
        self.forget();
        Ok(())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.memory)?;
        // Waiting for a lock here could wait for ourselves; what is not visited is merely kept alive.
        if let Ok(call) = self.wakes.call.try_lock() {
            visit.call(&*call)?;
        }
        if let Ok(miss) = self.wakes.miss.try_lock() {
            visit.call(&*miss)?;
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
        let (call, miss) = (locked(&self.wakes.call).take(), locked(&self.wakes.miss).take());
        drop((call, miss));
        self.forget();
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let text = self.with(py, |queue| {
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
        });
        text.unwrap_or_else(|_| "<DeviceQueue in a transfer>".to_owned())
    }
}
