//! A case on stage: guest memory, both ends, and each of its acts as a call of the core.

use std::cell::OnceCell;

use pyo3::prelude::*;
use pyo3::types::PyTuple;
use smallvec::SmallVec;

use crate::chain::{Element, Segment};
use crate::error::{Fault, Misuse, QueueError};
use crate::mem::{Access, At, GuestMemory, MemoryError};
use crate::py::guard::with_memory;
use crate::py::remote::is_interrupt;
use crate::queue::{DeviceQueue, DriverQueue, QueueConfig, QueueState};
use crate::ring::{Field, RingLayout, desc};

/// Why a case ends before its acts do.
pub(super) enum Stop {
    /// The judged end found a rule broken.
    Broken(Fault),
    /// The driver end has no room left: what there is to take is still taken.
    Full,
    /// It is `Scene`'s to say what is wrong.
    Unusual,
    /// An interrupt, which is nobody's to swallow.
    Interrupted(PyErr),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Broken(fault)
    }
}

impl From<QueueError> for Stop {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::Violation(fault) => Self::Broken(fault),
            QueueError::Misuse(Misuse::QueueFull { .. }) => Self::Full,
            QueueError::Misuse(_) => Self::Unusual,
        }
    }
}

impl From<PyErr> for Stop {
    fn from(error: PyErr) -> Self {
        if Python::attach(|py| is_interrupt(py, &error)) {
            Self::Interrupted(error)
        } else {
            Self::Unusual
        }
    }
}

impl From<MemoryError> for Stop {
    fn from(_: MemoryError) -> Self {
        Self::Unusual
    }
}

type Span = (u64, u64);
/// (address, bytes) of the parts of a buffer.
type Spans = SmallVec<[(u64, u32); 4]>;
/// Chains or used buffers, the rule, whether the end was built, the segments and the used buffers.
pub(super) type Outcome<'py> = (
    usize,
    Option<&'static str>,
    bool,
    Option<Bound<'py, PyTuple>>,
    Option<Bound<'py, PyTuple>>,
);

/// What there is of a case in all of its acts.
pub(super) struct Stage<'a, 'py> {
    pub(super) py: Python<'py>,
    pub(super) guest: &'a GuestMemory,
    pub(super) of_device: bool,
    pub(super) size: u16,
    pub(super) layout: RingLayout,
    /// All indirect tables, seen as one.
    pub(super) table: RingLayout,
    /// Of the layout and of the table, made when one of them is first asked for.
    pub(super) fields: [OnceCell<Vec<Field>>; 2],
    pub(super) peer: QueueConfig,
    pub(super) begin: QueueState,
    pub(super) driver: Option<DriverQueue>,
    pub(super) device: Option<DeviceQueue>,
    pub(super) added: u64,
    pub(super) chains: Vec<(Element, bool)>,
    /// Those of all chains.
    pub(super) segments: Vec<Segment>,
    /// What the legal device of a driver's case has taken.
    pub(super) theirs: Vec<(Element, bool)>,
    pub(super) used: Vec<(u64, u32)>,
    /// (address, bytes) of all that was written but by the ends, and of what they write.
    pub(super) dirty: Vec<Span>,
    /// Whether an area of the ring lies in no one region, so that each of its fields has to be cleaned by itself.
    pub(super) scattered: bool,
}

impl Stage<'_, '_> {
    pub(super) fn write(&mut self, address: u64, data: &[u8]) -> Result<(), Stop> {
        self.dirty.push((address, data.len() as u64));
        self.store(address, data)
    }

    fn store(&self, address: u64, data: &[u8]) -> Result<(), Stop> {
        let at = At::unresolved(address);
        Ok(with_memory!(Some(self.py), self.guest, |mem| mem.write(at, 0, data))?)
    }

    /// A field, and whether it is one of the tables.
    fn field(&self, name: &str) -> Result<(Field, bool), Stop> {
        let (table, name) = match name.strip_prefix("table.") {
            Some(rest) => (true, rest),
            None => (false, name),
        };
        let [ring, tables] = &self.fields;
        let known = if table {
            tables.get_or_init(|| self.table.fields())
        } else {
            ring.get_or_init(|| self.layout.fields())
        };
        let same = |field: &&Field| match field.name.strip_prefix("desc.") {
            Some(rest) if table => rest == name,
            _ => !table && field.name == name,
        };
        let found = known.iter().find(same).ok_or(Stop::Unusual)?;
        Ok((*found, table))
    }

    /// Write `value`, then `value + step`, and so on, to `number` places of a field.
    pub(super) fn put(&mut self, name: &str, value: u64, step: u64, place: u64, number: u64) -> Result<(), Stop> {
        let (field, table) = self.field(name)?;
        if place.checked_add(number).is_none_or(|end| end > field.count) {
            return Err(Stop::Unusual);
        }
        let Some(more) = number.checked_sub(1) else {
            return Ok(());
        };
        let first = field.address.wrapping_add(field.stride * place);
        let length = field.stride * more + field.size;
        if table || self.scattered {
            self.dirty.push((first, length));
        }
        let (bits, size) = (8 * field.size, usize::try_from(field.size).unwrap_or(usize::MAX));
        let (stride, length) = (usize::try_from(field.stride), usize::try_from(length));
        let (Ok(stride), Ok(length)) = (stride, length) else {
            return Err(Stop::Unusual);
        };
        let mut whole: SmallVec<[u8; 64]> = SmallVec::from_elem(0, length);
        if more > 0 {
            // What lies between the places stays.
            let at = At::unresolved(first);
            with_memory!(Some(self.py), self.guest, |mem| mem.read(at, 0, &mut whole))?;
        }
        for (at, cell) in (0..number).zip(whole.chunks_mut(stride.max(1))) {
            let value = step
                .checked_mul(at)
                .and_then(|more| value.checked_add(more))
                .filter(|value| bits >= 64 || value >> bits == 0)
                .ok_or(Stop::Unusual)?;
            let bytes = value.to_le_bytes();
            let (cell, bytes) = cell.get_mut(..size).zip(bytes.get(..size)).ok_or(Stop::Unusual)?;
            cell.copy_from_slice(bytes);
        }
        self.store(first, &whole)
    }

    /// 2.7.6, 2.8.1: a queue that stands at `start` with nothing in flight.
    pub(super) fn prepare(&mut self, start: u16) -> Result<(), Stop> {
        if !self.peer.packed() {
            self.put("avail.idx", start.into(), 0, 0, 1)?;
            return self.put("used.idx", start.into(), 0, 0, 1);
        }
        let here = start & 0x7fff;
        let (first, end) = if start >> 15 == 1 { (0, here) } else { (here, self.size) };
        let number = end.checked_sub(first).ok_or(Stop::Unusual)?;
        let flags = u64::from(desc::AVAIL | desc::USED);
        self.put("desc.flags", flags, 0, first.into(), number.into())
    }

    pub(super) fn add(&mut self, buffer: &Bound<'_, PyAny>) -> Result<(), Stop> {
        let (readable, writable, indirect, data): (Bound<'_, PyTuple>, Bound<'_, PyTuple>, bool, &[u8]) =
            buffer.extract()?;
        let (readable, writable) = (spans(&readable)?, spans(&writable)?);
        let mut data = data;
        for &(address, length) in &readable {
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(data.len());
            let (here, rest) = data.split_at_checked(length).ok_or(Stop::Unusual)?;
            if !here.is_empty() {
                self.write(address, here)?;
            }
            data = rest;
        }
        let driver = self.driver.as_mut().ok_or(Stop::Unusual)?;
        let token = with_memory!(Some(self.py), self.guest, |mem| driver
            .add(mem, &readable, &writable, indirect))?;
        // Tokens count from 0, so a token is the number of its buffer.
        if token != self.added {
            return Err(Stop::Unusual);
        }
        self.added += 1;
        Ok(())
    }

    pub(super) fn publish(&mut self) -> Result<(), Stop> {
        let driver = self.driver.as_mut().ok_or(Stop::Unusual)?;
        with_memory!(Some(self.py), self.guest, |mem| driver.publish(mem))?;
        Ok(())
    }

    pub(super) fn pop(&mut self, limit: usize) -> Result<usize, Stop> {
        let device = self.device.as_mut().ok_or(Stop::Unusual)?;
        for taken in 0..limit {
            let segments = &mut self.segments;
            let popped = with_memory!(Some(self.py), self.guest, |mem| device.pop(mem, segments))?;
            let Some(element) = popped else { return Ok(taken) };
            self.chains.push((element, false));
        }
        Ok(limit)
    }

    pub(super) fn push(&mut self, which: usize, written: u64) -> Result<(), Stop> {
        let device = self.device.as_mut().ok_or(Stop::Unusual)?;
        let Some((element, done)) = self.chains.get_mut(which) else {
            return Ok(());
        };
        if std::mem::replace(done, true) {
            return Err(Stop::Unusual);
        }
        complete(self.py, self.guest, device, element, written)
    }

    pub(super) fn take(&mut self, limit: usize) -> Result<usize, Stop> {
        let driver = self.driver.as_mut().ok_or(Stop::Unusual)?;
        for taken in 0..limit {
            let Some(used) = with_memory!(Some(self.py), self.guest, |mem| driver.get_used(mem))? else {
                return Ok(taken);
            };
            self.used.push(used);
        }
        Ok(limit)
    }

    /// The legal device takes all there is and completes one; what it finds broken is not the judged end's.
    pub(super) fn use_one(&mut self, which: usize, written: u64) -> Result<(), Stop> {
        let mut device = match self.device.take() {
            Some(device) => device,
            None => with_memory!(Some(self.py), self.guest, |mem| DeviceQueue::new(
                mem,
                self.peer,
                Some(self.begin)
            ))?,
        };
        let done = self.use_with(&mut device, which, written);
        self.device = Some(device);
        match done {
            Err(Stop::Broken(_)) => Ok(()),
            done => done,
        }
    }

    fn use_with(&mut self, device: &mut DeviceQueue, which: usize, written: u64) -> Result<(), Stop> {
        let mut segments = Vec::new();
        while let Some(element) = with_memory!(Some(self.py), self.guest, |mem| device.pop(mem, &mut segments))? {
            self.theirs.push((element, false));
        }
        let Some((element, done)) = self.theirs.get_mut(which) else {
            return Ok(());
        };
        if std::mem::replace(done, true) {
            return Err(Stop::Unusual);
        }
        let written = written.min(element.writable);
        complete(self.py, self.guest, device, element, written)
    }

    pub(super) fn look(&mut self) -> Result<(), Stop> {
        if self.of_device {
            let device = self.device.as_mut().ok_or(Stop::Unusual)?;
            with_memory!(Some(self.py), self.guest, |mem| device.has_work(mem));
        } else {
            let driver = self.driver.as_mut().ok_or(Stop::Unusual)?;
            with_memory!(Some(self.py), self.guest, |mem| driver.has_used(mem));
        }
        Ok(())
    }

    /// Zeros in all that is dirty. What is gone by now needs none.
    pub(super) fn clean(&mut self) -> PyResult<()> {
        let dirty = std::mem::take(&mut self.dirty);
        with_memory!(Some(self.py), self.guest, |mem| {
            for (address, length) in dirty {
                let _ = mem.fill(At::unresolved(address), 0, length, 0);
            }
        });
        Ok(())
    }

    /// Twice what the ring has room for is an error of the judged end, which `Scene` reports.
    pub(super) fn drain(&mut self) -> Result<(), Stop> {
        let limit = 2 * usize::from(self.size) + 2;
        let count = if self.of_device {
            self.pop(limit)
        } else {
            self.take(limit)
        }?;
        if count == limit { Err(Stop::Unusual) } else { Ok(()) }
    }
}

/// Parts of a buffer.
fn spans(parts: &Bound<'_, PyTuple>) -> Result<Spans, Stop> {
    parts.iter_borrowed().map(|part| Ok(part.extract()?)).collect()
}

fn complete(
    py: Python<'_>,
    guest: &GuestMemory,
    device: &mut DeviceQueue,
    element: &Element,
    written: u64,
) -> Result<(), Stop> {
    let ticket = element.ticket();
    with_memory!(Some(py), guest, |mem| {
        device.complete(mem, &ticket, written).and_then(|_| {
            device.publish(mem)?;
            Ok(())
        })
    })?;
    Ok(())
}

/// What has come of it.
pub(super) fn outcome<'py>(stage: &Stage<'_, 'py>, fault: Option<&Fault>, built: bool) -> Result<Outcome<'py>, Stop> {
    let (py, rule) = (stage.py, fault.map(|fault| fault.rule.name()));
    if !stage.of_device {
        let used = PyTuple::new(py, &stage.used)?;
        return Ok((stage.used.len(), rule, built, None, Some(used)));
    }
    let shown = |segment: &Segment| (segment.at.gpa, segment.len, segment.writable);
    let whole = |(element, _): &(Element, bool)| {
        let own = stage.segments.get(element.first..).unwrap_or_default();
        let own = own.get(..element.count).unwrap_or_default();
        PyTuple::new(py, own.iter().map(shown))
    };
    let segments: Vec<_> = stage.chains.iter().map(whole).collect::<PyResult<_>>()?;
    let segments = PyTuple::new(py, segments)?;
    Ok((stage.chains.len(), rule, built, Some(segments), None))
}
