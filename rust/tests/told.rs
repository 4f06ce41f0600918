//! What an access to a ring that fails becomes: whoever made it says so, at every single one. And where a burst ends.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::far::{Far, NEVER};
use common::recorded::{BYTES, SIZE, part};
use common::{BIG, DATA, EVENT_IDX, IN_ORDER, INDIRECT, INDIRECT_DESC, PACKED, TABLE, World, config, files, region};
use virtio_test::mem::{GuestMemory, Mediated};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue};
use virtio_test::rule::Rule;

/// Both ends over rings behind transfers; two buffers are available, of which the first was popped.
struct Ends<'a> {
    mem: &'a Mediated<'a>,
    driver: DriverQueue,
    device: DeviceQueue,
}

impl Ends<'_> {
    fn pop(&mut self) -> Result<bool, ()> {
        let popped = self.device.pop(self.mem, &mut Vec::new());
        popped.map(|element| element.is_some()).map_err(drop)
    }
}

type Act = fn(&mut Ends<'_>) -> Result<(), ()>;

/// Run `act` after `before`, with one transfer after the other failing in it.
#[track_caller]
fn each_failure_is_told(features: u64, policy: Policy, before: &[Act], act: Act) {
    for number in 0.. {
        let far = Far::new(0, 0x10000);
        let memory = GuestMemory::new(vec![far.spec(true), region(DATA, 0x1000)], None).unwrap();
        let pin = memory.pin();
        let mem = &pin.mediated().unwrap();
        let config = config(8, features, policy);
        let mut ends = Ends {
            mem,
            driver: DriverQueue::new(mem, config, None, None).unwrap(),
            device: DeviceQueue::new(mem, config, None).unwrap(),
        };
        for at in 0..2 {
            ends.driver.add(mem, &[(DATA + 8 * at, 8)], &[], false).unwrap();
        }
        ends.driver.publish(mem).unwrap();
        assert_eq!(ends.pop(), Ok(true));
        for step in before {
            step(&mut ends).unwrap();
        }
        let fails = far.count() + number;
        far.fails.store(fails, Ordering::Relaxed);
        let told = act(&mut ends);
        let failed = far.count() > fails;
        far.fails.store(NEVER, Ordering::Relaxed);
        assert_eq!(told.is_err(), failed, "{features:#x} {number}");
        if !failed {
            assert!(number > 0, "{features:#x}: nothing was accessed");
            break;
        }
    }
}

#[test]
fn each_access_of_a_ring_that_fails_is_told() {
    let pop: Act = |ends| ends.pop().map(drop);
    let complete: Act = |ends| {
        let element = ends.device.pop(ends.mem, &mut Vec::new()).map_err(drop)?.ok_or(())?;
        ends.device.complete(ends.mem, &element.ticket(), 0).map_err(drop)?;
        ends.device.publish(ends.mem).map_err(drop)
    };
    let no_kicks: Act = |ends| ends.device.disable_kicks(ends.mem).map_err(drop);
    let no_calls: Act = |ends| ends.driver.disable_calls(ends.mem).map_err(drop);
    let used: Act = |ends| ends.driver.get_used(ends.mem).map(drop).map_err(drop);
    let wants_call: Act = |ends| ends.device.wants_call(ends.mem).map(drop).map_err(drop);
    let wants_kick: Act = |ends| ends.driver.wants_kick(ends.mem).map(drop).map_err(drop);
    for format in [0, PACKED] {
        for features in [format, format | EVENT_IDX] {
            for policy in [Policy::INTEROP, Policy::STRICT] {
                each_failure_is_told(features, policy, &[], pop);
                each_failure_is_told(features, policy, &[pop], pop);
                each_failure_is_told(features, policy, &[], complete);
                each_failure_is_told(features, policy, &[complete], wants_call);
                each_failure_is_told(features, policy, &[], wants_kick);
                each_failure_is_told(features, policy, &[], used);
                each_failure_is_told(features, policy, &[complete], used);
            }
            // What asks without an event index writes nothing with one, where nothing is to be taken back.
            if features != EVENT_IDX {
                each_failure_is_told(features, Policy::INTEROP, &[], no_kicks);
                each_failure_is_told(features, Policy::INTEROP, &[], no_calls);
            }
        }
    }
}

/// To ask for kicks or calls is a store or two. (Of the look behind it the next call tells: what fails counts as work.)
#[test]
fn what_cannot_be_asked_for_is_told() {
    for (features, stores) in [(0, 1), (EVENT_IDX, 1), (PACKED, 1), (PACKED | EVENT_IDX, 2)] {
        for number in 0..stores {
            let far = Far::new(0, 0x10000);
            let memory = GuestMemory::new(vec![far.spec(true)], None).unwrap();
            let pin = memory.pin();
            let mem = &pin.mediated().unwrap();
            let config = config(8, features, Policy::INTEROP);
            let mut device = DeviceQueue::new(mem, config, None).unwrap();
            let mut driver = DriverQueue::new(mem, config, None, None).unwrap();
            far.fails.store(far.count() + number, Ordering::Relaxed);
            let fault = device.enable_kicks(mem).unwrap_err();
            assert_eq!(
                (fault.rule, device.broken()),
                (Rule::RingUnmapped, true),
                "{features:#x} {number}"
            );
            far.fails.store(far.count() + number, Ordering::Relaxed);
            let fault = driver.enable_calls(mem).unwrap_err();
            assert_eq!(fault.rule, Rule::RingUnmapped, "{features:#x} {number}");
            assert!(driver.latched().is_some());
        }
    }
}

/// An indirect table at an odd address is read in one piece, and may then be gone.
#[test]
fn an_odd_table_that_cannot_be_read_is_told() {
    for features in [INDIRECT_DESC, INDIRECT_DESC | PACKED] {
        for number in 0..3 {
            let far = Far::new(BIG + (1 << 30), 0x1000);
            let mut world = World::interop(8, features);
            world.mem.add(far.spec(true)).unwrap();
            let table = far.gpa + 1;
            for at in 0..2 {
                let more = u16::from(at == 0);
                world.entry(table, at, (DATA, 8, more, 1));
            }
            world.chain(&[(table, 32, INDIRECT, 0)]);
            far.fails.store(far.count() + number, Ordering::Relaxed);
            let pin = world.mem.pin();
            let popped = world.device.pop(&pin.mediated().unwrap(), &mut Vec::new());
            let rule = popped
                .map(|element| element.unwrap().descriptors)
                .map_err(|fault| fault.rule);
            let expected = if number < 2 { Err(Rule::IndirectUnmapped) } else { Ok(2) };
            assert_eq!(rule, expected, "{number}");
        }
    }
}

/// Hostile chains share their descriptors: a burst has 2^17 segments, however it is popped.
#[test]
fn a_burst_ends_with_the_chain_that_fills_it() {
    for features in [INDIRECT_DESC, INDIRECT_DESC | PACKED] {
        for (recorded, before) in [(false, 0), (false, 5), (true, 0)] {
            let file = files::file(0x10000);
            let mut world = World::interop(256, features);
            for at in 0..1024 {
                world.entry(
                    TABLE,
                    at,
                    (DATA, 1, u16::from(at < 1023), u16::try_from(at + 1).unwrap()),
                );
            }
            for at in 0..256_u16 {
                let mark = if features & PACKED == 0 { 0 } else { common::AVAIL };
                world.desc(at.into(), (TABLE, 1024 * 16, INDIRECT | mark, at));
                if features & PACKED == 0 {
                    world.avail(at);
                }
            }
            if recorded {
                let backing = files::received(0, 0x10000, &file).backing;
                let area = virtio_test::inflight::Area::new(0x10000, backing, None).unwrap();
                let part = virtio_test::inflight::Part::new(Arc::new(area), 0, 256);
                let pin = world.mem.pin();
                let config = *world.device.config();
                world.device = DeviceQueue::recorded(&pin.mapped(), config, None, part).unwrap();
            }
            assert_eq!(world.device.keeps_record(), recorded);
            let pin = world.mem.pin();
            let one = virtio_test::chain::Segment {
                at: virtio_test::mem::At::unresolved(0),
                len: 1,
                writable: false,
            };
            let mut arena = vec![one; before];
            for count in [128, 128, 0] {
                let mut elements = Vec::new();
                arena.truncate(before);
                let popped = world.device.pop_many(&pin.mapped(), 1000, &mut arena, &mut elements);
                assert_eq!((popped, elements.len()), (Ok(count), count), "{features:#x} {recorded}");
            }
        }
    }
}

/// What an earlier device end left is in a ring that may have gone since, and what is published goes into one.
#[test]
fn a_ring_that_is_gone_is_told_beside_its_record() {
    for features in [0, PACKED] {
        for number in 0.. {
            let far = Far::new(0, 0x10000);
            let memory = GuestMemory::new(vec![far.spec(true), region(DATA, 0x1000)], None).unwrap();
            let pin = memory.pin();
            let mem = &pin.mediated().unwrap();
            let config = config(SIZE, features, Policy::INTEROP);
            let mut driver = DriverQueue::new(mem, config, None, None).unwrap();
            driver.add(mem, &[(DATA, 8)], &[], false).unwrap();
            driver.publish(mem).unwrap();
            let file = files::file(BYTES as u64);
            let mut device = DeviceQueue::recorded(mem, config, None, part(&file)).unwrap();
            let element = device.pop(mem, &mut Vec::new()).unwrap().unwrap();
            device.complete(mem, &element.ticket(), 0).unwrap();
            let fails = far.count() + number;
            far.fails.store(fails, Ordering::Relaxed);
            let told = device.publish(mem);
            let failed = far.count() > fails;
            assert_eq!(told.is_err(), failed, "{number}");
            if !failed {
                assert!(number > 0);
                break;
            }
        }
        let mut recorded = common::recorded::Recorded::new(features);
        recorded.restart(None).unwrap();
        recorded.world.mem.remove(0, 0x20_0000).unwrap();
        let fault = recorded.world.pop().unwrap_err();
        assert_eq!(fault.rule, Rule::RingUnmapped);
    }
}

#[test]
fn a_rule_has_the_clause_of_its_format_or_the_only_one() {
    for (rule, split, packed) in [
        (Rule::ChainTooLong, "2.7.5.3.1", "2.8.17"),
        (Rule::HeadInFlight, "2.7.13.1", "2.7.13.1"),
        (Rule::IdInFlight, "2.8.21.1", "2.8.21.1"),
    ] {
        assert_eq!((rule.clause(false), rule.clause(true)), (split, packed));
    }
}

/// With IN_ORDER: what is said of a chain that is used up counts for nothing, and the latest of what is said before its turn.
#[test]
fn in_order_what_is_said_twice_holds_nobody_up() {
    for format in [0, PACKED] {
        let mut world = World::interop(16, format | IN_ORDER);
        for _ in 0..6 {
            world.give(false);
        }
        let elements: Vec<_> = (0..6).map(|_| world.take()).collect();
        // 0, and 0 again; 2 before its turn, twice; then 1 and 3.
        for (which, written) in [(0, 1), (0, 9), (2, 3), (2, 4), (1, 2), (3, 5)] {
            assert!(world.complete(&elements[which], written));
        }
        world.show();
        let pin = world.mem.pin();
        let used = world.driver.get_used_many(&pin.mapped(), 8).unwrap();
        let lengths: Vec<_> = used.iter().map(|&(_, len)| len).collect();
        assert_eq!(lengths, [1, 2, 4, 5], "{format:#x}");
    }
}

/// With IN_ORDER, where a completion writes the entries of those that waited for it.
#[test]
fn in_order_each_entry_that_cannot_be_written_is_told() {
    for features in [IN_ORDER, IN_ORDER | PACKED] {
        for number in 0.. {
            let far = Far::new(0, 0x10000);
            let memory = GuestMemory::new(vec![far.spec(true), region(DATA, 0x1000)], None).unwrap();
            let pin = memory.pin();
            let mem = &pin.mediated().unwrap();
            let config = config(8, features, Policy::INTEROP);
            let mut driver = DriverQueue::new(mem, config, None, None).unwrap();
            let mut device = DeviceQueue::new(mem, config, None).unwrap();
            for _ in 0..2 {
                driver.add(mem, &[(DATA, 8)], &[], false).unwrap();
            }
            driver.publish(mem).unwrap();
            let mut tickets = Vec::new();
            for _ in 0..2 {
                tickets.push(device.pop(mem, &mut Vec::new()).unwrap().unwrap().ticket());
            }
            device.complete(mem, &tickets[1], 0).unwrap();
            let fails = far.count() + number;
            far.fails.store(fails, Ordering::Relaxed);
            let told = device.complete(mem, &tickets[0], 0);
            let failed = far.count() > fails;
            assert_eq!(told.is_err(), failed, "{features:#x} {number}");
            if !failed {
                assert!(number > 1);
                break;
            }
        }
    }
}

/// What a record is kept of is not visible before it is published, in whatever way it was completed.
#[test]
fn a_burst_of_completions_is_recorded_too() {
    for features in [0, PACKED] {
        let mut recorded = common::recorded::Recorded::new(features);
        let world = &mut recorded.world;
        let element = world.take();
        let pin = world.mem.pin();
        let done = std::iter::once((element.ticket(), 0));
        assert_eq!(world.device.complete_many(&pin.mapped(), done), Ok(1));
        drop(pin);
        assert_eq!(world.used().unwrap(), None);
        world.show();
        assert!(world.used().unwrap().is_some());
        assert_eq!(common::recorded::flying(&recorded, features).len(), 2);
    }
}

/// With an event index the flags of a split ring stay 0 (2.7.7.1, 2.7.10.2); a packed ring that asked for no kicks gets none,
/// after however many laps.
#[test]
fn whoever_asks_for_nothing_says_so_as_it_was_agreed() {
    for (features, flags) in [(0, 1), (EVENT_IDX, 0)] {
        let mut world = World::interop(8, features);
        let pin = world.mem.pin();
        world.device.disable_kicks(&pin.mapped()).unwrap();
        world.driver.disable_calls(&pin.mapped()).unwrap();
        drop(pin);
        assert_eq!(
            (world.get("used.flags", 0), world.get("avail.flags", 0)),
            (flags, flags)
        );
    }
    let mut world = World::interop(4, PACKED | EVENT_IDX);
    let pin = world.mem.pin();
    world.device.disable_kicks(&pin.mapped()).unwrap();
    drop(pin);
    for _ in 0..9 {
        world.give(true);
        let element = world.take();
        world.finish(&element, 0);
        assert!(world.used().unwrap().is_some());
        let pin = world.mem.pin();
        world.device.disable_kicks(&pin.mapped()).unwrap();
    }
    world.give(true);
    assert!(!world.kick());
}
