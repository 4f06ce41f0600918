//! Memory in which device queues record what they have in flight.

use std::sync::Arc;

use pyo3::prelude::*;

use super::args::{Int, duplicate, invalid};
use super::mem::{PyTrace, region_error};
use crate::inflight::{Area, Part};
use crate::mem::Backing;

/// The other side's memory for the records of all its queues.
#[pyclass(frozen, module = "virtio_test._core", name = "InflightArea")]
pub struct PyInflightArea(Arc<Area>);

#[pymethods]
impl PyInflightArea {
    #[new]
    #[pyo3(signature = (size, *, fd, offset = Int(0), trace = None))]
    #[pyo3(text_signature = "(size, *, fd, offset=0, trace=None)")]
    fn new(
        py: Python<'_>,
        size: Int<u64>,
        fd: Int<i32>,
        offset: Int<u64>,
        trace: Option<&Bound<'_, PyTrace>>,
    ) -> PyResult<Self> {
        let backing = Backing::Received {
            fd: duplicate(fd.0)?,
            offset: offset.0,
            writable: true,
        };
        let trace = trace.map(|trace| Arc::clone(trace.get().inner()));
        let area = py.detach(|| Area::new(size.0, backing, trace));
        Ok(Self(Arc::new(area.map_err(region_error)?)))
    }

    #[getter]
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn part(&self, offset: Int<u64>, entries: Int<u16>) -> PyResult<PyInflightPart> {
        // What the smaller format needs; a queue asks for its own.
        let bytes = Part::bytes(false, entries.0);
        let end = offset.0.checked_add(bytes);
        if entries.0 == 0 || offset.0 % 8 != 0 || end.is_none_or(|end| end > self.0.size()) {
            return Err(invalid(format_args!(
                "no record of {} descriptors from byte {:#x} of {:#x} on",
                entries.0,
                offset.0,
                self.0.size()
            )));
        }
        let part = Part::new(Arc::clone(&self.0), offset.0, entries.0);
        Ok(PyInflightPart(part))
    }

    fn __repr__(&self) -> String {
        format!("<InflightArea of {:#x} bytes>", self.size())
    }
}

/// Where the record of one queue lies in an area.
#[pyclass(frozen, module = "virtio_test._core", name = "InflightPart")]
pub struct PyInflightPart(Part);

impl PyInflightPart {
    pub(super) const fn inner(&self) -> &Part {
        &self.0
    }
}

#[pymethods]
impl PyInflightPart {
    #[staticmethod]
    fn bytes(entries: Int<u16>, packed: bool) -> u64 {
        Part::bytes(packed, entries.0)
    }

    #[getter]
    const fn entries(&self) -> u16 {
        self.0.entries()
    }

    fn clear(&self) -> PyResult<()> {
        self.0.clear().map_err(invalid)
    }

    fn __repr__(&self) -> String {
        format!("<InflightPart of {} descriptors>", self.entries())
    }
}
