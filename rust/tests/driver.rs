//! The driver end against a hostile device: the rows G of the robustness catalogue, and what its user may not do.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::{AVAIL, DATA, EVENT_IDX, IN_ORDER, INDIRECT_DESC, PACKED, USED, WRITE, World, config, memory};
use virtio_test::error::{Misuse, QueueError};
use virtio_test::policy::Policy;
use virtio_test::queue::{DriverQueue, IndirectArea, QueueConfig, QueueState};
use virtio_test::rule::Rule;

type Buffer = (u64, u32);

/// What an evil device writes: a used entry at the next place, and (split) the index.
fn answer(world: &World, place: u64, id: u64, len: u64) {
    if world.layout.packed {
        world.put("desc.id", place, id);
        world.put("desc.len", place, len);
        world.put("desc.flags", place, u64::from(AVAIL | USED | WRITE));
    } else {
        world.put("used.ring.id", place, id);
        world.put("used.ring.len", place, len);
        world.put("used.idx", 0, place + 1);
    }
}

/// Any.
fn a_fault() -> virtio_test::error::Fault {
    let mut world = World::interop(2, 0);
    world.put("avail.idx", 0, 9);
    world.pop().unwrap_err()
}

fn both(features: u64) -> [World; 2] {
    [World::interop(8, features), World::interop(8, features | PACKED)]
}

#[test]
fn g01_ids_beyond_the_queue() {
    for id in [8, 9, 0xFFFF] {
        for mut world in both(0) {
            world.give(false);
            answer(&world, 0, id, 0);
            world.cheats(Rule::UsedIdOutOfRange);
        }
    }
    // Not cut down to the 16 bits that would be in range.
    let mut world = World::interop(8, 0);
    world.give(false);
    answer(&world, 0, 0x1_0000, 0);
    world.cheats(Rule::UsedIdOutOfRange);
}

#[test]
fn g02_ids_that_are_not_in_flight() {
    for mut world in both(0) {
        world.give(false);
        // The middle of the chain (split), or an id that was not given (packed).
        answer(&world, 0, 1, 0);
        world.cheats(Rule::UsedIdNotInFlight);
    }
}

#[test]
fn g02_what_is_not_published_cannot_be_used() {
    let [mut split, mut packed] = both(0);
    for world in [&mut split, &mut packed] {
        world.give(true);
        world.add(&[(DATA, 16)], &[]);
        answer(world, 0, 1, 0);
    }
    split.cheats(Rule::UsedIdNotInFlight);
    packed.cheats(Rule::UsedIdNotInFlight);
    let mut world = World::interop(8, 0);
    world.add(&[(DATA, 16)], &[]);
    answer(&world, 0, 0, 0);
    world.cheats(Rule::UsedIdxTooFar);
}

#[test]
fn g04_lengths_beyond_the_writable_part() {
    for mut world in both(0) {
        world.give(false);
        answer(&world, 0, 0, 17);
        world.cheats(Rule::UsedLenTooBig);
    }
    let policy = Policy {
        used_len_beyond: true,
        ..Policy::INTEROP
    };
    for features in [0, PACKED] {
        let mut world = World::new(8, features, policy);
        let token = world.give(false);
        answer(&world, 0, 0, 0xFFFF_FFFF);
        assert_eq!(world.used().unwrap(), Some((token, 16)));
    }
}

#[test]
fn g04_a_packed_length_without_write() {
    // 17 are more than there is room for: no length, but what DPDK leaves there.
    let cases = [
        (Policy::INTEROP, 9, 9),
        (Policy::INTEROP, 16, 16),
        (Policy::INTEROP, 17, 0),
        (Policy::STRICT, 9, 0),
        (Policy::STRICT, 17, 0),
    ];
    for (policy, said, expected) in cases {
        let mut world = World::new(8, PACKED, policy);
        let token = world.give(false);
        answer(&world, 0, 0, said);
        world.put("desc.flags", 0, u64::from(AVAIL | USED));
        assert_eq!(world.used().unwrap(), Some((token, expected)));
    }
}

#[test]
fn g05_g06_used_idx_jumps_and_goes_back() {
    for idx in [2, 9, 0x8000, 0xFFFF] {
        let mut world = World::interop(8, 0);
        world.give(true);
        world.put("used.idx", 0, idx);
        let fault = world.cheats(Rule::UsedIdxTooFar);
        assert_eq!(fault.address, Some(world.at("used.idx", 0)));
    }
    let mut world = World::interop(8, 0);
    world.traffic(3, true);
    world.give(true);
    world.put("used.idx", 0, 2);
    world.cheats(Rule::UsedIdxTooFar);
}

#[test]
fn g08_the_same_buffer_twice() {
    for mut world in both(0) {
        let token = world.give(true);
        world.give(true);
        answer(&world, 0, 0, 0);
        assert_eq!(world.used().unwrap(), Some((token, 0)));
        answer(&world, 1, 0, 0);
        world.cheats(Rule::UsedIdNotInFlight);
    }
}

#[test]
fn g09_nothing_used_is_nothing_and_after_the_latch_too() {
    for mut world in both(0) {
        assert!(!world.has_used());
        world.give(true);
        assert_eq!(world.used().unwrap(), None);
        answer(&world, 0, 99, 0);
        world.cheats(Rule::UsedIdOutOfRange);
        let pin = world.mem.pin();
        let refused = world.driver.add(&pin.mapped(), &[(DATA, 1)], &[], false).unwrap_err();
        assert_eq!(refused, QueueError::Misuse(Misuse::Latched));
        assert_eq!(world.driver.publish(&pin.mapped()).unwrap(), 0);
        assert!(!world.driver.wants_kick(&pin.mapped()).unwrap());
        assert!(!world.driver.enable_calls(&pin.mapped()).unwrap());
        assert_eq!(world.driver.detach(), [0]);
        world.driver.reset(&pin.mapped(), None, None).unwrap();
        drop(pin);
        assert_eq!((world.driver.generation(), world.driver.free()), (1, 8));
        assert_eq!(world.give(true), 1, "tokens go on");
    }
}

#[test]
fn g10_garbage_in_what_suppresses_kicks_is_no_more_than_that() {
    for value in [0, 1, 7, 0x7FFF, 0xFFFF] {
        for features in [0, EVENT_IDX] {
            for mut world in both(features) {
                let fields: &[_] = if world.layout.packed {
                    &["device_event.off_wrap", "device_event.flags"]
                } else {
                    &["used.flags", "avail_event"]
                };
                for _ in 0..20 {
                    for name in fields {
                        world.put(name, 0, value);
                    }
                    let token = world.add(&[(DATA, 1)], &[]);
                    world.kick();
                    let element = world.take();
                    assert!(world.finish(&element, 0));
                    assert_eq!(world.used().unwrap(), Some((token, 0)));
                }
            }
        }
    }
}

#[test]
fn g11_packed_flags_that_are_not_used_and_ids_of_nothing() {
    for flags in [AVAIL, USED, 0] {
        let mut world = World::interop(8, PACKED);
        world.give(true);
        answer(&world, 0, 5, 0);
        world.put("desc.flags", 0, u64::from(flags));
        assert_eq!(world.used().unwrap(), None);
    }
    let mut world = World::interop(8, PACKED);
    answer(&world, 0, 0, 0);
    world.cheats(Rule::UsedIdNotInFlight);
}

#[test]
fn u11_in_order_one_entry_for_several_buffers() {
    for mut world in both(IN_ORDER) {
        let first = world.add(&[], &[(DATA, 16)]);
        let second = world.add(&[(DATA, 1)], &[(DATA, 16)]);
        let third = world.add(&[(DATA, 1)], &[(DATA, 16)]);
        world.publish();
        answer(&world, 0, if world.layout.packed { 2 } else { 3 }, 4);
        if !world.layout.packed {
            world.put("used.idx", 0, 3);
        }
        // Those before the last count as written whole.
        assert_eq!(world.used().unwrap(), Some((first, 16)));
        assert!(world.has_used());
        assert_eq!(world.used().unwrap(), Some((second, 16)));
        assert_eq!(world.used().unwrap(), Some((third, 4)));
        assert_eq!(world.used().unwrap(), None);
        assert_eq!((world.driver.free(), world.driver.in_flight()), (8, 0));
        let state = if world.layout.packed { 0x8005 } else { 3 };
        assert_eq!(world.driver.state().used, state);
    }
}

#[test]
fn u11_in_order_an_entry_for_more_than_the_index_says() {
    let mut world = World::interop(8, IN_ORDER);
    for _ in 0..3 {
        world.give(true);
    }
    answer(&world, 0, 2, 0);
    world.cheats(Rule::UsedIdNotInFlight);
    assert_eq!(world.driver.detach(), [0, 1, 2]);
}

#[test]
fn in_order_goes_around_the_ring() {
    for mut world in both(IN_ORDER) {
        for _ in 0..9 {
            world.traffic(5, true);
            world.full_ring(|_| ());
        }
    }
}

#[test]
fn misuse_leaves_memory_as_it_was() {
    for features in [0, PACKED] {
        let mut world = World::interop(2, features | INDIRECT_DESC);
        let pin = world.mem.pin();
        let ram = |world: &World| {
            let mut bytes = vec![0; 0x2000];
            world.mem.read(0, &mut bytes).unwrap();
            bytes
        };
        let before = ram(&world);
        let one = (DATA, 1);
        let mut refused =
            |r: &[(u64, u32)], w: &[(u64, u32)], indirect| match world.driver.add(&pin.mapped(), r, w, indirect) {
                Err(QueueError::Misuse(misuse)) => misuse,
                other => unreachable!("{other:?}"),
            };
        let empty = [(DATA, 0)];
        let cases: [(&[Buffer], &[Buffer], &str); 5] = [
            (&[], &[], "at least one buffer"),
            (&empty, &[], "at least one byte"),
            (&[], &empty, "at least one byte"),
            (&[one, one], &[one], "3 buffers does not fit a queue of 2"),
            (&[(DATA, u32::MAX)], &[(DATA, 2)], "at most 2^32 bytes"),
        ];
        for (readable, writable, said) in cases {
            for indirect in [false, true] {
                let misuse = refused(readable, writable, indirect);
                assert!(
                    matches!(&misuse, Misuse::Invalid(text) if text.contains(said)),
                    "{misuse} {said}"
                );
            }
        }
        drop(pin);
        assert!(world.driver.latched().is_none());
        assert_eq!(ram(&world), before);
        world.add(&[one], &[one]);
        let pin = world.mem.pin();
        let before = ram(&world);
        for indirect in [false, true] {
            let full = world.driver.add(&pin.mapped(), &[one], &[], indirect).unwrap_err();
            assert_eq!(full, QueueError::Misuse(Misuse::QueueFull { needed: 1, free: 0 }));
        }
        assert_eq!((world.driver.free(), world.driver.in_flight()), (0, 1));
        assert_eq!(ram(&world), before);
    }
}

#[test]
fn indirect_areas_are_the_callers() {
    let mem = memory();
    let pin = mem.pin();
    let plain = config(8, 0, Policy::INTEROP);
    let able = QueueConfig {
        features: INDIRECT_DESC,
        ..plain
    };
    let area = |address| Some(IndirectArea { address, entries: 8 });
    for address in [common::HOLE, common::ROM, u64::MAX - 15] {
        let mut driver = DriverQueue::new(&pin.mapped(), able, None, area(address)).unwrap();
        let refused = driver.add(&pin.mapped(), &[(DATA, 1)], &[], true).unwrap_err();
        assert!(matches!(refused, QueueError::Misuse(Misuse::Invalid(_))), "{refused}");
        assert!(driver.latched().is_none());
        assert_eq!((driver.free(), driver.in_flight()), (8, 0));
    }
    let mut driver = DriverQueue::new(&pin.mapped(), plain, None, area(common::TABLES)).unwrap();
    let refused = driver.add(&pin.mapped(), &[(DATA, 1)], &[], true).unwrap_err();
    assert_eq!(refused, QueueError::Misuse(Misuse::NoIndirect));
    // The room is remembered when the feature comes with a reset.
    driver.reset(&pin.mapped(), Some(able), None).unwrap();
    driver.add(&pin.mapped(), &[(DATA, 1)], &[], true).unwrap();
}

#[test]
fn detached_is_empty_until_it_is_reset() {
    for mut world in both(0) {
        for _ in 0..3 {
            world.give(true);
        }
        world.add(&[(DATA, 1)], &[]);
        let element = world.take();
        assert!(world.finish(&element, 0));
        assert_eq!(world.driver.detach(), [0, 1, 2, 3]);
        assert!(world.driver.detach().is_empty());
        assert!(!world.has_used(), "what the device still uses is nobody's");
        assert_eq!(world.used().unwrap(), None);
        assert!(world.driver.latched().is_none());
        let pin = world.mem.pin();
        let refused = world.driver.add(&pin.mapped(), &[(DATA, 1)], &[], false).unwrap_err();
        assert_eq!(refused, QueueError::Misuse(Misuse::Latched));
        assert_eq!(world.driver.publish(&pin.mapped()).unwrap(), 0);
        world.driver.reset(&pin.mapped(), None, None).unwrap();
        world.device.reset(&pin.mapped(), None, None).unwrap();
        drop(pin);
        world.full_ring(|elements| elements.reverse());
    }
}

#[test]
fn a_driver_goes_on_only_where_nothing_is_in_flight() {
    let mem = memory();
    let pin = mem.pin();
    for (features, avail, used) in [(0, 5, 3), (PACKED, 0x8002, 0x8000)] {
        let state = QueueState { avail, used };
        let refused = DriverQueue::new(&pin.mapped(), config(8, features, Policy::INTEROP), Some(state), None);
        assert_eq!(refused.unwrap_err().rule, Rule::StateOutOfRange);
    }
}

#[test]
fn a_broken_answer_behind_good_ones_is_found_by_the_next_call() {
    for mut world in both(0) {
        let token = world.give(true);
        world.give(true);
        answer(&world, 0, 0, 0);
        answer(&world, 1, 77, 0);
        let pin = world.mem.pin();
        let good = world.driver.get_used_many(&pin.mapped(), 8).unwrap();
        assert_eq!(good, [(token, 0)]);
        let fault = world.driver.get_used_many(&pin.mapped(), 8).unwrap_err();
        assert_eq!(fault.rule, Rule::UsedIdOutOfRange);
        assert!(world.driver.get_used_many(&pin.mapped(), 8).unwrap().is_empty());
    }
}

#[test]
fn what_just_fits_is_taken_and_one_more_is_not() {
    let mem = memory();
    let pin = mem.pin();
    let able = config(8, INDIRECT_DESC, Policy::INTEROP);
    let area = IndirectArea {
        address: common::TABLES,
        entries: 2,
    };
    let mut driver = DriverQueue::new(&pin.mapped(), able, None, Some(area)).unwrap();
    let one = (DATA, 1);
    for (readable, fits) in [(1, true), (2, true), (3, false), (4, false)] {
        let added = driver.add(&pin.mapped(), &vec![one; readable], &[], true);
        assert_eq!(added.is_ok(), fits, "{readable} buffers in a table of 2: {added:?}");
    }
    assert_eq!((driver.free(), driver.in_flight()), (6, 2));
    // 2.7.5.2: 2^32 bytes are allowed, on either side or on both.
    driver.add(&pin.mapped(), &[(DATA, u32::MAX)], &[one], false).unwrap();
    driver.add(&pin.mapped(), &[(DATA, u32::MAX), one], &[], false).unwrap();
    assert_eq!((driver.free(), driver.in_flight()), (2, 4));
}

/// They come again before what is in the ring, whichever way they are asked for.
#[test]
fn what_was_given_back_comes_first_and_then_the_ring() {
    for mut world in both(0) {
        let tokens: Vec<_> = (0..4).map(|_| world.give(true)).collect();
        let elements = world.pop_many(4).unwrap();
        for element in &elements {
            assert!(world.finish(element, 0));
        }
        let pin = world.mem.pin();
        let mem = &pin.mapped();
        let taken = world.driver.get_used_many(mem, 2).unwrap();
        world.driver.give_back(taken);
        assert_eq!(world.driver.in_flight(), 4);
        assert_eq!(world.driver.get_used(mem).unwrap(), Some((tokens[0], 0)));
        let rest = world.driver.get_used_many(mem, 8).unwrap();
        assert_eq!(rest, tokens[1..].iter().map(|&token| (token, 0)).collect::<Vec<_>>());
        assert_eq!((world.driver.in_flight(), world.driver.counters().popped), (0, 4));
    }
}

/// Whether it was detached or found something broken: memory may be somebody else's by then.
#[test]
fn an_end_that_has_ended_asks_for_nothing_in_memory() {
    for features in [0, EVENT_IDX] {
        for broken in [false, true] {
            for mut world in both(features) {
                world.give(true);
                let element = world.take();
                if broken {
                    answer(&world, 0, 9, 0);
                    world.cheats(Rule::UsedIdOutOfRange);
                } else {
                    world.driver.detach();
                    assert!(world.driver.detached());
                }
                let pin = world.mem.pin();
                let mem = &pin.mapped();
                let size = usize::try_from(world.layout.driver_bytes()).unwrap();
                let pen = vec![0x5A; size];
                world.mem.write(world.layout.driver, &pen).unwrap();
                assert!(!world.driver.enable_calls(mem).unwrap());
                world.driver.disable_calls(mem).unwrap();
                assert!(!world.driver.wants_kick(mem).unwrap());
                let mut after = vec![0; size];
                world.mem.read(world.layout.driver, &mut after).unwrap();
                assert_eq!(after, pen);
                // And the device end.
                world.device.latch(a_fault());
                let size = usize::try_from(world.layout.device_bytes()).unwrap();
                let pen = vec![0xA5; size];
                world.mem.write(world.layout.device, &pen).unwrap();
                assert!(!world.device.enable_kicks(mem).unwrap());
                world.device.disable_kicks(mem).unwrap();
                let done = [(element.ticket(), 0)];
                assert_eq!(world.device.complete_many(mem, done.into_iter()).unwrap(), 0);
                world.device.unpop(&element.ticket()).unwrap();
                let mut after = vec![0; size];
                world.mem.read(world.layout.device, &mut after).unwrap();
                assert_eq!(after, pen);
                assert_eq!(world.device.in_flight(), 1);
            }
        }
    }
}

#[test]
fn kicks_that_are_wanted_and_not_are_counted_apart() {
    for mut world in both(0) {
        world.give(true);
        assert!(world.kick());
        let pin = world.mem.pin();
        world.device.disable_kicks(&pin.mapped()).unwrap();
        drop(pin);
        for _ in 0..2 {
            world.give(true);
            assert!(!world.kick());
        }
        let counters = world.driver.counters();
        assert_eq!((counters.notified, counters.suppressed), (1, 2));
    }
}
