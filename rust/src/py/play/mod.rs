//! `Player`: a whole `RingCase` in one call, for millions of them.
//!
//! # Theory
//!
//! `Scene` of the strategies plays a case by calls that anybody could make, which costs several times what the calls do.
//! This plays the same case by the same calls of the core, without an object between them: the legal peer makes the ring, the
//! changes are made, the judged end is built and does what follows, and then takes all there is. Memory is zeros before; at
//! the end there are zeros again wherever something was written, which is much less than all of it.
//!
//! It knows nothing that `Scene` does not. Whatever is unusual (a field that is not there, memory that cannot be
//! written, a chain completed twice, accesses that change memory) ends it with nothing said, and `Scene` plays the case anew
//! and says what is wrong. The tests play everything both ways.

mod stage;

use std::cell::OnceCell;

use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple, PyType};

use super::args::Int;
use super::guard::{pin, with_memory};
use super::layout::PyPolicy;
use super::mem::PyGuestMemory;
use super::remote::interrupted;
use crate::error::Fault;
use crate::mem::{Access, GuestMemory, Want};
use crate::policy::Policy;
use crate::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueConfig, QueueState, feature};
use crate::ring::{MAX_SIZE, RingLayout, desc};
use stage::{Outcome, Stage, Stop, outcome};

/// Descriptors of all indirect tables together, seen as one table.
const TABLE: u16 = MAX_SIZE;

fn tuple<'py>(case: &Bound<'py, PyAny>, name: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyTuple>> {
    Ok(case.getattr(name)?.cast_into::<PyTuple>()?)
}

/// Plays cases; made of the classes of their acts, in the order of [`KINDS`].
#[pyclass(frozen, module = "virtio_test._core", name = "Player")]
pub struct PyPlayer {
    kinds: Vec<Py<PyType>>,
    /// Number of the queue of all cases.
    index: u16,
}

/// Acts that are known here, by their place among the classes.
#[derive(Clone, Copy)]
enum Kind {
    Put,
    Fill,
    Write,
    Copy,
    Unmap,
    Look,
    Pop,
    Push,
    Add,
    Publish,
    Take,
    Use,
}

const KINDS: [Kind; 12] = [
    Kind::Put,
    Kind::Fill,
    Kind::Write,
    Kind::Copy,
    Kind::Unmap,
    Kind::Look,
    Kind::Pop,
    Kind::Push,
    Kind::Add,
    Kind::Publish,
    Kind::Take,
    Kind::Use,
];

impl PyPlayer {
    fn act(&self, stage: &mut Stage<'_, '_>, act: &Bound<'_, PyAny>) -> Result<(), Stop> {
        let class = act.get_type();
        let mut known = self.kinds.iter().zip(KINDS);
        let (_, kind) = known.find(|(kind, _)| class.is(kind)).ok_or(Stop::Unusual)?;
        match kind {
            Kind::Put => {
                let (field, value, place): (&str, u64, u64) = act.extract()?;
                stage.put(field, value, 0, place, 1)
            }
            Kind::Fill => {
                let (field, value, step, number): (&str, u64, u64, u64) = act.extract()?;
                stage.put(field, value, step, 0, number)
            }
            Kind::Write => {
                let (address, data): (u64, &[u8]) = act.extract()?;
                stage.write(address, data)
            }
            Kind::Copy => {
                let (destination, source, length) = act.extract()?;
                stage.dirty.push((destination, length));
                let pin = pin(Some(stage.py), stage.guest)?;
                Ok(pin.whole().copy_within(destination, source, length)?)
            }
            Kind::Unmap => {
                let (address, size) = act.extract()?;
                // It waits for pins, whose holders may wait for the GIL.
                let guest = stage.guest;
                let removed = stage.py.detach(|| guest.remove(address, size));
                removed.map_err(|_| Stop::Unusual)
            }
            Kind::Look => stage.look(),
            Kind::Pop => {
                let (limit,) = act.extract()?;
                stage.pop(limit).map(drop)
            }
            Kind::Push => {
                let (which, written) = act.extract()?;
                stage.push(which, written)
            }
            Kind::Add => {
                let (buffer,): (Bound<'_, PyAny>,) = act.extract()?;
                stage.add(&buffer)
            }
            Kind::Publish => stage.publish(),
            Kind::Take => {
                let (limit,) = act.extract()?;
                match stage.take(limit).map(drop) {
                    // What the legal driver finds is not the judged end's.
                    Err(Stop::Broken(_)) if stage.of_device => Ok(()),
                    done => done,
                }
            }
            Kind::Use => {
                let (which, written) = act.extract()?;
                stage.use_one(which, written)
            }
        }
    }

    fn acts(&self, stage: &mut Stage<'_, '_>, acts: &Bound<'_, PyTuple>) -> Result<(), Stop> {
        acts.iter_borrowed().try_for_each(|act| self.act(stage, &act))
    }

    fn whole<'py>(
        &self,
        py: Python<'py>,
        guest: &GuestMemory,
        case: &Bound<'_, PyAny>,
        policy: Policy,
    ) -> Result<Outcome<'py>, Stop> {
        macro_rules! get {
            ($name:literal) => {
                case.getattr(intern!(py, $name))?.extract()?
            };
        }
        let end = case.getattr(intern!(py, "end"))?;
        let of_device = match end.extract()? {
            "device" => true,
            "driver" => false,
            _ => return Err(Stop::Unusual),
        };
        let (packed, size, ring, start): (bool, u16, u64, u16) =
            (get!("packed"), get!("size"), get!("ring"), get!("start"));
        let features: u64 = get!("features");
        if !(1..=MAX_SIZE).contains(&size) || !(packed || size.is_power_of_two()) || ring % 16 != 0 {
            return Err(Stop::Unusual);
        }
        let layout = RingLayout::contiguous(size, packed, ring).ok_or(Stop::Unusual)?;
        let tables: u64 = get!("tables");
        let table = RingLayout {
            size: TABLE,
            packed,
            desc: tables,
            driver: 0,
            device: 0,
        };
        let peer = QueueConfig {
            size: size.into(),
            desc: layout.desc,
            driver: layout.driver,
            device: layout.device,
            index: self.index,
            features: features | if packed { feature::RING_PACKED } else { 0 },
            policy: Policy::INTEROP,
        };
        let mut judged = QueueConfig { policy, ..peer };
        let areas = case
            .getattr(intern!(py, "areas"))?
            .cast_into::<PyDict>()
            .map_err(PyErr::from)?;
        for (name, value) in &areas {
            match name.extract()? {
                "size" => judged.size = value.extract()?,
                "desc" => judged.desc = value.extract()?,
                "driver" => judged.driver = value.extract()?,
                "device" => judged.device = value.extract()?,
                _ => return Err(Stop::Unusual),
            }
        }
        let resume: Option<(u16, u16)> = get!("state");
        let begin = QueueState {
            avail: start,
            used: start,
        };
        let resumed = resume.map_or(begin, |(avail, used)| QueueState { avail, used });
        let mut spans = layout.spans().into_iter();
        let scattered = with_memory!(Some(py), guest, |mem| spans
            .any(|(at, len)| mem.resolve(at, len, Want::Write).is_err()));
        let mut stage = Stage {
            py,
            guest,
            of_device,
            size,
            layout,
            table,
            fields: [OnceCell::new(), OnceCell::new()],
            peer,
            begin,
            driver: None,
            device: None,
            added: 0,
            chains: Vec::new(),
            segments: Vec::new(),
            theirs: Vec::new(),
            used: Vec::new(),
            dirty: layout.spans().to_vec(),
            scattered,
        };
        if let Ok(other) = judged.layout() {
            stage.dirty.extend(other.spans());
        }
        let elsewhere = !areas.is_empty() || resume.is_some();
        let done = self.played(&mut stage, case, judged, resumed, elsewhere);
        stage.clean()?;
        done
    }

    fn played<'py>(
        &self,
        stage: &mut Stage<'_, 'py>,
        case: &Bound<'_, PyAny>,
        judged: QueueConfig,
        resumed: QueueState,
        elsewhere: bool,
    ) -> Result<Outcome<'py>, Stop> {
        if let Err(fault) = self.build(stage, case, judged, resumed, elsewhere)? {
            return outcome(stage, Some(&fault), false);
        }
        let later = tuple(case, intern!(case.py(), "later"))?;
        let done = match self.acts(stage, &later) {
            Ok(()) | Err(Stop::Full) => stage.drain(),
            stopped => stopped,
        };
        match done {
            Ok(()) => outcome(stage, None, true),
            Err(Stop::Broken(fault)) => outcome(stage, Some(&fault), true),
            Err(stop) => Err(stop),
        }
    }

    /// Whether a buffer is to have an indirect table, now or later.
    fn tabled(&self, case: &Bound<'_, PyAny>, buffers: &Bound<'_, PyTuple>) -> Result<bool, Stop> {
        let py = case.py();
        for buffer in buffers {
            if buffer.get_item(2)?.is_truthy()? {
                return Ok(true);
            }
        }
        for act in tuple(case, intern!(py, "later"))? {
            let class = act.get_type();
            let mut known = self.kinds.iter().zip(KINDS);
            if known.any(|(kind, name)| matches!(name, Kind::Add) && class.is(kind))
                && act.get_item(0)?.get_item(2)?.is_truthy()?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The ring and both ends, up to the point where the judged one exists, or is refused.
    fn build(
        &self,
        stage: &mut Stage<'_, '_>,
        case: &Bound<'_, PyAny>,
        judged: QueueConfig,
        resumed: QueueState,
        elsewhere: bool,
    ) -> Result<Result<(), Fault>, Stop> {
        let (py, guest) = (stage.py, stage.guest);
        if elsewhere && !stage.of_device {
            return match with_memory!(Some(py), guest, |mem| DriverQueue::new(
                mem,
                judged,
                Some(resumed),
                None
            )) {
                Ok(driver) => {
                    stage.driver = Some(driver);
                    Ok(Ok(()))
                }
                Err(fault) => Ok(Err(fault)),
            };
        }
        stage.prepare(stage.begin.avail)?;
        let config = if stage.of_device { stage.peer } else { judged };
        let buffers = tuple(case, intern!(py, "buffers"))?;
        let area = if self.tabled(case, &buffers)? {
            let address: u64 = case.getattr(intern!(py, "tables"))?.extract()?;
            let entries: u16 = case.getattr(intern!(py, "entries"))?.extract()?;
            if entries == 0 || address % 16 != 0 {
                return Err(Stop::Unusual);
            }
            let bytes = desc::BYTES * u64::from(entries) * u64::from(stage.size);
            stage.dirty.push((address, bytes));
            Some(IndirectArea { address, entries })
        } else {
            None
        };
        let legal = |stop| match stop {
            // Of the legal ring nothing may be broken.
            Stop::Broken(_) | Stop::Full => Stop::Unusual,
            Stop::Unusual | Stop::Interrupted(_) => stop,
        };
        let driver = with_memory!(Some(py), guest, |mem| DriverQueue::new(
            mem,
            config,
            Some(stage.begin),
            area
        ));
        stage.driver = Some(driver.map_err(|fault| legal(fault.into()))?);
        for buffer in &buffers {
            stage.add(&buffer).map_err(legal)?;
        }
        stage.publish().map_err(legal)?;
        let writes = tuple(case, intern!(py, "writes"))?;
        self.acts(stage, &writes).map_err(legal)?;
        if stage.of_device {
            match with_memory!(Some(py), guest, |mem| DeviceQueue::new(mem, judged, Some(resumed))) {
                Ok(device) => stage.device = Some(device),
                Err(fault) => return Ok(Err(fault)),
            }
        }
        Ok(Ok(()))
    }
}

#[pymethods]
impl PyPlayer {
    #[new]
    #[pyo3(signature = (kinds, *, index))]
    fn new(kinds: Vec<Py<PyType>>, index: Int<u16>) -> PyResult<Self> {
        if kinds.len() == KINDS.len() {
            Ok(Self { kinds, index: index.0 })
        } else {
            Err(super::args::invalid("a player knows 12 kinds of acts"))
        }
    }

    /// What comes of `case` in `memory`, which is zeros in the regions of the case, now and afterwards; None where it is
    /// unusual. What interrupts it is raised.
    fn play<'py>(
        &self,
        py: Python<'py>,
        memory: &Bound<'_, PyGuestMemory>,
        case: &Bound<'_, PyAny>,
        policy: PyPolicy,
    ) -> PyResult<Option<Outcome<'py>>> {
        let guest = memory.get().inner().clone();
        let done = self.whole(py, &guest, case, policy.0);
        interrupted()?;
        match done {
            Ok(outcome) => Ok(Some(outcome)),
            Err(Stop::Interrupted(error)) => Err(error),
            Err(_) => Ok(None),
        }
    }
}
