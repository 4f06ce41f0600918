//! The record lies in memory of the other side: whatever it says is judged before anything is done.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::recorded::{BYTES, Recorded, SIZE, content, entry, flying, part};
use common::{AVAIL, NEXT, PACKED, USED, World, config, files};
use rustix::fs::ftruncate;
use virtio_test::error::QueueError;
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, QueueState, StartError};
use virtio_test::rule::Rule;

#[test]
fn what_is_left_comes_first_and_then_what_is_new() {
    for features in [0, PACKED] {
        let mut recorded = Recorded::new(features);
        let heads = flying(&recorded, features);
        assert_eq!(heads.len(), 2);
        // A front-end need not know where the ring goes on.
        recorded.restart(None).unwrap();
        let world = &mut recorded.world;
        assert_eq!((world.device.left(), world.device.in_flight()), (2, 2));
        assert!(world.has_work());
        let (first, second, third) = (world.take(), world.take(), world.take());
        assert_eq!((first.descriptors, second.descriptors, third.descriptors), (1, 1, 2));
        assert_eq!(world.pop().unwrap(), None);
        // They are not the newest, and the older ones are in no ring any more.
        assert!(world.device.unpop(&first.ticket()).is_err());
        for element in [third, first, second] {
            assert!(world.finish(&element, 0));
        }
        for _ in 0..3 {
            assert!(world.used().unwrap().is_some());
        }
        assert_eq!((world.used().unwrap(), world.driver.free()), (None, SIZE));
        assert!(flying(&recorded, features).is_empty());
    }
}

#[test]
fn whoever_takes_over_tells_the_driver_again() {
    let mut recorded = Recorded::new(0);
    assert!(recorded.world.call(), "something was published");
    assert!(!recorded.world.call());
    recorded.restart(None).unwrap();
    assert!(recorded.world.call(), "nobody knows whether the driver was told");
    recorded.file = files::file(BYTES as u64);
    recorded.restart(Some(QueueState { avail: 8, used: 6 })).unwrap();
    assert!(!recorded.world.call(), "a new record says nothing of the past");
}

#[test]
fn a_chain_that_was_left_is_put_back_here_and_not_into_the_ring() {
    for features in [0, PACKED] {
        let mut recorded = Recorded::new(features);
        recorded.restart(None).unwrap();
        let world = &mut recorded.world;
        let state = world.device.state();
        let first = world.take();
        let segments = world.segments.clone();
        assert!(world.device.unpop(&first.ticket()).is_err());
        world.device.put_back(&first, &segments);
        assert_eq!((world.device.state(), world.device.in_flight()), (state, 2));
        let again = world.take();
        assert_eq!((again.head, again.seq), (first.head, first.seq));
        assert_eq!(flying(&recorded, features).len(), 2);
    }
}

#[test]
fn an_older_one_that_waits_is_no_part_of_the_ring_when_a_newer_one_goes_back() {
    for features in [0, PACKED] {
        let mut recorded = Recorded::new(features);
        recorded.restart(None).unwrap();
        let world = &mut recorded.world;
        let (first, second) = (world.take(), world.take());
        let segments = world.segments.clone();
        let state = world.device.state();
        let third = world.take();
        world.device.put_back(&second, &segments[second.first..]);
        world.device.unpop(&third.ticket()).unwrap();
        assert_eq!((world.device.state(), world.device.in_flight()), (state, 2));
        assert_eq!(world.take().head, second.head);
        assert_eq!(world.take().head, third.head);
        assert_ne!(first.head, second.head);
    }
}

#[test]
fn they_come_in_the_order_in_which_they_were_taken() {
    for features in [0, PACKED] {
        let mut recorded = Recorded::new(features);
        recorded.restart(None).unwrap();
        let mut order = [0; 3];
        order.fill_with(|| recorded.world.take().head);
        for _ in 0..2 {
            recorded.restart(None).unwrap();
            assert_eq!(recorded.world.device.left(), 3);
            for head in order {
                assert_eq!(recorded.world.take().head, head);
            }
        }
        // The numbers say so, and not the places.
        let entries = flying(&recorded, features);
        for (counter, &entry) in (0..).zip(entries.iter().rev()) {
            recorded.put(self::entry(features, entry) + 8, counter, 8);
        }
        recorded.restart(None).unwrap();
        let mut last = None;
        while recorded.world.device.left() > 0 {
            let entry = recorded.world.take().entry;
            assert!(last.is_none_or(|last| entry < last));
            last = Some(entry);
        }
    }
}

#[test]
fn what_was_left_counts_against_the_size_of_a_packed_ring() {
    let mut recorded = Recorded::new(PACKED);
    recorded.restart(None).unwrap();
    let world = &mut recorded.world;
    // The ninth buffer, of the slots 0 and 1, and whatever a driver may write into the six others: there is room for four.
    for slot in 2..8 {
        world.desc(slot, (common::DATA, 16, USED, 9));
    }
    for _ in 0..7 {
        world.take();
    }
    world.breaks(Rule::TooManyInFlight);
}

#[test]
fn a_split_record_that_cannot_be() {
    // Header: features 0, version 8, desc_num 10, last_batch_head 12, used_idx 14. State: inflight 0, next 6.
    for (at, value, bytes, words) in [
        (0, 1, 8, "features"),
        (0, 1 << 63, 8, "features"),
        (8, 2, 2, "version 2"),
        (8, 0xffff, 2, "version 65535"),
        (10, 0, 2, "states of 0"),
        (10, 7, 2, "states of 7"),
        (10, 9, 2, "states of 9"),
        (10, 0xffff, 2, "states of 65535"),
        (14, 0, 2, "twice"),
        (14, 0xfffd, 2, "9 buffers were used"),
        (14, 0x8000, 2, "buffers were used"),
        (14, 7, 2, "65535 buffers were used"),
        (entry(0, 2), 2, 1, "inflight 2"),
        (entry(0, 2), 255, 1, "inflight 255"),
    ] {
        let mut recorded = Recorded::new(0);
        recorded.put(at, value, bytes);
        recorded.refused(words);
    }
    // The list of the last batch: begins or goes on beyond the ring, or in a circle.
    for (head, next, words) in [
        (SIZE, 0, "descriptor 8 of 8"),
        (0xffff, 0, "65535"),
        (2, 2, "twice"),
        (2, 0xfff0, "65520"),
    ] {
        let mut recorded = Recorded::new(0);
        recorded.put(14, 4, 2);
        recorded.put(12, head.into(), 2);
        recorded.put(entry(0, 2) + 6, next, 2);
        recorded.refused(words);
    }
}

#[test]
fn a_packed_record_that_cannot_be() {
    // Header: version 8, desc_num 10, free_head 12, old_free_head 14, used_idx 16, old 18, wrap 20, old 21.
    // State: inflight 0, next 2, last 4, num 6, counter 8, id 16, flags 18, len 20, addr 24.
    let flying = flying(&Recorded::new(PACKED), PACKED);
    let (one, other) = (entry(PACKED, flying[0]), entry(PACKED, flying[1]));
    let free = |recorded: &Recorded| u64::from(content(&recorded.file)[12]);
    for (at, value, bytes, words) in [
        (0, 1, 8, "features"),
        (8, 2, 2, "version 2"),
        (10, 0, 2, "states of 0"),
        (10, 0xffff, 2, "states of 65535"),
        (14, 0xffff, 2, "neither free"),
        (16, u64::from(SIZE), 2, "used indices 8"),
        (16, 0xffff, 2, "used indices 65535"),
        (18, u64::from(SIZE), 2, "used indices"),
        (20, 2, 1, "wrap counters 2"),
        (21, 255, 1, "and 255"),
        (one, 2, 1, "inflight 2"),
        (one, 255, 1, "inflight 255"),
        (one + 6, 0, 2, "stands for 0"),
        (one + 6, 9, 2, "stands for 9"),
        (one + 6, 0xffff, 2, "stands for 65535"),
        (one + 4, 0xffff, 2, "ends elsewhere"),
        (one + 18, u64::from(NEXT), 2, "ends elsewhere"),
        (other, 0, 1, "neither free"),
    ] {
        let mut recorded = Recorded::new(PACKED);
        recorded.put(at, value, bytes);
        recorded.refused(words);
    }
    // A buffer of two descriptors that goes on where it must not: nowhere, in a free entry, in another's.
    let free_entry = free(&Recorded::new(PACKED));
    for (next, words) in [
        (0xffff, "there is not"),
        (free_entry, "another's"),
        (flying[1], "another's"),
    ] {
        let mut recorded = Recorded::new(PACKED);
        recorded.put(one + 6, 2, 2);
        recorded.put(one + 4, next, 2);
        recorded.put(one + 18, u64::from(NEXT), 2);
        recorded.put(one + 2, next, 2);
        recorded.refused(words);
    }
    // A list of free entries that comes back to where it was.
    let mut recorded = Recorded::new(PACKED);
    recorded.put(entry(PACKED, free_entry) + 2, free_entry, 2);
    recorded.refused("comes back");
}

#[test]
fn a_record_for_a_smaller_ring_is_no_record_for_this_one() {
    let mut recorded = Recorded::new(0);
    let config = config(2 * SIZE, 0, Policy::INTEROP);
    let pin = recorded.world.mem.pin();
    let error = DeviceQueue::recorded(&pin.mapped(), config, None, part(&recorded.file)).unwrap_err();
    assert!(error.to_string().contains("a ring of 16 and a record for 8"), "{error}");
    drop(pin);
    recorded.restart(None).unwrap();
}

#[test]
fn descriptors_in_the_record_are_judged_like_those_of_a_ring() {
    let flying = flying(&Recorded::new(PACKED), PACKED);
    let one = entry(PACKED, flying[0]);
    for (at, value, bytes, rule) in [
        (24, u64::MAX, 8, Rule::AddressWraps),
        (24, 0xffff_0000_0000, 8, Rule::UnmappedAddress),
        (18, 4, 2, Rule::IndirectNotNegotiated),
    ] {
        let mut recorded = Recorded::new(PACKED);
        recorded.put(one + at, value, bytes);
        recorded.restart(None).unwrap();
        let fault = recorded.world.breaks(rule);
        assert!(fault.address.is_some() || rule == Rule::IndirectNotNegotiated);
    }
    // Of a split ring they lie in guest memory, which has changed meanwhile.
    let mut recorded = Recorded::new(0);
    let heads = self::flying(&recorded, 0);
    recorded.world.put("desc.addr", heads[0], u64::MAX);
    recorded.restart(None).unwrap();
    recorded.world.breaks(Rule::AddressWraps);
}

/// 2.8.19: a list in the record has no table behind direct descriptors; the list of one does not show it.
#[test]
fn a_list_in_the_record_has_no_table_at_its_end() {
    let mut recorded = Recorded {
        world: World::interop(SIZE, PACKED),
        file: files::file(BYTES as u64),
    };
    recorded.restart(None).unwrap();
    recorded.world.give(false);
    assert_eq!(recorded.world.take().slots, 2);
    // A fresh record is filled from its first entry on; flags are at 18.
    recorded.put(entry(PACKED, 1) + 18, 4, 2);
    recorded.restart(None).unwrap();
    recorded.world.breaks(Rule::IndirectAfterDirect);
}

#[test]
fn a_batch_that_somebody_else_left_half_done_is_settled_whole() {
    // Two more are used at once, up to the ring's index; the record has the list, and the flags are as before.
    let mut recorded = Recorded::new(0);
    let heads = flying(&recorded, 0);
    recorded.put(entry(0, heads[1]) + 6, heads[0], 2);
    recorded.put(12, heads[1], 2);
    recorded.world.put("used.idx", 0, 8);
    recorded.restart(None).unwrap();
    assert_eq!(recorded.world.device.state(), QueueState { avail: 8, used: 8 });
    assert_eq!(recorded.world.device.left(), 0);
    assert!(flying(&recorded, 0).is_empty());
    assert_eq!(content(&recorded.file)[14..16], [8, 0]);
    // The same of a packed ring: whether the update holds is seen by the descriptor at the old place.
    for (flags, left) in [(AVAIL, 2), (AVAIL | USED, 0)] {
        let mut recorded = Recorded::new(PACKED);
        let heads = flying(&recorded, PACKED);
        let free = u64::from(content(&recorded.file)[12]);
        recorded.put(entry(PACKED, heads[0]) + 2, free, 2);
        recorded.put(entry(PACKED, heads[1]) + 2, heads[0], 2);
        recorded.put(12, heads[1], 2);
        recorded.put(16, 0, 2);
        recorded.put(20, 0, 1);
        recorded.world.put("desc.flags", 6, flags.into());
        recorded.restart(None).unwrap();
        assert_eq!(recorded.world.device.left(), left);
        let place = |slot: u16, wrap: u16| slot | wrap << 15;
        let (avail, used) = (place(0, 0), if left == 2 { place(6, 1) } else { place(0, 0) });
        assert_eq!(recorded.world.device.state(), QueueState { avail, used });
        // The record says so too, twice.
        let bytes = content(&recorded.file);
        let [slot, wrap] = [used & 0x7fff, used >> 15].map(|half| u8::try_from(half).unwrap());
        assert_eq!(bytes[16..22], [slot, 0, slot, 0, wrap, wrap]);
        assert_eq!(bytes[12..14], bytes[14..16]);
    }
}

#[test]
fn nothing_is_published_when_the_record_is_lost() {
    for features in [0, PACKED] {
        let mut recorded = Recorded::new(features);
        let before = recorded.world.device.state();
        let pin = recorded.world.mem.pin();
        ftruncate(&recorded.file, 0).unwrap();
        let mut segments = Vec::new();
        // The ninth buffer is taken and then not handed out: it could be recorded nowhere.
        let fault = recorded.world.device.pop(&pin.mapped(), &mut segments).unwrap_err();
        assert_eq!(fault.rule, Rule::MemoryLost);
        assert!(fault.message.contains("the record"), "{fault}");
        assert_eq!((recorded.world.device.state(), segments.len()), (before, 0));
        drop(pin);

        let mut recorded = Recorded::new(features);
        let element = recorded.world.take();
        let used = recorded.world.device.state().used;
        ftruncate(&recorded.file, 0).unwrap();
        let pin = recorded.world.mem.pin();
        let device = &mut recorded.world.device;
        assert!(device.complete(&pin.mapped(), &element.ticket(), 0).unwrap());
        let fault = device.publish(&pin.mapped()).unwrap_err();
        assert_eq!(fault.rule, Rule::MemoryLost);
        assert_eq!(device.state().used, used);
        drop(pin);
        assert_eq!(recorded.world.used().unwrap(), None);
    }
}

#[test]
fn a_file_that_was_cut_short_is_no_record() {
    let file = files::file(BYTES as u64);
    let part = part(&file);
    ftruncate(&file, 0).unwrap();
    let world = World::interop(SIZE, 0);
    let pin = world.mem.pin();
    let error = DeviceQueue::recorded(&pin.mapped(), config(SIZE, 0, Policy::INTEROP), None, part).unwrap_err();
    assert!(matches!(error, StartError::Record(_)), "{error:?}");
}

#[test]
fn a_ring_that_cannot_be_is_told_from_a_record_that_cannot() {
    let recorded = Recorded::new(0);
    let pin = recorded.world.mem.pin();
    let mut config = config(SIZE, 0, Policy::INTEROP);
    config.desc = common::HOLE;
    let error = DeviceQueue::recorded(&pin.mapped(), config, None, part(&recorded.file)).unwrap_err();
    assert!(matches!(error, StartError::Fault(fault) if fault.rule == Rule::RingUnmapped));
}

/// Bytes without a meaning, some of them with one: the queue begins or not, works or breaks, and comes to an end.
#[test]
fn any_record_ends_in_one_way_or_the_other() {
    let mut state: u64 = 7;
    let mut roll = move |sides: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % sides
    };
    let (mut begun, mut broken, mut refused) = (0, 0, 0);
    for case in 0..6000 {
        let features = if case % 2 == 0 { 0 } else { PACKED };
        let mut recorded = Recorded::new(features);
        let size = entry(features, SIZE.into());
        for _ in 0..=roll(6) {
            let at = roll(size);
            let value = [0, 1, 2, 7, 8, 255][usize::try_from(roll(6)).unwrap()];
            // Past the version most of the time, which is all that is looked at when it is wrong.
            if !(8..12).contains(&at) || roll(8) == 0 {
                recorded.put(at, value, 1);
            }
        }
        match recorded.restart(None) {
            Err(_) => refused += 1,
            Ok(()) => loop {
                match recorded.world.pop() {
                    Ok(Some(element)) => {
                        let pin = recorded.world.mem.pin();
                        let device = &mut recorded.world.device;
                        let done = device.complete(&pin.mapped(), &element.ticket(), 0);
                        assert!(done.is_ok() || matches!(done, Err(QueueError::Violation(_))));
                        device.publish(&pin.mapped()).unwrap();
                    }
                    Ok(None) => {
                        begun += 1;
                        break;
                    }
                    Err(_) => {
                        broken += 1;
                        break;
                    }
                }
            },
        }
    }
    assert!(
        begun > 500 && broken > 50 && refused > 500,
        "{begun} {broken} {refused}"
    );
}
