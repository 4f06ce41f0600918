//! The device end of a packed ring against the rows P and N of the robustness catalogue.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::Arc;

use common::{
    AVAIL, DATA, Desc, EVENT_IDX, HOLE, INDIRECT, INDIRECT_DESC, NEXT, PACKED, ROM, TABLE, USED, WRITE, World, config,
    memory, region,
};
use virtio_test::mem::{AccessKind, GuestMemory, Trace};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, QueueState};
use virtio_test::ring::{PackedEvent, packed_need_event};
use virtio_test::rule::Rule;

const R: Desc = (DATA, 16, 0, 0);
const BOTH: [Policy; 2] = [Policy::STRICT, Policy::INTEROP];

fn with(policy: Policy, descs: &[Desc]) -> World {
    let world = World::new(5, PACKED | INDIRECT_DESC, policy);
    world.chain(descs);
    world
}

fn never(descs: &[Desc], rule: Rule) {
    for policy in BOTH {
        with(policy, descs).breaks(rule);
    }
}

fn tabled(policy: Policy, entries: &[Desc]) -> World {
    let len = 16 * u32::try_from(entries.len()).unwrap();
    let world = World::new(5, PACKED | INDIRECT_DESC, policy);
    for (i, &entry) in (0u64..).zip(entries) {
        world.entry(TABLE, i, entry);
    }
    world.chain(&[(TABLE, len, INDIRECT | WRITE, 3)]);
    world
}

#[test]
fn p01_p02_p03_what_is_not_available() {
    let mut world = World::interop(5, PACKED);
    for flags in [0, AVAIL | USED, USED, USED | NEXT, AVAIL | USED | WRITE] {
        world.desc(0, (DATA, 16, flags, 0));
        assert!(!world.has_work());
        assert_eq!(world.pop().unwrap(), None);
    }
}

#[test]
fn p04_a_list_whose_second_descriptor_is_not_available() {
    for policy in BOTH {
        for flags in [0, USED, AVAIL | USED] {
            let mut world = World::new(5, PACKED, policy);
            world.desc(0, (DATA, 16, AVAIL | NEXT, 0));
            world.desc(1, (DATA, 16, flags, 0));
            assert_eq!(world.breaks(Rule::ChainNotAvail).descriptor, Some(1));
        }
    }
}

#[test]
fn p05_next_on_every_slot() {
    for size in [1, 5, 32768] {
        let mut world = World::interop(size, PACKED);
        for slot in 0..u64::from(size) {
            world.desc(slot, (DATA, 1, AVAIL | NEXT, 0));
        }
        world.breaks(Rule::ChainTooLong);
    }
}

#[test]
fn p06_an_id_is_opaque() {
    let mut world = with(Policy::STRICT, &[(DATA, 16, WRITE, 0xFFFF)]);
    let element = world.take();
    assert_eq!(element.head, 0xFFFF);
    assert!(world.finish(&element, 3));
    assert_eq!((world.get("desc.id", 0), world.get("desc.len", 0)), (0xFFFF, 3));
}

#[test]
fn p07_an_id_twice() {
    let descs = [(DATA, 16, WRITE, 1), (DATA, 16, WRITE | NEXT, 0), (DATA, 16, WRITE, 1)];
    let mut world = with(Policy::INTEROP, &descs);
    let (first, second) = (world.take(), world.take());
    assert_eq!((first.slots, second.slots), (1, 2));
    assert!(world.finish(&second, 2));
    assert!(world.finish(&first, 1));
    assert_eq!((world.get("desc.len", 0), world.get("desc.len", 2)), (2, 1));
    assert_eq!(world.device.state().used, 3 | 0x8000);
    for second in [&descs[1..], &[(DATA, 16, WRITE, 1)]] {
        let mut world = with(Policy::STRICT, &[&descs[..1], second].concat());
        world.take();
        assert_eq!(world.breaks(Rule::IdInFlight).head, Some(1));
        assert_eq!(world.segments.len(), 1);
    }
}

#[test]
fn p07_an_id_twice_of_tables() {
    for policy in [Policy::INTEROP, Policy::STRICT] {
        let mut world = World::new(8, PACKED | INDIRECT_DESC, policy);
        world.entry(TABLE, 0, (DATA, 16, WRITE, 0));
        world.chain(&[(TABLE, 16, INDIRECT, 1), (TABLE, 16, INDIRECT, 1)]);
        let elements = world.pop_many(8).unwrap();
        let count = if policy.duplicate_heads { 2 } else { 1 };
        assert_eq!((elements.len(), world.segments.len()), (count, count));
        assert!(elements.iter().all(|element| element.head == 1));
        if count == 1 {
            let fault = world.breaks(Rule::IdInFlight);
            assert_eq!((fault.head, world.device.in_flight()), (Some(1), 1));
        }
    }
}

#[test]
fn p09_p11_p12_p21_every_size_wraps_where_it_should() {
    for size in [1, 2, 3, 5, 7, 255, 257] {
        let mut world = World::interop(size, PACKED | EVENT_IDX);
        world.traffic(3 * u32::from(size) + 1, false);
        if size > 1 {
            world.traffic(3 * u32::from(size) + 1, true);
        }
        for turn in 0..3 {
            world.full_ring(|elements| elements.rotate_left(turn * usize::from(size) / 3));
            world.full_ring(|elements| elements.reverse());
        }
    }
    for size in [32767, 32768] {
        let mut world = World::interop(size, PACKED);
        for _ in 0..3 {
            world.full_ring(|elements| elements.reverse());
        }
        assert!(world.device.state().used & 0x8000 == 0);
    }
}

#[test]
fn p13_sizes_that_cannot_be() {
    let mem = memory();
    let pin = mem.pin();
    let good = config(5, PACKED, Policy::INTEROP);
    for (size, rule) in [
        (0, Rule::QueueSizeZero),
        (32769, Rule::QueueSizeTooBig),
        (65535, Rule::QueueSizeTooBig),
    ] {
        let refused = DeviceQueue::new(&pin.mapped(), QueueConfig { size, ..good }, None).unwrap_err();
        assert_eq!((refused.rule, refused.packed), (rule, true));
    }
    for (driver, rule) in [(DATA + 2, Rule::RingMisaligned), (HOLE, Rule::RingUnmapped)] {
        let refused = DeviceQueue::new(&pin.mapped(), QueueConfig { driver, ..good }, None).unwrap_err();
        assert_eq!(refused.rule, rule);
    }
    let rom = QueueConfig { desc: ROM, ..good };
    let refused = DeviceQueue::new(&pin.mapped(), rom, None).unwrap_err();
    assert_eq!(refused.rule, Rule::RingUnmapped, "both ends write the packed ring");
}

#[test]
fn p14_reserved_flags_in_a_table() {
    let odd = [(DATA, 1, NEXT | AVAIL | USED | INDIRECT, 9), (DATA, 2, WRITE, 0xFFFF)];
    let element = tabled(Policy::INTEROP, &odd).take();
    assert_eq!(
        (element.readable, element.writable, element.head, element.slots),
        (1, 2, 3, 1)
    );
    tabled(Policy::STRICT, &odd).breaks(Rule::NestedIndirect);
    let unlinked = [(DATA, 1, 0, 0), (DATA, 2, 0, 0), (DATA, 4, 0, 0)];
    assert_eq!(tabled(Policy::STRICT, &unlinked).take().readable, 7);
}

#[test]
fn p15_a_table_in_a_list() {
    never(&[(TABLE, 16, INDIRECT | NEXT, 0), R], Rule::IndirectAndNext);
    never(
        &[(DATA, 16, NEXT, 0), (TABLE, 16, INDIRECT, 0)],
        Rule::IndirectAfterDirect,
    );
    let mut world = World::interop(5, PACKED);
    world.chain(&[(TABLE, 16, INDIRECT, 0)]);
    world.breaks(Rule::IndirectNotNegotiated);
}

#[test]
fn p16_lengths_of_tables() {
    for len in [0, 1, 15, 17] {
        never(&[(TABLE, len, INDIRECT, 0)], Rule::IndirectBadLen);
    }
    never(&[(TABLE, 1025 * 16, INDIRECT, 0)], Rule::IndirectTooLong);
    never(&[(HOLE, 16, INDIRECT, 0)], Rule::IndirectUnmapped);
    with(Policy::STRICT, &[(TABLE, 6 * 16, INDIRECT, 0)]).breaks(Rule::IndirectTooLong);
    assert_eq!(tabled(Policy::STRICT, &[R; 5]).take().descriptors, 5);
    assert_eq!(tabled(Policy::INTEROP, &[R; 6]).take().descriptors, 6);
}

#[test]
fn p18_a_loop_over_has_work_ends_at_what_is_broken() {
    let mut world = with(Policy::INTEROP, &[(TABLE, 16, INDIRECT | NEXT, 0), R]);
    let mut turns = 0;
    while world.has_work() {
        assert!(world.pop().is_err());
        turns += 1;
    }
    assert_eq!(turns, 1);
}

#[test]
fn p19_flags_of_a_used_descriptor() {
    let mut world = with(Policy::STRICT, &[(DATA, 16, WRITE, 0), (DATA, 16, WRITE, 1)]);
    let (first, second) = (world.take(), world.take());
    assert!(world.finish(&first, 0));
    assert!(world.finish(&second, 16));
    assert_eq!(world.get("desc.flags", 0), u64::from(AVAIL | USED));
    assert_eq!(world.get("desc.flags", 1), u64::from(AVAIL | USED | WRITE));
}

#[test]
fn p20_lists_completed_out_of_order() {
    for size in [5, 7] {
        let mut world = World::interop(size, PACKED);
        for round in 0..20 {
            let one = world.give(true);
            let two = world.give(false);
            let (a, b) = (world.take(), world.take());
            if round % 2 == 0 {
                assert!(world.finish(&b, 5));
                assert_eq!(world.used().unwrap(), Some((two, 5)));
                assert!(world.finish(&a, 0));
                assert_eq!(world.used().unwrap(), Some((one, 0)));
            } else {
                assert!(world.complete(&b, 5));
                assert!(world.complete(&a, 0));
                world.show();
                assert_eq!(world.used().unwrap(), Some((two, 5)));
                assert_eq!(world.used().unwrap(), Some((one, 0)));
            }
            assert_eq!(world.driver.free(), size);
        }
    }
}

#[test]
fn p22_p23_n01_event_flags_and_places() {
    // Against a plain count of the places passed, for a small ring.
    let size = 3u16;
    let place = |step: u16| (step % size, step / size % 2 == 0);
    for old in 0..2 * size {
        for count in 1..=size {
            for target in 0..2 * size {
                let (off, wrap) = place(target);
                let event = PackedEvent {
                    off_wrap: off | u16::from(wrap) << 15,
                    flags: 2,
                };
                let passed = (old..old + count).any(|step| place(step) == (off, wrap));
                let decided = packed_need_event(event, true, size, place(old + count), place(old));
                assert_eq!(decided, passed, "from {old} by {count}, event at {target}");
            }
        }
    }
    // Nonsense wakes, disabled does not, whatever the reserved bits are.
    for (flags, features, wants) in [
        (3, EVENT_IDX, true),
        (2, 0, true),
        (0xFFFC, EVENT_IDX, true),
        (0xFFFD, EVENT_IDX, false),
        (1, 0, false),
    ] {
        let mut world = World::interop(5, PACKED | features);
        world.put("driver_event.flags", 0, flags);
        world.put("driver_event.off_wrap", 0, 0xFFFF);
        for _ in 0..2 {
            world.give(true);
            let element = world.take();
            assert!(world.finish(&element, 0));
            assert_eq!(world.call(), wants, "flags {flags:#x}");
        }
    }
}

#[test]
fn p24_slots_made_available_again_while_they_are_in_flight() {
    let mut world = with(Policy::INTEROP, &[R; 5]);
    assert_eq!(world.pop_many(8).unwrap().len(), 5);
    world.desc(0, (DATA, 16, USED, 0));
    world.breaks(Rule::TooManyInFlight);
    // A list that begins where there is room, and does not end there.
    let mut world = with(Policy::INTEROP, &[R; 4]);
    assert_eq!(world.pop_many(8).unwrap().len(), 4);
    world.desc(4, (DATA, 16, AVAIL | NEXT, 0));
    world.desc(0, (DATA, 16, USED, 0));
    assert_eq!(world.breaks(Rule::TooManyInFlight).descriptor, Some(0));
}

#[test]
fn p26_a_head_that_is_taken_back_after_it_was_seen() {
    let mut world = with(Policy::STRICT, &[R]);
    assert!(world.has_work());
    world.put("desc.flags", 0, 0);
    assert_eq!(world.pop().unwrap(), None);
}

#[test]
fn p28_flags_of_the_first_come_last_at_both_ends() {
    let trace = Arc::new(Trace::new());
    let mem = GuestMemory::new(vec![region(0, 0x10_0000)], Some(Arc::clone(&trace))).unwrap();
    let config = config(8, PACKED, Policy::STRICT);
    let pin = mem.pin();
    let traced = pin.mediated().unwrap();
    let mut driver = DriverQueue::new(&traced, config, None, None).unwrap();
    let mut device = DeviceQueue::new(&traced, config, None).unwrap();
    let stores = |trace: &Trace| -> Vec<u64> {
        let log = trace.log();
        log.iter()
            .filter(|r| r.kind == AccessKind::Store)
            .map(|r| r.gpa)
            .collect()
    };
    let flags = |slot: u64| config.desc + 16 * slot + 14;
    trace.clear();
    for _ in 0..3 {
        driver.add(&traced, &[(0x8000, 1)], &[(0x9000, 1)], false).unwrap();
    }
    assert!(!stores(&trace).contains(&flags(0)));
    driver.publish(&traced).unwrap();
    assert_eq!(stores(&trace).last(), Some(&flags(0)));
    let (mut segments, mut elements) = (Vec::new(), Vec::new());
    device.pop_many(&traced, 3, &mut segments, &mut elements).unwrap();
    trace.clear();
    for element in &elements {
        device.complete(&traced, &element.ticket(), 1).unwrap();
    }
    assert!(!stores(&trace).contains(&flags(0)));
    device.publish(&traced).unwrap();
    let log = stores(&trace);
    assert_eq!(log.last(), Some(&flags(0)));
    // 2.8.13: of each used descriptor the flags come after length and id.
    let after = |slot: u64| {
        let place = |gpa| log.iter().position(|&stored| stored == gpa).unwrap();
        place(flags(slot)) > place(flags(slot) - 2) && place(flags(slot)) > place(flags(slot) - 6)
    };
    assert!(after(0) && after(2) && after(4));
}

#[test]
fn p29_p30_order_and_zero_lengths() {
    never(&[(DATA, 16, WRITE | NEXT, 0), R], Rule::OutOfOrder);
    with(Policy::STRICT, &[(HOLE, 0, 0, 0)]).breaks(Rule::ZeroLength);
    let element = with(Policy::INTEROP, &[(HOLE, 0, 0, 0)]).take();
    assert_eq!((element.count, element.slots), (0, 1));
    never(&[(HOLE, 1, 0, 0)], Rule::UnmappedAddress);
    never(&[(u64::MAX, 2, 0, 0)], Rule::AddressWraps);
    never(&[(ROM, 2, WRITE, 0)], Rule::ReadOnlyAddress);
}

#[test]
fn p32_states() {
    let mem = memory();
    let pin = mem.pin();
    let config = config(5, PACKED, Policy::INTEROP);
    let new = |avail, used| DeviceQueue::new(&pin.mapped(), config, Some(QueueState { avail, used }));
    // Beyond the ring; or used before avail was, by a slot or by laps.
    for (avail, used) in [
        (5, 0),
        (0, 0x8005),
        (0x8001, 0x8002),
        (0x8001, 0),
        (0, 1),
        (0x7FFF, 0x7FFF),
    ] {
        let refused = new(avail, used).unwrap_err();
        assert_eq!(refused.rule, Rule::StateOutOfRange, "{avail:#x} {used:#x}");
    }
    for (avail, used) in [(0x8004, 0x8000), (0, 0x8000), (0x8002, 2), (1, 0x8003), (0x8000, 4)] {
        let state = QueueState { avail, used };
        assert_eq!(new(avail, used).unwrap().state(), state);
    }
}
