//! With IN_ORDER, one used entry for a batch of chains that have nothing to write to (VIRTIO 1.4, 2.7.9, 2.8.8).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::atomic::Ordering;

use common::far::{Far, NEVER};
use common::{AVAIL, DATA, EVENT_IDX, IN_ORDER, PACKED, USED, WRITE, World, config, region};
use virtio_test::chain::Element;
use virtio_test::error::{Misuse, QueueError};
use virtio_test::mem::{Access, GuestMemory};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, Ticket};
use virtio_test::rule::Rule;

/// A chain to be completed: of one readable descriptor or two, or with a writable one behind them, with the bytes written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    One,
    Two,
    Answered(u32),
}
use Kind::{Answered, One, Two};

/// What is completed, each with its bytes.
type Done = Vec<(Ticket, u64)>;

impl Kind {
    const fn written(self) -> u32 {
        if let Answered(written) = self { written } else { 0 }
    }

    const fn slots(self) -> u64 {
        if matches!(self, One) { 1 } else { 2 }
    }
}

/// Each of these, so many times, as one list after the other.
fn every(kinds: &[Kind], len: usize) -> Vec<Vec<Kind>> {
    (0..len).fold(vec![vec![]], |lists, _| {
        let longer = |list: &Vec<Kind>| {
            kinds
                .iter()
                .map(|&kind| [&list[..], &[kind]].concat())
                .collect::<Vec<_>>()
        };
        lists.iter().flat_map(longer).collect()
    })
}

/// Give them to the device end, which pops them; their tokens and the elements.
fn given(world: &mut World, kinds: &[Kind]) -> (Vec<u64>, Vec<Element>) {
    let tokens = kinds.iter().map(|kind| match kind {
        One => world.add(&[(DATA, 16)], &[]),
        Two => world.add(&[(DATA, 16), (DATA + 32, 8)], &[]),
        Answered(_) => world.add(&[(DATA, 16)], &[(DATA + 64, 16)]),
    });
    let tokens = tokens.collect();
    world.publish();
    world.segments.clear();
    let elements = world.pop_many(kinds.len()).unwrap();
    assert_eq!(elements.len(), kinds.len());
    (tokens, elements)
}

fn complete<A: Access>(device: &mut DeviceQueue, mem: &A, done: &[(Ticket, u64)]) -> Result<u64, QueueError> {
    device.complete_many(mem, done.iter().copied())
}

fn complete_many(world: &mut World, done: &[(&Element, u64)]) -> Result<u64, QueueError> {
    let done: Vec<_> = done
        .iter()
        .map(|&(element, written)| (element.ticket(), written))
        .collect();
    let pin = world.mem.pin();
    complete(&mut world.device, &pin.mapped(), &done)
}

fn used_many(world: &mut World) -> Vec<(u64, u32)> {
    let pin = world.mem.pin();
    world.driver.get_used_many(&pin.mapped(), 64).unwrap()
}

/// Used entries: the place of each, counted in slots from the first lap on, the head and the bytes written.
fn batches(kinds: &[Kind], elements: &[Element], packed: bool, mut place: u64) -> (Vec<(u64, u16, u32)>, u64) {
    let (mut entries, mut first) = (Vec::new(), place);
    for (at, (kind, element)) in kinds.iter().zip(elements).enumerate() {
        place += if packed { kind.slots() } else { 1 };
        if matches!(kind, Answered(_)) || at + 1 == kinds.len() {
            entries.push((first, element.head, kind.written()));
            first = place;
        }
    }
    (entries, place)
}

/// The used ring with its index, or all descriptors.
fn used_part(world: &World) -> Vec<u8> {
    let (gpa, len) = if world.layout.packed {
        (world.layout.desc, 16 * usize::from(world.layout.size))
    } else {
        (world.layout.device, 4 + 8 * usize::from(world.layout.size))
    };
    let mut bytes = vec![0; len];
    world.mem.read(gpa, &mut bytes).unwrap();
    bytes
}

/// Every batch there is of up to five chains, one after the other, so over each end of the ring: to the byte.
#[test]
fn the_last_of_a_batch_is_told_and_nothing_else_is_written() {
    for (features, size) in [(IN_ORDER, 8), (PACKED | IN_ORDER, 10), (PACKED | IN_ORDER, 13)] {
        let packed = features & PACKED != 0;
        let mut world = World::interop(size, features);
        let ring = u64::from(size);
        let (mut place, kinds) = (0, [One, Two, Answered(5), Answered(0)]);
        // A split ring holds four of two descriptors.
        let most = if packed { 5 } else { 4 };
        for kinds in (1..=most).flat_map(|len| every(&kinds, len)) {
            let (tokens, elements) = given(&mut world, &kinds);
            let mut expected = used_part(&world);
            let (entries, behind) = batches(&kinds, &elements, packed, place);
            for (place, head, written) in entries {
                let slot = usize::try_from(place % ring).unwrap();
                if packed {
                    let desc = &mut expected[16 * slot + 8..16 * slot + 16];
                    desc[..4].copy_from_slice(&written.to_le_bytes());
                    desc[4..6].copy_from_slice(&head.to_le_bytes());
                    let lap = if place / ring % 2 == 0 { AVAIL | USED } else { 0 };
                    let flags = lap | if written > 0 { WRITE } else { 0 };
                    desc[6..].copy_from_slice(&flags.to_le_bytes());
                } else {
                    let entry = &mut expected[4 + 8 * slot..12 + 8 * slot];
                    entry[..4].copy_from_slice(&u32::from(head).to_le_bytes());
                    entry[4..].copy_from_slice(&written.to_le_bytes());
                    expected[2..4].copy_from_slice(&behind.to_le_bytes()[..2]);
                }
            }
            let done: Vec<_> = elements
                .iter()
                .zip(&kinds)
                .map(|(one, kind)| (one, kind.written().into()))
                .collect();
            assert_eq!(complete_many(&mut world, &done), Ok(kinds.len() as u64));
            assert_eq!(used_many(&mut world), [], "nothing is visible before it is published");
            world.show();
            assert_eq!(used_part(&world), expected, "{kinds:?} from {place}");
            place = behind;
            let used: Vec<_> = tokens
                .into_iter()
                .zip(kinds.iter().map(|kind| kind.written()))
                .collect();
            assert_eq!(used_many(&mut world), used);
            assert_eq!((world.device.in_flight(), world.driver.free()), (0, size));
        }
        let counted = world.device.counters();
        assert_eq!(
            (counted.pushed, counted.popped),
            (world.driver.counters().popped, counted.pushed)
        );
    }
}

/// A whole ring of them is one entry, again and again, over the 16 bits of an index as well.
#[test]
fn a_full_ring_is_one_batch() {
    for (features, size) in [
        (IN_ORDER, 8),
        (IN_ORDER, 256),
        (PACKED | IN_ORDER, 7),
        (PACKED | IN_ORDER, 256),
    ] {
        let packed = features & PACKED != 0;
        let at = if packed { 0x8003 } else { 0xFFF9 };
        let mut world = World::started(size, features, at);
        for lap in 0..4 {
            let (tokens, elements) = given(&mut world, &vec![One; size.into()]);
            let done: Vec<_> = elements.iter().map(|element| (element, 0)).collect();
            assert_eq!(complete_many(&mut world, &done), Ok(size.into()));
            world.show();
            let wrap = if lap % 2 == 0 { 0 } else { 0x8000 };
            let expected = if packed {
                3 | wrap
            } else {
                at.wrapping_add((lap + 1) * size)
            };
            assert_eq!(world.device.state().used, expected);
            let used: Vec<_> = tokens.into_iter().map(|token| (token, 0)).collect();
            let pin = world.mem.pin();
            assert_eq!(world.driver.get_used_many(&pin.mapped(), 1000).unwrap(), used);
            assert_eq!(world.driver.free(), size);
        }
    }
}

/// Whatever is staged before and behind a batch: one publication, and each keeps its place.
#[test]
fn batches_and_single_completions_follow_each_other() {
    for features in [IN_ORDER, PACKED | IN_ORDER] {
        let mut world = World::started(16, features, if features & PACKED == 0 { 12 } else { 0x800C });
        let kinds = [One, Two, One, One, Answered(3), One, Two, One];
        for _ in 0..8 {
            let (tokens, elements) = given(&mut world, &kinds);
            assert_eq!(complete_many(&mut world, &[]), Ok(0));
            assert_eq!(
                complete_many(&mut world, &[(&elements[0], 0), (&elements[1], 0)]),
                Ok(2)
            );
            assert!(world.complete(&elements[2], 0));
            assert_eq!(
                complete_many(&mut world, &[(&elements[3], 0), (&elements[4], 3), (&elements[5], 0)]),
                Ok(3)
            );
            assert_eq!(complete_many(&mut world, &[(&elements[6], 0)]), Ok(1));
            assert_eq!(used_many(&mut world), []);
            world.show();
            let used: Vec<_> = tokens.iter().copied().zip(kinds.map(Kind::written)).collect();
            assert_eq!(used_many(&mut world), used[..7]);
            assert!(world.finish(&elements[7], 0));
            assert_eq!(used_many(&mut world), used[7..]);
        }
    }
}

/// What is wrong in a batch ends it: those before it are told, by the last of them.
#[test]
fn what_ends_a_batch_leaves_those_before_it_complete() {
    let wrong = |written, writable| Err(Misuse::WrittenTooBig { written, writable }.into());
    for features in [IN_ORDER, PACKED | IN_ORDER] {
        for before in 0..4 {
            let kinds = [&[One, Two, One, One][..before], &[Answered(1), Two, One]].concat();
            let tickets = |elements: &[Element]| -> Vec<_> {
                elements
                    .iter()
                    .zip(&kinds)
                    .map(|(one, kind)| (one.ticket(), u64::from(kind.written())))
                    .collect()
            };
            let used = |world: &mut World, tokens: &[u64]| {
                world.show();
                let expected: Vec<_> = tokens
                    .iter()
                    .copied()
                    .zip(kinds.iter().map(|kind| kind.written()))
                    .collect();
                (used_many(world), expected)
            };
            let ends = |change: &dyn Fn(&mut Done), expected: Result<u64, QueueError>, shown: usize| {
                let mut world = World::interop(16, features);
                let (tokens, elements) = given(&mut world, &kinds);
                let mut done = tickets(&elements);
                change(&mut done);
                let pin = world.mem.pin();
                assert_eq!(complete(&mut world.device, &pin.mapped(), &done), expected);
                drop(pin);
                let (shows, all) = used(&mut world, &tokens);
                assert_eq!(shows, all[..shown]);
                (world, elements, tokens)
            };
            // More bytes than there are, of a chain that has some and of one that has none.
            ends(&|done| done[before].1 = 17, wrong(17, 16), before);
            let (world, ..) = ends(&|done| done[before + 1].1 = 1, wrong(1, 0), before + 1);
            assert_eq!(world.device.in_flight(), 2);
            // More chains than are in flight, or one of them twice: which goes beyond, or is of no turn.
            let twice = |done: &mut Done| done.extend_from_within(..1);
            let (world, ..) = ends(&twice, Err(Misuse::StaleChain.into()), kinds.len());
            assert_eq!(world.device.counters().pushed, kinds.len() as u64);
            // Before its turn: it waits, with all behind it, for the one that was left out.
            let count = kinds.len() as u64 - 1;
            let left_out = |done: &mut Done| {
                done.remove(before);
            };
            let (mut world, elements, tokens) = ends(&left_out, Ok(count), before);
            assert_eq!(world.device.in_flight(), 1);
            assert!(world.complete(&elements[before], 1));
            let (shows, all) = used(&mut world, &tokens);
            assert_eq!(shows, all[before..]);
        }
    }
}

/// Of an old generation nothing is written, and those around it are one batch.
#[test]
fn what_is_of_an_old_generation_ends_no_batch() {
    for features in [IN_ORDER, PACKED | IN_ORDER] {
        let mut world = World::interop(16, features);
        let (_, old) = given(&mut world, &[One, Answered(1)]);
        let fresh = World::interop(16, features);
        let pin = world.mem.pin();
        world.mem.fill(world.layout.desc, 0x1000, 0).unwrap();
        world.device.reset(&pin.mapped(), None, None).unwrap();
        drop(pin);
        world.driver = fresh.driver;
        let before = used_part(&world);
        let (tokens, new) = given(&mut world, &[One, Two, One]);
        let done = [
            (&old[1], 1),
            (&new[0], 0),
            (&old[0], 0),
            (&new[1], 0),
            (&old[1], 0),
            (&new[2], 0),
            (&old[0], 0),
        ];
        assert_eq!(complete_many(&mut world, &done), Ok(3));
        assert_eq!(world.device.counters().dropped, 4);
        world.show();
        assert_ne!(used_part(&world), before);
        assert_eq!(
            used_many(&mut world),
            tokens.iter().map(|&token| (token, 0)).collect::<Vec<_>>()
        );
        assert_eq!(complete_many(&mut world, &[(&old[0], 0)]), Ok(0));
        world.show();
        assert_eq!(used_many(&mut world), []);
    }
}

/// The driver wants to hear of a place that a batch skips, and of one batch once (2.7.7.2, 2.8.10).
#[test]
fn a_batch_passes_each_of_its_places() {
    for features in [IN_ORDER | EVENT_IDX, PACKED | IN_ORDER | EVENT_IDX] {
        let packed = features & PACKED != 0;
        // (start, event): all places of two laps of 8.
        for (start, event) in (0..16_u16).flat_map(|start| (0..16).map(move |event| (start, event))) {
            let lap = |place: u16| if place % 16 < 8 { 0x8000 } else { 0 };
            let bits = |place: u16| if packed { lap(place) | (place % 8) } else { place };
            let mut world = World::started(8, features, bits(start));
            // The first call after a start is always one.
            let (_, elements) = given(&mut world, &[One]);
            assert!(world.finish(&elements[0], 0));
            assert!(world.call());
            used_many(&mut world);
            let (_, elements) = given(&mut world, &[One; 4]);
            let done: Vec<_> = elements.iter().map(|element| (element, 0)).collect();
            assert_eq!(complete_many(&mut world, &done), Ok(4));
            world.show();
            if packed {
                world.put("driver_event.off_wrap", 0, bits(event).into());
                world.put("driver_event.flags", 0, 2);
            } else {
                world.put("used_event", 0, event.into());
            }
            let (first, behind) = (start + 1, start + 5);
            let passed = (first..behind).any(|place| bits(place) == bits(event));
            assert_eq!(world.call(), passed, "{features:#x} from {start}, event at {event}");
            assert!(!world.call());
            let counted = world.device.counters();
            assert_eq!(
                (counted.notified, counted.suppressed),
                (1 + u64::from(passed), u64::from(!passed))
            );
        }
    }
}

/// A ring that is gone is told before anything is taken for complete.
#[test]
fn a_batch_for_a_ring_that_is_gone_is_told() {
    for features in [IN_ORDER, PACKED | IN_ORDER] {
        let mut world = World::interop(8, features);
        let (_, elements) = given(&mut world, &[One, One]);
        world.mem.remove(0, 0x20_0000).unwrap();
        let Err(QueueError::Violation(fault)) = complete_many(&mut world, &[(&elements[0], 0), (&elements[1], 0)])
        else {
            panic!("it was told")
        };
        assert_eq!(fault.rule, Rule::RingUnmapped);
        assert_eq!(world.device.latched(), Some(&fault));
        assert_eq!(world.device.in_flight(), 2);
    }
}

/// Each access of a ring that somebody carries may fail: that is told, and then nothing is shown; else all is.
#[test]
fn each_entry_of_a_batch_that_cannot_be_written_is_told() {
    for features in [0, PACKED, IN_ORDER, PACKED | IN_ORDER] {
        for kinds in every(&[One, Answered(1)], 3) {
            for number in 0.. {
                let far = Far::new(0, 0x10000);
                let memory = GuestMemory::new(vec![far.spec(true), region(DATA, 0x1000)], None).unwrap();
                let pin = memory.pin();
                let mem = &pin.mediated().unwrap();
                let config = config(8, features, Policy::INTEROP);
                let mut driver = DriverQueue::new(mem, config, None, None).unwrap();
                let mut device = DeviceQueue::new(mem, config, None).unwrap();
                for kind in &kinds {
                    let writable: &[_] = if *kind == One { &[] } else { &[(DATA + 64, 16)] };
                    driver.add(mem, &[(DATA, 8)], writable, false).unwrap();
                }
                driver.publish(mem).unwrap();
                let (mut segments, mut elements) = (Vec::new(), Vec::new());
                device.pop_many(mem, 3, &mut segments, &mut elements).unwrap();
                let done = elements.iter().zip(&kinds);
                let done: Vec<_> = done
                    .map(|(one, kind)| (one.ticket(), u64::from(kind.written())))
                    .collect();
                let fails = far.count() + number;
                far.fails.store(fails, Ordering::Relaxed);
                let told = complete(&mut device, mem, &done);
                let failed = far.count() > fails;
                assert!(
                    !failed || far.count() == fails + 1,
                    "nothing is written behind what failed"
                );
                far.fails.store(NEVER, Ordering::Relaxed);
                device.publish(mem).unwrap();
                let used = driver.get_used_many(mem, 8).unwrap();
                if failed {
                    let Err(QueueError::Violation(fault)) = told else {
                        panic!("{number}: {told:?}")
                    };
                    assert_eq!(Some(&fault), device.latched());
                    assert_eq!(used, []);
                    continue;
                }
                assert_eq!((told, used.len()), (Ok(3), 3));
                // Without order an entry each, of a word in two of them or three.
                let entries = kinds
                    .iter()
                    .filter(|&&kind| features & IN_ORDER == 0 || kind != One)
                    .count()
                    + usize::from(features & IN_ORDER != 0 && kinds[2] == One);
                assert!(number >= entries as u64, "{features:#x} {kinds:?}: {number}");
                break;
            }
        }
    }
}
