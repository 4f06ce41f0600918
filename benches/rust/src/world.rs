//! One queue in guest memory that both our core and the vm-memory crate map.

use std::fs::File;
use std::os::fd::OwnedFd;

use virtio_test::mem::{Access, At, Backing, GuestMemory, Mapped, Pin, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueConfig, QueueState, feature};
use virtio_test::ring::RingLayout;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::shape::Shape;

/// Bytes of one region, and from one to the next: there is a hole behind each.
const REGION: u64 = 4 << 20;
const STRIDE: u64 = 16 << 20;
/// The ring comes first, then indirect tables, then buffers.
pub const RING: u64 = 0x1000;
const TABLES: u64 = 0x10_0000;
const DATA: u64 = 0x30_0000;
/// Sets of buffers; chains beyond take the first again.
const SETS: u64 = 32;
/// Bytes from one set of buffers to the next.
const SET: u64 = 0x5000;

/// 2.8.1: the flags of a packed descriptor that say whose it is.
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// Addresses and lengths of what is readable, and of what is writable.
pub type Buffers = (Vec<(u64, u32)>, Vec<(u64, u32)>);

/// What a queue is like.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub size: u16,
    pub packed: bool,
    pub regions: u64,
    /// Chains of two descriptors that have gone through it, as its indices say.
    pub before: u64,
}

impl Ring {
    /// Where both indices stand (2.7.6; 2.8.1: the place, and the lap's parity above it).
    #[allow(
        clippy::cast_possible_truncation,
        reason = "indices count on 16 bits, and places are below the size"
    )]
    pub fn start(&self) -> u16 {
        if !self.packed {
            return self.before as u16;
        }
        let (size, slots) = (u64::from(self.size), 2 * self.before);
        (slots % size) as u16 | u16::from(slots / size % 2 == 0) << 15
    }
}

/// Guest memory and where things lie in it. Lives as long as the process, as a program's memory does.
pub struct World {
    pub ring: Ring,
    pub layout: RingLayout,
    pub mem: &'static Mapped<'static>,
    pub memory: &'static GuestMemory,
    pub theirs: &'static GuestMemoryMmap,
    avail: At,
}

/// Leave in the ring what chains that are done with have left: indices, and in a packed ring the flags of the lap before.
fn used_before(mem: Mapped<'_>, ring: Ring, layout: &RingLayout) {
    let start = ring.start();
    let put = |at: u64, value: u16| mem.store_u16(At::unresolved(at), 0, value).expect("the ring is mapped");
    if !ring.packed {
        put(layout.driver + 2, start);
        put(layout.device + 2, start);
        return;
    }
    let here = start & 0x7fff;
    let used = if start >> 15 == 1 { 0..here } else { here..ring.size };
    for slot in used {
        put(layout.desc + 16 * u64::from(slot) + 14, AVAIL | USED);
    }
}

impl World {
    pub fn new(ring: Ring) -> Self {
        let spec = |i: u64| RegionSpec {
            gpa: i * STRIDE,
            size: REGION,
            backing: Backing::Memfd,
        };
        let memory = GuestMemory::new((0..ring.regions).map(spec).collect(), None).expect("memory can be had");
        let regions = memory.regions();
        let range = |region: &std::sync::Arc<virtio_test::mem::Region>| {
            let fd: &OwnedFd = region.fd().expect("a memfd has one");
            let file = File::from(fd.try_clone().expect("one more descriptor"));
            let size = usize::try_from(region.size()).expect("it is small");
            let offset = FileOffset::new(file, region.offset());
            (GuestAddress(region.gpa()), size, Some(offset))
        };
        let theirs =
            GuestMemoryMmap::from_ranges_with_files(regions.iter().map(range)).expect("it can be mapped twice");
        let memory: &'static GuestMemory = Box::leak(Box::new(memory));
        let pin: &'static Pin<'static> = Box::leak(Box::new(memory.pin()));
        let mem: &'static Mapped<'static> = Box::leak(Box::new(pin.mapped()));
        let layout = RingLayout::contiguous(ring.size, ring.packed, RING).expect("it is small");
        let avail = mem.resolve(layout.driver, layout.driver_bytes(), virtio_test::mem::Want::Write);
        if ring.before > 0 {
            used_before(*mem, ring, &layout);
        }
        Self {
            ring,
            layout,
            mem,
            memory,
            theirs: Box::leak(Box::new(theirs)),
            avail: avail.expect("the ring is mapped"),
        }
    }

    /// Where a ring that was used before goes on; a fresh one is made so by the driver end.
    fn state(&self) -> Option<QueueState> {
        let start = self.ring.start();
        (self.ring.before > 0).then_some(QueueState {
            avail: start,
            used: start,
        })
    }

    pub fn config(&self) -> QueueConfig {
        let packed = if self.ring.packed { feature::RING_PACKED } else { 0 };
        QueueConfig {
            size: u32::from(self.ring.size),
            desc: self.layout.desc,
            driver: self.layout.driver,
            device: self.layout.device,
            index: 0,
            features: packed | feature::EVENT_IDX | feature::INDIRECT_DESC,
            policy: Policy::INTEROP,
        }
    }

    /// Our device end, which asks for no kicks.
    pub fn device(&self) -> DeviceQueue {
        let mut device = DeviceQueue::new(self.mem, self.config(), self.state()).expect("the ring is mapped");
        device.disable_kicks(self.mem).expect("the ring is mapped");
        device
    }

    /// Our driver end, which asks for no calls.
    pub fn driver(&self) -> DriverQueue {
        let area = IndirectArea {
            address: TABLES,
            entries: 4,
        };
        let mut driver =
            DriverQueue::new(self.mem, self.config(), self.state(), Some(area)).expect("the ring is mapped");
        driver.disable_calls(self.mem).expect("the ring is mapped");
        driver
    }

    /// The buffers of the chain of this number: readable, writable.
    pub fn buffers(&self, shape: &Shape, number: u64) -> Buffers {
        let set = number % SETS;
        let mut at = (set % self.ring.regions) * STRIDE + DATA + set * SET;
        let mut take = |&len: &u32| {
            let buffer = (at, len);
            at += u64::from(len.next_multiple_of(16));
            buffer
        };
        let readable = shape.readable.iter().map(&mut take).collect();
        (readable, shape.writable.iter().map(&mut take).collect())
    }

    /// Let the device see chains up to `idx`, as the split driver's own publication does.
    #[inline]
    pub fn show(&self, idx: u16) {
        let stored = self.mem.store_u16_release(self.avail, 2, idx);
        stored.expect("the ring is mapped");
    }
}
