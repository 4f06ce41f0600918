//! Python's `GuestMemory`, `Region`, `Trace` and `Access`.
//!
//! Each method pins, copies and unpins; no code of Python's runs meanwhile but that of remote memory. What waits for pins
//! (a change of the table) does so without the GIL, and what waits for a change does too (see `guard`).

#![allow(clippy::needless_pass_by_value, reason = "PyO3 hands arguments over by value")]

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView};
use pyo3::{PyRef, PyTraverseError, PyVisit, ffi};
use rustix::io::Errno;

use super::args::{Input, Int, Output, Raw, duplicate, invalid, os_error};
use super::errors::{StateError, memory_error};
use super::guard::{DETACH_ABOVE, Gil, detached, pin};
use super::remote::{self, Callbacks};
use crate::mem::{
    Access, AliasSpec, At, Backing, Elsewhere, GuestMemory, Live, Log, Mediated, MemoryError, Record, Region,
    RegionError, RegionSpec, Trace, Want,
};

pub(super) fn region_error(error: RegionError) -> PyErr {
    match error {
        // The fd or the size is one that cannot be mapped; everything else is the machine's trouble.
        RegionError::System {
            errno:
                Errno::ACCESS | Errno::BADF | Errno::FBIG | Errno::INVAL | Errno::NODEV | Errno::OVERFLOW | Errno::PERM,
            ..
        } => invalid(error),
        RegionError::System { errno, .. } => os_error(errno, error.to_string()),
        RegionError::InTransfer | RegionError::Mixed => StateError::new_err(error.to_string()),
        _ => invalid(error),
    }
}

/// One stretch of guest memory, as it was when asked for.
#[pyclass(frozen, name = "Region", module = "virtio_test._core")]
pub struct PyRegion {
    #[pyo3(get)]
    address: u64,
    #[pyo3(get)]
    size: u64,
    #[pyo3(get)]
    offset: u64,
    #[pyo3(get)]
    writable: bool,
    #[pyo3(get)]
    remote: bool,
    #[pyo3(get)]
    lost: bool,
    /// Keeps the fd open, and not the mapping.
    file: Option<Arc<OwnedFd>>,
}

impl From<&Arc<Region>> for PyRegion {
    fn from(region: &Arc<Region>) -> Self {
        Self {
            address: region.gpa(),
            size: region.size(),
            offset: region.offset(),
            writable: region.writable(),
            remote: region.remote().is_some(),
            lost: region.lost(),
            file: region.fd().cloned(),
        }
    }
}

#[pymethods]
impl PyRegion {
    #[getter]
    fn fd(&self) -> Option<RawFd> {
        self.file.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn __repr__(&self) -> String {
        let Self {
            address, size, offset, ..
        } = self;
        let bytes = match self.fd() {
            Some(fd) => format!("fd {fd} at {offset:#x}"),
            None if self.remote => "remote".to_owned(),
            None => "anonymous".to_owned(),
        };
        let mode = if self.writable { "" } else { ", read-only" };
        let lost = if self.lost { ", lost" } else { "" };
        format!("<Region {address:#x} + {size:#x}, {bytes}{mode}{lost}>")
    }
}

/// One access to traced memory.
#[pyclass(frozen, name = "Access", module = "virtio_test._core")]
pub struct PyAccess(Record);

#[pymethods]
impl PyAccess {
    #[getter]
    const fn kind(&self) -> &'static str {
        self.0.kind.name()
    }

    #[getter]
    const fn address(&self) -> u64 {
        self.0.gpa
    }

    #[getter]
    const fn length(&self) -> u64 {
        self.0.len
    }

    fn __repr__(&self) -> String {
        format!("<Access {} {:#x} + {}>", self.kind(), self.address(), self.length())
    }
}

/// Records every access that queues and chains make to a memory, and can change memory in between.
#[pyclass(frozen, name = "Trace", module = "virtio_test._core")]
pub struct PyTrace(Arc<Trace>);

impl PyTrace {
    pub(super) const fn inner(&self) -> &Arc<Trace> {
        &self.0
    }
}

#[pymethods]
impl PyTrace {
    #[new]
    fn new() -> Self {
        Self(Arc::new(Trace::new()))
    }

    fn log(&self) -> Vec<PyAccess> {
        self.0.log().into_iter().map(PyAccess).collect()
    }

    fn clear(&self) {
        self.0.clear();
    }

    fn change_at(&self, number: Int<u64>, address: Int<u64>, data: Input<'_>) {
        self.0.change_at(number.0, address.0, data.to_vec());
    }

    fn end_at(&self, number: Int<u64>) {
        self.0.end_at(number.0);
    }

    #[getter]
    fn count(&self) -> u64 {
        self.0.count()
    }

    #[getter]
    fn missed(&self) -> u64 {
        self.0.missed()
    }

    #[expect(clippy::unused_self, reason = "Python calls it on an instance")]
    const fn __repr__(&self) -> &'static str {
        "Trace()"
    }
}

/// A dirty log of our own, for whoever reads it.
#[pyclass(frozen, name = "DirtyLog", module = "virtio_test._core")]
pub struct PyDirtyLog {
    log: Log,
    file: OwnedFd,
}

#[pymethods]
impl PyDirtyLog {
    #[new]
    fn new(size: Int<u64>) -> PyResult<Self> {
        let (log, file) = Log::fresh(size.0).map_err(region_error)?;
        Ok(Self { log, file })
    }

    #[getter]
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    #[getter]
    const fn size(&self) -> u64 {
        self.log.size()
    }

    fn take(&self) -> Vec<u64> {
        self.log.take()
    }

    fn __repr__(&self) -> String {
        format!("DirtyLog({})", self.log.size())
    }
}

/// A translation: address, size, physical address, whether it may be read and written.
type Translation = (Int<u64>, Int<u64>, Int<u64>, bool, bool);
/// A stretch that is logged elsewhere: physical address, size, where.
type Moved = (Int<u64>, Int<u64>, Int<u64>);

/// A received region: guest address, size, fd, offset in the file.
type Received = (Int<u64>, Int<u64>, Int<i32>, Int<u64>);

/// What new regions without an fd are made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    Memfd,
    Anonymous,
}

impl Own {
    fn named(name: &str) -> PyResult<Self> {
        match name {
            "memfd" => Ok(Self::Memfd),
            "anonymous" => Ok(Self::Anonymous),
            _ => Err(invalid(format_args!(
                "backing must be 'memfd' or 'anonymous', not {name:?}"
            ))),
        }
    }

    const fn backing(self) -> Backing {
        match self {
            Self::Memfd => Backing::Memfd,
            Self::Anonymous => Backing::Anonymous,
        }
    }
}

/// A table of regions that never overlap, with an epoch that grows at each change of the table.
#[pyclass(frozen, name = "GuestMemory", module = "virtio_test._core")]
pub struct PyGuestMemory {
    inner: Arc<GuestMemory>,
    trace: Option<Py<PyTrace>>,
    own: Own,
    /// Of the remote regions, for the garbage collector: what they call may hold this memory.
    callbacks: Mutex<Vec<Arc<Callbacks>>>,
}

impl PyGuestMemory {
    /// The memory itself, for the queues.
    pub(crate) const fn inner(&self) -> &Arc<GuestMemory> {
        &self.inner
    }

    /// Do `work` on the memory; not traced.
    fn reach<T>(&self, gil: Gil<'_>, work: impl FnOnce(&Mediated<'_>) -> Result<T, MemoryError>) -> PyResult<T> {
        remote::begin()?;
        let pin = pin(gil, &self.inner)?;
        let done = work(&pin.whole());
        drop(pin);
        remote::interrupted()?;
        done.map_err(memory_error)
    }

    /// Change the table; regions that went take their callbacks with them.
    fn change(&self, py: Python<'_>, work: impl FnOnce() -> Result<(), RegionError> + Send) -> PyResult<()> {
        py.detach(work).map_err(region_error)?;
        let gone: Vec<_> = {
            let mut callbacks = self.callbacks.lock().unwrap_or_else(PoisonError::into_inner);
            let (kept, gone) = callbacks.drain(..).partition(|one| Arc::strong_count(one) > 1);
            *callbacks = kept;
            gone
        };
        // Without the lock: the last reference to an object may run any code of Python's.
        drop(gone);
        Ok(())
    }
}

#[pymethods]
impl PyGuestMemory {
    #[new]
    #[pyo3(signature = (regions=Vec::new(), *, backing="memfd", trace=None))]
    #[pyo3(text_signature = "(regions=(), *, backing='memfd', trace=None)")]
    fn new(
        py: Python<'_>,
        regions: Vec<(Int<u64>, Int<u64>)>,
        backing: &str,
        trace: Option<Py<PyTrace>>,
    ) -> PyResult<Self> {
        let own = Own::named(backing)?;
        let spec = |(gpa, size): (Int<u64>, Int<u64>)| RegionSpec {
            gpa: gpa.0,
            size: size.0,
            backing: own.backing(),
        };
        let regions = regions.into_iter().map(spec).collect();
        let record = trace.as_ref().map(|trace| Arc::clone(&trace.bind(py).get().0));
        let inner = Arc::new(GuestMemory::new(regions, record).map_err(region_error)?);
        Ok(Self {
            inner,
            trace,
            own,
            callbacks: Mutex::new(Vec::new()),
        })
    }

    #[getter]
    fn epoch(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(pin(Some(py), &self.inner)?.epoch())
    }

    #[getter]
    fn regions(&self, py: Python<'_>) -> PyResult<Vec<PyRegion>> {
        let pin = pin(Some(py), &self.inner)?;
        Ok(pin.table().regions().iter().map(PyRegion::from).collect())
    }

    #[getter]
    fn trace(&self, py: Python<'_>) -> Option<Py<PyTrace>> {
        self.trace.as_ref().map(|trace| trace.clone_ref(py))
    }

    #[pyo3(signature = (address, size, *, fd=None, offset=Int(0), writable=true))]
    #[pyo3(text_signature = "($self, address, size, *, fd=None, offset=0, writable=True)")]
    fn add_region(
        &self,
        py: Python<'_>,
        address: Int<u64>,
        size: Int<u64>,
        fd: Option<Int<i32>>,
        offset: Int<u64>,
        writable: bool,
    ) -> PyResult<()> {
        let (gpa, size, offset) = (address.0, size.0, offset.0);
        let backing = match fd {
            Some(fd) => Backing::Received {
                fd: duplicate(fd.0)?,
                offset,
                writable,
            },
            None if offset != 0 => return Err(invalid("an offset is one into a file: give fd, or no offset")),
            None if writable => self.own.backing(),
            None => Backing::fresh_read_only(gpa, size).map_err(region_error)?,
        };
        self.change(py, || self.inner.add(RegionSpec { gpa, size, backing }))
    }

    #[pyo3(signature = (address, size, *, read, write))]
    fn add_remote(
        &self,
        py: Python<'_>,
        address: Int<u64>,
        size: Int<u64>,
        read: Bound<'_, PyAny>,
        write: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (gpa, size, writable) = (address.0, size.0, write.is_some());
        let callbacks = Arc::new(Callbacks::new(read, write)?);
        let transfer = Arc::clone(&callbacks) as _;
        let backing = Backing::Remote { transfer, writable };
        self.change(py, || self.inner.add(RegionSpec { gpa, size, backing }))?;
        let mut known = self.callbacks.lock().unwrap_or_else(PoisonError::into_inner);
        known.push(callbacks);
        Ok(())
    }

    fn remove_region(&self, py: Python<'_>, address: Int<u64>, size: Int<u64>) -> PyResult<()> {
        self.change(py, || self.inner.remove(address.0, size.0))
    }

    fn replace(&self, py: Python<'_>, regions: Vec<Received>) -> PyResult<()> {
        let specs = regions.into_iter().map(|(gpa, size, fd, offset)| {
            let backing = Backing::Received {
                fd: duplicate(fd.0)?,
                offset: offset.0,
                writable: true,
            };
            Ok(RegionSpec {
                gpa: gpa.0,
                size: size.0,
                backing,
            })
        });
        let specs = specs.collect::<PyResult<Vec<_>>>()?;
        self.change(py, || self.inner.replace(specs))
    }

    fn follow(&self, py: Python<'_>, other: &Bound<'_, Self>) -> PyResult<()> {
        let other = Arc::clone(&other.get().inner);
        self.change(py, || self.inner.follow(&other))
    }

    #[pyo3(signature = (other, *, remove = Vec::new(), add = Vec::new()))]
    #[pyo3(text_signature = "($self, other, *, remove=(), add=())")]
    fn translate(
        &self,
        py: Python<'_>,
        other: &Bound<'_, Self>,
        remove: Vec<Int<u64>>,
        add: Vec<Translation>,
    ) -> PyResult<()> {
        let gone = remove.into_iter().map(|address| address.0).collect();
        let new = {
            let pin = pin(Some(py), &other.get().inner)?;
            let alias = |(gpa, size, physical, readable, writable): Translation| {
                let region = pin.table().region_of(physical.0).cloned();
                let region = region.ok_or_else(|| invalid(format_args!("there is no memory at {:#x}", physical.0)))?;
                Ok(AliasSpec {
                    gpa: gpa.0,
                    size: size.0,
                    skip: physical.0.wrapping_sub(region.gpa()),
                    region,
                    access: (readable, writable),
                })
            };
            add.into_iter().map(alias).collect::<PyResult<Vec<_>>>()?
        };
        self.change(py, || self.inner.translate(gone, new))
    }

    #[pyo3(signature = (fd, size, *, offset = Int(0), elsewhere = Vec::new()))]
    #[pyo3(text_signature = "($self, fd, size, *, offset=0, elsewhere=())")]
    fn start_log(
        &self,
        py: Python<'_>,
        fd: Int<i32>,
        size: Int<u64>,
        offset: Int<u64>,
        elsewhere: Vec<Moved>,
    ) -> PyResult<()> {
        let file = duplicate(fd.0)?;
        let moved = |(gpa, size, logged): Moved| Elsewhere {
            gpa: gpa.0,
            size: size.0,
            logged: logged.0,
        };
        let elsewhere = elsewhere.into_iter().map(moved).collect();
        let log = Log::new(file.as_fd(), offset.0, size.0, elsewhere).map_err(region_error)?;
        self.change(py, || self.inner.set_log(Some(log)))
    }

    fn stop_log(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, || self.inner.set_log(None))
    }

    #[getter]
    fn log_size(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(pin(Some(py), &self.inner)?.table().log().map_or(0, |log| log.size()))
    }

    fn read<'py>(&self, py: Python<'py>, address: Int<u64>, length: Int<usize>) -> PyResult<Bound<'py, PyBytes>> {
        let (gpa, len) = (address.0, length.0);
        if len > DETACH_ABOVE {
            // Before that much memory is asked for.
            self.reach(Some(py), |mem| mem.check(gpa, len as u64, Want::Read))?;
        }
        PyBytes::new_with(py, len, |out| {
            detached(py, len, |gil| {
                self.reach(gil, |mem| mem.read(At::unresolved(gpa), 0, out))
            })
        })
    }

    fn read_into(&self, py: Python<'_>, address: Int<u64>, buffer: Output) -> PyResult<()> {
        let raw = buffer.raw();
        detached(py, raw.len, |gil| {
            let Raw { ptr, len } = { raw };
            self.reach(gil, |mem| {
                // SAFETY: `buffer` is held over the copy, so its `len` bytes are valid for writes (M6).
                unsafe { mem.read_raw(At::unresolved(address.0), 0, ptr, len) }
            })
        })
    }

    fn write(&self, py: Python<'_>, address: Int<u64>, data: Input<'_>) -> PyResult<()> {
        let raw = data.raw();
        detached(py, raw.len, |gil| {
            let Raw { ptr, len } = { raw };
            self.reach(gil, |mem| {
                // SAFETY: `data` is held over the copy, so its `len` bytes are valid for reads (M6).
                unsafe { mem.write_raw(At::unresolved(address.0), 0, ptr, len) }
            })
        })
    }

    #[pyo3(signature = (address, length, value=Int(0)))]
    #[pyo3(text_signature = "($self, address, length, value=0)")]
    fn fill(&self, py: Python<'_>, address: Int<u64>, length: Int<usize>, value: Int<u8>) -> PyResult<()> {
        let at = At::unresolved(address.0);
        detached(py, length.0, |gil| {
            self.reach(gil, |mem| mem.fill(at, 0, length.0 as u64, value.0))
        })
    }

    fn copy(&self, py: Python<'_>, destination: Int<u64>, source: Int<u64>, length: Int<usize>) -> PyResult<()> {
        detached(py, length.0, |gil| {
            self.reach(gil, |mem| mem.copy_within(destination.0, source.0, length.0 as u64))
        })
    }

    fn is_mapped(&self, py: Python<'_>, address: Int<u64>, length: Int<u64>) -> PyResult<bool> {
        let pin = pin(Some(py), &self.inner)?;
        Ok(pin.check(address.0, length.0, Want::Read).is_ok())
    }

    #[pyo3(signature = (address, length, *, writable=false))]
    fn live_view<'py>(
        &self,
        py: Python<'py>,
        address: Int<u64>,
        length: Int<u64>,
        writable: bool,
    ) -> PyResult<Bound<'py, PyMemoryView>> {
        let want = if writable { Want::Write } else { Want::Read };
        let (gpa, len) = (address.0, length.0);
        let live = {
            let pin = pin(Some(py), &self.inner)?;
            pin.live(gpa, len, want).map_err(|error| {
                let region = pin.table().region_of(gpa);
                if region.is_some_and(|region| region.remote().is_some()) {
                    invalid(format_args!(
                        "the memory at {gpa:#x} is remote: its bytes can be copied, not viewed"
                    ))
                } else if pin.check(gpa, len, want).is_ok() {
                    invalid("a live view must lie in one region")
                } else {
                    memory_error(error)
                }
            })?
        };
        PyMemoryView::from(Bound::new(py, LiveBytes { live, writable })?.as_any())
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.trace)?;
        // Waiting for the lock here could wait for ourselves; what is not visited is merely kept alive.
        let Ok(callbacks) = self.callbacks.try_lock() else {
            return Ok(());
        };
        callbacks.iter().try_for_each(|one| one.traverse(&visit))
    }

    fn __clear__(&self) {
        let callbacks = std::mem::take(&mut *self.callbacks.lock().unwrap_or_else(PoisonError::into_inner));
        for one in &callbacks {
            one.clear();
        }
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let Ok(pin) = pin(Some(py), &self.inner) else {
            return "<GuestMemory in a transfer>".to_owned();
        };
        let regions = pin.table().regions();
        if !regions.iter().all(|region| region.own()) {
            return format!("<GuestMemory of {} regions, epoch {}>", regions.len(), pin.epoch());
        }
        let pairs: Vec<_> = regions.iter().map(|region| (region.gpa(), region.size())).collect();
        let backing = if self.own == Own::Memfd {
            ""
        } else {
            ", backing='anonymous'"
        };
        let trace = if self.trace.is_some() { ", trace=Trace()" } else { "" };
        format!("GuestMemory({pairs:?}{backing}{trace})")
    }
}

/// What a live view is a view of; keeps its bytes mapped.
#[pyclass(frozen, module = "virtio_test._core")]
struct LiveBytes {
    live: Live,
    writable: bool,
}

#[pymethods]
impl LiveBytes {
    unsafe fn __getbuffer__(slf: PyRef<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        if view.is_null() {
            return Err(PyBufferError::new_err("no view to fill"));
        }
        let (ptr, len) = (slf.live.ptr().cast(), slf.live.len());
        let len = ffi::Py_ssize_t::try_from(len).map_err(|_| PyBufferError::new_err("the range is too long"))?;
        let readonly = c_int::from(!slf.writable);
        // SAFETY: Python gives a `view` to fill. The view takes a reference to the object, which holds the mapping,
        // so `len` bytes at `ptr` stay mapped while the view lives (M1); read-only unless the region is writable.
        let filled = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), ptr, len, readonly, flags) };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}
