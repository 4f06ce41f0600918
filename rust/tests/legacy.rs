//! What only the legacy interface has.

#![allow(missing_docs, reason = "a suite of tests")]

mod common;

use common::{EVENT_IDX, PACKED, World};
use virtio_test::queue::feature;

#[test]
fn n08_a_ring_that_ran_empty_is_announced_whatever_is_suppressed() {
    // (features, where 24 means something), for the driver that wants to hear of nothing.
    let (empty, version_1) = (feature::NOTIFY_ON_EMPTY, feature::VERSION_1);
    let cases = [
        (empty, true),
        (empty | EVENT_IDX, true),
        (0, false),
        (empty | version_1, false),
        (empty | PACKED, false),
    ];
    for (features, announced) in cases {
        let mut world = World::interop(8, features);
        let flags = if world.layout.packed {
            "driver_event.flags"
        } else {
            "avail.flags"
        };
        world.put(flags, 0, 1);
        if features & EVENT_IDX != 0 {
            // The very first decision is always for a notification; from here on only far away ones.
            world.give(true);
            let first = world.take();
            assert!(world.finish(&first, 0) && world.call());
            world.put("used_event", 0, 0x8000);
        }
        world.give(true);
        world.give(true);
        let (first, second) = (world.take(), world.take());
        assert!(world.finish(&first, 0));
        assert!(!world.call(), "one is not used yet");
        world.give(true);
        assert!(world.finish(&second, 0));
        assert!(!world.call(), "one is available and not popped yet");
        let third = world.take();
        assert!(world.complete(&third, 0));
        assert!(!world.call(), "not published yet");
        world.show();
        assert_eq!(world.call(), announced, "{features:#x}");
        assert!(!world.call(), "once");
    }
}
