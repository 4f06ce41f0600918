//! The packet loop in Python: set up for each negotiation, observed at any time.

use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use super::args::{Int, invalid};
use super::guard::lock;
use super::service::{PyService, counted};
use crate::service::Native;
use crate::service::packet::{LONGEST, MOST_HEADER, Mode, Packets, Setup, Told};

/// Bytes of a header without `num_buffers`.
const LEAST_HEADER: usize = 10;
/// Bytes of a frame's number.
const NUMBER: usize = 8;

/// The packet loop of one pair of queues.
#[pyclass(frozen, extends = PyService, module = "virtio_test._core", name = "PacketService")]
pub struct PyPacketService(Arc<Told>);

/// Do something with the service itself; waits for a turn without the GIL.
fn with<T>(slf: &Bound<'_, PyPacketService>, work: impl FnOnce(&mut Packets) -> T) -> PyResult<T> {
    let service = lock(Some(slf.py()), slf.as_super().get().inner());
    match &mut *service? {
        Native::Packets(packets) => Ok(work(packets)),
        Native::Entropy(_) | Native::File(_) => Err(invalid("not a packet loop")),
    }
}

#[pymethods]
impl PyPacketService {
    #[new]
    #[pyo3(signature = (mode, *, count = None), text_signature = "(mode, *, count=None)")]
    fn new(mode: &str, count: Option<Int<u64>>) -> PyResult<PyClassInitializer<Self>> {
        let mode = match (mode, count) {
            ("loopback", None) => Mode::Loopback,
            ("drop", None) => Mode::Discard,
            ("generate", count) => Mode::Generate(count.map_or(u64::MAX, |count| count.0)),
            ("loopback" | "drop", Some(_)) => return Err(invalid("only frames that are made here are counted")),
            _ => {
                return Err(invalid(format_args!(
                    "mode is {mode:?}: say 'loopback', 'drop' or 'generate'"
                )));
            }
        };
        let service = Packets::new(mode);
        let told = Arc::clone(service.told());
        Ok(PyService::new(Native::Packets(Box::new(service))).with(Self(told)))
    }

    #[pyo3(signature = (*, header = Int(12), mergeable = false, checksum = false, guest_checksum = false,
                        longest = Int(65553), usable = true, frame = None, number_at = None))]
    #[pyo3(
        text_signature = "($self, *, header=12, mergeable=False, checksum=False, guest_checksum=False, longest=65553, usable=True, frame=None, number_at=None)"
    )]
    #[allow(clippy::too_many_arguments, reason = "keyword arguments of Python")]
    #[allow(
        clippy::fn_params_excessive_bools,
        reason = "each is a feature bit, given by its name"
    )]
    fn set_up(
        slf: &Bound<'_, Self>,
        header: Int<usize>,
        mergeable: bool,
        checksum: bool,
        guest_checksum: bool,
        longest: Int<usize>,
        usable: bool,
        frame: Option<&Bound<'_, PyBytes>>,
        number_at: Option<Int<usize>>,
    ) -> PyResult<()> {
        let frame = frame.map_or_else(Vec::new, |frame| frame.as_bytes().to_vec());
        let number_at = number_at.map(|place| place.0);
        if header.0 != LEAST_HEADER && header.0 != MOST_HEADER {
            return Err(invalid(format_args!("a header has 10 or 12 bytes, not {}", header.0)));
        }
        if longest.0 > LONGEST || frame.len() > LONGEST {
            return Err(invalid(format_args!("no frame is longer than {LONGEST} bytes")));
        }
        if number_at.is_some_and(|place| place.checked_add(NUMBER).is_none_or(|end| end > frame.len())) {
            return Err(invalid("a frame's number lies in it"));
        }
        let setup = Setup {
            header: header.0,
            mergeable,
            checksum,
            guest_checksum,
            longest: longest.0,
            usable,
            frame,
            number_at,
        };
        with(slf, |packets| packets.set_up(setup))
    }

    #[getter]
    fn generated(slf: &Bound<'_, Self>) -> PyResult<u64> {
        with(slf, |packets| packets.generated())
    }

    #[setter]
    fn set_generated(slf: &Bound<'_, Self>, number: Int<u64>) -> PyResult<()> {
        with(slf, |packets| packets.set_generated(number.0))
    }

    #[getter]
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let told = &*self.0;
        counted(
            py,
            &[
                ("sent", &told.sent[0]),
                ("sent_bytes", &told.sent[1]),
                ("received", &told.received[0]),
                ("received_bytes", &told.received[1]),
                ("dropped", &told.dropped),
                ("broken", &told.broken),
            ],
        )
    }

    /// What the driver did wrong since this was asked last: rule, clause, message, queue, head.
    fn take_findings(&self) -> Vec<(&'static str, &'static str, String, u16, u16)> {
        let found = self.0.take_findings().into_iter();
        found
            .map(|each| (each.rule, each.clause, each.message, each.queue, each.head))
            .collect()
    }
}
