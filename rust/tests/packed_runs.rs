//! Runs of buffers in a packed ring, which are popped together: where they end, and what is left when one of them is wrong.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::recorded::part;
use common::{
    AVAIL, DATA, Desc, HOLE, INDIRECT, INDIRECT_DESC, NEXT, PACKED, Popped as _, ROM, TABLE, USED, WRITE, World, files,
};
use virtio_test::chain::{Element, Segment};
use virtio_test::mem::{Access, At};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, QueueState};
use virtio_test::rule::Rule;

const SIZE: u64 = 8;
const BOTH: [Policy; 2] = [Policy::STRICT, Policy::INTEROP];

/// The place after so many slots from the start of the first lap, as a state says it.
fn place(slots: u64) -> u16 {
    let wrap = if slots / SIZE % 2 == 0 { 0x8000 } else { 0 };
    u16::try_from(slots % SIZE).unwrap() | wrap
}

/// Make these available from that place on.
fn offer(world: &World, from: u64, descs: &[Desc]) {
    for (at, &(addr, len, flags, id)) in (from..).zip(descs) {
        let mark = if at / SIZE % 2 == 0 { AVAIL } else { USED };
        world.desc(at % SIZE, (addr, len, flags | mark, id));
    }
}

/// A device end that goes on from that place of the first lap, where these are available.
fn from(from: u64, policy: Policy, descs: &[Desc]) -> World {
    let mut world = World::new(8, PACKED | INDIRECT_DESC, policy);
    let state = QueueState {
        avail: place(from),
        used: place(from),
    };
    let pin = world.mem.pin();
    world.device = DeviceQueue::new(&pin.mapped(), *world.device.config(), Some(state)).unwrap();
    drop(pin);
    offer(&world, from, descs);
    world
}

/// A buffer that says by its length and its id which one it is; every other is writable.
fn buffer(number: u16) -> Desc {
    let flags = if number % 2 == 0 { 0 } else { WRITE };
    (
        DATA + 64 * u64::from(number),
        u32::from(number) + 1,
        flags,
        100 + number,
    )
}

/// Popped one after the other, in memory that hands out no words: by the way that does everything.
fn one_by_one(world: &mut World, limit: usize) -> Vec<Element> {
    let pin = world.mem.pin();
    let mem = pin.whole();
    let pop = || world.device.pop(&mem, &mut world.segments).unwrap();
    std::iter::from_fn(pop).take(limit).collect()
}

fn shape(segments: &[Segment]) -> Vec<(u64, u32, bool)> {
    segments.iter().map(|one| (one.at.gpa, one.len, one.writable)).collect()
}

#[test]
fn a_run_ends_where_it_should_and_the_next_goes_on_there() {
    for start in 0..SIZE {
        for count in 1..=8 {
            for limit in 1..=9 {
                let descs: Vec<_> = (0..count).map(buffer).collect();
                let mut world = from(start, Policy::STRICT, &descs);
                let mut popped = Vec::new();
                while popped.len() < descs.len() {
                    let some = world.pop_many(limit).unwrap();
                    assert_eq!(some.len(), limit.min(descs.len() - popped.len()));
                    popped.extend(some);
                    let behind = start + popped.len() as u64;
                    assert_eq!(world.device.state().avail, place(behind));
                    assert_eq!(u64::from(world.device.in_flight()), popped.len() as u64);
                }
                for ((number, element), (_, len, flags, id)) in (0..).zip(&popped).zip(descs) {
                    let bytes = [element.readable, element.writable];
                    let expected = if flags == 0 { [len.into(), 0] } else { [0, len.into()] };
                    assert_eq!((bytes, element.head), (expected, id));
                    assert_eq!(u64::from(element.position), (start + number) % SIZE);
                    assert_eq!((element.seq, element.first as u64, element.count), (number, number, 1));
                    assert_eq!((element.slots, element.descriptors, element.generation), (1, 1, 0));
                }
                assert!(world.pop_many(limit).unwrap().is_empty());
                if count == 8 {
                    offer(&world, start + SIZE, &[buffer(8)]);
                    let fault = world.breaks(Rule::TooManyInFlight);
                    assert_eq!(fault.position.map(u64::from), Some(start));
                }
            }
        }
    }
}

/// 2.8.17: what was popped stays so when the next one has no room beside what is in flight.
#[test]
fn a_run_ends_where_there_is_no_room() {
    for done in 1..=5 {
        let descs: Vec<_> = (0..8).map(buffer).collect();
        let mut world = from(0, Policy::INTEROP, &descs);
        let elements = world.pop_many(8).unwrap();
        for element in &elements[..done] {
            assert!(world.complete(element, 0));
        }
        offer(&world, SIZE, &descs[..6]);
        assert_eq!(world.pop_many(8).unwrap().len(), done);
        assert_eq!(world.device.state().avail, place(SIZE + done as u64));
        assert_eq!(world.device.in_flight(), 8);
        let fault = world.breaks(Rule::TooManyInFlight);
        assert_eq!(fault.position.map(usize::from), Some(done));
    }
}

/// Lists of several descriptors and tables, before, in and behind runs: each is what it is when nothing is popped together, with
/// a record of what is in flight as well.
#[test]
fn lists_and_tables_in_between_are_popped_in_their_turn() {
    let list: &[Desc] = &[(DATA, 16, NEXT, 0), (DATA + 512, 24, WRITE, 77)];
    let table: &[Desc] = &[(TABLE, 32, INDIRECT, 88)];
    // Of no bytes, and with flags that mean nothing here.
    let odd: &[Desc] = &[(HOLE, 0, 0, 99)];
    let more: &[Desc] = &[(DATA, 8, 0x4000 | 0x0078, 66)];
    for (start, before, between) in (0..SIZE)
        .flat_map(|start| (0..5).map(move |before| (start, before)))
        .flat_map(|(start, before)| [list, table, odd, more].map(|between| (start, before, between)))
    {
        let singles: Vec<_> = (0..6).map(buffer).collect();
        let descs = [&singles[..before], between, &singles[before..]].concat();
        let chains = descs.len() + 1 - between.len();
        for limit in [1, 2, before.max(1), before + 1, 8] {
            let mut worlds = [0; 3].map(|_| {
                let world = from(start, Policy::INTEROP, &descs);
                world.entry(TABLE, 0, (DATA, 3, 0, 0));
                world.entry(TABLE, 1, (DATA, 4, WRITE, 0));
                world
            });
            let file = files::file(0x1000);
            let pin = worlds[2].mem.pin();
            let (config, state) = (*worlds[2].device.config(), Some(worlds[2].device.state()));
            let device = DeviceQueue::recorded(&pin.mapped(), config, state, part(&file)).unwrap();
            drop(pin);
            worlds[2].device = device;
            let [plain, single, recorded] = &mut worlds;
            let mut popped = Vec::new();
            while popped.len() < chains {
                let some = plain.pop_many(limit).unwrap();
                assert_eq!(some.len(), limit.min(chains - popped.len()));
                let each = one_by_one(single, some.len());
                let mut noted = recorded.pop_many(limit).unwrap();
                for element in &mut noted {
                    element.entry = 0;
                }
                assert_eq!((&some, &some), (&each, &noted));
                popped.extend(some);
                let (state, counters) = (plain.device.state(), plain.device.counters());
                for other in [&single.device, &recorded.device] {
                    assert_eq!((state, counters), (other.state(), other.counters()));
                }
            }
            assert_eq!(shape(&plain.segments), shape(&single.segments));
            assert_eq!(shape(&plain.segments), shape(&recorded.segments));
            assert_eq!(plain.device.state().avail, place(start + descs.len() as u64));
        }
    }
}

const WRONG: [(Policy, Desc, Rule); 9] = [
    (Policy::STRICT, (DATA, 0, 0, 9), Rule::ZeroLength),
    (Policy::STRICT, (DATA, 16, 0, 100), Rule::IdInFlight),
    (Policy::STRICT, (HOLE, 1, 0, 9), Rule::UnmappedAddress),
    (Policy::INTEROP, (HOLE, 1, 0, 9), Rule::UnmappedAddress),
    (Policy::INTEROP, (u64::MAX, 2, 0, 9), Rule::AddressWraps),
    (Policy::INTEROP, (ROM, 1, WRITE, 9), Rule::ReadOnlyAddress),
    (Policy::INTEROP, (DATA, 1, NEXT, 9), Rule::ChainNotAvail),
    (Policy::INTEROP, (TABLE, 15, INDIRECT, 9), Rule::IndirectBadLen),
    (Policy::INTEROP, (TABLE, 16, INDIRECT | NEXT, 9), Rule::IndirectAndNext),
];

#[test]
fn what_lies_before_a_broken_one_is_popped_and_the_place_is_right_there() {
    for (policy, wrong, rule) in WRONG {
        for (start, before) in (0..SIZE).flat_map(|start| (1..7).map(move |before| (start, before))) {
            let mut descs: Vec<_> = (0..before).map(buffer).collect();
            descs.push(wrong);
            let behind = descs.len() as u64;
            let mut world = from(start, policy, &descs);
            // What a list would go on in is not available; behind all others there is more.
            if rule != Rule::ChainNotAvail {
                offer(&world, start + behind, &[buffer(7)]);
            }
            let elements = world.pop_many(8).unwrap();
            assert_eq!(elements.len(), usize::from(before), "{rule:?} from {start}");
            let heads: Vec<_> = elements.iter().map(|element| element.head).collect();
            assert_eq!(heads, (100..100 + before).collect::<Vec<_>>());
            let at = start + u64::from(before);
            assert_eq!(world.device.state().avail, place(at));
            assert_eq!(
                (world.segments.len(), world.device.in_flight()),
                (before.into(), before.into())
            );
            let fault = world.breaks(rule);
            assert_eq!(fault.position.map(u64::from), Some(at % SIZE), "{rule:?}");
            // All that it says is what is said of it where nothing is popped together.
            let mut single = from(start, policy, &descs);
            if rule != Rule::ChainNotAvail {
                offer(&single, start + behind, &[buffer(7)]);
            }
            one_by_one(&mut single, before.into());
            let pin = single.mem.pin();
            let told = single.device.pop(&pin.whole(), &mut single.segments).unwrap_err();
            assert_eq!(fault, told);
        }
    }
}

/// Who accepts them takes buffers of no bytes in a run, and an id twice.
#[test]
fn what_is_tolerated_ends_no_run() {
    let descs = [
        (HOLE, 0, 0, 5),
        (DATA, 1, 0, 5),
        (HOLE, 0, WRITE, 6),
        (DATA, 2, WRITE, 5),
        (HOLE, 0, 0, 7),
    ];
    for start in 0..SIZE {
        let mut world = from(start, Policy::INTEROP, &descs);
        let elements = world.pop_many(8).unwrap();
        let told: Vec<_> = elements
            .iter()
            .map(|one| (one.head, one.count, one.readable, one.writable))
            .collect();
        assert_eq!(
            told,
            [(5, 0, 0, 0), (5, 1, 1, 0), (6, 0, 0, 0), (5, 1, 0, 2), (7, 0, 0, 0)]
        );
    }
    // An id is free again when its buffer is completed, not before.
    for policy in BOTH {
        let mut world = from(0, policy, &[buffer(0), buffer(1)]);
        let elements = world.pop_many(8).unwrap();
        assert!(world.complete(&elements[0], 0));
        offer(&world, 2, &[buffer(0), buffer(1)]);
        let taken = if policy.duplicate_heads { 2 } else { 1 };
        assert_eq!(world.pop_many(8).unwrap().len(), taken);
    }
}

/// A burst has 2^17 segments beside those that were there: tables give most of them, and a run the rest.
#[test]
fn a_run_ends_with_the_segment_that_fills_a_burst() {
    for before in [0, 5] {
        let mut world = World::interop(2048, PACKED | INDIRECT_DESC);
        for at in 0..1024 {
            world.entry(TABLE, at, (DATA, 1, 0, 0));
        }
        for at in 0..1300 {
            let id = u16::try_from(at).unwrap();
            let desc = match at {
                0..127 => (TABLE, 1024 * 16, INDIRECT | AVAIL, id),
                127..200 => (HOLE, 0, AVAIL, id),
                _ => (DATA, 16, AVAIL, id),
            };
            world.desc(at, desc);
        }
        let one = Segment {
            at: At::unresolved(0),
            len: 1,
            writable: false,
        };
        world.segments = vec![one; before];
        for (count, segments) in [(200 + 1024, 1 << 17), (76, 76), (0, 0)] {
            world.segments.truncate(before);
            assert_eq!(world.pop_many(4000).unwrap().len(), count);
            assert_eq!(world.segments.len(), before + segments);
        }
    }
}

/// A ring that is not there any more, and one that somebody carries: no words of either are handed out.
#[test]
fn a_ring_without_words_is_popped_as_well() {
    let mut world = from(6, Policy::INTEROP, &[buffer(0), buffer(1), buffer(2)]);
    let pin = world.mem.pin();
    let mut elements = Vec::new();
    let mem = pin.whole();
    assert_eq!(mem.epoch(), 0);
    let popped = world.device.pop_many(&mem, 8, &mut world.segments, &mut elements);
    assert_eq!((popped, elements.len()), (Ok(3), 3));
    drop(pin);
    let mut world = from(6, Policy::INTEROP, &[buffer(0), buffer(1), buffer(2)]);
    world.take();
    assert_eq!(world.pop().unwrap().expect_element().position, 7);
    world.mem.remove(0, 0x20_0000).unwrap();
    let fault = world.pop_many(8).unwrap_err();
    assert_eq!((fault.rule, fault.position), (Rule::RingUnmapped, Some(0)));
}
