//! How many frames the packet loop takes at once, and when the driver sees them.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::pair::{PLAIN, Pair, configs, frame, setup};
use common::{DATA, TABLES, region};
use virtio_test::mem::{AccessKind, GuestMemory, Trace};
use virtio_test::service::Bounds;
use virtio_test::service::packet::{Mode, Setup};

/// Of what a turn has no bytes for nothing is looked at, but before that was known: it would go back.
#[test]
fn no_more_is_taken_than_a_turn_has_bytes_for() {
    for (mode, queue, done, first) in [(Mode::Loopback, 1, 10, 128), (Mode::Generate(200), 0, 22, 22)] {
        let made = Setup {
            frame: frame(60),
            ..setup()
        };
        let trace = Arc::new(Trace::new());
        let ram = vec![region(0, 0x20_0000), region(DATA, 0x10000), region(TABLES, 0x20_0000)];
        let mem = GuestMemory::new(ram, Some(Arc::clone(&trace))).unwrap();
        let mut pair = Pair::over(mem, mode, made);
        pair.give(&[1526; 200]);
        for _ in 0..if queue == 1 { 200 } else { 0 } {
            pair.send(&PLAIN, &frame(60));
        }
        let bounds = Bounds {
            chains: 256,
            bytes: 132 * 10,
        };
        for seen in [first, done, done] {
            trace.clear();
            let turn = pair.turn(bounds).turn.unwrap();
            assert_eq!((turn.done, turn.more), (done, true), "{mode:?}");
            let desc = configs()[queue].desc;
            let log = trace.log();
            let looked: BTreeSet<u64> = log.iter().filter_map(|one| one.gpa.checked_sub(desc)).collect();
            let descs: BTreeSet<u64> = looked.into_iter().map(|off| off / 16).filter(|&at| at < 256).collect();
            assert_eq!(descs.len(), seen, "{mode:?}");
        }
    }
}

/// One frame, and then many: they are taken and shown at once, since no turn had too few bytes. Those that go nowhere are taken
/// 32 at a time.
#[test]
fn a_short_turn_has_none_taken_one_by_one() {
    for (mode, shown) in [(Mode::Loopback, 1), (Mode::Discard, 4)] {
        let trace = Arc::new(Trace::new());
        let ram = vec![region(0, 0x20_0000), region(DATA, 0x10000), region(TABLES, 0x20_0000)];
        let mem = GuestMemory::new(ram, Some(Arc::clone(&trace))).unwrap();
        let mut pair = Pair::over(mem, mode, setup());
        pair.give(&[1526; 101]);
        for (count, shown) in [(1, 1), (100, shown)] {
            for _ in 0..count {
                pair.send(&PLAIN, &frame(60));
            }
            trace.clear();
            assert_eq!(pair.done(), count);
            let idx = configs()[1].device + 2;
            let log = trace.log();
            let stores = log.iter().filter(|one| one.kind == AccessKind::Store && one.gpa == idx);
            assert_eq!(stores.count(), shown, "{mode:?}");
        }
    }
}

/// Made frames are shown after each 128, not one by one, and not only at the end of a turn.
#[test]
fn made_frames_are_shown_in_bursts() {
    for (count, shown) in [(127, 1), (128, 1), (129, 2), (256, 2)] {
        let trace = Arc::new(Trace::new());
        let ram = vec![region(0, 0x20_0000), region(TABLES, 0x20_0000)];
        let mem = GuestMemory::new(ram, Some(Arc::clone(&trace))).unwrap();
        let made = Setup {
            frame: frame(60),
            ..setup()
        };
        let mut pair = Pair::over(mem, Mode::Generate(count), made);
        pair.give(&[1526; 256]);
        trace.clear();
        assert_eq!(pair.done(), usize::try_from(count).unwrap());
        let idx = configs()[0].device + 2;
        let log = trace.log();
        let stores = log.iter().filter(|one| one.kind == AccessKind::Store && one.gpa == idx);
        assert_eq!(stores.count(), shown, "{count}");
    }
}
