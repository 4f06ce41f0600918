//! The device end of a split ring against the rows A, C, B, I and U of the robustness catalogue.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::{
    BIG, DATA, Desc, EVENT_IDX, HOLE, INDIRECT, INDIRECT_DESC, NEXT, NEXT_DOOR, ROM, TABLE, WRITE, World, config,
    memory,
};
use virtio_test::chain::Element;
use virtio_test::error::Fault;
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueState};
use virtio_test::rule::Rule;

const R: Desc = (DATA, 16, 0, 0);

fn with(policy: Policy, descs: &[Desc]) -> World {
    let world = World::new(8, INDIRECT_DESC, policy);
    world.chain(descs);
    world
}

fn refused(policy: Policy, descs: &[Desc], rule: Rule) -> Fault {
    with(policy, descs).breaks(rule)
}

/// Both policies refuse it.
fn never(descs: &[Desc], rule: Rule) -> Fault {
    refused(Policy::STRICT, descs, rule);
    refused(Policy::INTEROP, descs, rule)
}

fn taken(policy: Policy, descs: &[Desc]) -> Element {
    with(policy, descs).take()
}

/// An INDIRECT descriptor to a table of these entries at `TABLE`.
fn tabled(policy: Policy, head: Desc, entries: &[Desc]) -> World {
    let world = World::new(8, INDIRECT_DESC, policy);
    for (i, &entry) in (0u64..).zip(entries) {
        world.entry(head.0, i, entry);
    }
    world.chain(&[head]);
    world
}

fn table(len: u32) -> Desc {
    (TABLE, len, INDIRECT, 0)
}

// ------------------------------------------------------------------------------------------------- A: the avail ring

#[test]
fn a01_avail_idx_too_far_ahead() {
    for idx in [9, 10, 0x8000, 0xFFFF] {
        let mut world = World::interop(8, 0);
        world.put("avail.idx", 0, idx);
        let fault = world.breaks(Rule::AvailIdxTooFar);
        assert_eq!(
            (fault.position, fault.address),
            (Some(0), Some(world.at("avail.idx", 0)))
        );
    }
}

#[test]
fn a02_a_full_ring_is_taken_in_any_order_of_completion() {
    for size in [1, 2, 8, 32768] {
        let mut world = World::interop(size, 0);
        world.full_ring(|_| ());
        world.full_ring(|elements| elements.reverse());
        world.full_ring(|elements| elements.rotate_left(usize::from(size / 3)));
    }
}

#[test]
fn a03_indices_wrap_at_their_16_bits() {
    for size in [1, 2, 256] {
        let mut world = World::started(size, EVENT_IDX, 0xFFF0);
        if size > 1 {
            world.traffic(40, true);
        }
        world.traffic(40, false);
        world.full_ring(|elements| elements.reverse());
        assert!(world.device.state().used < 1000);
    }
}

#[test]
fn a04_a_head_beyond_the_table() {
    for head in [8, 9, 0x7FFF, 0x8000, 0xFFFF] {
        let mut world = World::interop(8, 0);
        world.avail(head);
        let fault = world.breaks(Rule::HeadOutOfRange);
        assert_eq!((fault.head, fault.descriptor), (Some(head), None));
    }
}

#[test]
fn a05_a_head_twice_is_two_chains_whose_completions_are_not_confused() {
    let mut world = World::interop(8, 0);
    world.chain(&[(DATA, 16, WRITE, 0)]);
    world.avail(0);
    let (first, second) = (world.take(), world.take());
    assert_eq!((first.head, second.head, world.device.in_flight()), (0, 0, 2));
    assert!(world.finish(&second, 2));
    assert!(world.finish(&first, 1));
    assert_eq!((world.get("used.ring.len", 0), world.get("used.ring.len", 1)), (2, 1));
    assert_eq!((world.device.in_flight(), world.get("used.idx", 0)), (0, 2));
    let mut world = with(Policy::STRICT, &[R]);
    world.avail(0);
    let first = world.take();
    world.breaks(Rule::HeadInFlight);
    assert!(!world.finish(&first, 0), "after the latch it is dropped");
    assert_eq!(world.get("used.idx", 0), 0);
}

#[test]
fn a06_all_slots_hold_one_head() {
    let mut world = World::interop(8, 0);
    world.chain(&[R]);
    for _ in 1..8 {
        world.avail(0);
    }
    let elements = world.pop_many(32).unwrap();
    assert_eq!(elements.len(), 8);
    world.avail(0);
    world.breaks(Rule::TooManyInFlight);
}

#[test]
fn a07_chains_that_share_descriptors_are_taken() {
    let mut world = with(
        Policy::STRICT,
        &[(DATA, 1, NEXT, 2), (DATA, 2, NEXT, 2), (DATA, 4, 0, 0)],
    );
    world.avail(1);
    assert_eq!((world.take().readable, world.take().readable), (5, 6));
}

#[test]
fn a08_a14_a15_what_the_driver_writes_where_it_should_not_is_not_read() {
    let mut world = World::interop(8, 0);
    world.put("avail.flags", 0, 0xFFFE);
    world.put("used.idx", 0, 0x1234);
    world.put("used.flags", 0, 0xFFFF);
    let token = world.give(false);
    let element = world.take();
    assert!(world.finish(&element, 7));
    assert!(world.call());
    assert_eq!((world.get("used.idx", 0), world.used().unwrap()), (1, Some((token, 7))));
    assert_eq!(world.pop().unwrap(), None);
    assert_eq!(world.get("used.flags", 0), 0, "kicks are asked for");
}

#[test]
fn a09_an_avail_idx_that_goes_back() {
    let mut world = with(Policy::INTEROP, &[R]);
    world.take();
    world.put("avail.idx", 0, 0);
    world.breaks(Rule::AvailIdxTooFar);
    for policy in [Policy::INTEROP, Policy::STRICT] {
        let mut world = with(policy, &[R]);
        for head in 1..5 {
            world.desc(head, R);
            world.avail(u16::try_from(head).unwrap());
        }
        world.take();
        world.put("avail.idx", 0, 2);
        if policy == Policy::STRICT {
            world.breaks(Rule::AvailIdxDecreased);
        } else {
            assert_eq!(world.take().head, 1);
        }
    }
}

#[test]
fn a13_rings_that_are_not_all_there_are_refused() {
    let mem = memory();
    let pin = mem.pin();
    let good = config(8, 0, Policy::INTEROP);
    let new = |config| DeviceQueue::new(&pin.mapped(), config, None).unwrap_err().rule;
    let unmapped = [
        virtio_test::queue::QueueConfig { desc: HOLE, ..good },
        virtio_test::queue::QueueConfig {
            driver: HOLE - 16,
            ..good
        },
        virtio_test::queue::QueueConfig { device: ROM, ..good },
        virtio_test::queue::QueueConfig { desc: !15, ..good },
    ];
    for config in unmapped {
        assert_eq!(new(config), Rule::RingUnmapped);
    }
    let misaligned = [
        virtio_test::queue::QueueConfig { desc: DATA + 8, ..good },
        virtio_test::queue::QueueConfig {
            driver: DATA + 1,
            ..good
        },
        virtio_test::queue::QueueConfig {
            device: DATA + 2,
            ..good
        },
    ];
    for config in misaligned {
        assert_eq!(new(config), Rule::RingMisaligned);
    }
    for (size, rule) in [
        (0, Rule::QueueSizeZero),
        (3, Rule::QueueSizeNotPowerOfTwo),
        (32769, Rule::QueueSizeTooBig),
        (65536, Rule::QueueSizeTooBig),
        (u32::MAX, Rule::QueueSizeTooBig),
    ] {
        assert_eq!(new(virtio_test::queue::QueueConfig { size, ..good }), rule);
    }
    let state = QueueState { avail: 9, used: 0 };
    let refused = DeviceQueue::new(&pin.mapped(), good, Some(state)).unwrap_err();
    assert_eq!(refused.rule, Rule::StateOutOfRange);
    // A fresh driver zeroes all three areas or none: the device's is not ours to write here.
    mem.write(good.desc, &[7; 16]).unwrap();
    let rom = virtio_test::queue::QueueConfig { device: ROM, ..good };
    let refused = DriverQueue::new(&pin.mapped(), rom, None, None).unwrap_err();
    let mut first = [0];
    mem.read(good.desc, &mut first).unwrap();
    assert_eq!((refused.rule, first), (Rule::RingUnmapped, [7]));
}

#[test]
fn a16_nothing_available_is_nothing_however_often_it_is_asked() {
    let mut world = World::interop(8, 0);
    for _ in 0..1000 {
        assert!(!world.has_work());
        assert_eq!(world.pop().unwrap(), None);
    }
}

// ---------------------------------------------------------------------------------------------------- C: descriptors

#[test]
fn c01_next_beyond_the_table() {
    for next in [8, 0xFFFF] {
        let fault = never(&[(DATA, 16, NEXT, next)], Rule::NextOutOfRange);
        assert_eq!((fault.head, fault.descriptor), (Some(0), Some(0)));
    }
}

#[test]
fn c02_c03_loops() {
    never(&[(DATA, 16, NEXT, 0)], Rule::ChainTooLong);
    never(&[(DATA, 16, NEXT, 1), (DATA, 16, NEXT, 0)], Rule::ChainTooLong);
    never(
        &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 2), (DATA, 1, NEXT, 1)],
        Rule::ChainTooLong,
    );
}

#[test]
fn c04_a_chain_as_long_as_the_queue() {
    let mut descs: Vec<Desc> = (1..=8).map(|next| (DATA, 16, NEXT, next)).collect();
    descs[7].2 = 0;
    assert_eq!(taken(Policy::STRICT, &descs).descriptors, 8);
}

#[test]
fn c06_c09_next_without_its_flag_and_unknown_flags_are_ignored() {
    let element = taken(Policy::STRICT, &[(DATA, 16, 0xFFF8, 0xFFFF)]);
    assert_eq!((element.descriptors, element.readable), (1, 16));
}

#[test]
fn c07_readable_after_writable() {
    let descs = [(DATA, 16, WRITE | NEXT, 1), R];
    never(&descs, Rule::OutOfOrder);
    let policy = Policy {
        mixed_order: true,
        ..Policy::INTEROP
    };
    let element = taken(policy, &descs);
    assert_eq!((element.readable, element.writable), (16, 16));
}

// -------------------------------------------------------------------------------------------------------- B: buffers

#[test]
fn b01_b02_zero_lengths() {
    refused(Policy::STRICT, &[(DATA, 0, 0, 0)], Rule::ZeroLength);
    let mut world = with(
        Policy::INTEROP,
        &[(HOLE, 0, NEXT, 1), (DATA, 4, NEXT, 2), (HOLE, 0, WRITE, 0)],
    );
    let element = world.take();
    assert_eq!((element.count, element.readable, element.writable), (1, 4, 0));
    assert!(world.finish(&element, 0));
}

#[test]
fn b03_b06_b08_b10_not_wholly_mapped() {
    let buffers = [
        (HOLE, 1),
        (1 << 52, 16),
        (HOLE - 8, 9),
        (ROM + 0x1000, 1),
        (DATA, u32::MAX),
        (0x1F_FFFF, 2 + 0x1_1000),
    ];
    for (addr, len) in buffers {
        let fault = never(&[(addr, len, 0, 0)], Rule::UnmappedAddress);
        assert!(fault.address.unwrap() >= addr);
    }
}

#[test]
fn b04_addresses_that_wrap() {
    for (addr, len) in [(u64::MAX - 7, 16), (u64::MAX, 2), (u64::MAX - 7, u32::MAX)] {
        never(&[(addr, len, 0, 0)], Rule::AddressWraps);
    }
}

#[test]
fn b05_b17_to_the_last_byte_across_regions_and_from_address_0() {
    let mut world = with(
        Policy::STRICT,
        &[(NEXT_DOOR - 4, 8, NEXT, 1), (HOLE - 4, 4, NEXT, 2), (0, 1, WRITE, 0)],
    );
    world.mem.write(NEXT_DOOR - 4, b"12345678").unwrap();
    let element = world.take();
    let (mut bytes, pin) = ([0; 12], world.mem.pin());
    assert_eq!(world.iov(&element).read(&pin.mapped(), 0, &mut bytes).unwrap(), 12);
    assert_eq!(&bytes[..8], b"12345678");
}

#[test]
fn b09_2_to_the_32_bytes_and_no_more() {
    let mut descs = vec![(BIG, 256 << 20, NEXT, 0); 16];
    for (i, desc) in (1..).zip(&mut descs) {
        desc.3 = i;
    }
    descs[15].2 = WRITE;
    let mut world = World::interop(32, 0);
    world.chain(&descs);
    let element = world.take();
    assert_eq!(element.readable + element.writable, 1 << 32);
    descs[15].2 = WRITE | NEXT;
    descs.push((DATA, 1, WRITE, 0));
    let mut world = World::interop(32, 0);
    world.chain(&descs);
    world.breaks(Rule::ChainTooBig);
}

#[test]
fn b09_a_used_length_cannot_say_2_to_the_32() {
    let mut descs = vec![(BIG, 256 << 20, NEXT | WRITE, 0); 16];
    for (i, desc) in (1..).zip(&mut descs) {
        desc.3 = i;
    }
    descs[15].2 = WRITE;
    let mut world = World::interop(32, 0);
    world.chain(&descs);
    let element = world.take();
    assert!(world.finish(&element, 1 << 32));
    assert_eq!(world.get("used.ring.len", 0), u64::from(u32::MAX));
}

#[test]
fn b12_a_buffer_over_its_own_ring() {
    let mut world = World::interop(8, 0);
    let ring = world.layout.desc;
    world.chain(&[(ring, 128, WRITE, 0)]);
    let element = world.take();
    let pin = world.mem.pin();
    assert_eq!(world.iov(&element).write(&pin.mapped(), 0, &[0xFF; 128]).unwrap(), 128);
    drop(pin);
    assert!(world.finish(&element, 128));
    world.avail(0);
    world.breaks(Rule::IndirectNotNegotiated);
}

#[test]
fn b15_writable_where_only_reading_is_allowed() {
    assert_eq!(taken(Policy::STRICT, &[(ROM, 16, 0, 0)]).readable, 16);
    never(&[(ROM, 16, WRITE, 0)], Rule::ReadOnlyAddress);
}

// ------------------------------------------------------------------------------------------------ I: indirect tables

#[test]
fn i01_indirect_without_the_feature() {
    let mut world = World::interop(8, 0);
    world.chain(&[table(16)]);
    world.breaks(Rule::IndirectNotNegotiated);
}

#[test]
fn i02_i05_indirect_with_next() {
    never(&[(TABLE, 16, INDIRECT | NEXT, 1), R], Rule::IndirectAndNext);
}

#[test]
fn i03_i15_nested_tables_and_what_lies_behind_the_end() {
    for policy in [Policy::STRICT, Policy::INTEROP] {
        tabled(policy, table(16), &[(DATA, 16, INDIRECT, 0)]).breaks(Rule::NestedIndirect);
        let element = tabled(policy, table(32), &[R, (HOLE, 1, INDIRECT, 0)]).take();
        assert_eq!(element.descriptors, 1);
    }
}

#[test]
fn i06_i07_lengths_of_tables() {
    for len in [0, 1, 15, 17, 31, 24] {
        never(&[table(len)], Rule::IndirectBadLen);
    }
    let policy = Policy {
        indirect_remainder: true,
        ..Policy::INTEROP
    };
    assert_eq!(tabled(policy, table(31), &[R]).take().descriptors, 1);
    tabled(policy, table(15), &[R]).breaks(Rule::IndirectBadLen);
}

#[test]
fn i08_sizes_of_tables() {
    let entries = |count: u16| -> Vec<Desc> {
        let last = count - 1;
        (0..count)
            .map(|i| (DATA, 1, if i == last { 0 } else { NEXT }, i + 1))
            .collect()
    };
    assert_eq!(tabled(Policy::STRICT, table(128), &entries(8)).take().descriptors, 8);
    tabled(Policy::STRICT, table(144), &entries(9)).breaks(Rule::IndirectTooLong);
    assert_eq!(tabled(Policy::INTEROP, table(144), &entries(9)).take().descriptors, 9);
    assert_eq!(
        tabled(Policy::INTEROP, table(1024 * 16), &entries(1024))
            .take()
            .descriptors,
        1024
    );
    for len in [1025 * 16, 65536 * 16, 0xFFFF_FFF0] {
        refused(Policy::INTEROP, &[table(len)], Rule::IndirectTooLong);
    }
    let policy = Policy {
        max_indirect: 65536,
        ..Policy::INTEROP
    };
    refused(policy, &[table(65537 * 16)], Rule::IndirectTooLong);
    // Strict: no chain longer than the queue, its direct descriptors included.
    let world = World::new(8, INDIRECT_DESC, Policy::STRICT);
    for (i, entry) in (0..).zip(entries(8)) {
        world.entry(TABLE, i, entry);
    }
    world.chain(&[(DATA, 1, NEXT, 1), table(128)]);
    let mut world = world;
    world.breaks(Rule::ChainTooLong);
}

#[test]
fn i10_i16_i17_anywhere_even_unaligned_and_across_regions_with_write_ignored() {
    for at in [TABLE + 3, TABLE + 8, NEXT_DOOR - 24, NEXT_DOOR - 5] {
        let head = (at, 32, INDIRECT | WRITE, 0);
        let mut world = tabled(Policy::STRICT, head, &[(DATA, 3, NEXT, 1), (DATA, 5, WRITE, 0)]);
        let element = world.take();
        assert_eq!((element.readable, element.writable), (3, 5));
    }
    let mut world = tabled(Policy::STRICT, (common::RING + 64, 16, INDIRECT, 0), &[R]);
    assert_eq!(world.take().readable, 16);
}

#[test]
fn i11_tables_that_are_not_wholly_mapped() {
    for addr in [HOLE, HOLE - 16, u64::MAX - 7] {
        never(&[(addr, 32, INDIRECT, 0)], Rule::IndirectUnmapped);
    }
}

#[test]
fn i12_i13_next_and_loops_in_tables() {
    for policy in [Policy::STRICT, Policy::INTEROP] {
        tabled(policy, table(32), &[(DATA, 1, NEXT, 2), R]).breaks(Rule::NextOutOfRange);
        tabled(policy, table(32), &[(DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0)]).breaks(Rule::ChainTooLong);
    }
}

#[test]
fn i14_direct_descriptors_before_a_table() {
    let world = World::new(8, INDIRECT_DESC, Policy::STRICT);
    world.entry(TABLE, 0, (DATA, 2, WRITE, 0));
    world.chain(&[(DATA, 1, NEXT, 1), table(16)]);
    let mut world = world;
    let element = world.take();
    assert_eq!((element.readable, element.writable, element.descriptors), (1, 2, 2));
}

#[test]
fn i18_a_driver_end_writes_tables_that_the_device_end_takes() {
    let mut world = World::new(8, INDIRECT_DESC, Policy::STRICT);
    for _ in 0..20 {
        let token = world.add_indirect(&[(DATA, 3), (DATA + 8, 4)], &[(DATA + 16, 5)]);
        world.publish();
        let element = world.take();
        assert_eq!((element.readable, element.writable, element.slots), (7, 5, 1));
        assert!(world.finish(&element, 5));
        assert_eq!(world.used().unwrap(), Some((token, 5)));
    }
}

// ----------------------------------------------------------------------------------------------------- U: completion

#[test]
fn u05_u07_a_batch_over_the_wrap_is_one_publication() {
    let mut world = World::started(16, 0, 0xFFF8);
    world.full_ring(|elements| elements.reverse());
    assert_eq!(world.get("used.idx", 0), 8);
}

#[test]
fn r8_shared_descriptors_do_not_make_a_batch_of_any_size() {
    let mut world = World::interop(32768, 0);
    let size = 32767;
    for i in 0..size {
        world.put("desc.addr", i, DATA);
        world.put("desc.len", i, 1);
        world.put("desc.flags", i, u64::from(NEXT));
        world.put("desc.next", i, i + 1);
    }
    world.put("desc.addr", size, DATA);
    world.put("desc.len", size, 1);
    for i in 0..=size {
        world.put("avail.ring", i, 0);
    }
    world.put("avail.idx", 0, 32768);
    let elements = world.pop_many(32768).unwrap();
    assert!((1..=5).contains(&elements.len()), "{} chains", elements.len());
    assert!(world.has_work());
}
