//! Edges that a broken core could cross unseen: found by breaking it in every small way (`make mutants-rust`).

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::files::{file, received};
use common::{DATA, INDIRECT, INDIRECT_DESC, NEXT, PACKED, ROM, WRITE, World, config, region};
use rustix::fs::ftruncate;
use virtio_test::chain::Segment;
use virtio_test::error::QueueError;
use virtio_test::iov::Iov;
use virtio_test::mem::{Access, At, GuestMemory, MemoryError, Want};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, QueueState};
use virtio_test::rule::Rule;

/// Six segments, readable and writable in turn, none of one length with its neighbour; the last two touch.
const PIECES: [(u64, u32, bool); 6] = [
    (0x1003, 3, false),
    (0x2fff, 2, true),
    (0x1100, 1, false),
    (0x3101, 5, true),
    (0x1110, 4, false),
    (0x3106, 4, true),
];

fn pages() -> GuestMemory {
    GuestMemory::new((1..4).map(|page| region(page << 12, 0x1000)).collect(), None).unwrap()
}

fn resolved<A: Access>(mem: &A) -> Vec<Segment> {
    let pieces = PIECES.iter();
    let segment = |&(gpa, len, writable): &(u64, u32, bool)| Segment {
        at: mem.resolve(gpa, u64::from(len), Want::Read).unwrap(),
        len,
        writable,
    };
    pieces.map(segment).collect()
}

/// Guest addresses of the bytes of one kind, in order.
fn flat(writable: bool) -> Vec<u64> {
    let own = PIECES.iter().filter(|piece| piece.2 == writable);
    own.flat_map(|&(gpa, len, _)| gpa..gpa + u64::from(len)).collect()
}

/// Every offset and every length, in the chain's own epoch and in the next one.
#[test]
fn every_copy_from_and_to_a_chain_of_six_segments() {
    let memory = pages();
    let segments = resolved(&memory.pin().mapped());
    let (from, to) = (flat(false), flat(true));
    for epoch in 0..2 {
        let pin = memory.pin();
        let mem = pin.mapped();
        let iov = Iov::new(&segments, 0);
        assert_eq!(mem.epoch(), epoch);
        for (number, &gpa) in (1..).zip(&from) {
            mem.write(At::unresolved(gpa), 0, &[number]).unwrap();
        }
        for offset in 0..14 {
            for len in 0..14 {
                let expected: Vec<u8> = (1..).take(from.len()).skip(offset).take(len).collect();
                let mut found = vec![0xee; len];
                assert_eq!(iov.read(&mem, offset as u64, &mut found), Ok(expected.len()));
                assert_eq!(found[..expected.len()], expected, "{offset} {len}");
                assert!(found[expected.len()..].iter().all(|&byte| byte == 0xee));

                let values: Vec<u8> = (100..).take(len).collect();
                for (value, fill) in [(0xaa, false), (0xbb, true)] {
                    for &gpa in &to {
                        mem.write(At::unresolved(gpa), 0, &[value]).unwrap();
                    }
                    let count = if fill {
                        iov.fill(&mem, offset as u64, len, 7)
                    } else {
                        iov.write(&mem, offset as u64, &values)
                    };
                    let inside = to.len().saturating_sub(offset).min(len);
                    assert_eq!(count, Ok(inside));
                    for (place, &gpa) in to.iter().enumerate() {
                        let mut byte = [0];
                        mem.read(At::unresolved(gpa), 0, &mut byte).unwrap();
                        let written = place.checked_sub(offset).filter(|&at| at < inside);
                        let now = written.map_or(value, |at| if fill { 7 } else { values[at] });
                        assert_eq!(byte[0], now, "{offset} {len} at {place}");
                    }
                }
            }
        }
        drop(pin);
        memory.add(region(0x9000 + (epoch << 12), 0x1000)).unwrap();
    }
}

/// In a later epoch nothing is written unless all of it can be.
#[test]
fn a_copy_to_what_vanished_in_part_writes_nothing() {
    let memory = pages();
    let segments = resolved(&memory.pin().mapped());
    memory.remove(0x3000, 0x1000).unwrap();
    let pin = memory.pin();
    let mem = pin.mapped();
    let iov = Iov::new(&segments, 0);
    // The first segment ends in the page that is gone.
    for (offset, len, gone) in [
        (0, 1, false),
        (0, 2, true),
        (0, 11, true),
        (1, 1, true),
        (5, 2, true),
        (11, 4, false),
    ] {
        let wrote = iov.write(&mem, offset, &vec![9; len]);
        let filled = iov.fill(&mem, offset, len, 9);
        assert_eq!(wrote.is_err(), gone, "{offset} {len}");
        assert_eq!(filled.is_err(), gone, "{offset} {len}");
        let mut byte = [0];
        mem.read(At::unresolved(0x2fff), 0, &mut byte).unwrap();
        assert!(!gone || byte[0] == 0, "{offset} {len}");
        mem.write(At::unresolved(0x2fff), 0, &[0]).unwrap();
    }
    assert_eq!(iov.write(&mem, 2, &[1]), Err(MemoryError::Unmapped { gpa: 0x3101 }));
}

/// Who may write which area decides where it may lie (2.7, 2.8): each area in turn in memory that is for reading only.
#[test]
fn an_area_may_be_read_only_where_its_end_only_reads() {
    let memory = common::memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    let moved = |config: QueueConfig, area: usize| match area {
        0 => QueueConfig { desc: ROM, ..config },
        1 => QueueConfig { driver: ROM, ..config },
        _ => QueueConfig { device: ROM, ..config },
    };
    for (features, device, driver) in [
        (0, [true, true, false], [false, false, true]),
        (PACKED, [false, true, false], [false, false, true]),
    ] {
        let config = config(4, features, Policy::INTEROP);
        let state = Some(QueueState::fresh(features == PACKED));
        for area in 0..3 {
            let config = moved(config, area);
            let made = DeviceQueue::new(&mem, config, None).map_err(|fault| fault.rule);
            assert_eq!(
                made.err(),
                (!device[area]).then_some(Rule::RingUnmapped),
                "device, area {area}"
            );
            let made = DriverQueue::new(&mem, config, state, None).map_err(|fault| fault.rule);
            assert_eq!(
                made.err(),
                (!driver[area]).then_some(Rule::RingUnmapped),
                "driver, area {area}"
            );
            // A fresh driver zeroes all three.
            assert!(DriverQueue::new(&mem, config, None, None).is_err());
        }
    }
}

/// Both ends of a ring whose areas lie in regions of their own, with one chain made available.
fn apart(packed: bool) -> (GuestMemory, DriverQueue, DeviceQueue) {
    let memory = pages();
    memory.add(region(0x8000, 0x1000)).unwrap();
    let config = QueueConfig {
        size: 4,
        desc: AREAS[0],
        driver: AREAS[1],
        device: AREAS[2],
        index: 0,
        features: if packed { PACKED } else { 0 },
        policy: Policy::INTEROP,
    };
    let pin = memory.pin();
    let mut driver = DriverQueue::new(&pin.mapped(), config, None, None).unwrap();
    let device = DeviceQueue::new(&pin.mapped(), config, None).unwrap();
    driver.add(&pin.mapped(), &[], &[(0x8000, 8)], false).unwrap();
    driver.publish(&pin.mapped()).unwrap();
    drop(pin);
    (memory, driver, device)
}

const AREAS: [u64; 3] = [0x1000, 0x2000, 0x3000];

/// The same of what is completed: no entry is written into what is left, one by one or in a burst.
#[test]
fn a_ring_that_vanished_in_part_is_given_nothing_back() {
    for (packed, burst, gone) in [false, true]
        .into_iter()
        .flat_map(|packed| [false, true].map(|burst| (packed, burst)))
        .flat_map(|(packed, burst)| AREAS.map(|gone| (packed, burst, gone)))
    {
        let (memory, _driver, mut device) = apart(packed);
        let popped = device.pop(&memory.pin().mapped(), &mut Vec::new());
        let ticket = popped.unwrap().unwrap().ticket();
        memory.remove(gone, 0x1000).unwrap();
        let pin = memory.pin();
        let completed = if burst {
            device.complete_many(&pin.mapped(), [(ticket, 8)].into_iter())
        } else {
            device.complete(&pin.mapped(), &ticket, 8).map(u64::from)
        };
        let Err(QueueError::Violation(fault)) = completed else {
            unreachable!("packed: {packed}, burst: {burst}, {gone:#x}: {completed:?}")
        };
        assert_eq!((fault.rule, device.broken()), (Rule::RingUnmapped, true));
    }
}

/// A ring of which any part vanished is found before anything is read from what is left.
#[test]
fn a_ring_that_vanished_in_part_hands_out_nothing() {
    for packed in [false, true] {
        for gone in AREAS {
            let (memory, mut driver, mut device) = apart(packed);
            memory.remove(gone, 0x1000).unwrap();
            let pin = memory.pin();
            let popped = device.pop(&pin.mapped(), &mut Vec::new()).map_err(|fault| fault.rule);
            assert_eq!(popped, Err(Rule::RingUnmapped), "packed: {packed}, area {gone:#x}");
            let used = driver.get_used(&pin.mapped()).map_err(|fault| fault.rule);
            assert_eq!(used, Err(Rule::RingUnmapped), "packed: {packed}, area {gone:#x}");
        }
    }
}

/// The fault is the table's, not that of the entry where it would have been met.
#[test]
fn a_table_that_leaves_memory_is_found_before_its_entries() {
    for features in [0, PACKED] {
        for entries in 2..4u64 {
            let table = common::HOLE - 16 * entries + 1;
            let mut world = World::interop(4, features | INDIRECT_DESC);
            world.chain(&[(table, u32::try_from(16 * entries).unwrap(), INDIRECT, 0)]);
            let fault = world.breaks(Rule::IndirectUnmapped);
            assert_eq!((fault.descriptor, fault.address), (Some(0), Some(common::HOLE)));
            assert!(fault.message.starts_with("an indirect table of"), "{fault}");
        }
    }
}

/// A table that goes on in a file that was cut short is lost, though all that is left of it looks good.
#[test]
fn a_table_is_lost_with_its_last_entry() {
    for features in [0, PACKED] {
        for behind in 1..4u64 {
            let (first, second) = (file(0x1000), file(0x1000));
            let regions = vec![
                region(0x1000, 0x1000),
                received(0x10000, 0x1000, &first),
                received(0x11000, 0x1000, &second),
            ];
            let memory = GuestMemory::new(regions, None).unwrap();
            let config = config(4, features | INDIRECT_DESC, Policy::INTEROP);
            let table = 0x11000 - 16 * (4 - behind);
            let put = |gpa: u64, (addr, len, flags, last): common::Desc, packed: bool| {
                let mut bytes = addr.to_le_bytes().to_vec();
                bytes.extend(len.to_le_bytes());
                let tail = if packed { [last, flags] } else { [flags, last] };
                bytes.extend(tail.into_iter().flat_map(u16::to_le_bytes));
                memory.write(gpa, &bytes).unwrap();
            };
            let packed = features == PACKED;
            let mark = if packed { common::AVAIL } else { 0 };
            put(config.desc, (table, 64, INDIRECT | mark, 0), packed);
            for index in 0..4u16 {
                let more = if index < 3 { NEXT } else { 0 };
                put(
                    table + 16 * u64::from(index),
                    (0x1800, 8, more | WRITE, index + 1),
                    packed,
                );
            }
            if !packed {
                memory.write(config.driver + 2, &[1, 0]).unwrap();
            }
            let pin = memory.pin();
            let mut device = DeviceQueue::new(&pin.mapped(), config, None).unwrap();
            ftruncate(&second, 0).unwrap();
            let popped = device.pop(&pin.mapped(), &mut Vec::new()).map_err(|fault| fault.rule);
            assert_eq!(
                popped,
                Err(Rule::MemoryLost),
                "packed: {packed}, {behind} entries behind the edge"
            );
        }
    }
}

/// What a queue says of a chain is what the chain is: none of its numbers is another's.
#[test]
fn an_element_tells_its_numbers_apart() {
    for packed in [false, true] {
        let mut world = World::interop(8, if packed { PACKED } else { 0 });
        world.give(true);
        let first = world.take();
        world.add(&[(DATA, 3), (DATA + 8, 4)], &[(DATA + 16, 5)]);
        world.publish();
        let element = world.take();
        assert_eq!(
            (element.readable, element.writable, element.count, element.descriptors),
            (7, 5, 3, 3)
        );
        assert_eq!((element.first, element.seq, element.generation), (1, 1, 0));
        assert_eq!(element.slots, if packed { 3 } else { 1 });
        let ticket = element.ticket();
        assert_eq!((ticket.seq, ticket.head, ticket.slots), (1, 1, element.slots));
        assert_eq!((ticket.writable, ticket.generation), (5, 0));
        assert_eq!((first.position, element.position), (0, 1));
        assert_eq!(world.device.in_flight(), 2);
    }
}

/// Chains that were put back out of turn come again in their order, each with its own segments, wherever those now begin.
#[test]
fn what_was_put_back_comes_again_as_it_was() {
    for packed in [false, true] {
        for order in [[0, 1], [1, 0]] {
            let mut world = World::interop(8, if packed { PACKED } else { 0 });
            for number in 0..3 {
                let readable: Vec<_> = (0..=number).map(|part| (DATA + 64 * number + 8 * part, 8)).collect();
                world.add(&readable, &[]);
            }
            world.publish();
            let elements = world.pop_many(3).unwrap();
            let spans = |arena: &[Segment]| arena.iter().map(|s| (s.at.gpa, s.len)).collect::<Vec<_>>();
            let own = |arena: &[Segment], element: &virtio_test::chain::Element| {
                spans(&arena[element.first..element.first + element.count])
            };
            let before: Vec<_> = elements.iter().map(|element| own(&world.segments, element)).collect();
            for which in order {
                let segments = world.segments.clone();
                let element = &elements[which];
                let part = &segments[element.first..element.first + element.count];
                world.device.put_back(element, part);
            }
            // The arena is not empty, and begins elsewhere than before.
            world.segments.truncate(5);
            for number in 0..2 {
                let element = world.take();
                assert_eq!(
                    (element.seq, element.head),
                    (elements[number].seq, elements[number].head)
                );
                assert_eq!(
                    own(&world.segments, &element),
                    before[number],
                    "packed: {packed}, {order:?}"
                );
            }
            assert_eq!(world.pop().unwrap(), None);
        }
    }
}
