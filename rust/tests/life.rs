//! The life of a queue: latch, reset, stop, put back, completion in order, states, and notifications that may
//! neither be lost nor come too often.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::Arc;

use common::{DATA, EVENT_IDX, HOLE, IN_ORDER, INDIRECT_DESC, NEXT_DOOR, PACKED, WRITE, World, config, region};
use virtio_test::chain::{Element, Segment};
use virtio_test::error::{Fault, Misuse, QueueError};
use virtio_test::mem::{GuestMemory, MemoryError, Trace};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueState};
use virtio_test::rule::Rule;

fn both(size: u16, features: u64) -> [World; 2] {
    [World::interop(size, features), World::interop(size, features | PACKED)]
}

fn put_back(world: &mut World, element: &Element) {
    let segments: Vec<Segment> = world.segments[element.first..element.first + element.count].to_vec();
    world.device.put_back(element, &segments);
}

/// Make what comes next a broken chain.
fn break_next(world: &mut World) {
    world.add(&[(HOLE, 1)], &[]);
    world.publish();
}

// ------------------------------------------------------------------------------------------------- latch and reset

#[test]
fn a_latch_drops_completions_and_only_a_reset_clears_it() {
    for mut world in both(8, 0) {
        world.give(true);
        let before = world.take();
        break_next(&mut world);
        world.breaks(Rule::UnmappedAddress);
        assert!(!world.device.is_current(&before.ticket()));
        assert!(!world.finish(&before, 0));
        assert_eq!(world.device.counters().dropped, 1);
        world.device.resume();
        world.device.stop();
        assert!(world.device.broken() && !world.device.stopped());
        let pin = world.mem.pin();
        assert!(!world.device.enable_kicks(&pin.mapped()).unwrap());
        world.driver.reset(&pin.mapped(), None, None).unwrap();
        world.device.reset(&pin.mapped(), None, None).unwrap();
        drop(pin);
        assert_eq!((world.device.generation(), world.device.in_flight()), (1, 0));
        // Of the old generation nothing is written, although the head is in use again.
        world.give(true);
        let after = world.take();
        assert!(!world.finish(&before, 0));
        assert_eq!(world.used().unwrap(), None);
        assert!(world.finish(&after, 0));
        assert_eq!(world.used().unwrap(), Some((2, 0)));
    }
}

#[test]
fn a_device_that_gives_up_has_no_violation_but_the_same_silence() {
    for mut world in both(8, 0) {
        world.give(true);
        let element = world.take();
        world.give(true);
        world.device.break_down();
        assert!(world.device.latched().is_none());
        assert!(!world.has_work() && world.pop().unwrap().is_none() && !world.finish(&element, 0));
        assert_eq!(world.used().unwrap(), None);
    }
}

#[test]
fn a_reset_that_is_refused_changes_nothing() {
    for mut world in both(8, 0) {
        world.give(true);
        let element = world.take();
        let mut bad = config(8, world.device.config().features, Policy::INTEROP);
        bad.desc = HOLE;
        let pin = world.mem.pin();
        let refused = world.device.reset(&pin.mapped(), Some(bad), None).unwrap_err();
        assert_eq!(refused.rule, Rule::RingUnmapped);
        assert!(world.driver.reset(&pin.mapped(), Some(bad), None).is_err());
        drop(pin);
        assert!(world.finish(&element, 0));
        assert_eq!(world.used().unwrap(), Some((0, 0)));
    }
}

#[test]
fn a_broken_chain_behind_good_ones_is_found_by_the_next_call() {
    for mut world in both(8, 0) {
        world.give(true);
        world.give(true);
        break_next(&mut world);
        let good = world.pop_many(8).unwrap();
        assert_eq!((good.len(), world.device.latched()), (2, None));
        for element in &good {
            assert!(world.finish(element, 0));
        }
        world.breaks(Rule::UnmappedAddress);
    }
}

#[test]
fn a09_a_strict_decrease_behind_a_good_chain_is_not_forgotten() {
    let trace = Arc::new(Trace::new());
    let mem = GuestMemory::new(vec![region(0, 0x10_0000)], Some(Arc::clone(&trace))).unwrap();
    let config = config(8, 0, Policy::STRICT);
    let idx = config.driver + 2;
    let pin = mem.pin();
    let mem = &pin.mediated().unwrap();
    let mut driver = DriverQueue::new(mem, config, None, None).unwrap();
    let mut device = DeviceQueue::new(mem, config, None).unwrap();
    for _ in 0..4 {
        driver.add(mem, &[(0x8000, 1)], &[], false).unwrap();
    }
    driver.publish(mem).unwrap();
    let (mut segments, mut elements) = (Vec::new(), Vec::new());
    trace.clear();
    assert_eq!(device.pop_many(mem, 2, &mut segments, &mut elements), Ok(2));
    let looks: Vec<_> = (0u64..)
        .zip(trace.log())
        .filter(|(_, record)| record.gpa == idx)
        .collect();
    device.reset(mem, None, None).unwrap();
    // The driver takes two chains back between the first pop and the second.
    trace.clear();
    trace.change_at(looks[1].0, idx, vec![2, 0]);
    assert_eq!(device.pop_many(mem, 4, &mut segments, &mut elements), Ok(1));
    assert!(device.latched().is_none());
    let fault = device.pop_many(mem, 4, &mut segments, &mut elements).unwrap_err();
    assert_eq!(fault.rule, Rule::AvailIdxDecreased);
}

#[test]
fn u04_a_ring_that_vanishes_latches_and_publishes_nothing() {
    for features in [0, PACKED, IN_ORDER, IN_ORDER | PACKED] {
        let mut world = World::interop(8, features);
        world.give(true);
        let element = world.take();
        let spare = world.mem.regions()[0].size();
        world.mem.remove(0, spare).unwrap();
        let pin = world.mem.pin();
        let failed = world.device.complete(&pin.mapped(), &element.ticket(), 0).unwrap_err();
        let QueueError::Violation(fault) = failed else {
            unreachable!("{failed}")
        };
        assert_eq!(fault.rule, Rule::RingUnmapped);
        assert_eq!(world.device.complete(&pin.mapped(), &element.ticket(), 0), Ok(false));
        world.device.publish(&pin.mapped()).unwrap();
        let failed: Fault = world.driver.get_used(&pin.mapped()).unwrap_err();
        assert_eq!(failed.rule, Rule::RingUnmapped);
        assert_eq!(world.driver.get_used(&pin.mapped()).unwrap(), None);
    }
}

#[test]
fn u01_u03_a_completion_that_cannot_be_changes_nothing() {
    for mut world in both(8, 0) {
        let token = world.give(false);
        let element = world.take();
        let pin = world.mem.pin();
        let refused = world.device.complete(&pin.mapped(), &element.ticket(), 17).unwrap_err();
        let (written, writable) = (17, 16);
        assert_eq!(refused, QueueError::Misuse(Misuse::WrittenTooBig { written, writable }));
        drop(pin);
        assert!(world.finish(&element, 16), "it can be tried again");
        let pin = world.mem.pin();
        let twice = world.device.complete(&pin.mapped(), &element.ticket(), 16).unwrap_err();
        assert_eq!(twice, QueueError::Misuse(Misuse::StaleChain));
        drop(pin);
        assert_eq!(world.used().unwrap(), Some((token, 16)));
        assert_eq!(world.used().unwrap(), None);
    }
}

// --------------------------------------------------------------------------------------------- stop and putting back

#[test]
fn stopped_takes_completions_and_goes_on_where_it_was() {
    for features in [0, PACKED] {
        for size in [1, 5, 8] {
            let size = if features == 0 && size == 5 { 4 } else { size };
            let mut world = World::interop(size, features);
            for _ in 0..7 {
                world.traffic(1, false);
            }
            let token = world.give(true);
            let element = world.take();
            let state = world.device.stop();
            assert!(world.device.stopped() && !world.has_work());
            assert_eq!(world.pop().unwrap(), None);
            assert!(world.finish(&element, 0));
            assert_eq!(world.used().unwrap(), Some((token, 0)));
            let end = world.device.state();
            assert_eq!((end.avail, end.used), (state.avail, state.avail));
            // Another device end takes over.
            let config = *world.device.config();
            let pin = world.mem.pin();
            world.device = DeviceQueue::new(&pin.mapped(), config, Some(end)).unwrap();
            drop(pin);
            world.traffic(9, size > 1);
            world.full_ring(|elements| elements.reverse());
            world.device.stop();
            world.device.resume();
            world.traffic(3, false);
        }
    }
}

#[test]
fn put_back_newest_first_is_as_if_never_popped() {
    for features in [0, PACKED, IN_ORDER, PACKED | IN_ORDER] {
        for size in [2, 8] {
            let mut world = World::interop(size, features);
            for _ in 0..5 {
                let tokens = [world.give(true), world.give(true)];
                let before = world.device.state();
                let elements = world.pop_many(2).unwrap();
                let early = world.device.unpop(&elements[0].ticket()).unwrap_err();
                assert_eq!(early, Misuse::NotNewest);
                for element in elements.iter().rev() {
                    world.device.unpop(&element.ticket()).unwrap();
                }
                assert_eq!((world.device.state(), world.device.in_flight()), (before, 0));
                assert!(world.has_work());
                for token in tokens {
                    let element = world.take();
                    assert!(world.finish(&element, 0));
                    assert_eq!(world.used().unwrap(), Some((token, 0)));
                }
            }
            assert_eq!(world.device.counters().popped, 10);
        }
    }
}

#[test]
fn put_back_in_any_order_goes_into_the_ring_at_last() {
    for mut world in both(8, 0) {
        let before = world.device.state();
        for _ in 0..4 {
            world.give(false);
        }
        let elements = world.pop_many(4).unwrap();
        for index in [1, 0, 3, 2] {
            put_back(&mut world, &elements[index]);
        }
        assert_eq!((world.device.state(), world.device.in_flight()), (before, 0));
        let again = world.pop_many(8).unwrap();
        let heads = |elements: &[Element]| -> Vec<u16> { elements.iter().map(|element| element.head).collect() };
        assert_eq!(heads(&again), heads(&elements));
    }
}

#[test]
fn put_back_behind_a_newer_one_is_handed_out_again() {
    for features in [0, PACKED, IN_ORDER, PACKED | IN_ORDER] {
        let mut world = World::interop(8, features);
        let tokens = [world.give(false), world.give(false), world.give(false)];
        let elements = world.pop_many(3).unwrap();
        assert!(world.finish(&elements[2], 3));
        put_back(&mut world, &elements[1]);
        put_back(&mut world, &elements[0]);
        assert!(world.has_work());
        assert_eq!(world.device.in_flight(), 2);
        for (index, original) in elements.iter().enumerate().take(2) {
            let again = world.take();
            assert_eq!(
                (again.head, again.seq, again.readable),
                (original.head, original.seq, 16)
            );
            assert_eq!(again.count, 2);
            assert_eq!(world.segments[again.first].at.gpa, DATA);
            assert!(world.finish(&again, index as u64));
        }
        assert!(!world.has_work());
        let mut answers: Vec<_> = (0..3).map(|_| world.used().unwrap().unwrap()).collect();
        answers.sort_unstable();
        assert_eq!(answers, [(tokens[0], 0), (tokens[1], 1), (tokens[2], 3)]);
        assert_eq!((world.driver.free(), world.device.in_flight()), (8, 0));
        // What is put back is forgotten with its generation.
        world.give(true);
        world.give(true);
        let elements = world.pop_many(2).unwrap();
        put_back(&mut world, &elements[0]);
        let pin = world.mem.pin();
        world.driver.reset(&pin.mapped(), None, None).unwrap();
        world.device.reset(&pin.mapped(), None, None).unwrap();
        drop(pin);
        put_back(&mut world, &elements[1]);
        assert!(!world.has_work());
        assert_eq!(world.pop().unwrap(), None);
    }
}

// ------------------------------------------------------------------------------------------------------- in order

#[test]
fn u10_in_order_publishes_in_the_order_of_the_driver() {
    for mut world in both(8, IN_ORDER) {
        for _ in 0..5 {
            let tokens: Vec<u64> = (0..3).map(|_| world.give(false)).collect();
            let elements = world.pop_many(3).unwrap();
            assert!(world.finish(&elements[2], 3));
            assert!(!world.call(), "nothing is visible, so there is nothing to tell");
            assert!(world.finish(&elements[1], 2));
            assert_eq!(world.used().unwrap(), None);
            assert!(world.finish(&elements[0], 1));
            assert!(world.call());
            for (token, written) in tokens.into_iter().zip(1..) {
                assert_eq!(world.used().unwrap(), Some((token, written)));
            }
        }
    }
}

#[test]
fn in_order_what_waits_is_in_flight_for_an_evil_driver_too() {
    for features in [IN_ORDER, IN_ORDER | PACKED] {
        let mut world = World::interop(2, features);
        world.give(true);
        let held = world.take();
        world.give(true);
        let waits = world.take();
        assert!(world.finish(&waits, 0));
        assert_eq!(world.device.in_flight(), 1);
        // Nothing was used, yet the driver makes more available.
        if features & PACKED == 0 {
            world.put("avail.idx", 0, 3);
        } else {
            world.desc(0, (DATA, 16, common::USED | WRITE, 0));
        }
        world.breaks(Rule::TooManyInFlight);
        assert!(!world.finish(&held, 0));
    }
}

// ------------------------------------------------------------------------------------------------------ notifications

#[test]
fn n03_n05_calls_without_event_idx() {
    for mut world in both(8, 0) {
        let flags = if world.layout.packed {
            "driver_event.flags"
        } else {
            "avail.flags"
        };
        for disabled in [false, true, false] {
            world.put(flags, 0, u64::from(disabled));
            world.give(true);
            let element = world.take();
            assert!(world.finish(&element, 0));
            assert_eq!(world.call(), !disabled);
            assert!(!world.call(), "once for each publication");
            world.used().unwrap();
        }
        let counters = *world.device.counters();
        assert_eq!((counters.notified, counters.suppressed), (2, 1));
    }
}

#[test]
fn n06_each_end_that_found_nothing_is_woken_exactly_once() {
    for start in [0, 0xFFFD] {
        let split = World::started(8, EVENT_IDX, start);
        for mut world in [split, World::interop(5, EVENT_IDX | PACKED)] {
            for round in 0..20 {
                // Each end learns in its own way that there is nothing: both ask to be woken by that.
                if round % 2 == 0 {
                    assert_eq!((world.pop().unwrap(), world.used().unwrap()), (None, None));
                } else {
                    assert!(!world.has_work() && !world.has_used());
                }
                world.add(&[(DATA, 1)], &[]);
                assert!(world.kick(), "round {round}");
                world.add(&[(DATA, 1)], &[]);
                assert!(!world.kick(), "it is awake already");
                let elements = world.pop_many(2).unwrap();
                assert!(world.finish(&elements[0], 0));
                assert!(world.call(), "round {round}");
                assert!(world.finish(&elements[1], 0));
                assert!(!world.call());
                let pin = world.mem.pin();
                assert_eq!(world.driver.get_used_many(&pin.mapped(), 2).unwrap().len(), 2);
            }
        }
    }
}

#[test]
fn n06_what_arrived_before_the_end_went_to_sleep_is_seen() {
    for mut world in both(8, EVENT_IDX) {
        let pin = world.mem.pin();
        world.device.disable_kicks(&pin.mapped()).unwrap();
        world.driver.disable_calls(&pin.mapped()).unwrap();
        drop(pin);
        world.add(&[(DATA, 1)], &[]);
        world.kick();
        let pin = world.mem.pin();
        assert!(world.device.enable_kicks(&pin.mapped()).unwrap());
        drop(pin);
        let element = world.take();
        assert!(world.finish(&element, 0));
        world.call();
        let pin = world.mem.pin();
        assert!(world.driver.enable_calls(&pin.mapped()).unwrap());
    }
}

#[test]
fn n06_while_kicks_and_calls_are_disabled_nobody_asks_for_them() {
    for mut world in both(8, 0) {
        let pin = world.mem.pin();
        world.device.disable_kicks(&pin.mapped()).unwrap();
        world.driver.disable_calls(&pin.mapped()).unwrap();
        drop(pin);
        for _ in 0..3 {
            assert!(!world.has_work() && !world.has_used());
            world.add(&[(DATA, 1)], &[]);
            assert!(!world.kick());
            let element = world.take();
            assert!(world.finish(&element, 0));
            assert!(!world.call());
            assert!(world.used().unwrap().is_some());
        }
    }
}

#[test]
fn a_turn_of_the_index_without_a_notification_passes_every_event() {
    for features in [EVENT_IDX, EVENT_IDX | PACKED] {
        let mut world = World::interop(8, features);
        world.add(&[(DATA, 1)], &[]);
        assert!(world.kick());
        let first = world.take();
        assert!(world.finish(&first, 0));
        assert!(world.call());
        assert!(world.used().unwrap().is_some());
        assert!(!world.has_used() && !world.has_work());
        for _ in 0..65536 {
            world.give(true);
            let element = world.take();
            assert!(world.finish(&element, 0));
            world.segments.clear();
            assert!(world.used().unwrap().is_some());
        }
        assert!(world.kick() && world.call());
    }
}

#[test]
fn a_question_before_the_publication_does_not_swallow_the_notification() {
    for features in [0, PACKED, EVENT_IDX, EVENT_IDX | PACKED] {
        let mut world = World::interop(8, features);
        assert_eq!((world.pop().unwrap(), world.used().unwrap()), (None, None));
        world.add(&[(DATA, 1)], &[]);
        let pin = world.mem.pin();
        assert!(!world.driver.wants_kick(&pin.mapped()).unwrap());
        drop(pin);
        assert!(world.kick());
        let element = world.take();
        assert!(world.complete(&element, 0));
        assert!(!world.call());
        world.show();
        assert!(world.call());
    }
}

// ------------------------------------------------------------------------------------------------------------- memory

#[test]
fn chains_of_an_older_epoch_reach_what_is_there_now_or_nothing() {
    for mut world in both(8, 0) {
        world.add(&[(DATA, 4), (NEXT_DOOR, 4)], &[(DATA + 64, 4), (NEXT_DOOR + 64, 4)]);
        world.publish();
        let element = world.take();
        world.mem.add(region(HOLE, 0x1000)).unwrap();
        let pin = world.mem.pin();
        assert_eq!(world.iov(&element).write(&pin.mapped(), 0, &[1; 8]), Ok(8));
        drop(pin);
        world.mem.remove(NEXT_DOOR, 0x1000).unwrap();
        let pin = world.mem.pin();
        let gone = Err(MemoryError::Unmapped { gpa: NEXT_DOOR + 64 });
        assert_eq!(world.iov(&element).write(&pin.mapped(), 0, &[2; 8]), gone);
        assert_eq!(world.iov(&element).fill(&pin.mapped(), 0, 8, 3), gone);
        let mut bytes = [0; 4];
        world.mem.read(DATA + 64, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 4], "nothing is half done");
        assert_eq!(world.iov(&element).write(&pin.mapped(), 0, &[4; 4]), Ok(4));
        drop(pin);
        // The rings are still there, so the chain can be completed.
        assert!(world.finish(&element, 4));
        assert_eq!(world.used().unwrap(), Some((0, 4)));
    }
}

#[test]
fn rings_follow_their_memory_to_a_new_table() {
    for features in [0, PACKED] {
        let mem = GuestMemory::new(vec![region(0, 0x10_0000), region(DATA, 0x1000)], None).unwrap();
        let config = config(4, features | INDIRECT_DESC, Policy::STRICT);
        let pin = mem.pin();
        let mut driver = DriverQueue::new(&pin.mapped(), config, None, None).unwrap();
        let mut device = DeviceQueue::new(&pin.mapped(), config, None).unwrap();
        drop(pin);
        for round in 0..10u64 {
            mem.add(region(HOLE + 0x1_0000 * round, 0x1000)).unwrap();
            let pin = mem.pin();
            let mem = &pin.mapped();
            let token = driver.add(mem, &[(DATA, 1)], &[(DATA + 8, 2)], false).unwrap();
            driver.publish(mem).unwrap();
            let mut segments = Vec::new();
            let element = device.pop(mem, &mut segments).unwrap().unwrap();
            device.complete(mem, &element.ticket(), 2).unwrap();
            device.publish(mem).unwrap();
            assert_eq!(driver.get_used(mem).unwrap(), Some((token, 2)));
        }
        assert_eq!(driver.state(), device.state());
        let state = QueueState {
            avail: driver.state().avail,
            used: driver.state().used,
        };
        let pin = mem.pin();
        driver.reset(&pin.mapped(), None, Some(state)).unwrap();
        device.reset(&pin.mapped(), None, Some(state)).unwrap();
        assert_eq!(
            (driver.generation(), device.generation(), device.state()),
            (1, 1, state)
        );
    }
}

// -------------------------------------------------------------------------------------------------------------- rules

#[test]
fn every_rule_is_broken_by_some_row() {
    let suites = [
        include_str!("split.rs"),
        include_str!("packed.rs"),
        include_str!("driver.rs"),
        include_str!("life.rs"),
        include_str!("lost.rs"),
    ];
    let missing: Vec<_> = Rule::ALL
        .iter()
        .map(|rule| format!("Rule::{}", rule.name()))
        .filter(|name| {
            !suites
                .iter()
                .any(|text| text.contains(&format!("{name})")) || text.contains(&format!("{name},")))
        })
        .collect();
    assert!(missing.is_empty(), "{missing:?}");
}
