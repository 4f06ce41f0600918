//! Killed between any two accesses to guest memory or to the record, a device end leaves what the next one goes on from.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test stops at what it did not expect; numbers are small"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use common::{DATA, IN_ORDER, PACKED, config, files, region};
use virtio_test::chain::{Element, Segment};
use virtio_test::inflight::{Area, Part};
use virtio_test::mem::{Access, Backing, GuestMemory, Trace};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueState, StartError};

const SIZE: u16 = 4;
const TABLES: u64 = 0x10_0000;

/// Numbers without end, the same for the same seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// What one side does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The driver: one more request, of one or two descriptors, or of a table.
    Give {
        shape: u64,
    },
    /// The driver: take back what is used.
    Collect,
    Pop,
    /// Answer one of those that are held.
    Answer {
        which: u64,
    },
    Publish,
    /// Put the newest back.
    Unpop,
    /// Put any one back.
    PutBack {
        which: u64,
    },
}

impl Step {
    fn any(dice: &mut Dice) -> Self {
        match dice.roll(16) {
            0..=4 => Self::Give { shape: dice.roll(3) },
            5 => Self::Collect,
            6..=9 => Self::Pop,
            10..=12 => Self::Answer { which: dice.roll(4) },
            13 => Self::Publish,
            14 => Self::Unpop,
            _ => Self::PutBack { which: dice.roll(4) },
        }
    }
}

/// A request that the device end holds.
struct Held {
    element: Element,
    segments: Vec<Segment>,
    number: u64,
}

/// Memory, record and driver, which outlive every device end.
struct World {
    features: u64,
    mem: GuestMemory,
    trace: Arc<Trace>,
    file: OwnedFd,
    start: QueueState,
    driver: DriverQueue,
    next: u64,
    /// Requests without an answer, by token.
    open: BTreeMap<u64, u64>,
    answered: BTreeSet<u64>,
}

/// One device end, until it dies.
struct Life {
    device: DeviceQueue,
    held: Vec<Held>,
    /// Requests that it has executed.
    executed: Vec<u64>,
}

impl World {
    fn new(features: u64, start: QueueState) -> Self {
        let trace = Arc::new(Trace::new());
        let regions = vec![region(0, 0x20_0000), region(DATA, 0x1_0000)];
        let mem = GuestMemory::new(regions, Some(Arc::clone(&trace))).unwrap();
        let config = config(SIZE, features, Policy::STRICT);
        let layout = config.layout().unwrap();
        if layout.packed {
            // Used in this lap, up to where it goes on, and in the one before.
            for slot in 0..SIZE {
                let used = (slot < start.used & 0x7fff) == (start.used & 0x8000 != 0);
                let flags = if used { common::AVAIL | common::USED } else { 0 };
                mem.write(layout.desc + 16 * u64::from(slot) + 14, &flags.to_le_bytes())
                    .unwrap();
            }
        } else {
            mem.write(layout.driver + 2, &start.avail.to_le_bytes()).unwrap();
            mem.write(layout.device + 2, &start.used.to_le_bytes()).unwrap();
        }
        let tables = IndirectArea {
            address: TABLES,
            entries: 4,
        };
        let driver = DriverQueue::new(&mem.pin().mapped(), config, Some(start), Some(tables)).unwrap();
        Self {
            features,
            mem,
            trace,
            file: files::file(0x1000),
            start,
            driver,
            next: 0,
            open: BTreeMap::new(),
            answered: BTreeSet::new(),
        }
    }

    fn packed(&self) -> bool {
        self.features & PACKED != 0
    }

    fn part(&self) -> Part {
        let fd = self.file.try_clone().unwrap();
        let backing = Backing::Received {
            fd,
            offset: 0,
            writable: true,
        };
        let area = Area::new(0x1000, backing, Some(Arc::clone(&self.trace))).unwrap();
        Part::new(Arc::new(area), 64, SIZE + 2)
    }

    /// Where a front-end lets the next device end begin: behind what is used (split), or where it does not know (packed).
    fn told(&self) -> QueueState {
        if self.packed() || self.next == 0 {
            return self.start;
        }
        let layout = config(SIZE, self.features, Policy::STRICT).layout().unwrap();
        let mut used = [0; 2];
        self.mem.read(layout.device + 2, &mut used).unwrap();
        let used = u16::from_le_bytes(used);
        QueueState { avail: used, used }
    }

    fn life(&self) -> Result<Life, StartError> {
        let pin = self.mem.pin();
        let config = config(SIZE, self.features, Policy::STRICT);
        let device = DeviceQueue::recorded(&pin.mediated().unwrap(), config, Some(self.told()), self.part())?;
        Ok(Life {
            device,
            held: Vec::new(),
            executed: Vec::new(),
        })
    }

    /// What request `number` has in its buffer, and what its answer is.
    fn buffers(number: u64) -> (u64, u64) {
        let at = DATA + (number % 32) * 64;
        (at, at + 32)
    }

    fn give(&mut self, shape: u64) {
        let number = self.next;
        let (request, answer) = Self::buffers(number);
        let pin = self.mem.pin();
        let mem = pin.mapped();
        let indirect = shape == 2 && self.features & common::INDIRECT_DESC != 0;
        let needed = if indirect { 1 } else { 1 + shape.min(1) as u16 };
        if self.driver.free() < needed {
            return;
        }
        mem.write(virtio_test::mem::At::unresolved(request), 0, &number.to_le_bytes())
            .unwrap();
        // A request of one descriptor is answered with nothing.
        let writable: &[(u64, u32)] = if shape == 0 { &[] } else { &[(answer, 8)] };
        let token = self.driver.add(&mem, &[(request, 8)], writable, indirect).unwrap();
        self.driver.publish(&mem).unwrap();
        self.next += 1;
        self.open.insert(token, number);
    }

    /// Each answer is of a request that has none yet, and it is the right one.
    fn collect(&mut self) {
        let pin = self.mem.pin();
        while let Some((token, written)) = self.driver.get_used(&pin.mapped()).unwrap() {
            let number = self.open.remove(&token).unwrap();
            if written > 0 {
                let mut bytes = [0; 8];
                self.mem.read(Self::buffers(number).1, &mut bytes).unwrap();
                assert_eq!(u64::from_le_bytes(bytes), number * 3 + 1);
            }
            assert!(self.answered.insert(number));
        }
    }

    fn step(&mut self, life: &mut Life, step: Step) {
        let pin = self.mem.pin();
        let mem = pin.mediated().unwrap();
        match step {
            Step::Give { shape } => {
                drop(pin);
                self.give(shape);
            }
            Step::Collect => {
                drop(pin);
                self.collect();
            }
            Step::Pop => life.pop(&mem),
            Step::Answer { which } => life.answer(&mem, which),
            Step::Publish => life.device.publish(&mem).unwrap(),
            Step::Unpop => {
                if let Some(newest) = (0..life.held.len()).max_by_key(|&at| life.held[at].element.seq) {
                    let ticket = life.held[newest].element.ticket();
                    if life.device.unpop(&ticket).is_ok() {
                        life.held.remove(newest);
                    }
                }
            }
            Step::PutBack { which } => {
                if !life.held.is_empty() {
                    let held = life.held.remove(which as usize % life.held.len());
                    life.device.put_back(&held.element, &held.segments);
                }
            }
        }
    }

    /// The rest is answered, all of it, and then there is nothing left anywhere.
    fn settle(&mut self, life: &mut Life) {
        let pin = self.mem.pin();
        let mem = pin.mediated().unwrap();
        loop {
            let before = life.held.len();
            life.pop(&mem);
            if life.held.len() == before {
                break;
            }
        }
        while !life.held.is_empty() {
            life.answer(&mem, 1);
        }
        life.device.publish(&mem).unwrap();
        drop(pin);
        self.collect();
        assert!(self.open.is_empty(), "without an answer: {:?}", self.open);
        assert_eq!(self.answered.len() as u64, self.next);
        assert_eq!((self.driver.free(), life.device.in_flight()), (SIZE, 0));
    }
}

impl Life {
    fn pop<A: Access>(&mut self, mem: &A) {
        let mut segments = Vec::new();
        let Some(element) = self.device.pop(mem, &mut segments).unwrap() else {
            return;
        };
        let mut bytes = [0; 8];
        mem.read(segments[0].at, 0, &mut bytes).unwrap();
        let number = u64::from_le_bytes(bytes);
        self.held.push(Held {
            element,
            segments,
            number,
        });
    }

    fn answer<A: Access>(&mut self, mem: &A, which: u64) {
        if self.held.is_empty() {
            return;
        }
        let held = self.held.remove(which as usize % self.held.len());
        let answer = (held.number * 3 + 1).to_le_bytes();
        let written = held.segments.get(1).map_or(0, |segment| {
            mem.write(segment.at, 0, &answer).unwrap();
            8
        });
        self.executed.push(held.number);
        assert!(self.device.complete(mem, &held.element.ticket(), written).unwrap());
    }
}

/// Play `script` with a device end that dies at access `end` of its life, and others that die as `more` says; how many
/// accesses the first one made.
fn play(world: &mut World, script: &[Step], end: Option<u64>, more: &[u64]) -> u64 {
    let mut more = more.iter().copied();
    world.trace.clear();
    let mut end = end;
    if let Some(end) = end {
        world.trace.end_at(end);
    }
    let mut life = world.life().unwrap();
    let mut script = script.iter();
    loop {
        if end.is_some_and(|end| world.trace.count() > end) {
            // Dead: what it has published the driver sees, and nothing of that is executed again.
            world.collect();
            world.trace.clear();
            end = more.next();
            if let Some(end) = end {
                world.trace.end_at(end);
            }
            life = world.life().unwrap();
            continue;
        }
        let Some(&step) = script.next() else { break };
        let answered = world.answered.clone();
        let executed = life.executed.len();
        world.step(&mut life, step);
        for number in &life.executed[executed..] {
            assert!(!answered.contains(number), "{number} had its answer");
        }
    }
    let count = world.trace.count();
    // Whoever dies in the end is replaced too.
    world.trace.clear();
    world.collect();
    let mut last = if end.is_some() { world.life().unwrap() } else { life };
    world.settle(&mut last);
    count
}

fn starts(packed: bool) -> [QueueState; 3] {
    let at = |avail| QueueState { avail, used: avail };
    if packed {
        [at(0x8000), at(0x8003), at(2)]
    } else {
        [at(0), at(0xfffe), at(3)]
    }
}

/// A script for each seed, killed everywhere, and its successors somewhere.
fn killed_everywhere(features: u64, seeds: u64) {
    let mut kills = 0;
    for seed in 0..seeds {
        let start = starts(features & PACKED != 0)[seed as usize % 3];
        let mut dice = Dice(seed);
        let script: Vec<Step> = (0..30).map(|_| Step::any(&mut dice)).collect();
        let count = play(&mut World::new(features, start), &script, None, &[]);
        for end in 0..count {
            let more: Vec<u64> = (0..dice.roll(3)).map(|_| dice.roll(80)).collect();
            kills += 1 + more.len();
            play(&mut World::new(features, start), &script, Some(end), &more);
        }
    }
    assert!(kills > 1000, "{kills}");
}

#[test]
fn a_split_ring() {
    killed_everywhere(0, 24);
    killed_everywhere(common::INDIRECT_DESC, 12);
}

#[test]
fn a_split_ring_in_order() {
    killed_everywhere(IN_ORDER, 24);
}

#[test]
fn a_packed_ring() {
    killed_everywhere(PACKED, 24);
    killed_everywhere(PACKED | common::INDIRECT_DESC, 12);
}

#[test]
fn a_packed_ring_in_order() {
    killed_everywhere(PACKED | IN_ORDER, 24);
}
