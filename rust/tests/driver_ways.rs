//! The quick way through the driver end beside the plain one, under any use and before any device.
//!
//! Through `Mapped` a ring is reached directly and a burst is taken in one loop; `Mediated`, which never shows where memory
//! lies, is asked for each word. Two queues in memories of their own do the same steps, one each way; what the device did in
//! the first memory is copied to the second. Answers, state and every byte of both must be the same after each step.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::{AVAIL, EVENT_IDX, IN_ORDER, INDIRECT_DESC, PACKED, USED, WRITE, region};
use virtio_test::error::{Fault, QueueError};
use virtio_test::mem::{Access, GuestMemory};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueConfig};
use virtio_test::ring::RingLayout;

const MEMORY: usize = 0x4000;
const TABLES: u64 = 0x2000;
const DATA: u64 = 0x3000;

/// Xorshift, the same everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    fn small(&mut self, limit: u16) -> u16 {
        u16::try_from(self.below(u64::from(limit))).unwrap()
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::try_from(self.below(choices.len() as u64)).unwrap()]
    }

    fn buffers(&mut self, most: u64) -> Vec<(u64, u32)> {
        let len = |dice: &mut Self| match dice.below(60) {
            0 => 0,
            1 => u32::MAX,
            _ => 1 + u32::from(dice.small(64)),
        };
        (0..self.below(most + 1))
            .map(|_| (DATA + self.below(512), len(self)))
            .collect()
    }
}

/// What a queue answered; each step has one answer.
#[derive(Debug, PartialEq)]
enum Answer {
    Added(Result<u64, QueueError>),
    Published(Result<u16, Fault>),
    Asked(Result<bool, Fault>),
    One(Result<Option<(u64, u32)>, Fault>),
    Many(Result<usize, Fault>, Vec<(u64, u32)>),
    Found(bool),
    Done(Result<(), Fault>),
    Tokens(Vec<u64>),
}

#[derive(Clone, Debug)]
enum Step {
    Add(Vec<(u64, u32)>, Vec<(u64, u32)>, bool),
    Publish,
    WantsKick,
    One,
    Many(usize),
    HasUsed,
    EnableCalls,
    DisableCalls,
    GiveBack(usize),
    Detach,
    Reset,
}

impl Step {
    fn any(dice: &mut Dice) -> Self {
        match dice.below(100) {
            0..35 => Self::Add(dice.buffers(3), dice.buffers(3), dice.below(4) == 0),
            35..55 => Self::Publish,
            55..60 => Self::WantsKick,
            60..70 => Self::One,
            70..88 => Self::Many(dice.of(&[0, 1, 2, 3, 64])),
            88..92 => Self::HasUsed,
            92..94 => Self::EnableCalls,
            94..96 => Self::DisableCalls,
            96..98 => Self::GiveBack(dice.of(&[1, 2, 64])),
            98 => Self::Reset,
            _ if dice.below(6) == 0 => Self::Detach,
            _ => Self::HasUsed,
        }
    }

    fn run<A: Access>(&self, queue: &mut DriverQueue, mem: &A) -> Answer {
        match self {
            Self::Add(readable, writable, indirect) => Answer::Added(queue.add(mem, readable, writable, *indirect)),
            Self::Publish => Answer::Published(queue.publish(mem)),
            Self::WantsKick => Answer::Asked(queue.wants_kick(mem)),
            Self::One => Answer::One(queue.get_used(mem)),
            Self::Many(limit) => {
                let mut used = Vec::new();
                Answer::Many(queue.get_used_into(mem, *limit, &mut used), used)
            }
            Self::HasUsed => Answer::Found(queue.has_used(mem)),
            Self::EnableCalls => Answer::Asked(queue.enable_calls(mem)),
            Self::DisableCalls => Answer::Done(queue.disable_calls(mem)),
            Self::GiveBack(limit) => {
                let mut used = Vec::new();
                let taken = queue.get_used_into(mem, *limit, &mut used);
                queue.give_back(used.clone());
                Answer::Many(taken, used)
            }
            Self::Detach => Answer::Tokens(queue.detach()),
            Self::Reset => Answer::Done(queue.reset(mem, None, None)),
        }
    }
}

fn config(size: u16, features: u64, policy: Policy) -> QueueConfig {
    let layout = RingLayout::contiguous(size, features & PACKED != 0, 0x1000).unwrap();
    QueueConfig {
        size: u32::from(size),
        desc: layout.desc,
        driver: layout.driver,
        device: layout.device,
        index: 1,
        features,
        policy,
    }
}

fn bytes(mem: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY];
    mem.read(0, &mut bytes).unwrap();
    bytes
}

fn put(mem: &GuestMemory, gpa: u64, value: u64, width: usize) {
    mem.write(gpa, &value.to_le_bytes()[..width]).unwrap();
}

/// One used entry of anything: where it is looked for next or somewhere else, with an id of the queue or not.
fn cheat(mem: &GuestMemory, layout: &RingLayout, used: u16, dice: &mut Dice) {
    let id = u64::from(dice.small(layout.size + 1)) + if dice.below(30) == 0 { 0x1_0000 } else { 0 };
    let len = if dice.below(8) == 0 {
        dice.below(1 << 32)
    } else {
        dice.below(40)
    };
    if layout.packed {
        let (slot, wrap) = (used & 0x7fff, used & 0x8000 != 0);
        let slot = if dice.below(6) == 0 {
            dice.small(layout.size)
        } else {
            slot
        };
        let desc = layout.desc + 16 * u64::from(slot);
        put(mem, desc + 8, len, 4);
        put(mem, desc + 12, id, 2);
        let flags = if wrap { AVAIL | USED } else { 0 } | dice.of(&[0, WRITE]);
        let flags = if dice.below(8) == 0 {
            dice.small(u16::MAX)
        } else {
            flags
        };
        put(mem, desc + 14, u64::from(flags), 2);
    } else {
        let slot = u64::from(used % layout.size);
        put(mem, layout.device + 4 + 8 * slot, id, 4);
        put(mem, layout.device + 8 + 8 * slot, len, 4);
        let ahead = dice.of(&[1, 1, 1, 1, 2, 3, 0, 0xffff]);
        put(mem, layout.device + 2, u64::from(used.wrapping_add(ahead)), 2);
    }
}

/// An honest device uses some of what there is.
fn serve(mem: &GuestMemory, device: &mut DeviceQueue, dice: &mut Dice) {
    let pin = mem.pin();
    let (mut segments, mut elements) = (Vec::new(), Vec::new());
    let limit = usize::try_from(1 + dice.below(5)).unwrap();
    if device
        .pop_many(&pin.mapped(), limit, &mut segments, &mut elements)
        .is_err()
    {
        return;
    }
    let ordered = device.config().features & IN_ORDER != 0;
    if !ordered && dice.below(2) == 0 {
        elements.reverse();
    }
    for element in &elements {
        let written = dice.below(element.writable.min(u64::from(u32::MAX)) + 1);
        device.complete(&pin.mapped(), &element.ticket(), written).unwrap();
    }
    device.publish(&pin.mapped()).unwrap();
}

#[derive(Default)]
struct Tally {
    used: usize,
    faults: usize,
    misuse: usize,
    tables: usize,
}

fn play(seed: u64, config: QueueConfig, honest: bool, tally: &mut Tally) {
    let layout = config.layout().unwrap();
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let made = || GuestMemory::new(vec![region(0, MEMORY as u64)], None).unwrap();
    let (quick, plain) = (made(), made());
    let area = Some(IndirectArea {
        address: TABLES,
        entries: 4,
    });
    let mut one = DriverQueue::new(&quick.pin().mapped(), config, None, area).unwrap();
    let mut other = DriverQueue::new(&plain.pin().whole(), config, None, area).unwrap();
    let mut device = DeviceQueue::new(&quick.pin().mapped(), config, None).unwrap();
    for turn in 0..80 {
        let step = Step::any(&mut dice);
        let place = format!("seed {seed}, turn {turn}: {step:?} in {config:?}");
        let answer = step.run(&mut one, &quick.pin().mapped());
        assert_eq!(answer, step.run(&mut other, &plain.pin().whole()), "{place}");
        let state = |queue: &DriverQueue| (queue.state(), queue.free(), queue.in_flight(), *queue.counters());
        assert_eq!(state(&one), state(&other), "{place}");
        assert_eq!(one.latched(), other.latched(), "{place}");
        assert_eq!(bytes(&quick), bytes(&plain), "{place}");
        match &answer {
            Answer::Many(_, used) => tally.used += used.len(),
            Answer::One(Ok(used)) => tally.used += usize::from(used.is_some()),
            Answer::Added(Err(_)) => tally.misuse += 1,
            _ => {}
        }
        if one.latched().is_some() || one.detached() {
            tally.faults += usize::from(one.latched().is_some());
            let again = Step::Reset;
            assert_eq!(
                again.run(&mut one, &quick.pin().mapped()),
                again.run(&mut other, &plain.pin().whole())
            );
        }
        if matches!(step, Step::Reset) || one.generation() != device.generation() {
            while device.generation() != one.generation() {
                device.reset(&quick.pin().mapped(), None, None).unwrap();
            }
        }
        match dice.below(10) {
            0..4 if honest => serve(&quick, &mut device, &mut dice),
            0..4 => cheat(&quick, &layout, one.state().used, &mut dice),
            4 => {
                // A ring that was resolved in the table before this one is resolved again.
                tally.tables += 1;
                for mem in [&quick, &plain] {
                    let more = region(0x10_0000 * (1 + turn), 0x1000);
                    mem.add(more).unwrap();
                }
            }
            _ => {}
        }
        plain.write(0, &bytes(&quick)).unwrap();
    }
}

#[test]
fn the_quick_way_does_what_the_plain_one_does() {
    let beyond = Policy {
        used_len_beyond: true,
        ..Policy::INTEROP
    };
    let mut tally = Tally::default();
    for seed in 0..160 {
        for features in [0, EVENT_IDX, IN_ORDER, INDIRECT_DESC] {
            for policy in [Policy::INTEROP, Policy::STRICT, beyond] {
                let honest = seed % 2 == 0;
                let split = [1, 2, 4, 8][usize::try_from(seed / 2 % 4).unwrap()];
                play(seed, config(split, features, policy), honest, &mut tally);
                let packed = [1, 3, 5, 8][usize::try_from(seed / 2 % 4).unwrap()];
                play(seed, config(packed, features | PACKED, policy), honest, &mut tally);
            }
        }
    }
    let Tally {
        used,
        faults,
        misuse,
        tables,
    } = tally;
    assert!(
        used > 10_000 && faults > 10_000 && misuse > 30_000 && tables > 10_000,
        "{used} used, {faults} faults, {misuse} misuses, {tables} tables"
    );
}
