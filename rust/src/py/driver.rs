//! `DriverQueue`: the driver end in Python.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::args::Int;
use super::counters::PyCounters;
use super::errors::{self, InvalidArgument, either, raise};
use super::layout::{PyQueueConfig, PyQueueState, PyRingLayout};
use super::mem::PyGuestMemory;
use super::notify::PyNotifier;
use crate::mem::{GuestMemory, with_access};
use crate::queue::{DriverQueue, IndirectArea};

/// The driver end of one virtqueue.
#[pyclass(frozen, module = "virtio_test._core", name = "DriverQueue")]
pub struct PyDriverQueue {
    memory: Py<PyGuestMemory>,
    guest: Arc<GuestMemory>,
    kick: Mutex<Option<Py<PyNotifier>>>,
    queue: Mutex<DriverQueue>,
}

impl PyDriverQueue {
    /// Taken after the pin of the memory, and let go with it before any code of Python's runs, as `with_queue!` of
    /// the device end does; making the exception for a broken rule is such code.
    fn lock(&self) -> MutexGuard<'_, DriverQueue> {
        // As for the device end: every operation validates before it changes anything.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notifier(&self) -> MutexGuard<'_, Option<Py<PyNotifier>>> {
        self.kick.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn buffers(pairs: Vec<(Int<u64>, Int<u64>)>) -> PyResult<Vec<(u64, u32)>> {
    let convert = |(Int(address), Int(length)): (Int<u64>, Int<u64>)| match u32::try_from(length) {
        Ok(short) => Ok((address, short)),
        Err(_) => Err(InvalidArgument::new_err(format!(
            "a buffer of {length} bytes does not fit the 32-bit length of a descriptor"
        ))),
    };
    pairs.into_iter().map(convert).collect()
}

#[pymethods]
impl PyDriverQueue {
    #[new]
    #[pyo3(signature = (memory, config, *, state = None, kick = None, indirect = None, indirect_entries = Int(16)))]
    #[pyo3(text_signature = "(memory, config, *, state=None, kick=None, indirect=None, indirect_entries=16)")]
    fn new(
        py: Python<'_>,
        memory: Py<PyGuestMemory>,
        config: PyQueueConfig,
        state: Option<PyQueueState>,
        kick: Option<Py<PyNotifier>>,
        indirect: Option<Int<u64>>,
        indirect_entries: Int<u16>,
    ) -> PyResult<Self> {
        if indirect_entries.0 == 0 {
            return Err(InvalidArgument::new_err("an indirect table has at least one entry"));
        }
        if let Some(address) = indirect.filter(|address| address.0 % 16 != 0) {
            let text = format!("the indirect tables at {:#x} are not aligned to 16 bytes", address.0);
            return Err(InvalidArgument::new_err(text));
        }
        let area = indirect.map(|address| IndirectArea {
            address: address.0,
            entries: indirect_entries.0,
        });
        let guest = memory.get().inner().clone();
        let pin = guest.pin();
        let queue = with_access!(pin, |mem| DriverQueue::new(
            mem,
            config.0,
            state.map(|state| state.0),
            area
        ));
        drop(pin);
        let queue = Mutex::new(queue.map_err(|fault| raise(py, &fault))?);
        Ok(Self {
            memory,
            guest,
            kick: Mutex::new(kick),
            queue,
        })
    }

    #[getter]
    fn memory(&self, py: Python<'_>) -> Py<PyGuestMemory> {
        self.memory.clone_ref(py)
    }

    #[getter]
    fn config(&self) -> PyQueueConfig {
        PyQueueConfig(*self.lock().config())
    }

    #[getter]
    fn index(&self) -> u16 {
        self.lock().config().index
    }

    #[getter]
    fn size(&self) -> u16 {
        self.lock().layout().size
    }

    #[getter]
    fn generation(&self) -> u64 {
        self.lock().generation()
    }

    #[getter]
    fn in_flight(&self) -> u32 {
        self.lock().in_flight()
    }

    #[getter]
    fn free(&self) -> u16 {
        self.lock().free()
    }

    #[getter]
    fn latched(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let fault = self.lock().latched().cloned();
        fault.map(|fault| errors::instance(py, &fault)).transpose()
    }

    #[getter]
    fn state(&self) -> PyQueueState {
        PyQueueState(self.lock().state())
    }

    #[getter]
    fn counters(&self) -> PyCounters {
        PyCounters(*self.lock().counters())
    }

    fn layout(&self) -> PyRingLayout {
        PyRingLayout(*self.lock().layout())
    }

    #[pyo3(signature = (readable, writable = Vec::new(), *, indirect = false))]
    #[pyo3(text_signature = "($self, readable, writable=(), *, indirect =False)")]
    fn add(
        &self,
        py: Python<'_>,
        readable: Vec<(Int<u64>, Int<u64>)>,
        writable: Vec<(Int<u64>, Int<u64>)>,
        indirect: bool,
    ) -> PyResult<u64> {
        let (readable, writable) = (buffers(readable)?, buffers(writable)?);
        let token = {
            let pin = self.guest.pin();
            with_access!(pin, |mem| self.lock().add(mem, &readable, &writable, indirect))
        };
        token.map_err(|error| either(py, error))
    }

    fn publish(&self, py: Python<'_>) -> PyResult<u16> {
        let done = {
            let pin = self.guest.pin();
            with_access!(pin, |mem| self.lock().publish(mem))
        };
        done.map_err(|fault| raise(py, &fault))
    }

    fn signal(&self, py: Python<'_>) -> PyResult<bool> {
        let pin = self.guest.pin();
        let wants = with_access!(pin, |mem| {
            let mut queue = self.lock();
            queue.publish(mem).and_then(|_| queue.wants_kick(mem))
        });
        drop(pin);
        let wants = wants.map_err(|fault| raise(py, &fault))?;
        let kick = self.notifier().as_ref().map(|kick| kick.clone_ref(py));
        if let Some(kick) = kick.filter(|_| wants) {
            kick.get().notify(py)?;
        }
        Ok(wants)
    }

    fn has_used(&self) -> bool {
        let pin = self.guest.pin();
        with_access!(pin, |mem| self.lock().has_used(mem))
    }

    fn get_used(&self, py: Python<'_>) -> PyResult<Option<(u64, u32)>> {
        let done = {
            let pin = self.guest.pin();
            with_access!(pin, |mem| self.lock().get_used(mem))
        };
        done.map_err(|fault| raise(py, &fault))
    }

    #[pyo3(signature = (limit = Int(32768)))]
    #[pyo3(text_signature = "($self, limit=32768)")]
    fn get_used_many(&self, py: Python<'_>, limit: Int<usize>) -> PyResult<Vec<(u64, u32)>> {
        let done = {
            let pin = self.guest.pin();
            with_access!(pin, |mem| self.lock().get_used_many(mem, limit.0))
        };
        done.map_err(|fault| raise(py, &fault))
    }

    fn detach(&self) -> Vec<u64> {
        self.lock().detach()
    }

    fn enable_calls(&self, py: Python<'_>) -> PyResult<bool> {
        let done = {
            let pin = self.guest.pin();
            with_access!(pin, |mem| self.lock().enable_calls(mem))
        };
        done.map_err(|fault| raise(py, &fault))
    }

    fn disable_calls(&self, py: Python<'_>) -> PyResult<()> {
        let done = {
            let pin = self.guest.pin();
            with_access!(pin, |mem| self.lock().disable_calls(mem))
        };
        done.map_err(|fault| raise(py, &fault))
    }

    #[pyo3(signature = (config = None, *, state = None))]
    fn reset(&self, py: Python<'_>, config: Option<PyQueueConfig>, state: Option<PyQueueState>) -> PyResult<()> {
        let (config, state) = (config.map(|config| config.0), state.map(|state| state.0));
        let done = {
            let pin = self.guest.pin();
            with_access!(pin, |mem| self.lock().reset(mem, config, state))
        };
        done.map_err(|fault| raise(py, &fault))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Waiting for the lock here could wait for ourselves; what is not visited is merely kept alive.
        self.kick.try_lock().map_or(Ok(()), |kick| visit.call(&*kick))
    }

    fn __clear__(&self) {
        let kick = self.notifier().take();
        drop(kick);
    }

    fn __repr__(&self) -> String {
        let queue = self.lock();
        let state = if queue.latched().is_some() {
            "latched"
        } else {
            "running"
        };
        let format = if queue.layout().packed { "packed" } else { "split" };
        let (index, size) = (queue.config().index, queue.layout().size);
        format!(
            "<DriverQueue {index} {format} of {size}, {state}, {} in flight>",
            queue.in_flight()
        )
    }
}
