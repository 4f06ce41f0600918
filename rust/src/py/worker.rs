//! Python's `Worker`: a thread that runs a service without the GIL.
//!
//! Its thread holds nothing of Python's but notifiers, which take the GIL only where they are callbacks. So whoever waits for
//! a turn to end waits without the GIL. Nobody waits for it inside a transfer, where this thread may hold a queue that the turn
//! waits for; nor when the interpreter ends, when the thread may wait for the GIL for ever: so all have ended just before.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use super::args::{Int, duplicate, invalid};
use super::device::PyDeviceQueue;
use super::errors::StateError;
use super::guard::lock;
use super::notify::{PyNotifier, notify_error};
use super::service::{Outcome, Party, PyService, bounds};
use crate::mem::{transferring, with_access};
use crate::notify::Notifier;
use crate::queue::DeviceQueue;
use crate::service::{Bounds, Native, Service, arm};
use crate::worker::{Kick, Turned, Wait, Work, Worker, WorkerError};

/// The longest time that a worker spins, in microseconds.
const MOST_SPIN: f64 = 1e6;

/// What the thread and the object share.
#[derive(Default)]
struct Seen {
    /// Whether the last turn could not be made in the thread.
    elsewhere: AtomicBool,
    deaf: AtomicBool,
    turns: AtomicU64,
    chains: AtomicU64,
    broken: Mutex<Vec<u16>>,
}

struct Served {
    party: Party,
    service: Arc<Mutex<Native>>,
    bounds: Bounds,
    tell: Option<Arc<Notifier>>,
    seen: Arc<Seen>,
}

impl Served {
    fn tell(&self) {
        let _ = self.tell.as_ref().map(|tell| tell.notify());
    }

    /// Whether `ask` holds of any queue.
    fn any(&self, ask: impl Fn(&mut DeviceQueue) -> bool) -> bool {
        let mut queues = self.party.queues.iter();
        queues.any(|(shared, _)| shared.lock(None).is_ok_and(|mut queue| ask(&mut queue)))
    }
}

impl Work for Served {
    fn turn(&mut self) -> Turned {
        let outcome = self.party.turn(None, &self.service, self.bounds, false);
        let Ok(Outcome::Done(done)) = outcome else {
            // Memory that is reached by functions of Python's is for the owner loop, which such functions belong to.
            self.seen.elsewhere.store(true, Ordering::Release);
            self.tell();
            return Turned::Asleep;
        };
        self.seen.elsewhere.store(false, Ordering::Release);
        self.seen.turns.fetch_add(1, Ordering::Relaxed);
        for ((_, wakes), wake) in self.party.queues.iter().zip(&done.wakes) {
            if wake.call || wake.miss {
                wakes.wake(*wake);
            }
        }
        let Ok(turn) = done.turn else {
            // The queue has kept what it was latched with. The others go on.
            broken(&self.seen).extend(done.broken);
            self.tell();
            return Turned::More;
        };
        self.seen.chains.fetch_add(turn.done as u64, Ordering::Relaxed);
        if turn.notable {
            self.tell();
        }
        if turn.more { Turned::More } else { Turned::Idle }
    }

    fn look(&mut self) -> bool {
        let Ok(service) = lock(None, &self.service) else {
            return true;
        };
        let looked = self.party.enter(None, |pin, queues| {
            let mut each = queues.iter_mut().enumerate();
            let remote = pin.table().has_remote();
            remote
                || with_access!(pin, |mem| each
                    .any(|(index, queue)| service.looks(index) && queue.has_work(mem)))
        });
        looked.unwrap_or(true)
    }

    fn alive(&mut self) -> bool {
        self.any(|queue| !queue.broken() && !queue.stopped())
    }

    fn arm(&mut self) -> bool {
        let Ok(service) = lock(None, &self.service) else {
            return false;
        };
        let armed = self.party.enter(None, |pin, queues| {
            // A ring that broke in between is told of by the turn after.
            !pin.table().has_remote() && with_access!(pin, |mem| arm(&*service, mem, queues)).unwrap_or(true)
        });
        armed.unwrap_or(false)
    }

    fn disarm(&mut self) {
        let _ = self.party.enter(None, |pin, queues| {
            if !pin.table().has_remote() {
                with_access!(pin, |mem| for queue in queues {
                    let _ = queue.disable_kicks(mem);
                });
            }
        });
    }

    fn deaf(&mut self) {
        self.seen.deaf.store(true, Ordering::Release);
        self.tell();
    }
}

fn broken(seen: &Seen) -> MutexGuard<'_, Vec<u16>> {
    // A list of numbers is whole at every moment.
    seen.broken.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The workers of this process that may run.
static LIVING: Mutex<Vec<Weak<Worker>>> = Mutex::new(Vec::new());

fn living() -> MutexGuard<'static, Vec<Weak<Worker>>> {
    LIVING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Have `worker` end before the interpreter does.
fn end_at_exit(py: Python<'_>, worker: &Arc<Worker>) -> PyResult<()> {
    static HOOKED: PyOnceLock<()> = PyOnceLock::new();
    HOOKED.get_or_try_init(py, || {
        let end = wrap_pyfunction!(end_all, py)?;
        py.import("atexit")?.call_method1("register", (end,)).map(drop)
    })?;
    let mut living = living();
    living.retain(|each| each.strong_count() > 0);
    living.push(Arc::downgrade(worker));
    Ok(())
}

#[pyfunction]
fn end_all(py: Python<'_>) {
    let workers = std::mem::take(&mut *living());
    let workers: Vec<_> = workers.iter().filter_map(Weak::upgrade).collect();
    py.detach(|| workers.iter().for_each(|worker| worker.stop()));
}

/// Whoever waits for the turn of a worker must not have what that waits for.
fn may_wait() -> PyResult<()> {
    if transferring() {
        return Err(StateError::new_err(
            "a worker cannot be waited for by the functions that read and write remote memory",
        ));
    }
    Ok(())
}

/// The queues of a worker, and what tells its owner.
type Kept = (Vec<Py<PyDeviceQueue>>, Option<Py<PyNotifier>>);

/// A thread that runs a service.
#[pyclass(frozen, module = "virtio_test._core", name = "Worker")]
pub struct PyWorker {
    worker: Arc<Worker>,
    seen: Arc<Seen>,
    /// What the thread reaches through what it shares with them: kept here, where a garbage collector finds it.
    kept: Mutex<Option<Kept>>,
}

fn kicks_of(fds: &[Int<i32>]) -> PyResult<Vec<Arc<Kick>>> {
    let kick = |fd: &Int<RawFd>| Kick::new(duplicate(fd.0)?).map(Arc::new).map_err(notify_error);
    fds.iter().map(kick).collect()
}

fn wait_of(wait: &str, spin: f64) -> PyResult<Wait> {
    if !(0.0..=MOST_SPIN).contains(&spin) {
        return Err(invalid(format_args!(
            "spin is {spin}: it is 0 to 1,000,000 microseconds"
        )));
    }
    match wait {
        "blocking" => Ok(Wait::Blocking),
        "adaptive" => Ok(Wait::Adaptive(Duration::from_secs_f64(spin / 1e6))),
        "busy" => Ok(Wait::Busy),
        _ => Err(invalid(format_args!(
            "wait is {wait:?}: say 'blocking', 'adaptive' or 'busy'"
        ))),
    }
}

#[pymethods]
impl PyWorker {
    #[new]
    #[pyo3(signature = (service, queues, kicks = Vec::new(), *, wait = "blocking", spin = 50.0, cpu = None, tell = None,
                        limit = Int(256), max_bytes = Int(0x8_0000)))]
    #[pyo3(
        text_signature = "(service, queues, kicks=(), *, wait='blocking', spin=50.0, cpu=None, tell=None, limit=256, max_bytes=524288)"
    )]
    #[allow(
        clippy::too_many_arguments,
        clippy::needless_pass_by_value,
        reason = "keyword arguments of Python, and what its sequences are extracted to"
    )]
    fn new(
        py: Python<'_>,
        service: PyRef<'_, PyService>,
        queues: Vec<PyRef<'_, PyDeviceQueue>>,
        kicks: Vec<Int<i32>>,
        wait: &str,
        spin: f64,
        cpu: Option<Int<usize>>,
        tell: Option<Py<PyNotifier>>,
        limit: Int<usize>,
        max_bytes: Int<u64>,
    ) -> PyResult<Self> {
        let (wait, kicks) = (wait_of(wait, spin)?, kicks_of(&kicks)?);
        let party = Party::new(&*lock(Some(py), service.inner())?, &queues)?;
        let seen = Arc::new(Seen::default());
        let served = Served {
            party,
            service: Arc::clone(service.inner()),
            bounds: bounds(limit, max_bytes)?,
            tell: tell.as_ref().map(|tell| Arc::clone(tell.get().inner())),
            seen: Arc::clone(&seen),
        };
        let cpu = cpu.map(|cpu| cpu.0);
        let worker = py.detach(|| Worker::start(served, kicks, wait, cpu));
        let worker = worker.map_err(|error| match error {
            WorkerError::Cpu { .. } => invalid(error),
            WorkerError::System(error) => error.into(),
        })?;
        let made = Self {
            worker: Arc::new(worker),
            seen,
            kept: Mutex::new(Some((queues.into_iter().map(Into::into).collect(), tell))),
        };
        end_at_exit(py, &made.worker)?;
        Ok(made)
    }

    fn wake(&self) {
        self.worker.wake();
    }

    #[allow(clippy::needless_pass_by_value, reason = "what Python's sequences are extracted to")]
    fn set_kicks(&self, fds: Vec<Int<i32>>) -> PyResult<()> {
        let kicks = kicks_of(&fds)?;
        self.seen.deaf.store(false, Ordering::Release);
        self.worker.set_kicks(kicks);
        Ok(())
    }

    fn park(&self, py: Python<'_>) -> PyResult<()> {
        if self.worker.is_inside() {
            return Err(StateError::new_err("a worker cannot wait for its own turn to end"));
        }
        may_wait()?;
        py.detach(|| self.worker.park());
        Ok(())
    }

    fn resume(&self) -> PyResult<()> {
        if self.worker.resume() {
            return Ok(());
        }
        Err(StateError::new_err("the worker is not parked"))
    }

    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        may_wait()?;
        py.detach(|| self.worker.stop());
        Ok(())
    }

    #[getter]
    fn parked(&self) -> bool {
        self.worker.parked()
    }

    #[getter]
    fn running(&self) -> bool {
        self.worker.running()
    }

    #[getter]
    fn elsewhere(&self) -> bool {
        self.seen.elsewhere.load(Ordering::Acquire)
    }

    #[getter]
    fn deaf(&self) -> bool {
        self.seen.deaf.load(Ordering::Acquire)
    }

    #[getter]
    fn broken(&self) -> Vec<u16> {
        broken(&self.seen).clone()
    }

    #[getter]
    fn turns(&self) -> u64 {
        self.seen.turns.load(Ordering::Relaxed)
    }

    #[getter]
    fn chains(&self) -> u64 {
        self.seen.chains.load(Ordering::Relaxed)
    }

    fn __repr__(&self) -> String {
        let state = match (self.worker.running(), self.worker.parked()) {
            (false, _) => "stopped",
            (true, true) => "parked",
            (true, false) => "running",
        };
        format!("<Worker {state}, {} turns, {} chains>", self.turns(), self.chains())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Waiting for a lock here could wait for ourselves; what is not visited is merely kept alive.
        if let Ok(kept) = self.kept.try_lock() {
            if let Some((queues, tell)) = &*kept {
                queues.iter().try_for_each(|queue| visit.call(queue))?;
                visit.call(tell)?;
            }
        }
        Ok(())
    }

    fn __clear__(&self) {
        let gone = self.kept.try_lock().ok().and_then(|mut kept| kept.take());
        drop(gone);
    }
}

impl Drop for PyWorker {
    fn drop(&mut self) {
        // The thread may wait for the GIL, so nobody waits for the thread with it.
        let stopped = if transferring() {
            None
        } else {
            Python::try_attach(|py| py.detach(|| self.worker.stop()))
        };
        if stopped.is_none() {
            self.worker.leave();
        }
    }
}
