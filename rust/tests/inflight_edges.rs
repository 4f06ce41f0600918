//! The edges of a record: where it ends, what just is one and what is not, and what becomes of each store that fails.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::far::Far;
use common::recorded::{BYTES, Recorded, SIZE, content, entry, flying, part};
use common::{AVAIL, DATA, PACKED, USED, World, config, files};
use virtio_test::inflight::{Area, Part};
use virtio_test::mem::{Backing, Trace};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, QueueConfig, QueueState, StartError};

/// vhost-user.rst, "Inflight I/O tracking": a header and a state for each descriptor, of 16 bytes each, or 32.
#[test]
fn a_record_lies_whole_in_its_area() {
    for (features, each) in [(0, 16), (PACKED, 32)] {
        let whole = Part::bytes(features == PACKED, SIZE);
        assert_eq!(whole, each * (1 + u64::from(SIZE)));
        for (base, size, fits) in [
            (0, whole, true),
            (0, whole - 8, false),
            (64, whole + 64, true),
            (72, whole + 64, false),
            (1 << 40, whole, false),
        ] {
            let backing = Backing::Received {
                fd: files::file(size),
                offset: 0,
                writable: true,
            };
            let area = Arc::new(Area::new(size, backing, None).unwrap());
            assert_eq!(area.size(), size);
            let world = World::interop(SIZE, features);
            let pin = world.mem.pin();
            let part = Part::new(area, base, SIZE);
            let made = DeviceQueue::recorded(&pin.mapped(), *world.device.config(), None, part.clone());
            assert_eq!(made.is_ok(), fits, "{base} {size}");
            assert_eq!(part.clear().is_ok(), base < size, "{base} {size}");
        }
    }
}

#[test]
fn a_part_that_was_cleared_is_one_that_nobody_has_written() {
    for features in [0, PACKED] {
        let mut recorded = Recorded::new(features);
        recorded.restart(None).unwrap();
        assert_eq!(recorded.world.device.left(), 2);
        part(&recorded.file).clear().unwrap();
        let state = recorded.world.device.state();
        recorded.restart(Some(state)).unwrap();
        assert_eq!(
            (recorded.world.device.left(), recorded.world.device.state()),
            (0, state)
        );
        assert!(flying(&recorded, features).is_empty());
    }
}

/// A ring of `size`, with a record for eight descriptors.
fn smaller(recorded: &Recorded, size: u16, state: Option<QueueState>) -> Result<DeviceQueue, StartError> {
    let there = *recorded.world.device.config();
    let config = QueueConfig {
        size: size.into(),
        ..there
    };
    let pin = recorded.world.mem.pin();
    DeviceQueue::recorded(&pin.mapped(), config, state, part(&recorded.file))
}

fn words<T>(made: Result<T, StartError>) -> String {
    made.map(drop)
        .map_or_else(|error| error.to_string(), |()| "fine".to_owned())
}

/// A record may have room for more than the ring has, but not say that there is more in flight.
#[test]
fn what_flies_is_of_the_ring() {
    // Split: by its number. The used index is that of the record, so nothing was used since.
    for (head, expected) in [(3, "fine"), (4, "the state of descriptor 4 of 4 has inflight 1")] {
        let recorded = Recorded::new(0);
        for flying in flying(&recorded, 0) {
            recorded.put(entry(0, flying), 0, 1);
        }
        recorded.put(entry(0, head), 1, 1);
        // Where the smaller ring has its used index.
        let device = recorded.world.layout.device + 2;
        let idx = recorded.world.get("used.idx", 0);
        recorded.put(14, idx, 2);
        recorded.world.mem.write(device, &idx.to_le_bytes()[..2]).unwrap();
        assert_eq!(words(smaller(&recorded, 4, None)), expected);
    }
    // Packed: by how many there are.
    for (count, expected) in [(4, "fine"), (5, "5 descriptors of a ring of 4 are in flight")] {
        let mut recorded = Recorded::new(PACKED);
        recorded.world = World::interop(SIZE, PACKED);
        recorded.file = files::file(BYTES as u64);
        recorded.restart(None).unwrap();
        for _ in 0..count {
            recorded.world.give(true);
            let _ = recorded.world.pop().unwrap().unwrap();
        }
        assert_eq!(words(smaller(&recorded, 4, None)), expected);
    }
    // One buffer of all that there is.
    let mut recorded = Recorded::new(PACKED);
    recorded.world = World::interop(SIZE, PACKED);
    recorded.file = files::file(BYTES as u64);
    recorded.restart(None).unwrap();
    let parts: Vec<_> = (0..u64::from(SIZE)).map(|at| (DATA + 8 * at, 8)).collect();
    recorded.world.add(&parts, &[]);
    recorded.world.publish();
    assert_eq!(recorded.world.pop().unwrap().unwrap().descriptors, u32::from(SIZE));
    recorded.restart(None).unwrap();
    assert_eq!(recorded.world.device.left(), 1);
    assert_eq!(recorded.world.pop().unwrap().unwrap().descriptors, u32::from(SIZE));
}

/// Of a split ring: buffers that were used since the record, up to all of the ring and none beyond.
#[test]
fn the_last_batch_is_of_the_ring() {
    // All eight in a list that begins at 0; one more cannot be.
    for (since, expected) in [
        (8_u16, "fine"),
        (9, "9 buffers were used since the last record, by a ring of 8"),
    ] {
        let mut recorded = Recorded::new(0);
        for head in 0..8 {
            recorded.put(entry(0, head) + 6, (head + 1) % 8, 2);
        }
        recorded.put(entry(0, 0), 1, 1);
        recorded.put(12, 0, 2);
        let used = u16::try_from(recorded.world.get("used.idx", 0)).unwrap();
        recorded.put(14, used.wrapping_sub(since).into(), 2);
        let made = recorded.restart(None);
        assert_eq!(words(made), expected);
        if since == 8 {
            assert_eq!(recorded.world.device.left(), 0);
        }
    }
    // The list begins behind a ring that is smaller than the record.
    for (last, expected) in [(3, "fine"), (4, "descriptor 4 of 4 is said to have been used last")] {
        let recorded = Recorded::new(0);
        for head in flying(&recorded, 0) {
            recorded.put(entry(0, head), 0, 1);
        }
        recorded.put(entry(0, 0), 1, 1);
        recorded.put(12, last, 2);
        recorded.put(14, 5, 2);
        recorded
            .world
            .mem
            .write(recorded.world.layout.device + 2, &[6, 0])
            .unwrap();
        assert_eq!(words(smaller(&recorded, 4, None)), expected);
    }
    // A ring that has begun anew, where nothing was in flight.
    let mut recorded = Recorded::new(0);
    for head in flying(&recorded, 0) {
        recorded.put(entry(0, head), 0, 1);
    }
    recorded.put(14, 0x4000, 2);
    recorded.put(12, 0xffff, 2);
    recorded.restart(None).unwrap();
    assert_eq!(recorded.world.device.left(), 0);
}

/// Of a packed ring: an update that has not come to the used index has changed nothing yet, whatever the ring looks like.
#[test]
fn half_an_update_is_taken_back() {
    let mut recorded = Recorded::new(PACKED);
    for _ in 0..2 {
        recorded.restart(None).unwrap();
        let one = recorded.world.take();
        recorded.world.finish(&one, 0);
    }
    assert!(flying(&recorded, PACKED).is_empty());
    let slot = u64::from(content(&recorded.file)[16]);
    recorded.world.put("desc.flags", slot, (AVAIL | USED).into());
    recorded.put(12, 0xffff, 2);
    recorded.restart(None).unwrap();
    let bytes = content(&recorded.file);
    assert_eq!(bytes[12..14], bytes[14..16], "the free ones are what they were");
}

/// A record behind transfers, of which each may fail: whoever needed it says so, at every step of its life.
#[test]
fn each_access_to_the_record_that_fails_is_told() {
    for (features, half_done) in [(0, false), (0, true), (PACKED, false), (PACKED, true)] {
        for number in 0.. {
            let mut world = World::interop(SIZE, features);
            let far = Far::new(0, BYTES);
            if half_done {
                let recorded = half(features);
                far.bytes.lock().unwrap().copy_from_slice(&content(&recorded.file));
                world = recorded.world;
            } else {
                world.give(true);
                world.give(false);
            }
            let area = Area::new(BYTES as u64, far.spec(true).backing, Some(Arc::new(Trace::new()))).unwrap();
            let part = Part::new(Arc::new(area), 0, SIZE);
            far.fails.store(number, Ordering::Relaxed);
            let told = life(&mut world, part).is_none() || world.device.broken();
            let failed = far.count() > number;
            assert_eq!(told, failed, "{features:#x} {half_done} {number}");
            if !failed {
                assert!(number > 20);
                break;
            }
        }
    }
}

/// Open it, take all, put the newest back and take it again, complete and publish them; none where something was told.
fn life(world: &mut World, part: Part) -> Option<()> {
    let config = config(SIZE, world.device.config().features, Policy::INTEROP);
    let pin = world.mem.pin();
    world.device = DeviceQueue::recorded(&pin.mapped(), config, None, part).ok()?;
    drop(pin);
    let mut taken = Vec::new();
    while let Some(element) = world.pop().ok()? {
        taken.push(element);
    }
    let newest = taken.pop()?;
    world.device.unpop(&newest.ticket()).ok()?;
    taken.push(world.pop().ok()??);
    for element in &taken {
        assert!(world.complete(element, 0));
    }
    let pin = world.mem.pin();
    world.device.publish(&pin.mapped()).ok()
}

/// A record whose last update was done in the ring and not yet settled, with something else in flight, and one more
/// buffer available.
fn half(features: u64) -> Recorded {
    let recorded = Recorded::new(features);
    let heads = flying(&recorded, features);
    if features == PACKED {
        let free = u64::from(content(&recorded.file)[12]);
        recorded.put(entry(PACKED, heads[0]) + 2, free, 2);
        recorded.put(12, heads[0], 2);
        recorded.put(16, 7, 2);
        recorded.world.put("desc.flags", 6, (AVAIL | USED).into());
    } else {
        recorded.put(12, heads[0], 2);
        recorded.world.put("used.idx", 0, 7);
    }
    recorded
}
