//! Adding many chains at once comes to what adding them one by one comes to.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::ops::Range;

use common::{AVAIL, BIG, DATA, EVENT_IDX, IN_ORDER, INDIRECT_DESC, PACKED, USED, World};
use virtio_test::error::{Misuse, QueueError};

type Buffers = Vec<(u64, u32)>;
type Chain = (Buffers, Buffers);

const FORMATS: [u64; 8] = [
    0,
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    PACKED,
    PACKED | EVENT_IDX,
    PACKED | IN_ORDER,
    PACKED | INDIRECT_DESC,
];

/// A chain of so many readable and writable buffers; no two numbers give the same.
fn chain(number: u64, readable: u64, writable: u64) -> Chain {
    let buffer = |part: u64| (DATA + 0x40 * number + part, u32::try_from(1 + part).unwrap());
    let (r, w) = (0..readable, readable..readable + writable);
    (r.map(buffer).collect(), w.map(buffer).collect())
}

/// Chains of all shapes that fit.
fn chains(count: u64) -> Vec<Chain> {
    (0..count)
        .map(|number| match number % 5 {
            0 => chain(number, 1, 1),
            1 => chain(number, 0, 1),
            2 => chain(number, 3, 0),
            3 => chain(number, 1, 0),
            _ => chain(number, 2, 2),
        })
        .collect()
}

/// In the memory of a world, mapped or with each access traced.
fn add_many(world: &mut World, chains: &[Chain], whole: bool) -> Result<Range<u64>, QueueError> {
    let pin = world.mem.pin();
    if whole {
        world.driver.add_many(&pin.whole(), chains)
    } else {
        world.driver.add_many(&pin.mapped(), chains)
    }
}

fn ram(world: &World) -> Vec<u8> {
    let mut bytes = vec![0; 0x4000];
    world.mem.read(0, &mut bytes).unwrap();
    bytes
}

/// All that is available is used, in order; the tokens that come back.
fn turn(world: &mut World) -> Vec<u64> {
    world.publish();
    while let Some(element) = world.pop().unwrap() {
        let pin = world.mem.pin();
        world
            .device
            .complete(&pin.mapped(), &element.ticket(), element.writable)
            .unwrap();
        world.device.publish(&pin.mapped()).unwrap();
    }
    let pin = world.mem.pin();
    let used = world.driver.get_used_many(&pin.mapped(), 1000).unwrap();
    used.into_iter().map(|(token, _)| token).collect()
}

#[test]
fn many_are_as_one_by_one() {
    for features in FORMATS {
        for whole in [false, true] {
            for size in [8, 16] {
                let (mut one, mut many) = (World::interop(size, features), World::interop(size, features));
                let all = chains(60);
                let mut rest = &all[..];
                while !rest.is_empty() {
                    let tokens = add_many(&mut many, rest, whole).unwrap();
                    let count = usize::try_from(tokens.end - tokens.start).unwrap();
                    assert!(count > 0);
                    for ((readable, writable), token) in rest.iter().zip(tokens.clone()) {
                        assert_eq!(one.add(readable, writable), token);
                    }
                    // What was left had no room.
                    if let Some((readable, writable)) = rest.get(count) {
                        let pin = one.mem.pin();
                        let full = one.driver.add(&pin.mapped(), readable, writable, false);
                        assert!(matches!(full, Err(QueueError::Misuse(Misuse::QueueFull { .. }))));
                    }
                    assert_eq!(ram(&one), ram(&many), "{features:#x} {whole} {size}");
                    let back = turn(&mut many);
                    assert_eq!(back, tokens.collect::<Vec<_>>());
                    assert_eq!((turn(&mut one), ram(&one)), (back, ram(&many)));
                    assert_eq!((one.driver.free(), many.driver.free()), (size, size));
                    assert_eq!(one.driver.state(), many.driver.state());
                    rest = &rest[count..];
                }
                assert_eq!(one.driver.counters(), many.driver.counters());
            }
        }
    }
}

#[test]
fn a_full_queue_takes_none_and_no_chains_are_none() {
    for features in FORMATS {
        let mut world = World::interop(4, features);
        assert_eq!(add_many(&mut world, &[], false), Ok(0..0));
        let two = vec![chain(0, 1, 1); 3];
        assert_eq!(add_many(&mut world, &two, false), Ok(0..2));
        let before = ram(&world);
        assert_eq!(add_many(&mut world, &two, false), Ok(2..2));
        assert_eq!((ram(&world), world.driver.free()), (before, 0));
        assert_eq!(turn(&mut world), [0, 1]);
        assert_eq!(add_many(&mut world, &two[..1], false), Ok(2..3));
    }
}

#[test]
fn what_is_no_chain_ends_it_and_is_told_of_when_it_is_the_first() {
    let bad: [(Chain, &str); 4] = [
        ((vec![], vec![]), "at least one buffer"),
        ((vec![(DATA, 1)], vec![(DATA, 0)]), "at least one byte"),
        ((vec![(DATA, 1); 9], vec![]), "9 buffers does not fit a queue of 8"),
        ((vec![(BIG, u32::MAX)], vec![(BIG, 2)]), "at most 2^32 bytes"),
    ];
    for features in FORMATS {
        for whole in [false, true] {
            for (odd, said) in &bad {
                let mut world = World::interop(8, features);
                let list = [chain(0, 1, 1), odd.clone(), chain(1, 1, 1)];
                assert_eq!(add_many(&mut world, &list, whole), Ok(0..1));
                let before = ram(&world);
                match add_many(&mut world, &list[1..], whole) {
                    Err(QueueError::Misuse(Misuse::Invalid(text))) => assert!(text.contains(said), "{text}"),
                    other => panic!("{other:?}"),
                }
                // A wrong call leaves memory as it was.
                assert_eq!((ram(&world), world.driver.free()), (before, 6));
                assert_eq!(add_many(&mut world, &list[2..], whole), Ok(1..2));
                assert_eq!(turn(&mut world), [0, 1]);
            }
        }
    }
}

#[test]
fn one_that_has_no_room_is_not_begun() {
    for features in FORMATS {
        let mut world = World::interop(4, features);
        let before = ram(&world);
        let list = [chain(0, 1, 1), chain(1, 2, 1)];
        assert_eq!(add_many(&mut world, &list, false), Ok(0..1));
        // Only what the first one wrote has changed: the slots of the second are as they were.
        let slots = |bytes: &[u8]| bytes[0x1020..0x1040].to_vec();
        assert_eq!(slots(&ram(&world)), slots(&before));
        assert_eq!(world.driver.free(), 2);
    }
}

#[test]
fn a_broken_queue_and_a_ring_that_is_gone_say_so() {
    for features in FORMATS {
        let mut world = World::interop(4, features);
        world.mem.remove(0, 0x20_0000).unwrap();
        let lost = add_many(&mut world, &chains(1), false);
        assert!(matches!(lost, Err(QueueError::Violation(_))), "{lost:?}");
        let latched = add_many(&mut world, &chains(1), false);
        assert!(
            matches!(latched, Err(QueueError::Misuse(Misuse::Latched))),
            "{latched:?}"
        );
    }
}

/// A device that uses what it was never given has broken the queue, whose ring is there as before.
#[test]
fn nothing_is_written_into_the_ring_of_a_broken_queue() {
    for features in FORMATS {
        let mut world = World::interop(4, features);
        add_many(&mut world, &chains(1), false).unwrap();
        world.publish();
        if world.layout.packed {
            world.desc(0, (0, 0, AVAIL | USED, 77));
        } else {
            world.put("used.ring.id", 0, 77);
            world.put("used.idx", 0, 1);
        }
        let pin = world.mem.pin();
        world.driver.get_used(&pin.mapped()).unwrap_err();
        drop(pin);
        let before = (ram(&world), world.driver.free());
        let latched = add_many(&mut world, &chains(1), false);
        assert!(
            matches!(latched, Err(QueueError::Misuse(Misuse::Latched))),
            "{latched:?}"
        );
        assert_eq!((ram(&world), world.driver.free()), before);
    }
}

/// Not only what is read is judged: the device gets chains that were all added in one call.
#[test]
fn the_device_finds_each_of_them_whole() {
    for features in FORMATS {
        let mut world = World::interop(16, features);
        let list = chains(7);
        let tokens = add_many(&mut world, &list, false).unwrap();
        world.publish();
        for ((readable, writable), _) in list.iter().zip(tokens) {
            world.segments.clear();
            let element = world.take();
            let found: Vec<_> = world
                .segments
                .iter()
                .map(|one| (one.at.gpa, one.len, one.writable))
                .collect();
            let wanted = |list: &Buffers, writes| list.iter().map(|&(at, len)| (at, len, writes)).collect::<Vec<_>>();
            assert_eq!(found, [wanted(readable, false), wanted(writable, true)].concat());
            assert_eq!(element.count, readable.len() + writable.len());
        }
    }
}
