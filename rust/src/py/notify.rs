//! Python's `Notifier`.
//!
//! A Python callback has two ways to be called: by us while we are attached, when what it raises goes to whoever
//! notified, and by a thread of the core, which has nobody to raise to: it is then reported as unraisable.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::{PyTraverseError, PyVisit};

use super::args::{Int, duplicate, invalid, os_error};
use super::errors::StateError;
use crate::notify::{Notifier, NotifyError};

/// The function of a callback; empty once the garbage collector has broken the cycle that it was part of.
struct Function(Mutex<Option<Py<PyAny>>>);

impl Function {
    fn call(&self, py: Python<'_>) -> PyResult<()> {
        // Cloned, so that the lock is free again before Python code runs.
        let function = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map(|known| known.clone_ref(py));
        function.map_or(Ok(()), |function| function.call0(py).map(drop))
    }
}

/// How one end wakes the other: an eventfd, any fd that takes 8 bytes (a pipe), or a Python callback.
#[pyclass(frozen, name = "Notifier", module = "virtio_test._core")]
pub struct PyNotifier {
    inner: Arc<Notifier>,
    function: Option<Arc<Function>>,
}

pub(crate) fn notify_error(error: NotifyError) -> PyErr {
    match error {
        NotifyError::WrongKind => invalid(error),
        NotifyError::ReadOnly => StateError::new_err(error.to_string()),
        NotifyError::System { errno, .. } => os_error(errno, error.to_string()),
    }
}

impl PyNotifier {
    /// For threads without the GIL: a callback takes it, and what that raises is reported as unraisable.
    pub(crate) const fn inner(&self) -> &Arc<Notifier> {
        &self.inner
    }
}

#[pymethods]
impl PyNotifier {
    #[staticmethod]
    fn eventfd() -> PyResult<Self> {
        let inner = Notifier::eventfd().map_err(notify_error)?.into();
        Ok(Self { inner, function: None })
    }

    #[staticmethod]
    fn from_fd(fd: Int<i32>) -> PyResult<Self> {
        let inner = Notifier::from_fd(duplicate(fd.0)?).map_err(notify_error)?.into();
        Ok(Self { inner, function: None })
    }

    #[staticmethod]
    fn callback(function: Bound<'_, PyAny>) -> PyResult<Self> {
        if !function.is_callable() {
            return Err(PyTypeError::new_err(format!(
                "{} object is not callable",
                function.get_type().name()?
            )));
        }
        let function = Arc::new(Function(Mutex::new(Some(function.unbind()))));
        let known = Arc::clone(&function);
        let call = move || {
            // Nobody can be called any more while the interpreter ends.
            let _ = Python::try_attach(|py| known.call(py).unwrap_or_else(|error| error.write_unraisable(py, None)));
        };
        let inner = Arc::new(Notifier::callback(Box::new(call)));
        Ok(Self {
            inner,
            function: Some(function),
        })
    }

    /// Wake the other end; what a callback raises is raised here.
    pub(crate) fn notify(&self, py: Python<'_>) -> PyResult<()> {
        match &self.function {
            Some(function) => {
                self.inner.count_one();
                function.call(py)
            }
            None => self.inner.notify().map_err(notify_error),
        }
    }

    fn fileno(&self) -> PyResult<RawFd> {
        let fd = self
            .inner
            .fd()
            .ok_or_else(|| invalid("a callback has no fd to wait on"))?;
        Ok(fd.as_raw_fd())
    }

    fn drain(&self) -> u64 {
        self.inner.drain()
    }

    #[getter]
    fn count(&self) -> u64 {
        self.inner.count()
    }

    fn __repr__(&self) -> String {
        let kind = self
            .inner
            .fd()
            .map_or_else(|| "callback".to_owned(), |fd| format!("fd {}", fd.as_raw_fd()));
        format!("<Notifier {kind}, notified {} times>", self.inner.count())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        let Some(function) = &self.function else { return Ok(()) };
        // Whoever holds the lock is running: what is not visited is not collected.
        match function.0.try_lock() {
            Ok(known) => visit.call(&*known),
            Err(TryLockError::Poisoned(known)) => visit.call(&*known.into_inner()),
            Err(TryLockError::WouldBlock) => Ok(()),
        }
    }

    fn __clear__(&self) {
        if let Some(function) = &self.function {
            let gone = function.0.lock().unwrap_or_else(PoisonError::into_inner).take();
            drop(gone);
        }
    }
}
