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
