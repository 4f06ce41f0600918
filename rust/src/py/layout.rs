//! `RingLayout`, `QueueState`, `QueueConfig`, `Policy`, `Rule`: the values that queues are made of.

#![allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "Python's methods take self by reference"
)]

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::args::Int;
use super::errors::InvalidArgument;
use crate::policy::Policy;
use crate::queue::{QueueConfig, QueueState, feature};
use crate::ring::{MAX_SIZE, RingLayout};
use crate::rule::Rule;

/// One check of the core.
#[pyclass(frozen, eq, hash, module = "virtio_test._core", name = "Rule")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PyRule(Rule);

#[pymethods]
impl PyRule {
    #[getter]
    fn name(&self) -> &'static str {
        self.0.name()
    }

    #[getter]
    fn clause(&self) -> String {
        match (self.0.split_clause(), self.0.packed_clause()) {
            (split, packed) if split == packed || packed.is_empty() => split.to_owned(),
            ("", packed) => packed.to_owned(),
            (split, packed) => format!("{split}, {packed}"),
        }
    }

    #[getter]
    fn summary(&self) -> &'static str {
        self.0.summary()
    }

    fn __repr__(&self) -> String {
        format!("<Rule {} ({})>", self.0.name(), self.clause())
    }
}

/// Every rule that the core can find broken.
#[pyfunction]
pub(crate) fn rules() -> Vec<PyRule> {
    Rule::ALL.iter().copied().map(PyRule).collect()
}

/// Tolerances towards the other side.
#[pyclass(frozen, eq, hash, from_py_object, module = "virtio_test._core", name = "Policy")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PyPolicy(pub(crate) Policy);

#[pymethods]
impl PyPolicy {
    #[classattr]
    fn interop() -> Self {
        Self(Policy::INTEROP)
    }

    #[classattr]
    fn strict() -> Self {
        Self(Policy::STRICT)
    }

    #[new]
    #[pyo3(signature = (base = "interop", *, zero_length = None, mixed_order = None, duplicate_heads = None,
        indirect_beyond_queue = None, indirect_remainder = None, packed_table_flags = None, avail_decrease = None,
        used_len_beyond = None, used_without_write = None, max_indirect = None))]
    #[allow(clippy::too_many_arguments, reason = "one keyword for each switch of the policy")]
    fn new(
        base: &str,
        zero_length: Option<bool>,
        mixed_order: Option<bool>,
        duplicate_heads: Option<bool>,
        indirect_beyond_queue: Option<bool>,
        indirect_remainder: Option<bool>,
        packed_table_flags: Option<bool>,
        avail_decrease: Option<bool>,
        used_len_beyond: Option<bool>,
        used_without_write: Option<bool>,
        max_indirect: Option<Int<u32>>,
    ) -> PyResult<Self> {
        let base = match base {
            "interop" => Policy::INTEROP,
            "strict" => Policy::STRICT,
            other => {
                let text = format!("there is no policy {other:?}: it is 'interop' or 'strict'");
                return Err(InvalidArgument::new_err(text));
            }
        };
        let max_indirect = max_indirect.map_or(base.max_indirect, |most| most.0);
        if !(1..=65536).contains(&max_indirect) {
            let text = format!("max_indirect is {max_indirect}: it is 1 to 65536 entries");
            return Err(InvalidArgument::new_err(text));
        }
        Ok(Self(Policy {
            zero_length: zero_length.unwrap_or(base.zero_length),
            mixed_order: mixed_order.unwrap_or(base.mixed_order),
            duplicate_heads: duplicate_heads.unwrap_or(base.duplicate_heads),
            indirect_beyond_queue: indirect_beyond_queue.unwrap_or(base.indirect_beyond_queue),
            indirect_remainder: indirect_remainder.unwrap_or(base.indirect_remainder),
            packed_table_flags: packed_table_flags.unwrap_or(base.packed_table_flags),
            avail_decrease: avail_decrease.unwrap_or(base.avail_decrease),
            used_len_beyond: used_len_beyond.unwrap_or(base.used_len_beyond),
            used_without_write: used_without_write.unwrap_or(base.used_without_write),
            max_indirect,
        }))
    }

    fn switches<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, value) in self.flags() {
            dict.set_item(name, value)?;
        }
        dict.set_item("max_indirect", self.0.max_indirect)?;
        Ok(dict)
    }

    fn __repr__(&self) -> String {
        if self.0 == Policy::INTEROP {
            return "Policy.interop".to_owned();
        }
        if self.0 == Policy::STRICT {
            return "Policy.strict".to_owned();
        }
        let word = |value| if value { "True" } else { "False" };
        let pairs = self.flags().into_iter().zip(Self(Policy::INTEROP).flags());
        let differing = pairs.filter(|(own, base)| own != base);
        let switches: Vec<_> = differing
            .map(|((name, value), _)| format!(", {name}={}", word(value)))
            .collect();
        format!(
            "Policy('interop'{}, max_indirect={})",
            switches.concat(),
            self.0.max_indirect
        )
    }
}

impl PyPolicy {
    fn flags(&self) -> [(&'static str, bool); 9] {
        let policy = &self.0;
        [
            ("zero_length", policy.zero_length),
            ("mixed_order", policy.mixed_order),
            ("duplicate_heads", policy.duplicate_heads),
            ("indirect_beyond_queue", policy.indirect_beyond_queue),
            ("indirect_remainder", policy.indirect_remainder),
            ("packed_table_flags", policy.packed_table_flags),
            ("avail_decrease", policy.avail_decrease),
            ("used_len_beyond", policy.used_len_beyond),
            ("used_without_write", policy.used_without_write),
        ]
    }
}

/// Where the fields of a virtqueue lie.
#[pyclass(frozen, eq, hash, from_py_object, module = "virtio_test._core", name = "RingLayout")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PyRingLayout(pub(crate) RingLayout);

fn possible_size(size: u64, packed: bool) -> PyResult<u16> {
    let fits = u16::try_from(size).ok().filter(|&size| (1..=MAX_SIZE).contains(&size));
    match fits.filter(|size| packed || size.is_power_of_two()) {
        Some(size) => Ok(size),
        None if packed => Err(InvalidArgument::new_err(format!(
            "a packed queue has 1 to 32768 descriptors, not {size}"
        ))),
        None => {
            let text = format!("a split queue has a power of two of descriptors, 1 to 32768, not {size}");
            Err(InvalidArgument::new_err(text))
        }
    }
}

#[pymethods]
impl PyRingLayout {
    #[new]
    #[pyo3(signature = (size, *, packed = false, desc = Int(0), driver = Int(0), device = Int(0)))]
    #[pyo3(text_signature = "(size, *, packed=False, desc=0, driver=0, device=0)")]
    fn new(size: Int<u64>, packed: bool, desc: Int<u64>, driver: Int<u64>, device: Int<u64>) -> PyResult<Self> {
        Ok(Self(RingLayout {
            size: possible_size(size.0, packed)?,
            packed,
            desc: desc.0,
            driver: driver.0,
            device: device.0,
        }))
    }

    #[staticmethod]
    #[pyo3(signature = (size, base, *, packed = false))]
    fn contiguous(size: Int<u64>, base: Int<u64>, packed: bool) -> PyResult<Self> {
        let (size, base) = (possible_size(size.0, packed)?, base.0);
        if base % 16 != 0 {
            let text = format!("the base {base:#x} is no multiple of 16: choose one that is");
            return Err(InvalidArgument::new_err(text));
        }
        match RingLayout::contiguous(size, packed, base) {
            Some(layout) => Ok(Self(layout)),
            None => Err(InvalidArgument::new_err(format!(
                "a queue at {base:#x} leaves the address space"
            ))),
        }
    }

    #[staticmethod]
    #[pyo3(signature = (size, base, *, align = Int(4096)))]
    #[pyo3(text_signature = "(size, base, *, align=4096)")]
    fn legacy(size: Int<u64>, base: Int<u64>, align: Int<u64>) -> PyResult<Self> {
        let (size, base, align) = (possible_size(size.0, false)?, base.0, align.0);
        if !align.is_power_of_two() || align < 16 {
            let text = format!("the alignment {align} is no power of two from 16 on: legacy PCI has 4096");
            return Err(InvalidArgument::new_err(text));
        }
        if base % align != 0 {
            let text = format!("the base {base:#x} is no multiple of {align}: choose one that is");
            return Err(InvalidArgument::new_err(text));
        }
        match RingLayout::legacy(size, base, align) {
            Some(layout) => Ok(Self(layout)),
            None => Err(InvalidArgument::new_err(format!(
                "a legacy queue at {base:#x} leaves the address space"
            ))),
        }
    }

    #[getter]
    const fn size(&self) -> u16 {
        self.0.size
    }

    #[getter]
    const fn packed(&self) -> bool {
        self.0.packed
    }

    #[getter]
    const fn desc(&self) -> u64 {
        self.0.desc
    }

    #[getter]
    const fn driver(&self) -> u64 {
        self.0.driver
    }

    #[getter]
    const fn device(&self) -> u64 {
        self.0.device
    }

    #[getter]
    const fn desc_bytes(&self) -> u64 {
        self.0.desc_bytes()
    }

    #[getter]
    const fn driver_bytes(&self) -> u64 {
        self.0.driver_bytes()
    }

    #[getter]
    const fn device_bytes(&self) -> u64 {
        self.0.device_bytes()
    }

    #[getter]
    fn end(&self) -> u64 {
        let layout = &self.0;
        let ends = [
            layout.desc.saturating_add(layout.desc_bytes()),
            layout.driver.saturating_add(layout.driver_bytes()),
            layout.device.saturating_add(layout.device_bytes()),
        ];
        ends.into_iter().max().unwrap_or(0)
    }

    fn fields<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for field in self.0.fields() {
            dict.set_item(field.name, (field.address, field.size, field.stride, field.count))?;
        }
        Ok(dict)
    }

    #[pyo3(signature = (field, index = Int(0)))]
    #[pyo3(text_signature = "($self, field, index=0)")]
    fn at(&self, field: &str, index: Int<u64>) -> PyResult<u64> {
        let index = index.0;
        let fields = self.0.fields();
        let Some(found) = fields.iter().find(|known| known.name == field) else {
            let names: Vec<_> = fields.iter().map(|known| known.name).collect();
            let text = format!(
                "there is no field {field:?} in this layout: it has {}",
                names.join(", ")
            );
            return Err(InvalidArgument::new_err(text));
        };
        if index >= found.count {
            let text = format!("{field} has {} entries, there is no entry {index}", found.count);
            return Err(InvalidArgument::new_err(text));
        }
        Ok(found.address.wrapping_add(found.stride * index))
    }

    fn __repr__(&self) -> String {
        let RingLayout {
            size,
            packed,
            desc,
            driver,
            device,
        } = self.0;
        let packed = if packed { "True" } else { "False" };
        format!("RingLayout({size}, packed={packed}, desc={desc:#x}, driver={driver:#x}, device={device:#x})")
    }
}

/// Where a stopped queue stands.
#[pyclass(frozen, eq, hash, from_py_object, module = "virtio_test._core", name = "QueueState")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PyQueueState(pub(crate) QueueState);

#[pymethods]
impl PyQueueState {
    #[new]
    #[pyo3(signature = (avail, used = None))]
    fn new(avail: Int<u64>, used: Option<Int<u64>>) -> PyResult<Self> {
        let bits = |Int(value): Int<u64>| {
            u16::try_from(value)
                .map_err(|_| InvalidArgument::new_err(format!("a queue index has 16 bits, {value} has more")))
        };
        let avail = bits(avail)?;
        Ok(Self(QueueState {
            avail,
            used: used.map_or(Ok(avail), bits)?,
        }))
    }

    #[getter]
    const fn avail(&self) -> u16 {
        self.0.avail
    }

    #[getter]
    const fn used(&self) -> u16 {
        self.0.used
    }

    fn __repr__(&self) -> String {
        format!("QueueState({:#x}, {:#x})", self.0.avail, self.0.used)
    }
}

/// All that a queue is made of.
#[pyclass(frozen, eq, hash, from_py_object, module = "virtio_test._core", name = "QueueConfig")]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct PyQueueConfig(pub(crate) QueueConfig);

#[pymethods]
impl PyQueueConfig {
    #[new]
    #[pyo3(signature = (size, *, desc, driver, device, index = Int(0), features = Int(0),
        policy = PyPolicy(Policy::INTEROP)))]
    #[pyo3(text_signature = "(size, *, desc, driver, device, index=0, features=0, policy=...)")]
    fn new(
        size: Int<u32>,
        desc: Int<u64>,
        driver: Int<u64>,
        device: Int<u64>,
        index: Int<u16>,
        features: Int<u128>,
        policy: PyPolicy,
    ) -> Self {
        // Bits from 64 on name no property of a queue.
        let features = u64::try_from(features.0 & u128::from(u64::MAX)).unwrap_or(0);
        Self(QueueConfig {
            size: size.0,
            desc: desc.0,
            driver: driver.0,
            device: device.0,
            index: index.0,
            features,
            policy: policy.0,
        })
    }

    #[staticmethod]
    #[pyo3(signature = (layout, *, index = Int(0), features = Int(0), policy = PyPolicy(Policy::INTEROP)))]
    #[pyo3(text_signature = "(layout, *, index=0, features=0, policy=...)")]
    fn from_layout(layout: PyRingLayout, index: Int<u16>, features: Int<u128>, policy: PyPolicy) -> Self {
        let RingLayout {
            size,
            packed,
            desc,
            driver,
            device,
        } = layout.0;
        let (desc, driver, device) = (Int(desc), Int(driver), Int(device));
        let mut config = Self::new(Int(u32::from(size)), desc, driver, device, index, features, policy);
        config.0.features &= !feature::RING_PACKED;
        if packed {
            config.0.features |= feature::RING_PACKED;
        }
        config
    }

    #[getter]
    const fn size(&self) -> u32 {
        self.0.size
    }

    #[getter]
    const fn desc(&self) -> u64 {
        self.0.desc
    }

    #[getter]
    const fn driver(&self) -> u64 {
        self.0.driver
    }

    #[getter]
    const fn device(&self) -> u64 {
        self.0.device
    }

    #[getter]
    const fn index(&self) -> u16 {
        self.0.index
    }

    #[getter]
    const fn features(&self) -> u64 {
        self.0.features
    }

    #[getter]
    const fn packed(&self) -> bool {
        self.0.packed()
    }

    #[getter]
    const fn policy(&self) -> PyPolicy {
        PyPolicy(self.0.policy)
    }

    fn layout(&self, py: Python<'_>) -> PyResult<PyRingLayout> {
        self.0
            .layout()
            .map(PyRingLayout)
            .map_err(|fault| super::errors::raise(py, &fault))
    }

    fn __repr__(&self) -> String {
        let QueueConfig {
            size,
            desc,
            driver,
            device,
            index,
            features,
            policy,
        } = self.0;
        let policy = PyPolicy(policy).__repr__();
        format!(
            "QueueConfig({size}, desc={desc:#x}, driver={driver:#x}, device={device:#x}, index={index}, \
             features={features:#x}, policy={policy})"
        )
    }
}
