//! Python's `Poller`.

use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use pyo3::prelude::*;

use super::args::{Int, invalid, os_error};
use crate::poller::{Polled, Poller, PollerError};

/// Waits are cut into slices of this length, so that signals are seen that another thread received.
const SLICE: Duration = Duration::from_millis(100);

/// Waits for readable fds with the GIL released.
#[pyclass(frozen, name = "Poller", module = "virtio_test._core")]
pub struct PyPoller(Poller);

fn poller_error(error: PollerError) -> PyErr {
    match error {
        PollerError::System { errno, .. } => os_error(errno, error.to_string()),
        _ => invalid(error),
    }
}

#[pymethods]
impl PyPoller {
    #[new]
    fn new() -> PyResult<Self> {
        Poller::new().map(Self).map_err(poller_error)
    }

    fn add(&self, fd: Int<i32>) -> PyResult<()> {
        self.0.add(fd.0).map_err(poller_error)
    }

    fn remove(&self, fd: Int<i32>) -> PyResult<()> {
        self.0.remove(fd.0).map_err(poller_error)
    }

    #[pyo3(signature = (timeout=None))]
    fn wait(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Vec<RawFd>> {
        if let Some(seconds) = timeout.filter(|seconds| seconds.is_nan() || *seconds < 0.0) {
            return Err(invalid(format_args!(
                "timeout must be 0 or more seconds, not {seconds}"
            )));
        }
        // What is too long for a Duration (infinity as well) is no limit.
        let limit = timeout.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let start = Instant::now();
        loop {
            let left = limit.map(|limit| limit.saturating_sub(start.elapsed()));
            let slice = left.map_or(SLICE, |left| left.min(SLICE));
            // A look that does not wait is too short to give the GIL away for.
            let polled = if slice.is_zero() {
                self.0.wait(slice)
            } else {
                py.detach(|| self.0.wait(slice))
            };
            match polled.map_err(poller_error)? {
                Polled::Ready(fds) => return Ok(fds),
                Polled::Woken => return Ok(Vec::new()),
                Polled::Timeout | Polled::Interrupted => py.check_signals()?,
            }
            if limit.is_some_and(|limit| start.elapsed() >= limit) {
                return Ok(Vec::new());
            }
        }
    }

    fn wake(&self) {
        self.0.wake();
    }

    fn __repr__(&self) -> String {
        format!("<Poller of fds {:?}>", self.0.watched())
    }
}
