//! `DriverQueue`: the driver end in Python.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use super::args::Int;
use super::counters::PyCounters;
use super::errors::{self, InvalidArgument, either, raise};
use super::guard::{Guarded, with_memory, with_queue};
use super::layout::{PyQueueConfig, PyQueueState, PyRingLayout};
use super::mem::PyGuestMemory;
use super::notify::PyNotifier;
use super::remote::pending;
use crate::queue::{DriverQueue, IndirectArea};

/// The driver end of one virtqueue.
#[pyclass(frozen, module = "virtio_test._core", name = "DriverQueue")]
pub struct PyDriverQueue {
    memory: Py<PyGuestMemory>,
    kick: Mutex<Option<Py<PyNotifier>>>,
    guarded: Guarded<DriverQueue>,
}

impl PyDriverQueue {
    /// Run `f` on the queue, which needs no memory for it.
    fn with<T>(&self, py: Python<'_>, f: impl FnOnce(&mut DriverQueue) -> T) -> PyResult<T> {
        Ok(f(&mut *self.guarded.lock(Some(py))?))
    }

    fn notifier(&self) -> MutexGuard<'_, Option<Py<PyNotifier>>> {
        self.kick.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// (address, length) of each buffer.
type Pairs = Vec<(Int<u64>, Int<u64>)>;

fn buffers(pairs: Pairs) -> PyResult<Vec<(u64, u32)>> {
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
        let queue = with_memory!(Some(py), &guest, |mem| DriverQueue::new(
            mem,
            config.0,
            state.map(|state| state.0),
            area
        ));
        let queue = queue.map_err(|fault| raise(py, &fault))?;
        Ok(Self {
            memory,
            kick: Mutex::new(kick),
            guarded: Guarded::new(guest, queue),
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
    fn free(&self, py: Python<'_>) -> PyResult<u16> {
        self.with(py, |queue| queue.free())
    }

    #[getter]
    fn latched(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let fault = self.with(py, |queue| queue.latched().cloned())?;
        fault.map(|fault| errors::instance(py, &fault)).transpose()
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

    #[pyo3(signature = (readable, writable = Vec::new(), *, indirect = false))]
    #[pyo3(text_signature = "($self, readable, writable=(), *, indirect =False)")]
    fn add(&self, py: Python<'_>, readable: Pairs, writable: Pairs, indirect: bool) -> PyResult<u64> {
        let (readable, writable) = (buffers(readable)?, buffers(writable)?);
        let token = with_queue!(Some(py), self.guarded, |mem, queue| queue
            .add(mem, &readable, &writable, indirect));
        token.map_err(|error| either(py, error))
    }

    fn add_many(&self, py: Python<'_>, chains: Vec<(Pairs, Pairs)>) -> PyResult<Vec<u64>> {
        let chains: PyResult<Vec<_>> = chains
            .into_iter()
            .map(|(r, w)| Ok((buffers(r)?, buffers(w)?)))
            .collect();
        let chains = chains?;
        let tokens = with_queue!(Some(py), self.guarded, |mem, queue| queue.add_many(mem, &chains));
        tokens.map(Iterator::collect).map_err(|error| either(py, error))
    }

    fn publish(&self, py: Python<'_>) -> PyResult<u16> {
        let done = with_queue!(Some(py), self.guarded, |mem, queue| queue.publish(mem));
        done.map_err(|fault| raise(py, &fault))
    }

    fn signal(&self, py: Python<'_>) -> PyResult<bool> {
        let wants = with_queue!(Some(py), self.guarded, |mem, queue| {
            queue.publish(mem).and_then(|_| queue.wants_kick(mem))
        });
        let wants = wants.map_err(|fault| raise(py, &fault))?;
        let kick = self.notifier().as_ref().map(|kick| kick.clone_ref(py));
        if let Some(kick) = kick.filter(|_| wants) {
            kick.get().notify(py)?;
        }
        Ok(wants)
    }

    fn has_used(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(with_queue!(Some(py), self.guarded, |mem, queue| queue.has_used(mem)))
    }

    fn get_used(&self, py: Python<'_>) -> PyResult<Option<(u64, u32)>> {
        let done = with_queue!(Some(py), self.guarded, |mem, queue| queue.get_used(mem));
        done.map_err(|fault| raise(py, &fault))
    }

    #[pyo3(signature = (limit = Int(32768)))]
    #[pyo3(text_signature = "($self, limit=32768)")]
    fn get_used_many(&self, py: Python<'_>, limit: Int<usize>) -> PyResult<Vec<(u64, u32)>> {
        let done = with_queue!(Some(py), self.guarded, |mem, queue| {
            let taken = queue.get_used_many(mem, limit.0);
            match taken {
                Ok(taken) if pending() => {
                    queue.give_back(taken);
                    Ok(Vec::new())
                }
                taken => taken,
            }
        });
        done.map_err(|fault| raise(py, &fault))
    }

    fn detach(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        self.with(py, DriverQueue::detach)
    }

    fn enable_calls(&self, py: Python<'_>) -> PyResult<bool> {
        let done = with_queue!(Some(py), self.guarded, |mem, queue| queue.enable_calls(mem));
        done.map_err(|fault| raise(py, &fault))
    }

    fn disable_calls(&self, py: Python<'_>) -> PyResult<()> {
        let done = with_queue!(Some(py), self.guarded, |mem, queue| queue.disable_calls(mem));
        done.map_err(|fault| raise(py, &fault))
    }

    #[pyo3(signature = (config = None, *, state = None))]
    fn reset(&self, py: Python<'_>, config: Option<PyQueueConfig>, state: Option<PyQueueState>) -> PyResult<()> {
        let (config, state) = (config.map(|config| config.0), state.map(|state| state.0));
        let done = with_queue!(Some(py), self.guarded, |mem, queue| queue.reset(mem, config, state));
        done.map_err(|fault| raise(py, &fault))
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.memory)?;
        // Waiting for the lock here could wait for ourselves; what is not visited is merely kept alive.
        self.kick.try_lock().map_or(Ok(()), |kick| visit.call(&*kick))
    }

    fn __clear__(&self) {
        let kick = self.notifier().take();
        drop(kick);
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let text = self.with(py, |queue| {
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
        });
        text.unwrap_or_else(|_| "<DriverQueue in a transfer>".to_owned())
    }
}
