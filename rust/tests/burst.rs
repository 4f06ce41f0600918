//! Completing and taking back many chains in one call, beside one call for each.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::{DATA, IN_ORDER, PACKED, World};
use virtio_test::chain::Element;
use virtio_test::error::{Misuse, QueueError};

/// A ring of 8 with four chains, all popped; and 12 bytes can be written to each.
fn popped(features: u64) -> (World, Vec<Element>) {
    let mut world = World::interop(8, features);
    let pin = world.mem.pin();
    for i in 0..4 {
        let base = DATA + 64 * i;
        let added = world
            .driver
            .add(&pin.mapped(), &[(base, 16)], &[(base + 16, 12)], false);
        assert_eq!(added, Ok(i));
    }
    world.driver.publish(&pin.mapped()).unwrap();
    drop(pin);
    let elements = world.pop_many(8).unwrap();
    assert_eq!(elements.len(), 4);
    (world, elements)
}

fn complete_many(world: &mut World, done: &[(&Element, u64)]) -> Result<u64, QueueError> {
    let pin = world.mem.pin();
    let done = done.iter().map(|&(element, written)| (element.ticket(), written));
    world.device.complete_many(&pin.mapped(), done)
}

fn used_many(world: &mut World, limit: usize) -> Vec<(u64, u32)> {
    let (pin, mut used) = (world.mem.pin(), vec![(99, 99)]);
    let taken = world.driver.get_used_into(&pin.mapped(), limit, &mut used).unwrap();
    assert_eq!((used.remove(0), used.len()), ((99, 99), taken), "appended");
    used
}

const EVERY: [u64; 4] = [0, PACKED, IN_ORDER, PACKED | IN_ORDER];

#[test]
fn one_call_does_what_one_for_each_does() {
    for features in EVERY {
        let (mut one, first) = popped(features);
        let (mut many, second) = popped(features);
        let order = [2, 0, 3, 1];
        for (i, &chain) in (0..).zip(&order) {
            assert!(one.complete(&first[chain], i));
        }
        let done: Vec<_> = (0..).zip(order).map(|(i, chain)| (&second[chain], i)).collect();
        assert_eq!(complete_many(&mut many, &done), Ok(4));
        one.show();
        many.show();
        assert_eq!(many.device.state(), one.device.state());
        assert_eq!(many.device.counters(), one.device.counters());
        assert_eq!(many.device.in_flight(), 0);
        let each: Vec<_> = std::iter::from_fn(|| one.used().unwrap()).collect();
        let used = used_many(&mut many, 3);
        assert_eq!(used[..], each[..3]);
        assert_eq!(used_many(&mut many, 3)[..], each[3..]);
        assert_eq!(many.driver.counters(), one.driver.counters());
        assert_eq!(many.driver.free(), 8);
    }
}

#[test]
fn a_wrong_one_stops_there_and_those_before_it_count() {
    for features in EVERY {
        let (mut world, elements) = popped(features);
        let done = [(&elements[0], 12), (&elements[1], 13), (&elements[2], 1)];
        let wrong = Misuse::WrittenTooBig {
            written: 13,
            writable: 12,
        };
        assert_eq!(complete_many(&mut world, &done), Err(wrong.into()));
        assert_eq!(world.device.in_flight(), 3);
        world.show();
        assert_eq!(used_many(&mut world, 8), [(0, 12)]);
        let rest = [(&elements[1], 2), (&elements[2], 1), (&elements[3], 0)];
        assert_eq!(complete_many(&mut world, &rest), Ok(3));
        world.show();
        assert_eq!(used_many(&mut world, 8), [(1, 2), (2, 1), (3, 0)]);
    }
}

#[test]
fn of_an_old_generation_none_is_written() {
    for features in EVERY {
        let (mut world, elements) = popped(features);
        let pin = world.mem.pin();
        world.device.reset(&pin.mapped(), None, None).unwrap();
        drop(pin);
        let done: Vec<_> = elements.iter().map(|element| (element, 1)).collect();
        assert_eq!(complete_many(&mut world, &done), Ok(0));
        assert_eq!(world.device.counters().dropped, 4);
        assert_eq!(world.device.counters().pushed, 0);
        world.show();
        assert_eq!(used_many(&mut world, 8), []);
    }
}

#[test]
fn no_more_are_completed_than_are_in_flight() {
    for features in [0, PACKED] {
        let (mut world, elements) = popped(features);
        let done: Vec<_> = elements.iter().chain(&elements).map(|element| (element, 1)).collect();
        assert_eq!(complete_many(&mut world, &done), Err(Misuse::StaleChain.into()));
        assert_eq!((world.device.in_flight(), world.device.counters().pushed), (0, 4));
    }
}

#[test]
fn in_order_any_mix_of_calls_shows_what_is_complete_from_the_first_on() {
    for features in [IN_ORDER, PACKED | IN_ORDER] {
        let mut world = World::interop(16, features);
        let mut state = 1_u64;
        let mut draw = move |below: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(state >> 33).unwrap() % below
        };
        // Of the driver, oldest first: all that it gave, and what it may see used.
        let (mut given, mut expected) = (Vec::new(), Vec::new());
        // Popped ones, oldest first, and what they are complete with.
        let mut popped: Vec<(Element, Option<u64>)> = Vec::new();
        let mut shown = 0;
        for step in 0..5_000 {
            let open: Vec<usize> = (0..popped.len()).filter(|&at| popped[at].1.is_none()).collect();
            match draw(5) {
                0 | 1 if given.len() + expected.len() < 8 => given.push(world.give(false)),
                0 | 1 => popped.extend(world.pop_many(1 + draw(4)).unwrap().into_iter().map(|new| (new, None))),
                2 if !open.is_empty() => {
                    let at = open[draw(open.len())];
                    popped[at].1 = Some(step % 17);
                    assert!(world.complete(&popped[at].0, step % 17));
                }
                3 if !open.is_empty() => {
                    let mut some = open;
                    let turn = draw(some.len());
                    // Half of the time in order.
                    if draw(2) == 0 {
                        some.rotate_left(turn);
                    }
                    some.truncate(1 + draw(4));
                    for &at in &some {
                        popped[at].1 = Some(at as u64);
                    }
                    let done: Vec<_> = some.iter().map(|&at| (&popped[at].0, at as u64)).collect();
                    assert_eq!(complete_many(&mut world, &done), Ok(some.len() as u64));
                }
                4 if popped.last().is_some_and(|(_, written)| written.is_none()) => {
                    let (newest, _) = popped.pop().unwrap();
                    world.device.unpop(&newest.ticket()).unwrap();
                }
                _ => {}
            }
            while let Some(&(_, Some(written))) = popped.first() {
                popped.remove(0);
                expected.push((given.remove(0), u32::try_from(written).unwrap()));
            }
            assert_eq!(
                usize::try_from(world.device.in_flight()).unwrap(),
                popped.iter().filter(|(_, written)| written.is_none()).count()
            );
            if draw(3) == 0 {
                world.show();
                let used = used_many(&mut world, 16);
                assert_eq!(used, expected, "step {step}");
                shown += used.len();
                expected.clear();
            }
        }
        assert!(shown > 500, "{shown}");
    }
}

#[test]
fn in_order_what_was_completed_and_put_back_is_not_complete() {
    for features in [IN_ORDER, PACKED | IN_ORDER] {
        let (mut world, elements) = popped(features);
        assert!(world.complete(&elements[3], 5));
        world.device.unpop(&elements[3].ticket()).unwrap();
        let again = world.take();
        assert_eq!(again.seq, elements[3].seq);
        for element in &elements[..3] {
            assert!(world.finish(element, 1));
        }
        assert_eq!(used_many(&mut world, 8), [(0, 1), (1, 1), (2, 1)]);
    }
}
