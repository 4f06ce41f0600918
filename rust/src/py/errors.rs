//! From the core's errors to the exceptions of `virtio_test.errors`: one conversion for each layer.

use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict, PyType};

use super::remote::caused;
use crate::error::{Fault, Misuse, QueueError, Violation};
use crate::inflight::BadRecord;
use crate::mem::MemoryError;
use crate::rule::Rule;

mod classes {
    pyo3::import_exception!(virtio_test.errors, InvalidArgument);
    pyo3::import_exception!(virtio_test.errors, StaleChain);
    pyo3::import_exception!(virtio_test.errors, ForeignChain);
    pyo3::import_exception!(virtio_test.errors, StaleMemory);
    pyo3::import_exception!(virtio_test.errors, QueueFull);
    pyo3::import_exception!(virtio_test.errors, NoFeature);
    pyo3::import_exception!(virtio_test.errors, HandlerError);
    pyo3::import_exception!(virtio_test.errors, StateError);
    pyo3::import_exception!(virtio_test.errors, QueueViolation);
    pyo3::import_exception!(virtio_test.errors, RuleViolation);
    pyo3::import_exception!(virtio_test.errors, MessageError);
}
pub(crate) use classes::{HandlerError, InvalidArgument, StaleChain, StateError};

/// The violation as an instance of `QueueViolation`.
fn violation<'py>(py: Python<'py>, fault: &Violation) -> PyResult<Bound<'py, PyAny>> {
    let places = [
        ("queue", Some(u64::from(fault.queue))),
        ("position", fault.position.map(u64::from)),
        ("head", fault.head.map(u64::from)),
        ("descriptor", fault.descriptor.map(u64::from)),
        ("address", fault.address),
    ];
    let known: Bound<'py, PyDict> = places
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .into_py_dict(py)?;
    let class = violation_type(py);
    let args = (
        fault.rule.name(),
        fault.rule.clause(fault.packed),
        fault.message.as_str(),
    );
    class.call(args, Some(&known))
}

/// The class `QueueViolation`.
pub(crate) fn violation_type(py: Python<'_>) -> Bound<'_, PyType> {
    py.get_type::<classes::QueueViolation>()
}

/// The exception for a broken rule.
pub(crate) fn raise(py: Python<'_>, fault: &Fault) -> PyErr {
    match violation(py, fault) {
        Ok(instance) if matches!(fault.rule, Rule::RingUnmapped | Rule::IndirectUnmapped) => {
            caused(py, PyErr::from_value(instance))
        }
        Ok(instance) => PyErr::from_value(instance),
        Err(error) => error,
    }
}

/// The exception for a record that cannot be: it is the vhost-user protocol that has them.
pub(crate) fn bad_record(py: Python<'_>, queue: u16, error: &BadRecord) -> PyErr {
    let raised = [("queue", queue)].into_py_dict(py).and_then(|known| {
        let class = py.get_type::<classes::MessageError>();
        let clause = "vhost-user, Inflight I/O tracking";
        class.call(("InflightState", clause, error.to_string()), Some(&known))
    });
    raised.map_or_else(|other| other, PyErr::from_value)
}

/// An address that our caller gave cannot be used: our caller's fault, unless the other side took the memory away.
pub(crate) fn memory_error(error: MemoryError) -> PyErr {
    match error {
        MemoryError::Lost { gpa } => Python::attach(|py| lost(py, gpa, &error)),
        _ => after(error, classes::InvalidArgument::new_err(error.to_string())),
    }
}

/// No queue is known here, and no format: the clause is the same for both.
fn lost(py: Python<'_>, gpa: u64, error: &MemoryError) -> PyErr {
    let rule = Rule::MemoryLost;
    let raised = [("address", gpa)].into_py_dict(py).and_then(|known| {
        let class = py.get_type::<classes::RuleViolation>();
        class.call((rule.name(), rule.split_clause(), error.to_string()), Some(&known))
    });
    raised.map_or_else(|other| other, PyErr::from_value)
}

/// `raised` for a memory error: if a transfer failed, with its cause.
fn after(error: MemoryError, raised: PyErr) -> PyErr {
    match error {
        MemoryError::Transfer { .. } => Python::attach(|py| caused(py, raised)),
        _ => raised,
    }
}

/// The instance for a property that shows a violation without raising it.
pub(crate) fn instance(py: Python<'_>, fault: &Fault) -> PyResult<Py<PyAny>> {
    Ok(violation(py, fault)?.unbind())
}

impl From<Misuse> for PyErr {
    fn from(misuse: Misuse) -> Self {
        let text = misuse.to_string();
        match misuse {
            Misuse::WrittenTooBig { .. } | Misuse::Invalid(_) => classes::InvalidArgument::new_err(text),
            Misuse::ForeignChain => classes::ForeignChain::new_err(text),
            Misuse::StaleChain => classes::StaleChain::new_err(text),
            Misuse::StaleMemory(error) => after(error, classes::StaleMemory::new_err(text)),
            Misuse::QueueFull { .. } => classes::QueueFull::new_err(text),
            Misuse::NoIndirect => classes::NoFeature::new_err(text),
            Misuse::NotNewest | Misuse::Latched => classes::StateError::new_err(text),
        }
    }
}

/// The exception for either side's fault.
pub(crate) fn either(py: Python<'_>, error: QueueError) -> PyErr {
    match error {
        QueueError::Violation(fault) => raise(py, &fault),
        QueueError::Misuse(misuse) => misuse.into(),
    }
}
