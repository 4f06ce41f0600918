//! Remote memory whose bytes functions of Python's read and write.
//!
//! # Theory
//!
//! A transfer is made somewhere inside an operation of the core, which knows only that it failed. What the function
//! raised waits in its thread until the operation is over. If that was an error, it becomes the cause of the exception
//! that the operation raises, if it raises one. What is no `Exception` (`KeyboardInterrupt`, `SystemExit`) is an
//! interrupt: no function is called any more in this operation, all its transfers fail, and it is raised in place of
//! whatever the operation gives. None is ever lost: one that could not be raised is raised by the next operation.

use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyException, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString};
use pyo3::{PyTraverseError, PyVisit};

use super::args::{Input, invalid};
use crate::mem::{Transfer, TransferFailed};

/// What the function of a failed transfer raised.
enum Failure {
    Error(PyErr),
    Interrupt(PyErr),
}

thread_local! {
    static FAILURE: RefCell<Option<Failure>> = const { RefCell::new(None) };
}

/// How many threads have one (or had one when they ended). Who asks first asks here, which costs next to nothing.
static FAILURES: AtomicUsize = AtomicUsize::new(0);

fn put(failure: Failure) {
    let older = FAILURE.replace(Some(failure));
    if older.is_none() {
        FAILURES.fetch_add(1, Ordering::Relaxed);
    }
    drop(older);
}

fn take() -> Option<Failure> {
    let failure = FAILURE.take();
    if failure.is_some() {
        FAILURES.fetch_sub(1, Ordering::Relaxed);
    }
    failure
}

/// Whether this is no error, but wants to get out of whatever goes on.
pub(crate) fn is_interrupt(py: Python<'_>, error: &PyErr) -> bool {
    !error.is_instance_of::<PyException>(py)
}

fn note(py: Python<'_>, error: PyErr) {
    let failure = if is_interrupt(py, &error) {
        Failure::Interrupt(error)
    } else {
        Failure::Error(error)
    };
    put(failure);
}

/// Forget what older operations left.
///
/// # Errors
/// An interrupt that was not raised yet.
#[inline]
pub(crate) fn begin() -> PyResult<()> {
    if FAILURES.load(Ordering::Relaxed) == 0 {
        return Ok(());
    }
    match take() {
        Some(Failure::Interrupt(error)) => Err(error),
        Some(Failure::Error(_)) | None => Ok(()),
    }
}

/// Whether the present operation was interrupted.
#[inline]
pub(crate) fn pending() -> bool {
    FAILURES.load(Ordering::Relaxed) != 0 && interrupt_waits()
}

#[cold]
fn interrupt_waits() -> bool {
    FAILURE.with_borrow(|failure| matches!(failure, Some(Failure::Interrupt(_))))
}

/// At the end of an operation.
///
/// # Errors
/// What interrupted it.
#[inline]
pub(crate) fn interrupted() -> PyResult<()> {
    if pending() { begin() } else { Ok(()) }
}

/// `error`, which a failed transfer may have caused, with what its function raised as its cause.
pub(crate) fn caused(py: Python<'_>, error: PyErr) -> PyErr {
    if !pending() {
        if let Some(Failure::Error(cause)) = take() {
            error.set_cause(py, Some(cause));
        }
    }
    error
}

/// Which of two errors to raise: an interrupt before any other, else the first.
pub(crate) fn pressing(py: Python<'_>, first: PyErr, second: PyErr) -> PyErr {
    if is_interrupt(py, &second) && !is_interrupt(py, &first) {
        second
    } else {
        first
    }
}

/// What to raise for `given`, which has shown no bytes: `say` of its type, caused by `error`; an interrupt as it is.
pub(crate) fn no_buffer(
    given: &Bound<'_, PyAny>,
    error: PyErr,
    say: impl FnOnce(&Bound<'_, PyString>) -> PyErr,
) -> PyErr {
    let py = given.py();
    if is_interrupt(py, &error) {
        return error;
    }
    match given.get_type().name() {
        Ok(name) => {
            let raised = say(&name);
            raised.set_cause(py, Some(error));
            raised
        }
        Err(other) => other,
    }
}

/// What comes of two things of which neither kept the other from being done.
pub(crate) fn both(py: Python<'_>, first: PyResult<()>, second: PyResult<()>) -> PyResult<()> {
    match (first, second) {
        (Ok(()), other) | (other, Ok(())) => other,
        (Err(first), Err(second)) => Err(pressing(py, first, second)),
    }
}

#[derive(Debug)]
struct Functions {
    read: Py<PyAny>,
    write: Option<Py<PyAny>>,
}

/// The way to a remote region; empty once the garbage collector has broken the cycle that it was part of.
#[derive(Debug)]
pub(crate) struct Callbacks(Mutex<Option<Functions>>);

fn callable(function: &Bound<'_, PyAny>) -> PyResult<()> {
    if function.is_callable() {
        return Ok(());
    }
    let name = function.get_type().name()?;
    Err(PyTypeError::new_err(format!("{name} object is not callable")))
}

impl Callbacks {
    pub(crate) fn new(read: Bound<'_, PyAny>, write: Option<Bound<'_, PyAny>>) -> PyResult<Self> {
        callable(&read)?;
        write.as_ref().map_or(Ok(()), callable)?;
        Ok(Self(Mutex::new(Some(Functions {
            read: read.unbind(),
            write: write.map(Bound::unbind),
        }))))
    }

    /// Cloned, so that the lock is free again before Python code runs.
    fn function(&self, py: Python<'_>, which: impl FnOnce(&Functions) -> Option<&Py<PyAny>>) -> PyResult<Py<PyAny>> {
        let functions = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let function = functions.as_ref().and_then(which).map(|known| known.clone_ref(py));
        function.ok_or_else(|| invalid("nobody reads and writes this memory any more"))
    }

    fn fetch(&self, py: Python<'_>, gpa: u64, dst: &mut [u8]) -> PyResult<()> {
        let read = self.function(py, |functions| Some(&functions.read))?;
        let given = read.bind(py).call1((gpa, dst.len()))?;
        let bytes = given.extract::<Input<'_>>().map_err(|error| {
            no_buffer(&given, error, |name| {
                PyTypeError::new_err(format!(
                    "the function that reads remote memory returned {name}: it returns bytes"
                ))
            })
        })?;
        if bytes.copy_to(dst) {
            return Ok(());
        }
        let (wanted, given) = (dst.len(), bytes.raw().len);
        Err(invalid(format_args!(
            "the function that reads remote memory returned {given} of the {wanted} bytes at {gpa:#x}"
        )))
    }

    pub(crate) fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Whoever holds the lock is running: what is not visited is not collected.
        let Ok(functions) = self.0.try_lock() else {
            return Ok(());
        };
        functions.as_ref().map_or(Ok(()), |functions| {
            visit.call(&functions.read)?;
            visit.call(&functions.write)
        })
    }

    pub(crate) fn clear(&self) {
        let gone = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(gone);
    }
}

/// Call Python for a transfer, from a thread that may or may not hold the GIL.
fn call(work: impl FnOnce(Python<'_>) -> PyResult<()>) -> Result<(), TransferFailed> {
    if pending() {
        return Err(TransferFailed);
    }
    // None while the interpreter ends: nobody can be called then.
    let done = Python::try_attach(|py| work(py).map_err(|error| note(py, error)));
    done.and_then(Result::ok).ok_or(TransferFailed)
}

impl Transfer for Callbacks {
    fn read(&self, gpa: u64, dst: &mut [u8]) -> Result<(), TransferFailed> {
        call(|py| self.fetch(py, gpa, dst))
    }

    fn write(&self, gpa: u64, src: &[u8]) -> Result<(), TransferFailed> {
        call(|py| {
            let write = self.function(py, |functions| functions.write.as_ref())?;
            write.bind(py).call1((gpa, PyBytes::new(py, src))).map(drop)
        })
    }
}
