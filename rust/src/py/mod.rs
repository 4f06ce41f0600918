//! The Python face of the core: the only folder that names pyo3, one file for each module above it.

mod args;
mod batch;
mod chain;
mod counters;
mod device;
mod driver;
mod errors;
mod guard;
mod inflight;
mod layout;
mod mem;
mod notify;
mod packet;
mod play;
mod poller;
mod process;
mod remote;
mod service;
mod worker;

use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Whether moving an index from `old` to `new` passes `event`.
#[pyfunction]
fn need_event(event: args::Int<u16>, new: args::Int<u16>, old: args::Int<u16>) -> bool {
    crate::ring::need_event(event.0, new.0, old.0)
}

/// How this core was built.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    info.set_item(
        "abi",
        if cfg!(feature = "abi3") {
            "abi3"
        } else {
            "version-specific"
        },
    )?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    Ok(info)
}

/// The module `virtio_test._core`.
#[pymodule(name = "_core")]
mod core_module {
    #[pymodule_export]
    use super::batch::PyBatch;
    #[pymodule_export]
    use super::chain::PyChain;
    #[pymodule_export]
    use super::counters::PyCounters;
    #[pymodule_export]
    use super::device::{PyDeviceQueue, PyMissing};
    #[pymodule_export]
    use super::driver::PyDriverQueue;
    #[pymodule_export]
    use super::inflight::{PyInflightArea, PyInflightPart};
    #[pymodule_export]
    use super::layout::{PyPolicy, PyQueueConfig, PyQueueState, PyRingLayout, PyRule, rules};
    #[pymodule_export]
    use super::mem::{PyAccess, PyDirtyLog, PyGuestMemory, PyRegion, PyTrace};
    #[pymodule_export]
    use super::notify::PyNotifier;
    #[pymodule_export]
    use super::packet::PyPacketService;
    #[pymodule_export]
    use super::play::PyPlayer;
    #[pymodule_export]
    use super::poller::PyPoller;
    #[pymodule_export]
    use super::service::{PyEntropyService, PyFileService, PyService};
    #[pymodule_export]
    use super::worker::PyWorker;
    #[pymodule_export]
    use super::{build_info, need_event};

    #[pymodule_export]
    #[allow(non_upper_case_globals, reason = "the name that Python expects")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
