//! Small scopes, whole: where the ends of a queue write, what a refused completion leaves behind, which used entries a
//! driver takes, and which bytes a translation reaches. See `exhaustive` for what the ends read.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::{AVAIL, DATA, EVENT_IDX, IN_ORDER, PACKED, USED, WRITE, World, config, memory};
use virtio_test::chain::Element;
use virtio_test::error::{Misuse, QueueError};
use virtio_test::mem::{Access, At, Backing, GuestMemory, MemoryError, RegionSpec, Want};
use virtio_test::policy::Policy;
use virtio_test::queue::{DriverQueue, QueueState};
use virtio_test::ring::RingLayout;
use virtio_test::rule::Rule;

/// All bytes of the three areas.
fn image(world: &World) -> Vec<u8> {
    let layout = &world.layout;
    let mut bytes = vec![0; usize::try_from(layout.device + layout.device_bytes() - layout.desc).unwrap()];
    world.mem.read(layout.desc, &mut bytes).unwrap();
    bytes
}

/// Addresses of the bytes that differ.
fn changed(world: &World, before: &[u8]) -> Vec<u64> {
    let after = image(world);
    let pairs = (world.layout.desc..).zip(before.iter().zip(&after));
    pairs.filter(|(_, (old, new))| old != new).map(|(gpa, _)| gpa).collect()
}

/// Every order of `count` things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    if count == 0 {
        return vec![Vec::new()];
    }
    let mut all = Vec::new();
    for shorter in orders(count - 1) {
        for place in 0..count {
            let mut order = shorter.clone();
            order.insert(place, count - 1);
            all.push(order);
        }
    }
    all
}

/// Start states, order of completion, where the batch of completions is cut in two, and the bytes written.
#[test]
fn completions_are_written_to_the_used_ring_and_nowhere_else() {
    for (size, features, start) in [
        (2, 0, 0),
        (2, EVENT_IDX, 0xffff),
        (4, IN_ORDER, 0xfffe),
        (4, 0, 3),
        (2, PACKED, 0x8001),
        (3, PACKED | EVENT_IDX, 0x8002),
        (4, PACKED | IN_ORDER, 0x8003),
    ] {
        for count in 0..=usize::from(size) {
            for order in orders(count) {
                for cut in 0..=count {
                    run(size, features, start, &order, cut);
                }
            }
        }
    }
}

fn run(size: u16, features: u64, start: u16, order: &[usize], cut: usize) {
    let mut world = World::started(size, features, start);
    if world.layout.packed {
        // What the lap with wrap counter 1 has left so far.
        (0..u64::from(start & 0x7fff)).for_each(|slot| world.put("desc.flags", slot, u64::from(AVAIL | USED)));
    }
    let in_order = features & IN_ORDER != 0;
    let tokens: Vec<u64> = order.iter().map(|_| world.add(&[], &[(DATA, 100)])).collect();
    world.publish();
    let elements = world.pop_many(order.len()).unwrap();
    assert_eq!(elements.len(), order.len());
    // With IN_ORDER only what is complete from the first one on is used.
    let mut done = vec![false; order.len()];
    let mut expected = Vec::new();
    let mut shown = 0;
    for (number, &which) in order.iter().enumerate() {
        let written = 40 + which as u64;
        let before = image(&world);
        assert!(world.complete(&elements[which], written));
        let visible = |gpa: &u64| *gpa == world.layout.device + 2 || *gpa == world.layout.device + 3;
        let staged = changed(&world, &before);
        assert!(staged.iter().all(|gpa| in_used(&world, *gpa)), "{staged:x?}");
        assert!(
            world.layout.packed || !staged.iter().any(visible),
            "idx moves when it is published"
        );
        done[which] = true;
        if in_order {
            let ready = done.iter().take_while(|&&done| done).count();
            expected = (0..ready).collect();
        } else {
            expected.push(which);
        }
        if number + 1 == cut || number + 1 == order.len() {
            let before = image(&world);
            world.show();
            assert!(changed(&world, &before).iter().all(|gpa| in_used(&world, *gpa)));
            let mut answers = Vec::new();
            while let Some(answer) = world.used().unwrap() {
                answers.push(answer);
            }
            let fresh = expected[shown..].iter();
            let fresh: Vec<_> = fresh
                .map(|&which| (tokens[which], 40 + u32::try_from(which).unwrap()))
                .collect();
            assert_eq!(answers, fresh, "{size} {features:#x} {order:?} cut at {cut}");
            shown = expected.len();
        }
    }
    let untouched = image(&world);
    world.show();
    assert!(changed(&world, &untouched).is_empty(), "nothing is left to publish");
}

/// Used ring and idx, or the packed ring itself.
fn in_used(world: &World, gpa: u64) -> bool {
    let layout = &world.layout;
    if layout.packed {
        (layout.desc..layout.driver).contains(&gpa)
    } else {
        (layout.device + 2..layout.device + layout.device_bytes() - 2).contains(&gpa)
    }
}

/// What is refused or dropped changes no byte and no state: neither now nor when the next one is published.
#[test]
fn a_completion_that_fails_moves_nothing() {
    for features in [0, PACKED, IN_ORDER, PACKED | IN_ORDER] {
        let ways: [fn(&mut World, &Element); 4] = [
            |world, element| {
                let pin = world.mem.pin();
                for excess in [1, 2, 1 << 31, u64::MAX - 100] {
                    let refused = world.device.complete(&pin.mapped(), &element.ticket(), 100 + excess);
                    let written = 100 + excess;
                    let error = QueueError::Misuse(Misuse::WrittenTooBig { written, writable: 100 });
                    assert_eq!(refused, Err(error));
                }
            },
            |world, element| {
                world.device.break_down();
                assert!(!world.complete(element, 7));
            },
            |world, element| {
                let pin = world.mem.pin();
                let state = world.device.state();
                world.device.reset(&pin.mapped(), None, Some(state)).unwrap();
                drop(pin);
                assert!(!world.complete(element, 7));
            },
            |world, element| {
                // A handler that gave the same chain twice: the second time nothing is in flight.
                let mut ticket = element.ticket();
                ticket.generation += 1;
                let pin = world.mem.pin();
                assert_eq!(world.device.complete(&pin.mapped(), &ticket, 7), Ok(false));
            },
        ];
        for way in ways {
            let mut world = World::interop(2, features);
            world.add(&[], &[(DATA, 100)]);
            world.publish();
            let element = world.take();
            let (before, state) = (image(&world), world.device.state());
            way(&mut world, &element);
            world.show();
            assert_eq!(changed(&world, &before), [] as [u64; 0], "{features:#x}");
            assert_eq!(world.device.state(), state);
            assert_eq!(world.device.counters().pushed, 0);
        }
        let mut world = World::interop(2, features);
        world.add(&[], &[(DATA, 100)]);
        world.publish();
        let element = world.take();
        assert!(world.complete(&element, 100));
        let pin = world.mem.pin();
        let twice = world.device.complete(&pin.mapped(), &element.ticket(), 100);
        assert_eq!(twice, Err(QueueError::Misuse(Misuse::StaleChain)));
    }
}

/// Two buffers in flight, of no and of 8 writable bytes, and any used ring of two entries.
#[test]
fn every_used_ring_of_two_entries_at_the_driver_end() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    let put = |gpa: u64, bytes: &[u8]| mem.write(At::unresolved(gpa), 0, bytes).unwrap();
    let entries: Vec<(u32, u32)> = [0, 1, 2, 0x10000]
        .into_iter()
        .flat_map(|id| [0, 1, 8, 9].map(|len| (id, len)))
        .collect();
    for clamp in [false, true] {
        let policy = Policy {
            used_len_beyond: clamp,
            ..Policy::INTEROP
        };
        let config = config(2, 0, policy);
        for first in &entries {
            for second in &entries {
                for idx in [0u16, 1, 2, 3, 0xffff] {
                    let mut driver = DriverQueue::new(&mem, config, None, None).unwrap();
                    let tokens = [
                        driver.add(&mem, &[(DATA, 4)], &[], false).unwrap(),
                        driver.add(&mem, &[], &[(DATA, 8)], false).unwrap(),
                    ];
                    driver.publish(&mem).unwrap();
                    put(config.device + 2, &idx.to_le_bytes());
                    for (slot, (id, len)) in (0..).zip([first, second]) {
                        put(config.device + 4 + 8 * slot, &id.to_le_bytes());
                        put(config.device + 8 + 8 * slot, &len.to_le_bytes());
                    }
                    let mut given = [false; 2];
                    let mut taken = Vec::new();
                    let broken = used_breaks(idx, [first, second], clamp, &tokens, &mut given, &mut taken);
                    let mut found = Vec::new();
                    let fault = loop {
                        match driver.get_used(&mem) {
                            Ok(Some(used)) => found.push(used),
                            Ok(None) => break None,
                            Err(fault) => break Some(fault.rule),
                        }
                    };
                    assert_eq!((&found, fault), (&taken, broken), "{idx} {first:?} {second:?}");
                    let left = (0..2).filter(|&i| !given[i]).count();
                    assert_eq!(usize::try_from(driver.in_flight()), Ok(left));
                    assert_eq!(usize::from(driver.free()), 2 - left);
                    assert_eq!(driver.detach().len(), left);
                }
            }
        }
    }
}

fn used_breaks(
    idx: u16,
    entries: [&(u32, u32); 2],
    clamp: bool,
    tokens: &[u64; 2],
    given: &mut [bool; 2],
    taken: &mut Vec<(u64, u32)>,
) -> Option<Rule> {
    if idx > 2 {
        return Some(Rule::UsedIdxTooFar);
    }
    for &&(id, len) in &entries[..usize::from(idx)] {
        let Some(id) = usize::try_from(id).ok().filter(|&id| id < 2) else {
            return Some(Rule::UsedIdOutOfRange);
        };
        if given[id] {
            return Some(Rule::UsedIdNotInFlight);
        }
        let writable = [0, 8][id];
        if len > writable && !clamp {
            return Some(Rule::UsedLenTooBig);
        }
        given[id] = true;
        taken.push((tokens[id], len.min(writable)));
    }
    None
}

/// Two buffers in flight, of one and of two descriptors, and anything in the first slot of the packed ring.
#[test]
fn every_used_descriptor_at_the_driver_end() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    for policy in [Policy::INTEROP, Policy::STRICT] {
        let config = config(3, PACKED, policy);
        for id in [0u16, 1, 2, 3, 0xffff] {
            for len in [0u32, 8, 9] {
                for flags in [0, WRITE, AVAIL, USED, AVAIL | USED, AVAIL | USED | WRITE] {
                    let mut driver = DriverQueue::new(&mem, config, None, None).unwrap();
                    driver.add(&mem, &[], &[(DATA, 8)], false).unwrap();
                    driver.add(&mem, &[(DATA, 4)], &[(DATA, 8)], false).unwrap();
                    driver.publish(&mem).unwrap();
                    let mut bytes = len.to_le_bytes().to_vec();
                    bytes.extend(id.to_le_bytes());
                    bytes.extend(flags.to_le_bytes());
                    mem.write(At::unresolved(config.desc + 8), 0, &bytes).unwrap();
                    let used = driver.get_used(&mem).map_err(|fault| fault.rule);
                    // Without WRITE the length is reserved; QEMU means it all the same, DPDK leaves the driver's there.
                    let meant = flags & WRITE != 0 || (policy.used_without_write && len <= 8);
                    let len = if meant { len } else { 0 };
                    let expected = if flags & (AVAIL | USED) != AVAIL | USED {
                        Ok(None)
                    } else if id > 2 {
                        Err(Rule::UsedIdOutOfRange)
                    } else if id == 2 {
                        Err(Rule::UsedIdNotInFlight)
                    } else if len > 8 {
                        Err(Rule::UsedLenTooBig)
                    } else {
                        Ok(Some((u64::from(id), len)))
                    };
                    assert_eq!(used, expected, "id {id}, len {len}, flags {flags:#x}");
                    let free = if matches!(expected, Ok(Some(_))) { 1 + id } else { 0 };
                    assert_eq!(driver.free(), free, "a buffer gives back its own descriptors");
                }
            }
        }
    }
}

/// Four pages, each nothing, for reading, or for reading and writing; neighbours are regions of their own.
#[test]
fn every_translation_over_four_pages() {
    const BASE: u64 = 0x10000;
    const BYTES: u64 = 0x1000;
    for pages in 0..81u32 {
        let kinds: Vec<u32> = (0..4).map(|page| pages / 3u32.pow(page) % 3).collect();
        let mut regions = Vec::new();
        for (page, &kind) in (0..).zip(&kinds) {
            let gpa = BASE + page * BYTES;
            let backing = match kind {
                0 => continue,
                1 => Backing::fresh_read_only(gpa, BYTES).unwrap(),
                _ => Backing::Anonymous,
            };
            regions.push(RegionSpec {
                gpa,
                size: BYTES,
                backing,
            });
        }
        let memory = GuestMemory::new(regions, None).unwrap();
        for (page, _) in (0..).zip(&kinds).filter(|(_, kind)| **kind == 2) {
            memory
                .fill(BASE + page * BYTES, BYTES, 1 + u8::try_from(page).unwrap())
                .unwrap();
        }
        let kind_of = |gpa: u64| {
            let page = gpa.checked_sub(BASE).map(|skip| skip / BYTES);
            page.and_then(|page| kinds.get(usize::try_from(page).ok()?))
                .copied()
                .unwrap_or(0)
        };
        let pin = memory.pin();
        let mem = pin.mapped();
        for edge in 0..=4 {
            for gpa in (BASE + edge * BYTES - 2)..=(BASE + edge * BYTES + 2) {
                for len in [
                    0,
                    1,
                    2,
                    3,
                    BYTES - 2,
                    BYTES,
                    BYTES + 3,
                    2 * BYTES + 2,
                    5 * BYTES,
                    u64::MAX,
                ] {
                    for want in [Want::Read, Want::Write] {
                        let first_bad = (gpa..gpa.saturating_add(len.min(6 * BYTES)))
                            .step_by(1)
                            .take_while(|_| len <= 6 * BYTES)
                            .find(|&byte| kind_of(byte) <= u32::from(want == Want::Write));
                        let expected = match first_bad {
                            _ if gpa.checked_add(len).is_none() => Err(MemoryError::Wraps { gpa, len }),
                            Some(bad) if kind_of(bad) == 1 => Err(MemoryError::ReadOnly { gpa: bad }),
                            Some(bad) => Err(MemoryError::Unmapped { gpa: bad }),
                            None => Ok(()),
                        };
                        assert_eq!(
                            mem.resolve(gpa, len, want).map(drop),
                            expected,
                            "{kinds:?} {gpa:#x} {len}"
                        );
                        if expected.is_ok() && want == Want::Read {
                            let mut bytes = vec![0xee; usize::try_from(len).unwrap()];
                            mem.read(At::unresolved(gpa), 0, &mut bytes).unwrap();
                            let byte = |gpa: u64| {
                                let page = u8::try_from((gpa - BASE) / BYTES).unwrap();
                                if kind_of(gpa) == 2 { 1 + page } else { 0 }
                            };
                            assert!((gpa..).zip(&bytes).all(|(gpa, &value)| value == byte(gpa)));
                        }
                    }
                }
            }
        }
    }
}

/// A driver writes its own parts while it works: descriptors, avail ring, driver events.
#[test]
fn a_driver_never_writes_what_is_the_devices() {
    for features in [0, EVENT_IDX, IN_ORDER, PACKED, PACKED | EVENT_IDX] {
        let mut world = World::interop(4, features);
        let layout = world.layout;
        let device = |world: &World| {
            let mut bytes = vec![0; usize::try_from(RingLayout::device_bytes(&layout)).unwrap()];
            world.mem.read(layout.device, &mut bytes).unwrap();
            bytes
        };
        let state = world.driver.state();
        assert_eq!(state, QueueState::fresh(layout.packed));
        for round in 0..9 {
            let before = device(&world);
            world.give(round % 2 == 0);
            let pin = world.mem.pin();
            world.driver.wants_kick(&pin.mapped()).unwrap();
            world.driver.enable_calls(&pin.mapped()).unwrap();
            world.driver.disable_calls(&pin.mapped()).unwrap();
            drop(pin);
            assert_eq!(device(&world), before, "round {round}");
            let element = world.take();
            world.finish(&element, 0);
            let before = device(&world);
            assert!(world.used().unwrap().is_some());
            assert_eq!(device(&world), before, "round {round}");
        }
    }
}
