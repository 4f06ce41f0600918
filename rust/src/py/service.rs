//! Native services in Python: made and observed here, run by `turn` or by a `Worker`.
//!
//! A service is locked for each turn, before the memory is pinned; queues are locked in one order, by address, since two
//! services may share them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use smallvec::SmallVec;

use super::args::{Input, Int, duplicate, invalid};
use super::chain::Shared;
use super::device::{PyDeviceQueue, Wakes, positive};
use super::errors::raise;
use super::guard::{Gil, lock, pin};
use super::remote::{self, both};
use crate::mem::{GuestMemory, with_access};
use crate::queue::DeviceQueue;
use crate::service::{
    Bounds, Done, Entropy, EntropyCounters, File, FileCounters, Native, Service, Terms, Traits, Turn, arm, run, term,
};

/// Queues of one memory that a service works on at once.
pub(crate) struct Party {
    pub(crate) guest: Arc<GuestMemory>,
    pub(crate) queues: SmallVec<[(Arc<Shared>, Arc<Wakes>); 2]>,
    /// Places in `queues`, in the order in which they are locked.
    order: SmallVec<[usize; 2]>,
}

/// What became of a turn that may have to be made elsewhere.
pub(crate) enum Outcome {
    Done(Done),
    /// Some of the memory is remote, and that was not wanted.
    Remote,
}

impl Party {
    /// The party of `queues`, as `service` wants it.
    pub(crate) fn new(service: &Native, queues: &[PyRef<'_, PyDeviceQueue>]) -> PyResult<Self> {
        let wanted = service.queues();
        if queues.len() != wanted {
            let given = queues.len();
            return Err(invalid(format_args!(
                "the service works on {wanted} queues, not {given}"
            )));
        }
        let Some(first) = queues.first() else {
            return Err(invalid("a service works on at least one queue"));
        };
        let guest = Arc::clone(first.guest());
        if queues.iter().any(|queue| !Arc::ptr_eq(queue.guest(), &guest)) {
            return Err(invalid("the queues of one service lie in one memory"));
        }
        let queues: SmallVec<[_; 2]> = queues
            .iter()
            .map(|queue| (Arc::clone(queue.shared()), Arc::clone(queue.wakes())))
            .collect();
        let mut order: SmallVec<[usize; 2]> = (0..queues.len()).collect();
        let place = |index: &usize| queues.get(*index).map(|(shared, _)| Arc::as_ptr(shared).addr());
        order.sort_by_key(place);
        if order
            .iter()
            .zip(order.iter().skip(1))
            .any(|(one, next)| place(one) == place(next))
        {
            return Err(invalid("the queues of one service are different ones"));
        }
        Ok(Self { guest, queues, order })
    }

    /// Run `work` with the memory pinned and all queues locked. What interrupts it waits for `remote::interrupted`.
    pub(crate) fn enter<T>(
        &self,
        gil: Gil<'_>,
        work: impl FnOnce(&crate::mem::Pin<'_>, &mut [&mut DeviceQueue]) -> T,
    ) -> PyResult<T> {
        remote::begin()?;
        let pinned = pin(gil, &self.guest)?;
        let mut guards: SmallVec<[Option<MutexGuard<'_, DeviceQueue>>; 2]> = self.queues.iter().map(|_| None).collect();
        for &index in &self.order {
            if let (Some(place), Some((shared, _))) = (guards.get_mut(index), self.queues.get(index)) {
                *place = Some(shared.lock(gil)?);
            }
        }
        let mut queues: SmallVec<[&mut DeviceQueue; 2]> =
            guards.iter_mut().flatten().map(|guard| &mut **guard).collect();
        let done = work(&pinned, &mut queues);
        drop(queues);
        drop(guards);
        drop(pinned);
        Ok(done)
    }

    /// One turn; nobody is woken yet, for whatever interrupted it too. Of remote memory only if that is `wanted` here.
    pub(crate) fn turn(
        &self,
        gil: Gil<'_>,
        service: &Mutex<Native>,
        bounds: Bounds,
        remote_wanted: bool,
    ) -> PyResult<Outcome> {
        let mut service = lock(gil, service)?;
        self.enter(gil, |pin, queues| {
            if pin.table().has_remote() && !remote_wanted {
                return Outcome::Remote;
            }
            Outcome::Done(with_access!(pin, |mem| run(&mut *service, mem, queues, bounds)))
        })
    }
}

/// The bounds of a turn.
pub(crate) fn bounds(limit: Int<usize>, max_bytes: Int<u64>) -> PyResult<Bounds> {
    Ok(Bounds {
        chains: positive(limit.0, "limit")?,
        bytes: max_bytes.0.max(1),
    })
}

/// A native handler.
#[pyclass(frozen, subclass, module = "virtio_test._core", name = "Service")]
pub struct PyService(Arc<Mutex<Native>>);

impl PyService {
    pub(crate) fn new(service: Native) -> Self {
        Self(Arc::new(Mutex::new(service)))
    }

    /// The object of a class that makes this service.
    pub(crate) fn with<T: pyo3::PyClass<BaseType = Self>>(self, own: T) -> PyClassInitializer<T> {
        PyClassInitializer::from(self).add_subclass(own)
    }

    pub(crate) const fn inner(&self) -> &Arc<Mutex<Native>> {
        &self.0
    }
}

#[pymethods]
impl PyService {
    /// How many queues it works on.
    #[getter]
    fn queues(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(lock(Some(py), &self.0)?.queues())
    }

    #[pyo3(signature = (queues, *, limit = Int(256), max_bytes = Int(0x8_0000)))]
    #[pyo3(text_signature = "($self, queues, *, limit=256, max_bytes=524288)")]
    #[allow(clippy::needless_pass_by_value, reason = "what Python's sequences are extracted to")]
    fn turn(
        &self,
        py: Python<'_>,
        queues: Vec<PyRef<'_, PyDeviceQueue>>,
        limit: Int<usize>,
        max_bytes: Int<u64>,
    ) -> PyResult<(usize, bool)> {
        let bounds = bounds(limit, max_bytes)?;
        let party = Party::new(&*lock(Some(py), &self.0)?, &queues)?;
        let service = &self.0;
        let Outcome::Done(done) = py.detach(|| party.turn(None, service, bounds, true))? else {
            return Ok((0, false));
        };
        let mut told = remote::interrupted();
        let (turn, fault) = match done.turn {
            Ok(turn) => (turn, Ok(())),
            Err(fault) => (Turn::default(), Err(raise(py, &fault))),
        };
        told = both(py, told, fault);
        for ((_, wakes), wake) in party.queues.iter().zip(done.wakes) {
            told = both(py, told, wakes.wake_attached(py, wake));
        }
        told.map(|()| (turn.done, turn.more))
    }

    #[allow(clippy::needless_pass_by_value, reason = "what Python's sequences are extracted to")]
    fn arm(&self, py: Python<'_>, queues: Vec<PyRef<'_, PyDeviceQueue>>) -> PyResult<bool> {
        let service = &self.0;
        let party = Party::new(&*lock(Some(py), service)?, &queues)?;
        let found = py.detach(|| {
            let service = lock(None, service)?;
            party.enter(None, |pin, queues| with_access!(pin, |mem| arm(&*service, mem, queues)))
        })?;
        remote::interrupted()?;
        found.map_err(|fault| raise(py, &fault))
    }

    fn __repr__(slf: &Bound<'_, Self>) -> PyResult<String> {
        Ok(format!("<{}>", slf.get_type().name()?))
    }
}

/// Counters as a new dict.
pub(crate) fn counted<'py>(py: Python<'py>, counters: &[(&str, &AtomicU64)]) -> PyResult<Bound<'py, PyDict>> {
    let shown = PyDict::new(py);
    for (name, counter) in counters {
        shown.set_item(name, counter.load(Ordering::Relaxed))?;
    }
    Ok(shown)
}

/// Fills buffers with random bytes of the operating system.
#[pyclass(frozen, extends = PyService, module = "virtio_test._core", name = "EntropyService")]
pub struct PyEntropyService(Arc<EntropyCounters>);

#[pymethods]
impl PyEntropyService {
    #[new]
    #[pyo3(signature = (*, limit = Int(0x1_0000)), text_signature = "(*, limit=65536)")]
    fn new(limit: Int<u64>) -> PyResult<PyClassInitializer<Self>> {
        if limit.0 == 0 {
            return Err(invalid("limit is 0: a buffer gets at least one byte"));
        }
        let service = Entropy::new(limit.0);
        let counters = Arc::clone(service.counters());
        Ok(PyService::new(Native::Entropy(service)).with(Self(counters)))
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let EntropyCounters { delivered, odd, failed } = &*self.0;
        counted(py, &[("delivered", delivered), ("odd", odd), ("failed", failed)])
    }
}

/// Answers block requests from a file.
#[pyclass(frozen, extends = PyService, module = "virtio_test._core", name = "FileService")]
pub struct PyFileService {
    terms: Arc<Terms>,
    counters: Arc<FileCounters>,
}

fn fixed<const N: usize>(name: &str, given: &Input<'_>) -> PyResult<[u8; N]> {
    let given = given.to_vec();
    let length = given.len();
    let fits = <[u8; N]>::try_from(given);
    fits.map_err(|_| invalid(format_args!("{name} has {length} bytes: it is {N}")))
}

#[pymethods]
impl PyFileService {
    #[new]
    #[pyo3(signature = (fd, *, serial, lifetime, max_discard, max_write_zeroes))]
    #[allow(clippy::needless_pass_by_value, reason = "held until they are copied")]
    fn new(
        fd: Int<i32>,
        serial: Input<'_>,
        lifetime: Input<'_>,
        max_discard: (Int<u32>, Int<u32>),
        max_write_zeroes: (Int<u32>, Int<u32>),
    ) -> PyResult<PyClassInitializer<Self>> {
        let traits = Traits {
            serial: fixed("serial", &serial)?,
            lifetime: fixed("lifetime", &lifetime)?,
            max_discard: (max_discard.0.0, max_discard.1.0),
            max_write_zeroes: (max_write_zeroes.0.0, max_write_zeroes.1.0),
        };
        let service = File::new(duplicate(fd.0)?, traits);
        let own = Self {
            terms: Arc::clone(service.terms()),
            counters: Arc::clone(service.counters()),
        };
        Ok(PyService::new(Native::File(service)).with(own))
    }

    #[pyo3(signature = (*, capacity, read_only, flush, legacy, write_through, discard, write_zeroes, lifetime))]
    #[allow(
        clippy::too_many_arguments,
        clippy::fn_params_excessive_bools,
        reason = "keyword arguments of Python"
    )]
    fn agree(
        &self,
        capacity: Int<u64>,
        read_only: bool,
        flush: bool,
        legacy: bool,
        write_through: bool,
        discard: bool,
        write_zeroes: bool,
        lifetime: bool,
    ) {
        let bits = [
            (read_only, term::READ_ONLY),
            (flush, term::FLUSH),
            (legacy, term::LEGACY),
            (write_through, term::WRITE_THROUGH),
            (discard, term::DISCARD),
            (write_zeroes, term::WRITE_ZEROES),
            (lifetime, term::LIFETIME),
        ];
        let flags = bits.iter().filter(|(set, _)| *set).map(|(_, bit)| bit).sum();
        self.terms.capacity.store(capacity.0, Ordering::Relaxed);
        self.terms.flags.store(flags, Ordering::Relaxed);
    }

    #[getter]
    fn last_errno(&self) -> i32 {
        self.counters.last_errno.load(Ordering::Relaxed)
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let seen = &*self.counters;
        counted(
            py,
            &[
                ("ok", &seen.ok),
                ("ioerr", &seen.ioerr),
                ("unsupp", &seen.unsupp),
                ("no_status", &seen.no_status),
                ("host_errors", &seen.host_errors),
                ("read", &seen.read),
                ("written", &seen.written),
                ("flushes", &seen.flushes),
            ],
        )
    }
}
