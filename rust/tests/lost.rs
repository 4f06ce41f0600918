//! Queues over files that are cut short: each step survives, and nothing is made of what it brought.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::os::fd::OwnedFd;

use common::files::{file, lost, received};
use common::{EVENT_IDX, INDIRECT_DESC, PACKED};
use rustix::fs::ftruncate;
use rustix::io::pread;
use virtio_test::chain::Segment;
use virtio_test::error::{Misuse, QueueError};
use virtio_test::iov::Iov;
use virtio_test::mem::{Access, GuestMemory};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueConfig};
use virtio_test::rule::Rule;

const PAGE: u64 = 4096;

const DESC: u64 = 0x1_0000;
const DRIVER: u64 = 0x2_0000;
const DEVICE: u64 = 0x3_0000;
const TABLES: u64 = 0x4_0000;
const SOURCE: u64 = 0x5_0000;
const TARGET: u64 = 0x6_0000;
const PLACES: [u64; 6] = [DESC, DRIVER, DEVICE, TABLES, SOURCE, TARGET];

/// A file for each part of a queue, mapped twice: what the other side does is done through its own mapping.
struct World {
    files: Vec<OwnedFd>,
    mem: GuestMemory,
    other: GuestMemory,
    config: QueueConfig,
}

impl World {
    fn new(features: u64) -> Self {
        let files: Vec<_> = PLACES.iter().map(|_| file(PAGE)).collect();
        let memory = || {
            let regions = PLACES.iter().zip(&files).map(|(&gpa, fd)| received(gpa, PAGE, fd));
            GuestMemory::new(regions.collect(), None).unwrap()
        };
        let (mem, other) = (memory(), memory());
        Self {
            files,
            mem,
            other,
            config: QueueConfig {
                size: 8,
                desc: DESC,
                driver: DRIVER,
                device: DEVICE,
                index: 0,
                features,
                policy: Policy::INTEROP,
            },
        }
    }

    fn driver(&self, mem: &GuestMemory) -> DriverQueue {
        let tables = IndirectArea {
            address: TABLES,
            entries: 4,
        };
        let pin = mem.pin();
        DriverQueue::new(&pin.mapped(), self.config, None, Some(tables)).unwrap()
    }

    fn lose(&self, place: u64) {
        let index = PLACES.iter().position(|&other| other == place).unwrap();
        ftruncate(&self.files[index], 0).unwrap();
    }

    /// The bytes in the file of a part, as whoever else has it sees them.
    fn seen(&self, place: u64) -> Vec<u8> {
        let index = PLACES.iter().position(|&other| other == place).unwrap();
        let mut bytes = vec![0; 4096];
        let read = pread(&self.files[index], &mut bytes, 0).unwrap();
        bytes.truncate(read);
        bytes
    }
}

fn rule_of<T>(result: Result<T, QueueError>) -> Result<T, Rule> {
    result.map_err(|error| match error {
        QueueError::Violation(fault) => fault.rule,
        QueueError::Misuse(misuse) => panic!("{misuse}"),
    })
}

/// One chain through the device end, `place` lost before step `when`; which step said so, if any.
fn device_end(features: u64, indirect: bool, place: u64, when: usize) -> Option<usize> {
    let world = World::new(features);
    let mut driver = world.driver(&world.other);
    let (mem, pinned) = (world.mem.pin(), world.other.pin());
    let mem = &mem.mapped();
    let mut device = DeviceQueue::new(mem, world.config, None).unwrap();
    let there = &pinned.mapped();
    driver.add(there, &[(SOURCE, 64)], &[(TARGET, 64)], indirect).unwrap();
    driver.publish(there).unwrap();
    let shows = if features & PACKED == 0 { DEVICE } else { DESC };
    let (mut segments, mut element, mut said) = (Vec::<Segment>::new(), None, None);
    let mut before = Vec::new();
    for step in 0..6 {
        if step == when {
            world.lose(place);
        }
        if step == 4 {
            before = world.seen(shows);
        }
        let ticket = element.as_ref().map(virtio_test::chain::Element::ticket);
        let outcome: Result<(), QueueError> = match (step, ticket) {
            (0, _) => device
                .pop(mem, &mut segments)
                .map(|popped| element = popped)
                .map_err(QueueError::from),
            (1, Some(_)) => {
                let read = Iov::new(&segments, mem.epoch()).read(mem, 0, &mut [0; 64]);
                device.copied(read).map(|count| assert_eq!(count, 64))
            }
            (2, Some(_)) => {
                let written = Iov::new(&segments, mem.epoch()).write(mem, 0, &[3; 64]);
                device.copied(written).map(|count| assert_eq!(count, 64))
            }
            (3, Some(ticket)) => device
                .complete(mem, &ticket, 64)
                .map(|done| assert_eq!(done, said.is_none())),
            (4, Some(_)) => device.publish(mem).map_err(QueueError::from),
            (5, Some(_)) => device
                .wants_call(mem)
                .map(|wants| assert_eq!(wants, said.is_none()))
                .map_err(QueueError::from),
            _ => Ok(()),
        };
        if let Err(rule) = rule_of(outcome) {
            assert_eq!((rule, said), (Rule::MemoryLost, None), "once");
            said = Some(step);
        }
        if step == 4 {
            assert_eq!(
                world.seen(shows) == before,
                said.is_some(),
                "shown, unless it was lost before"
            );
        }
    }
    let latched = device.latched().map(|fault| fault.rule);
    assert_eq!(latched, said.map(|_| Rule::MemoryLost));
    if said.is_some() {
        assert!(!device.has_work(mem), "latched");
        assert_eq!(device.pop(mem, &mut segments), Ok(None));
    }
    said
}

#[test]
fn the_device_end_stops_at_the_first_step_that_touches_what_is_lost() {
    for features in [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX] {
        for indirect in [false, true] {
            for place in PLACES {
                // Which steps touch it, and the step that says so: a completion says nothing before it is published.
                let steps: &[usize] = match (place, features & PACKED != 0) {
                    (DESC, false) => &[0],
                    (DESC, true) => &[0, 4],
                    (DRIVER, false) => &[0, 5],
                    (DRIVER, true) => &[5],
                    (DEVICE, false) => &[4],
                    (TABLES, _) if indirect => &[0],
                    (SOURCE, _) => &[1],
                    (TARGET, _) => &[2],
                    _ => &[],
                };
                for when in 0..7 {
                    let expected = steps.iter().copied().find(|&step| step >= when);
                    let said = device_end(features | INDIRECT_DESC, indirect, place, when);
                    assert_eq!(said, expected, "{place:#x} before {when}, {features:#x}, {indirect}");
                }
            }
        }
    }
}

/// One chain through the driver end, `place` lost before step `when`; which step said so, if any.
fn driver_end(features: u64, indirect: bool, place: u64, when: usize) -> Option<usize> {
    let world = World::new(features);
    let (pin, pinned) = (world.mem.pin(), world.other.pin());
    let (mem, there) = (&pin.mapped(), &pinned.mapped());
    let mut driver = world.driver(&world.mem);
    let mut device = DeviceQueue::new(there, world.config, None).unwrap();
    let shows = if features & PACKED == 0 { DRIVER } else { DESC };
    let (mut said, mut before) = (None, Vec::new());
    for step in 0..4 {
        if step == 3 && when == 3 {
            let mut segments = Vec::new();
            let element = device.pop(there, &mut segments).unwrap().unwrap();
            device.complete(there, &element.ticket(), 1).unwrap();
            device.publish(there).unwrap();
        }
        if step == when {
            world.lose(place);
        }
        if step == 1 {
            before = world.seen(shows);
        }
        let outcome: Result<(), QueueError> = match step {
            0 => driver.add(mem, &[(SOURCE, 64)], &[(TARGET, 64)], indirect).map(drop),
            1 => driver
                .publish(mem)
                .map(|count| assert_eq!(count == 1, said.is_none()))
                .map_err(QueueError::from),
            2 => driver
                .wants_kick(mem)
                .map(|wants| assert_eq!(wants, said.is_none()))
                .map_err(QueueError::from),
            _ => driver
                .get_used(mem)
                .map(|used| assert_eq!(used.is_some(), when == 3, "not what zeros say"))
                .map_err(QueueError::from),
        };
        if let Err(rule) = rule_of(outcome) {
            assert_eq!((rule, said), (Rule::MemoryLost, None), "once");
            said = Some(step);
        }
        if step == 1 {
            assert_eq!(
                world.seen(shows) == before,
                said.is_some(),
                "shown, unless it was lost before"
            );
        }
    }
    assert_eq!(driver.latched().map(|fault| fault.rule), said.map(|_| Rule::MemoryLost));
    if said.is_some() {
        let refused = driver.add(mem, &[(SOURCE, 1)], &[], false);
        assert_eq!(refused, Err(QueueError::Misuse(Misuse::Latched)));
    }
    said
}

#[test]
fn the_driver_end_stops_at_the_first_step_that_touches_what_is_lost() {
    for features in [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX] {
        for indirect in [false, true] {
            for place in PLACES {
                for when in 0..5 {
                    // The steps that touch it, and what is added says nothing before it is published.
                    let steps: &[usize] = match (place, features & PACKED != 0) {
                        (DESC, false) => &[0],
                        // With nothing used, a look arms: the used_event of the split ring, the driver's event area.
                        (DRIVER, false) if when == 3 => &[0, 1],
                        (DRIVER, true) if when == 3 => &[],
                        (DESC, true) | (DRIVER, false) => &[0, 1, 3],
                        (DRIVER, true) => &[3],
                        (DEVICE, false) => &[2, 3],
                        (DEVICE, true) => &[2],
                        (TABLES, _) if indirect => &[0],
                        _ => &[],
                    };
                    let expected = steps.iter().copied().find(|&step| step >= when).map(|step| step.max(1));
                    let said = driver_end(features | INDIRECT_DESC, indirect, place, when);
                    assert_eq!(said, expected, "{place:#x} before {when}, {features:#x}, {indirect}");
                }
            }
        }
    }
}

#[test]
fn what_is_lost_is_no_place_for_a_queue_and_a_reset_elsewhere_serves_again() {
    let world = World::new(0);
    let pin = world.mem.pin();
    let mut device = DeviceQueue::new(&pin.mapped(), world.config, None).unwrap();
    world.lose(DEVICE);
    drop(pin);
    assert!(world.mem.read(DEVICE, &mut [0]).is_err());
    let pin = world.mem.pin();
    let mem = &pin.mapped();
    assert_eq!(
        DeviceQueue::new(mem, world.config, None).unwrap_err().rule,
        Rule::MemoryLost
    );
    assert!(DriverQueue::new(mem, world.config, None, None).is_err());
    assert!(device.has_work(mem), "what is broken counts as work");
    assert_eq!(device.pop(mem, &mut Vec::new()).unwrap_err().rule, Rule::MemoryLost);
    assert_eq!(device.reset(mem, None, None).unwrap_err().rule, Rule::MemoryLost);
    drop(pin);
    world.mem.remove(DEVICE, PAGE).unwrap();
    world.mem.add(received(DEVICE, PAGE, &file(PAGE))).unwrap();
    let pin = world.mem.pin();
    device.reset(&pin.mapped(), None, None).unwrap();
    assert_eq!(device.pop(&pin.mapped(), &mut Vec::new()), Ok(None));
    assert!(device.latched().is_none());
}

#[test]
fn a_batch_hands_out_what_it_had_before_the_loss() {
    for features in [0, PACKED] {
        let world = World::new(features | INDIRECT_DESC);
        let (pin, pinned) = (world.mem.pin(), world.other.pin());
        let (mem, there) = (&pin.mapped(), &pinned.mapped());
        let mut driver = world.driver(&world.other);
        let mut device = DeviceQueue::new(mem, world.config, None).unwrap();
        driver.add(there, &[(SOURCE, 64)], &[], false).unwrap();
        driver.add(there, &[(SOURCE, 64)], &[(TARGET, 1)], true).unwrap();
        driver.publish(there).unwrap();
        world.lose(TABLES);
        let (mut segments, mut elements) = (Vec::new(), Vec::new());
        assert_eq!(
            device.pop_many(mem, 8, &mut segments, &mut elements),
            Ok(1),
            "only the table is lost"
        );
        assert_eq!((segments.len(), device.in_flight()), (1, 1));
        let fault = device.pop_many(mem, 8, &mut segments, &mut elements).unwrap_err();
        assert_eq!((fault.rule, fault.address), (Rule::MemoryLost, Some(TABLES + 64)));
        assert_eq!((segments.len(), device.in_flight()), (1, 1));
    }
}

/// Zeros are legal descriptors of length 0 for who is tolerant: such a chain is popped, and goes back.
#[test]
fn what_was_popped_from_zeros_goes_back() {
    for many in [false, true] {
        let world = World::new(0);
        let (pin, pinned) = (world.mem.pin(), world.other.pin());
        let (mem, there) = (&pin.mapped(), &pinned.mapped());
        let mut driver = world.driver(&world.other);
        let mut device = DeviceQueue::new(mem, world.config, None).unwrap();
        for _ in 0..2 {
            driver.add(there, &[(SOURCE, 64)], &[(TARGET, 64)], false).unwrap();
        }
        driver.publish(there).unwrap();
        let (mut segments, mut elements) = (Vec::new(), Vec::new());
        let before = device.pop(mem, &mut segments).unwrap().unwrap();
        let at = device.state();
        world.lose(DESC);
        let fault = if many {
            device.pop_many(mem, 8, &mut segments, &mut elements).unwrap_err()
        } else {
            device.pop(mem, &mut segments).unwrap_err()
        };
        assert_eq!(fault.rule, Rule::MemoryLost);
        assert_eq!((device.state(), device.in_flight()), (at, 1));
        assert_eq!((segments.len(), elements.len()), (before.count, 0));
    }
}

#[test]
fn a_fill_of_a_chain_is_a_copy_like_others() {
    let world = World::new(0);
    let (pin, pinned) = (world.mem.pin(), world.other.pin());
    let (mem, there) = (&pin.mapped(), &pinned.mapped());
    let mut driver = world.driver(&world.other);
    let mut device = DeviceQueue::new(mem, world.config, None).unwrap();
    driver.add(there, &[], &[(TARGET, 64)], false).unwrap();
    driver.publish(there).unwrap();
    let mut segments = Vec::new();
    device.pop(mem, &mut segments).unwrap().unwrap();
    world.lose(TARGET);
    let filled = Iov::new(&segments, mem.epoch()).fill(mem, 8, 8, 1);
    assert_eq!(filled, lost(TARGET + 8));
    assert_eq!(rule_of(device.copied(filled)), Err(Rule::MemoryLost));
    assert!(device.broken());
}

/// A used ring of three pages, of which the first remains: what was taken from that is not lost with the others.
#[test]
fn a_driver_that_finds_its_used_ring_lost_still_knows_what_was_in_flight() {
    const COUNT: usize = 700;
    let files = [file(4 * PAGE), file(PAGE), file(3 * PAGE), file(PAGE)];
    let places = [(DESC, 4 * PAGE), (DRIVER, PAGE), (DEVICE, 3 * PAGE), (SOURCE, PAGE)];
    let memory = || {
        let regions = places
            .iter()
            .zip(&files)
            .map(|(&(gpa, size), fd)| received(gpa, size, fd));
        GuestMemory::new(regions.collect(), None).unwrap()
    };
    let config = QueueConfig {
        size: 1024,
        desc: DESC,
        driver: DRIVER,
        device: DEVICE,
        index: 0,
        features: 0,
        policy: Policy::INTEROP,
    };
    for many in [false, true] {
        let (mem, other) = (memory(), memory());
        let (pin, pinned) = (mem.pin(), other.pin());
        let (mem, there) = (&pin.mapped(), &pinned.mapped());
        let mut driver = DriverQueue::new(mem, config, None, None).unwrap();
        let mut device = DeviceQueue::new(there, config, None).unwrap();
        let tokens: Vec<_> = (0..COUNT)
            .map(|_| driver.add(mem, &[(SOURCE, 1)], &[], false).unwrap())
            .collect();
        driver.publish(mem).unwrap();
        let (mut segments, mut elements) = (Vec::new(), Vec::new());
        device.pop_many(there, COUNT, &mut segments, &mut elements).unwrap();
        for element in &elements {
            device.complete(there, &element.ticket(), 0).unwrap();
        }
        device.publish(there).unwrap();
        ftruncate(&files[2], PAGE).unwrap();
        let mut taken = Vec::new();
        let fault = if many {
            driver.get_used_many(mem, COUNT).unwrap_err()
        } else {
            loop {
                match driver.get_used(mem) {
                    Ok(used) => taken.push(used.unwrap().0),
                    Err(fault) => break fault,
                }
            }
        };
        assert_eq!(fault.rule, Rule::MemoryLost);
        assert_eq!(driver.counters().popped, taken.len() as u64);
        taken.extend(driver.detach());
        assert_eq!(taken, tokens, "each once");
        ftruncate(&files[2], 3 * PAGE).unwrap();
    }
}

#[test]
fn who_looks_for_used_buffers_hears_that_something_is_broken() {
    for many in [false, true] {
        let world = World::new(0);
        let mut driver = world.driver(&world.mem);
        let pin = world.mem.pin();
        let mem = &pin.mapped();
        driver.add(mem, &[(SOURCE, 1)], &[], false).unwrap();
        driver.publish(mem).unwrap();
        world.lose(DEVICE);
        assert!(driver.has_used(mem), "what is broken counts");
        let fault = if many {
            driver.get_used_many(mem, 8).map(drop)
        } else {
            driver.get_used(mem).map(drop)
        };
        assert_eq!(fault.unwrap_err().rule, Rule::MemoryLost);
        assert!(!driver.has_used(mem), "latched");
    }
}

#[test]
fn the_last_of_the_tables_belongs_to_the_queue_and_what_lies_behind_them_does_not() {
    let world = World::new(INDIRECT_DESC);
    let behind = file(PAGE);
    world.mem.add(received(TABLES + PAGE, PAGE, &behind)).unwrap();
    ftruncate(&behind, 0).unwrap();
    assert!(world.mem.read(TABLES + PAGE, &mut [0]).is_err());
    let pin = world.mem.pin();
    // Eight tables of 16-byte entries: 32 of them fill a page, 33 reach into the next.
    let queue = |entries| {
        let tables = IndirectArea {
            address: TABLES,
            entries,
        };
        DriverQueue::new(&pin.mapped(), world.config, None, Some(tables)).map(|_| ())
    };
    assert_eq!(queue(32).map_err(|fault| fault.rule), Ok(()));
    assert_eq!(queue(33).map_err(|fault| fault.rule), Err(Rule::MemoryLost));
}
