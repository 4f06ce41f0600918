//! A pair of queues of a network device, both ends of each, and the packet loop.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_test::mem::GuestMemory;
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig};
use virtio_test::ring::RingLayout;
use virtio_test::service::packet::{Mode, Packets, Setup, Told};
use virtio_test::service::{Bounds, Done, run};

use super::{BIG, DATA, RING, TABLES, config, memory};

/// More than the frames that the loop takes at once.
const SIZE: u16 = 256;
pub const BOUNDS: Bounds = Bounds {
    chains: 256,
    bytes: 1 << 30,
};
/// Buffers of the receive queue begin here, a page for each; frames that are sent in `DATA`.
pub const RX: u64 = TABLES;
pub const PAGE: u64 = 0x1000;
pub const ODD: u64 = BIG + (1 << 30);
pub const RINGS: [u64; 2] = [RING, RING + 0x8000];

pub struct Pair {
    pub mem: GuestMemory,
    pub drivers: [DriverQueue; 2],
    pub devices: [DeviceQueue; 2],
    pub packets: Packets,
    pub given: u64,
}

/// Run `$body` with the memory of `$pair` as it has to be reached.
macro_rules! with_mem {
    ($pair:expr, |$mem:ident| $body:expr) => {{
        let pin = $pair.mem.pin();
        match pin.mediated() {
            Some($mem) => $body,
            None => {
                let $mem = pin.mapped();
                $body
            }
        }
    }};
}

pub fn setup() -> Setup {
    Setup {
        usable: true,
        ..Setup::default()
    }
}

pub fn configs() -> [QueueConfig; 2] {
    [0, 1].map(|index| {
        let layout = RingLayout::contiguous(SIZE, false, RINGS[index]).unwrap();
        QueueConfig {
            desc: layout.desc,
            driver: layout.driver,
            device: layout.device,
            index: u16::try_from(index).unwrap(),
            ..config(SIZE, 0, Policy::INTEROP)
        }
    })
}

impl Pair {
    pub fn new(mode: Mode, setup: Setup) -> Self {
        Self::over(memory(), mode, setup)
    }

    pub fn over(mem: GuestMemory, mode: Mode, setup: Setup) -> Self {
        let pin = mem.pin();
        let all = pin.whole();
        let drivers = configs().map(|config| DriverQueue::new(&all, config, None, None).unwrap());
        let devices = configs().map(|config| DeviceQueue::new(&all, config, None).unwrap());
        drop(pin);
        let mut packets = Packets::new(mode);
        packets.set_up(setup);
        Self {
            mem,
            drivers,
            devices,
            packets,
            given: 0,
        }
    }

    pub fn add(&mut self, queue: usize, readable: &[(u64, u32)], writable: &[(u64, u32)]) {
        with_mem!(self, |mem| {
            self.drivers[queue].add(&mem, readable, writable, false).unwrap();
            self.drivers[queue].publish(&mem).unwrap();
        });
    }

    /// Receive buffers of these sizes, one page after the other.
    pub fn give(&mut self, sizes: &[u32]) {
        for &size in sizes {
            let gpa = RX + PAGE * self.given;
            self.mem.fill(gpa, PAGE, 0xee).unwrap();
            self.add(0, &[], &[(gpa, size)]);
            self.given += 1;
        }
    }

    /// Send a header and a frame in one buffer.
    pub fn send(&mut self, header: &[u8], frame: &[u8]) {
        let whole = [header, frame].concat();
        self.mem.write(DATA, &whole).unwrap();
        self.add(1, &[(DATA, u32::try_from(whole.len()).unwrap())], &[]);
    }

    pub fn turn(&mut self, bounds: Bounds) -> Done {
        let [rx, tx] = &mut self.devices;
        with_mem!(self, |mem| run(&mut self.packets, &mem, &mut [rx, tx], bounds))
    }

    pub fn done(&mut self) -> usize {
        let done = self.turn(BOUNDS);
        assert!(done.broken.is_empty());
        done.turn.unwrap().done
    }

    /// Lengths of what has been used.
    pub fn used(&mut self, queue: usize) -> Vec<u32> {
        let driver = &mut self.drivers[queue];
        with_mem!(self, |mem| {
            std::iter::from_fn(|| driver.get_used(&mem).unwrap())
                .map(|(_, len)| len)
                .collect()
        })
    }

    /// The first bytes of a receive buffer, by its number.
    pub fn bytes(&self, number: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read(RX + PAGE * number, &mut bytes).unwrap();
        bytes
    }

    pub fn told(&self) -> &Arc<Told> {
        self.packets.told()
    }

    /// Frames sent, received, dropped, broken.
    pub fn counts(&self) -> [u64; 4] {
        let told = self.told();
        [&told.sent[0], &told.received[0], &told.dropped, &told.broken].map(|count| count.load(Ordering::Relaxed))
    }

    pub fn rules(&self) -> Vec<&'static str> {
        self.told()
            .take_findings()
            .into_iter()
            .map(|found| found.rule)
            .collect()
    }
}

/// A header of 12 bytes: flags, gso_type, csum_start, csum_offset.
pub const fn header(flags: u8, gso_type: u8, start: u16, offset: u16) -> [u8; 12] {
    let ([a, b], [c, d]) = (start.to_le_bytes(), offset.to_le_bytes());
    [flags, gso_type, 0xab, 0xab, 0xab, 0xab, a, b, c, d, 0xcd, 0xcd]
}

pub const PLAIN: [u8; 12] = [0; 12];
/// As it is received: one buffer.
pub const ONE: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

pub fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 255).unwrap() + 1).collect()
}
