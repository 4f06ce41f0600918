//! Both ends of one queue over real guest memory, and the pen of a hostile other side.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "each suite uses its part; a test stops at what it did not expect"
)]

pub mod far;
pub mod files;
pub mod pair;
pub mod recorded;

use virtio_test::chain::{Element, Segment};
use virtio_test::error::Fault;
use virtio_test::iov::Iov;
use virtio_test::mem::{Backing, GuestMemory, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueConfig, QueueState, feature};
use virtio_test::ring::{Field, RingLayout};
use virtio_test::rule::Rule;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

pub const INDIRECT_DESC: u64 = feature::INDIRECT_DESC;
pub const EVENT_IDX: u64 = feature::EVENT_IDX;
pub const PACKED: u64 = feature::RING_PACKED;
pub const IN_ORDER: u64 = feature::IN_ORDER;

/// The rings lie from here on.
pub const RING: u64 = 0x1000;
/// 64 KiB of data; its last byte is followed by `NEXT_DOOR` without a gap.
pub const DATA: u64 = 0x20_0000;
/// A region that adjoins `DATA`; behind it is nothing.
pub const NEXT_DOOR: u64 = DATA + 0x1_0000;
/// The first address behind `NEXT_DOOR`.
pub const HOLE: u64 = NEXT_DOOR + 0x1000;
/// Memory that may only be read.
pub const ROM: u64 = 0x40_0000;
/// Indirect tables: of the driver end, and behind them what tests write by hand.
pub const TABLES: u64 = 0x50_0000;
pub const TABLE: u64 = 0x58_0000;
/// 256 MiB.
pub const BIG: u64 = 1 << 32;

pub type Desc = (u64, u32, u16, u16);

pub fn region(gpa: u64, size: u64) -> RegionSpec {
    RegionSpec {
        gpa,
        size,
        backing: Backing::Anonymous,
    }
}

pub fn memory() -> GuestMemory {
    let rom = RegionSpec {
        gpa: ROM,
        size: 0x1000,
        backing: Backing::fresh_read_only(ROM, 0x1000).unwrap(),
    };
    let ram = [
        region(0, 0x20_0000),
        region(DATA, 0x1_0000),
        region(NEXT_DOOR, 0x1000),
        rom,
        region(TABLES, 0x20_0000),
        region(BIG, 256 << 20),
    ];
    GuestMemory::new(ram.into_iter().collect(), None).unwrap()
}

pub fn config(size: u16, features: u64, policy: Policy) -> QueueConfig {
    let layout = RingLayout::contiguous(size, features & PACKED != 0, RING).unwrap();
    QueueConfig {
        size: u32::from(size),
        desc: layout.desc,
        driver: layout.driver,
        device: layout.device,
        index: 3,
        features,
        policy,
    }
}

pub struct World {
    pub mem: GuestMemory,
    pub layout: RingLayout,
    pub driver: DriverQueue,
    pub device: DeviceQueue,
    pub segments: Vec<Segment>,
}

impl World {
    pub fn new(size: u16, features: u64, policy: Policy) -> Self {
        Self::build(config(size, features, policy), None)
    }

    pub fn interop(size: u16, features: u64) -> Self {
        Self::new(size, features, Policy::INTEROP)
    }

    /// Both ends go on from `at`, as two that have worked for long.
    pub fn started(size: u16, features: u64, at: u16) -> Self {
        let config = config(size, features, Policy::INTEROP);
        let state = QueueState { avail: at, used: at };
        Self::build(config, Some(state))
    }

    fn build(config: QueueConfig, state: Option<QueueState>) -> Self {
        let mem = memory();
        let layout = config.layout().unwrap();
        let area = IndirectArea {
            address: TABLES,
            entries: 8,
        };
        if let Some(state) = state.filter(|_| !layout.packed) {
            let both = state.avail.to_le_bytes();
            mem.write(layout.driver + 2, &both).unwrap();
            mem.write(layout.device + 2, &both).unwrap();
        }
        let pin = mem.pin();
        let driver = DriverQueue::new(&pin.mapped(), config, state, Some(area)).unwrap();
        let device = DeviceQueue::new(&pin.mapped(), config, state).unwrap();
        drop(pin);
        Self {
            mem,
            layout,
            driver,
            device,
            segments: Vec::new(),
        }
    }

    fn field(&self, name: &str) -> Field {
        let fields = self.layout.fields();
        *fields.iter().find(|field| field.name == name).unwrap()
    }

    pub fn at(&self, name: &str, index: u64) -> u64 {
        let field = self.field(name);
        assert!(index < field.count);
        field.address + index * field.stride
    }

    /// Write a field as the other side could at any time.
    pub fn put(&self, name: &str, index: u64, value: u64) {
        let width = usize::try_from(self.field(name).size).unwrap();
        self.mem
            .write(self.at(name, index), &value.to_le_bytes()[..width])
            .unwrap();
    }

    pub fn get(&self, name: &str, index: u64) -> u64 {
        let width = usize::try_from(self.field(name).size).unwrap();
        let mut bytes = [0; 8];
        self.mem.read(self.at(name, index), &mut bytes[..width]).unwrap();
        u64::from_le_bytes(bytes)
    }

    /// Write one descriptor of the ring or table: the last member is `next` (split) or the id (packed).
    pub fn desc(&self, index: u64, (addr, len, flags, last): Desc) {
        self.put("desc.addr", index, addr);
        self.put("desc.len", index, u64::from(len));
        let name = if self.layout.packed { "desc.id" } else { "desc.next" };
        self.put(name, index, u64::from(last));
        self.put("desc.flags", index, u64::from(flags));
    }

    /// Write one entry of an indirect table of this ring's format at `table`.
    pub fn entry(&self, table: u64, index: u64, (addr, len, flags, last): Desc) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        let tail = if self.layout.packed {
            [last, flags]
        } else {
            [flags, last]
        };
        bytes.extend(tail.into_iter().flat_map(u16::to_le_bytes));
        self.mem.write(table + 16 * index, &bytes).unwrap();
    }

    /// Split: put `head` into the avail ring and move its index.
    pub fn avail(&self, head: u16) {
        let idx = self.get("avail.idx", 0);
        self.put("avail.ring", idx % u64::from(self.layout.size), u64::from(head));
        self.put("avail.idx", 0, idx + 1);
    }

    /// Write `descs` from index 0 on and make them available as one chain (packed: wrap counter 1).
    pub fn chain(&self, descs: &[Desc]) {
        for (i, &(addr, len, flags, last)) in (0u64..).zip(descs) {
            let mark = if self.layout.packed { AVAIL } else { 0 };
            self.desc(i, (addr, len, flags | mark, last));
        }
        if !self.layout.packed {
            self.avail(0);
        }
    }

    pub fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u64 {
        let pin = self.mem.pin();
        self.driver.add(&pin.mapped(), readable, writable, false).unwrap()
    }

    pub fn add_indirect(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u64 {
        let pin = self.mem.pin();
        self.driver.add(&pin.mapped(), readable, writable, true).unwrap()
    }

    pub fn publish(&mut self) -> u16 {
        let pin = self.mem.pin();
        self.driver.publish(&pin.mapped()).unwrap()
    }

    /// Add and publish one buffer of 16 readable and 16 writable bytes in one descriptor each; `single` for one.
    pub fn give(&mut self, single: bool) -> u64 {
        let writable: &[(u64, u32)] = if single { &[] } else { &[(DATA + 64, 16)] };
        let token = self.add(&[(DATA, 16)], writable);
        assert_eq!(self.publish(), 1);
        token
    }

    pub fn kick(&mut self) -> bool {
        let pin = self.mem.pin();
        self.driver.publish(&pin.mapped()).unwrap();
        self.driver.wants_kick(&pin.mapped()).unwrap()
    }

    pub fn call(&mut self) -> bool {
        let pin = self.mem.pin();
        self.device.wants_call(&pin.mapped()).unwrap()
    }

    pub fn pop(&mut self) -> Result<Option<Element>, Fault> {
        let pin = self.mem.pin();
        self.device.pop(&pin.mapped(), &mut self.segments)
    }

    pub fn take(&mut self) -> Element {
        self.pop().unwrap().expect_element()
    }

    pub fn pop_many(&mut self, limit: usize) -> Result<Vec<Element>, Fault> {
        let mut elements = Vec::new();
        let pin = self.mem.pin();
        self.device
            .pop_many(&pin.mapped(), limit, &mut self.segments, &mut elements)?;
        Ok(elements)
    }

    pub fn has_work(&mut self) -> bool {
        let pin = self.mem.pin();
        self.device.has_work(&pin.mapped())
    }

    pub fn complete(&mut self, element: &Element, written: u64) -> bool {
        let pin = self.mem.pin();
        self.device.complete(&pin.mapped(), &element.ticket(), written).unwrap()
    }

    pub fn show(&mut self) {
        let pin = self.mem.pin();
        self.device.publish(&pin.mapped()).unwrap();
    }

    pub fn finish(&mut self, element: &Element, written: u64) -> bool {
        let done = self.complete(element, written);
        self.show();
        done
    }

    pub fn iov(&self, element: &Element) -> Iov<'_> {
        Iov::new(
            &self.segments[element.first..element.first + element.count],
            element.epoch,
        )
    }

    pub fn used(&mut self) -> Result<Option<(u64, u32)>, Fault> {
        let pin = self.mem.pin();
        self.driver.get_used(&pin.mapped())
    }

    pub fn has_used(&mut self) -> bool {
        let pin = self.mem.pin();
        self.driver.has_used(&pin.mapped())
    }

    /// The next pop finds `rule` broken, once; then the queue is latched and nothing goes on.
    pub fn breaks(&mut self, rule: Rule) -> Fault {
        assert!(self.has_work(), "what is broken counts as work: {rule:?}");
        let arena = self.segments.len();
        let fault = self.pop().unwrap_err();
        assert_eq!(fault.rule, rule, "{fault}");
        assert_eq!(fault.queue, 3);
        assert_eq!(fault.packed, self.layout.packed);
        assert_eq!(self.segments.len(), arena, "nothing is half done");
        assert_eq!(self.device.latched().unwrap(), &fault);
        assert_eq!(self.pop().unwrap(), None);
        assert!(self.pop_many(8).unwrap().is_empty());
        assert!(!self.has_work());
        assert!(!self.call());
        fault
    }

    /// The next look of the driver finds `rule` broken, once; then it is latched and nothing goes on.
    pub fn cheats(&mut self, rule: Rule) -> Fault {
        assert!(self.has_used());
        let fault = self.used().unwrap_err();
        assert_eq!(fault.rule, rule, "{fault}");
        assert_eq!(self.driver.latched().unwrap(), &fault);
        assert_eq!(self.used().unwrap(), None);
        assert!(!self.has_used());
        fault
    }

    /// `count` buffers go through both ends; each has one descriptor, or two when `double`.
    pub fn traffic(&mut self, count: u32, double: bool) {
        for i in 0..count {
            let token = self.give(!double);
            let element = self.take();
            assert_eq!(element.descriptors, 1 + u32::from(double));
            let written = if double { u64::from(i % 17) } else { 0 };
            assert!(self.finish(&element, written));
            self.segments.clear();
            let answer = self.used().unwrap();
            assert_eq!(answer, Some((token, u32::try_from(written).unwrap())), "buffer {i}");
        }
        assert_eq!(self.pop().unwrap(), None);
        assert_eq!(self.used().unwrap(), None);
        assert_eq!(
            (self.device.in_flight(), self.driver.in_flight(), self.driver.free()),
            (0, 0, self.layout.size)
        );
    }

    /// Fill the whole ring with single descriptors, take all, complete them in the order that `order` gives.
    pub fn full_ring(&mut self, order: impl Fn(&mut Vec<Element>)) {
        let size = usize::from(self.layout.size);
        let mut tokens: Vec<_> = (0..size).map(|_| self.add(&[(DATA, 16)], &[])).collect();
        assert_eq!(usize::from(self.publish()), size);
        assert_eq!(self.driver.free(), 0);
        let mut elements = self.pop_many(size + 1).unwrap();
        assert_eq!(elements.len(), size);
        assert_eq!(self.pop().unwrap(), None);
        order(&mut elements);
        for element in &elements {
            assert!(self.complete(element, 0));
        }
        assert_eq!(self.used().unwrap(), None, "nothing is visible before it is published");
        self.show();
        let pin = self.mem.pin();
        let used = self.driver.get_used_many(&pin.mapped(), size + 1).unwrap();
        drop(pin);
        let mut answered: Vec<_> = used.iter().map(|&(token, _)| token).collect();
        answered.sort_unstable();
        tokens.sort_unstable();
        assert_eq!(answered, tokens);
        assert_eq!(usize::from(self.driver.free()), size);
        self.segments.clear();
    }
}

pub trait Popped {
    fn expect_element(self) -> Element;
}

impl Popped for Option<Element> {
    fn expect_element(self) -> Element {
        let Some(element) = self else {
            panic!("nothing was popped")
        };
        element
    }
}
