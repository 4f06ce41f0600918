//! `Counters`: what has happened at one end of a queue.

use pyo3::prelude::*;

use crate::queue::Counters;

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
