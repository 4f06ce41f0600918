//! Files that are cut short while they are mapped: every access survives, and nothing is made of what it brought.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::os::fd::OwnedFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::{EVENT_IDX, INDIRECT_DESC, PACKED};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use virtio_test::chain::Segment;
use virtio_test::error::{Misuse, QueueError};
use virtio_test::iov::Iov;
use virtio_test::mem::{Access, At, Backing, GuestMemory, MemoryError, RegionSpec, Trace, Want};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueConfig};
use virtio_test::rule::Rule;

const PAGE: u64 = 4096;

fn file(size: u64) -> OwnedFd {
    let fd = memfd_create("lost", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

fn received(gpa: u64, size: u64, fd: &OwnedFd) -> RegionSpec {
    RegionSpec {
        gpa,
        size,
        backing: Backing::Received {
            fd: fd.try_clone().unwrap(),
            offset: 0,
            writable: true,
        },
    }
}

fn lost<T>(gpa: u64) -> Result<T, MemoryError> {
    Err(MemoryError::Lost { gpa })
}

/// A file of four pages at address 0, one of one page behind it, and own memory behind that.
fn three(trace: Option<std::sync::Arc<Trace>>) -> (OwnedFd, GuestMemory) {
    let (fd, whole) = (file(4 * PAGE), file(PAGE));
    let own = RegionSpec {
        gpa: 5 * PAGE,
        size: PAGE,
        backing: Backing::Memfd,
    };
    let regions = vec![received(0, 4 * PAGE, &fd), received(4 * PAGE, PAGE, &whole), own];
    let mem = GuestMemory::new(regions, trace).unwrap();
    mem.fill(0, 6 * PAGE, 7).unwrap();
    (fd, mem)
}

fn losses(mem: &GuestMemory) -> Vec<bool> {
    mem.regions().iter().map(|region| region.lost()).collect()
}

#[test]
fn each_kind_of_access_says_that_the_memory_is_lost() {
    type Touch = fn(&GuestMemory) -> Result<(), MemoryError>;
    let touches: [(Touch, u64); 7] = [
        (|mem| mem.read(2 * PAGE, &mut [0; 16]), 2 * PAGE),
        (|mem| mem.read(PAGE - 1, &mut [0; 2]), PAGE - 1),
        (|mem| mem.write(3 * PAGE, &[1]), 3 * PAGE),
        (|mem| mem.fill(PAGE, 4 * PAGE, 1), PAGE),
        (|mem| mem.copy(2 * PAGE, 5 * PAGE, 64), 2 * PAGE),
        (|mem| mem.copy(5 * PAGE, 2 * PAGE, 64), 2 * PAGE),
        (|mem| mem.read(0, &mut vec![0; 6 * 4096]), 0),
    ];
    for (touch, gpa) in touches {
        let (fd, mem) = three(None);
        ftruncate(&fd, PAGE).unwrap();
        assert_eq!(losses(&mem), [false; 3], "nobody has noticed");
        assert_eq!(touch(&mem), lost(gpa));
        assert_eq!(losses(&mem), [true, false, false]);
        // The whole region from then on, and only that.
        assert_eq!(mem.read(0, &mut [0]), lost(0));
        let mut one = [0];
        mem.read(4 * PAGE, &mut one).unwrap();
        mem.write(5 * PAGE, &[9]).unwrap();
        mem.remove(0, 4 * PAGE).unwrap();
        assert_eq!(losses(&mem), [false; 2]);
        mem.add(received(0, PAGE, &file(PAGE))).unwrap();
        mem.read(0, &mut one).unwrap();
        assert_eq!(one, [0]);
    }
}

#[test]
fn ring_words_are_zeros_then_and_intact_says_so() {
    let (fd, mem) = three(None);
    let pin = mem.pin();
    let view = pin.mapped();
    let at = view.resolve(0, 4 * PAGE, Want::Write).unwrap();
    assert_eq!(view.load_u64(at, PAGE).unwrap(), 0x0707_0707_0707_0707);
    assert_eq!(view.intact(0, u64::MAX), Ok(()));
    ftruncate(&fd, PAGE).unwrap();
    view.store_u16(at, 3 * PAGE, 5).unwrap();
    assert_eq!(view.load_u16_acquire(at, 3 * PAGE).unwrap(), 5, "in a page of our own");
    assert_eq!(view.load_u64(at, PAGE).unwrap(), 0);
    assert_eq!(view.load_u16(at, 0).unwrap(), 0x0707, "still the file's");
    assert_eq!(view.intact(PAGE, 8), lost(PAGE));
    assert_eq!(view.intact(4 * PAGE, PAGE), Ok(()));
    assert_eq!(view.intact(4 * PAGE, 0), Ok(()));
}

#[test]
fn a_traced_memory_and_a_read_only_one_are_no_exception() {
    let (fd, mem) = three(Some(std::sync::Arc::new(Trace::new())));
    ftruncate(&fd, 0).unwrap();
    let pin = mem.pin();
    let view = pin.mediated().unwrap();
    assert_eq!(view.read(At::unresolved(8), 0, &mut [0; 8]), lost(8));
    assert_eq!(view.write(At::unresolved(8), 0, &[0; 8]), lost(8));
    assert_eq!(view.fill(At::unresolved(8), 0, 8, 0), lost(8));
    drop(pin);
    let fd = file(2 * PAGE);
    let backing = Backing::Received {
        fd: fd.try_clone().unwrap(),
        offset: PAGE + 8,
        writable: false,
    };
    let rom = RegionSpec {
        gpa: 64,
        size: 128,
        backing,
    };
    let mem = GuestMemory::new(vec![rom], None).unwrap();
    ftruncate(&fd, 3).unwrap();
    assert_eq!(mem.read(64, &mut [0; 128]), lost(64));
    assert_eq!(mem.write(64, &[0]), Err(MemoryError::ReadOnly { gpa: 64 }));
}

#[test]
fn a_sealed_file_cannot_be_cut_and_is_not_lost() {
    let fd = file(PAGE);
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let mem = GuestMemory::new(vec![received(0, PAGE, &fd)], None).unwrap();
    assert!(ftruncate(&fd, 0).is_err());
    mem.fill(0, PAGE, 1).unwrap();
    assert_eq!(losses(&mem), [false]);
}

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

/// Threads read and write while files are cut under them and the table is exchanged. What a read says is good
/// is the file's own: no zero ever passes for a byte of it. Memory that is mapped meanwhile stays what it is.
#[test]
fn races_with_truncation_never_show_a_zero() {
    const ROUNDS: usize = 4000;
    const SIZE: u64 = 4 * PAGE;
    let mem = GuestMemory::new(Vec::new(), None).unwrap();
    let (stop, good, bad) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for thread in 0..3u64 {
            let (mem, stop, good, bad, barrier) = (&mem, &stop, &good, &bad, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let mut bytes = vec![0; 4096 * 2];
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    thread::yield_now();
                    let gpa = PAGE * ((round + thread) % 3);
                    let outcome = if thread == 2 {
                        mem.write(gpa, &[0xaa; 4096 * 2])
                    } else {
                        let read = mem.read(gpa, &mut bytes);
                        assert!(read.is_err() || bytes.iter().all(|&byte| byte == 0xaa), "a zero");
                        read
                    };
                    match outcome {
                        Ok(()) => good.fetch_add(1, Ordering::Relaxed),
                        Err(MemoryError::Lost { .. }) => bad.fetch_add(1, Ordering::Relaxed),
                        Err(MemoryError::Unmapped { .. }) => 0,
                        Err(error) => panic!("{error}"),
                    };
                }
            });
        }
        barrier.wait();
        let full = vec![0xaa; 4096 * 4];
        for round in 0..ROUNDS {
            let fd = file(SIZE);
            assert_eq!(pwrite(&fd, &full, 0).unwrap(), full.len());
            mem.replace(vec![received(0, SIZE, &fd)]).unwrap();
            if round % 4 != 0 {
                thread::yield_now();
            }
            ftruncate(&fd, PAGE * (round as u64 % 4)).unwrap();
            if round % 3 == 0 {
                thread::yield_now();
            }
            // It may get the addresses of what has just gone, while handlers return from there.
            mem.replace(Vec::new()).unwrap();
            let own = RegionSpec {
                gpa: 0,
                size: SIZE,
                backing: Backing::Anonymous,
            };
            let fresh = GuestMemory::new(vec![own], None).unwrap();
            fresh.fill(0, SIZE, 0x55).unwrap();
            let mut bytes = vec![0; 4096 * 4];
            fresh.read(0, &mut bytes).unwrap();
            assert!(
                bytes.iter().all(|&byte| byte == 0x55),
                "zeros over memory of somebody else"
            );
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        good.load(Ordering::Relaxed) > 0 && bad.load(Ordering::Relaxed) > 0,
        "both happened"
    );
}
