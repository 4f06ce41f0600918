//! The packet loop beside both ends of a pair of queues: which frames come back, where they lie, and what is said of the rest.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::atomic::Ordering;

use common::far::{Far, NEVER};
use common::files::{file, received};
use common::pair::{BOUNDS, ODD, ONE, PLAIN, Pair, frame, header, setup};
use common::{BIG, DATA, TABLES, region};
use rustix::fs::ftruncate;
use virtio_test::mem::{GuestMemory, MemoryError};
use virtio_test::rule::Rule;
use virtio_test::service::packet::{LONGEST, Mode, Setup};
use virtio_test::service::{Bounds, Native, Service, Turn, arm};

#[test]
fn a_frame_comes_back_in_the_next_buffer_if_it_may() {
    for (mode, usable) in [(Mode::Loopback, true), (Mode::Loopback, false), (Mode::Discard, true)] {
        let mut pair = Pair::new(mode, Setup { usable, ..setup() });
        pair.give(&[1526, 1526]);
        pair.send(&PLAIN, &frame(100));
        assert_eq!(pair.done(), 1);
        assert_eq!(pair.used(1), [0]);
        let back = mode == Mode::Loopback && usable;
        assert_eq!(pair.used(0), if back { vec![112] } else { vec![] });
        assert_eq!(pair.counts(), [1, u64::from(back), u64::from(!usable), 0]);
        let bytes = [&pair.told().sent[1], &pair.told().received[1]].map(|count| count.load(Ordering::Relaxed));
        assert_eq!(bytes, [100, if back { 100 } else { 0 }]);
        if back {
            assert_eq!(pair.bytes(0, 112), [&ONE[..], &frame(100)].concat());
            assert_eq!(pair.bytes(0, 113)[112], 0xee);
        }
        // What was not used lies in the ring for the next one.
        assert_eq!(pair.devices[0].in_flight(), 0);
        pair.send(&PLAIN, &frame(60));
        pair.done();
        assert_eq!(pair.used(0).len(), usize::from(back));
    }
}

/// More than are read at once: none is lost, whether few or many fit.
#[test]
fn long_frames_that_come_together_all_come_back() {
    for len in [1514, 9000, 16_384 - 12, 40_000] {
        let mut pair = Pair::new(Mode::Loopback, setup());
        let whole = u32::try_from(len + 12).unwrap();
        let places = [0, 1 << 22].map(|from| (0..32).map(move |at| BIG + from + at * 0x1_0000).collect::<Vec<_>>());
        for (number, (&from, &to)) in (0..).zip(places[0].iter().zip(&places[1])) {
            let mut bytes = [&PLAIN[..], &frame(len)].concat();
            bytes[12] = number;
            pair.mem.write(from, &bytes).unwrap();
            pair.add(1, &[(from, whole)], &[]);
            pair.add(0, &[], &[(to, whole)]);
        }
        assert_eq!(pair.done(), 32);
        assert_eq!(pair.used(0), vec![whole; 32]);
        assert_eq!(pair.used(1).len(), 32);
        for (number, &to) in (0..).zip(&places[1]) {
            let mut expected = [&ONE[..], &frame(len)].concat();
            expected[12] = number;
            let mut bytes = vec![0; expected.len()];
            pair.mem.read(to, &mut bytes).unwrap();
            assert_eq!(bytes, expected, "frame {number} of {len} bytes");
        }
        assert_eq!(pair.counts(), [32, 32, 0, 0]);
    }
}

#[test]
fn the_short_header_has_no_number_of_buffers() {
    let mut pair = Pair::new(Mode::Loopback, Setup { header: 10, ..setup() });
    pair.give(&[1526]);
    pair.send(&PLAIN[..10], &frame(60));
    pair.done();
    assert_eq!(pair.used(0), [70]);
    assert_eq!(pair.bytes(0, 70), [&PLAIN[..10], &frame(60)].concat());
}

#[test]
fn what_breaks_a_rule_is_answered_named_and_goes_nowhere() {
    let checked = Setup {
        checksum: true,
        longest: 100,
        ..setup()
    };
    let plain = Setup {
        checksum: false,
        ..checked.clone()
    };
    let whole = |header: [u8; 12], len: usize| [&header[..], &frame(len)].concat();
    for (setup, bytes, rule) in [
        (&plain, vec![0; 11], Some("HeaderTooShort")),
        (&plain, vec![0; 12], Some("FrameMissing")),
        (&plain, whole(PLAIN, 1), None),
        (&plain, whole(PLAIN, 100), None),
        (&plain, whole(PLAIN, 101), Some("FrameTooLong")),
        (&plain, whole(header(2, 0, 0, 0), 60), Some("OffloadNotNegotiated")),
        (&plain, whole(header(4, 0, 0, 0), 60), Some("OffloadNotNegotiated")),
        (&plain, whole(header(0, 1, 0, 0), 60), Some("OffloadNotNegotiated")),
        (&plain, whole(header(8, 0, 0, 0), 60), None),
        (&plain, whole(header(1, 0, 0, 0), 60), Some("OffloadNotNegotiated")),
        (&checked, whole(header(1, 0, 0, 0), 60), None),
        (&checked, whole(header(1, 0, 34, 24), 60), None),
        (&checked, whole(header(1, 0, 34, 25), 60), Some("ChecksumBeyondFrame")),
        (
            &checked,
            whole(header(1, 0, 0xffff, 0xffff), 60),
            Some("ChecksumBeyondFrame"),
        ),
        (&checked, whole(header(0, 0, 0xffff, 0xffff), 60), None),
    ] {
        let mut pair = Pair::new(Mode::Loopback, setup.clone());
        pair.give(&[1526]);
        pair.send(&bytes, &[]);
        assert_eq!(pair.done(), 1);
        assert_eq!(pair.used(1), [0]);
        assert_eq!(pair.used(0).len(), usize::from(rule.is_none()), "{rule:?}");
        assert_eq!(pair.rules(), rule.into_iter().collect::<Vec<_>>());
        let good = u64::from(rule.is_none());
        assert_eq!(pair.counts(), [good, good, 0, 1 - good]);
    }
}

#[test]
fn findings_are_kept_until_they_are_taken_but_not_without_end() {
    let mut pair = Pair::new(Mode::Discard, setup());
    for _ in 0..1001 {
        pair.send(&[0; 11], &[]);
        pair.done();
        pair.used(1);
    }
    let findings = pair.told().take_findings();
    assert_eq!(findings.len(), 1000);
    assert_eq!((findings[0].queue, findings[0].clause), (1, "5.1.9"));
    assert_eq!((pair.counts()[3], pair.rules().len()), (1001, 0));
}

/// The ones' complement sum of all words from `start` on is right when it comes to all ones.
#[test]
fn a_checksum_is_filled_in_or_left_to_who_can() {
    for (len, start, offset) in [
        (60, 20, 6),
        (61, 20, 6),
        (1514, 14, 10),
        (60, 0, 58),
        (40, 34, 4),
        (300, 33, 8),
    ] {
        let mut frame = vec![0xff_u8; len];
        let place = usize::from(start + offset);
        frame[place..place + 2].fill(0);
        for guest_checksum in [false, true] {
            let mut pair = Pair::new(
                Mode::Loopback,
                Setup {
                    checksum: true,
                    guest_checksum,
                    ..setup()
                },
            );
            pair.give(&[1526]);
            pair.send(&header(1, 0, start, offset), &frame);
            pair.done();
            assert_eq!(pair.used(0).len(), 1);
            let bytes = pair.bytes(0, 12 + len);
            let (head, back) = bytes.split_at(12);
            let mut kept = header(1, 0, start, offset);
            kept[2..6].fill(0);
            kept[10..].copy_from_slice(&[1, 0]);
            if guest_checksum {
                assert_eq!((head, back), (&kept[..], &frame[..]));
                continue;
            }
            assert_eq!(head, ONE);
            let word = |part: &[u8]| u32::from(part[0]) << 8 | u32::from(*part.get(1).unwrap_or(&0));
            let total: u32 = back[usize::from(start)..].chunks(2).map(word).sum();
            // A sum at an odd place counts with its bytes exchanged.
            let fits = offset % 2 == 0 && total % 0xffff == 0;
            assert!(fits, "{len} {start} {offset}");
            assert!(back[..place] == frame[..place] && back[place + 2..] == frame[place + 2..]);
        }
    }
}

/// (MRG_RXBUF, sizes of the buffers, used lengths, findings, counts of 60 bytes' frames that came or were dropped)
#[test]
fn a_frame_has_room_in_one_buffer_or_in_as_many_as_it_needs() {
    let small = "BufferTooSmall";
    for (mergeable, sizes, used, findings) in [
        (false, vec![72], vec![72], vec![]),
        (false, vec![71, 200], vec![], vec![small]),
        (false, vec![11, 200], vec![], vec![small]),
        (false, vec![], vec![], vec![]),
        (true, vec![72, 200], vec![72], vec![]),
        (true, vec![40, 32, 200], vec![40, 32], vec![]),
        (true, vec![40, 31, 200], vec![40, 31, 1], vec![]),
        (true, vec![12, 4, 56], vec![12, 4, 56], vec![]),
        (true, vec![11, 200], vec![], vec![small]),
        (true, vec![40, 31], vec![], vec![]),
        (true, vec![], vec![], vec![]),
    ] {
        let mut pair = Pair::new(Mode::Loopback, Setup { mergeable, ..setup() });
        pair.give(&sizes);
        pair.send(&PLAIN, &frame(60));
        assert_eq!(pair.done(), 1);
        assert_eq!(pair.used(1), [0]);
        assert_eq!(pair.used(0), used, "{sizes:?}");
        assert_eq!(pair.rules(), findings, "{sizes:?}");
        let came = u64::from(!used.is_empty());
        assert_eq!(pair.counts(), [1, came, 1 - came, 0]);
        let mut whole = Vec::new();
        for (number, &len) in (0..).zip(&used) {
            whole.extend(pair.bytes(number, len as usize));
            assert_eq!(pair.bytes(number, len as usize + 1)[len as usize], 0xee);
        }
        if came == 1 {
            let mut expected = [&PLAIN[..], &frame(60)].concat();
            expected[10] = u8::try_from(used.len()).unwrap();
            assert_eq!(whole, expected);
        }
        assert_eq!(pair.devices[0].in_flight(), 0, "what was not used went back");
        // And is there for a frame that fits.
        if used.is_empty() && sizes.first() == Some(&71) {
            pair.send(&PLAIN, &frame(59));
            pair.done();
            assert_eq!(pair.used(0), [71]);
        }
    }
}

#[test]
fn a_turn_over_sent_frames_ends_at_its_bounds() {
    // A frame of 60 bytes counts as those, and its buffers of 72. (chains, bytes, how many at each turn)
    for (chains, bytes, expected) in [
        (256, 1 << 30, vec![150]),
        (150, 1 << 30, vec![150]),
        (149, 1 << 30, vec![149, 1]),
        (128, 1 << 30, vec![128, 22]),
        (256, 132 * 60, vec![60, 60, 30]),
        (256, 132 * 60 + 1, vec![61, 61, 28]),
        (256, 132 * 128, vec![128, 22]),
        (256, 132 * 130, vec![130, 20]),
    ] {
        let mut pair = Pair::new(Mode::Loopback, setup());
        pair.give(&[1526; 160]);
        for _ in 0..150 {
            pair.send(&PLAIN, &frame(60));
        }
        for (number, &count) in expected.iter().enumerate() {
            let turn = pair.turn(Bounds { chains, bytes }).turn.unwrap();
            let more = count == chains || count as u64 * 132 >= bytes;
            assert_eq!((turn.done, turn.more), (count, more), "{chains} {bytes} {number}");
            assert_eq!((pair.used(1).len(), pair.used(0).len()), (count, count));
            assert_eq!((pair.devices[0].in_flight(), pair.devices[1].in_flight()), (0, 0));
        }
        assert_eq!(pair.done(), 0);
    }
}

#[test]
fn made_frames_fill_what_there_is_in_order() {
    let made = Setup {
        frame: frame(60),
        number_at: Some(8),
        ..setup()
    };
    // (chains, bytes, at each turn): of 150 frames for 160 buffers.
    for (chains, bytes, expected) in [
        (256, 1 << 30, vec![150]),
        (150, 1 << 30, vec![150]),
        (149, 1 << 30, vec![149, 1]),
        (256, 60 * 60, vec![60, 60, 30]),
        (256, 60 * 60 + 1, vec![61, 61, 28]),
        (256, 60 * 130, vec![130, 20]),
    ] {
        let mut pair = Pair::new(Mode::Generate(150), made.clone());
        pair.packets.set_generated(0);
        pair.give(&[1526; 160]);
        let mut number = 0;
        for &count in &expected {
            let turn = pair.turn(Bounds { chains, bytes }).turn.unwrap();
            // At its last one it knows that there are no more.
            let last = number + count == 150;
            let more = !last && (count == chains || count * 60 >= usize::try_from(bytes).unwrap());
            assert_eq!((turn.done, turn.more), (count, more), "{chains} {bytes}");
            assert_eq!(pair.used(0), vec![72; count]);
            for at in number..number + count {
                let mut expected = [&ONE[..], &frame(60)].concat();
                expected[20..28].copy_from_slice(&(at as u64).to_be_bytes());
                assert_eq!(pair.bytes(at as u64, 72), expected);
            }
            number += count;
        }
        assert_eq!((pair.packets.generated(), pair.done()), (150, 0));
        assert_eq!(pair.counts(), [0, 150, 0, 0]);
        assert_eq!(pair.devices[0].in_flight(), 0);
    }
    for setup in [
        Setup {
            usable: false,
            ..made.clone()
        },
        made,
    ] {
        let mut pair = Pair::new(Mode::Generate(if setup.usable { 0 } else { 5 }), setup);
        pair.give(&[1526]);
        assert_eq!(pair.turn(BOUNDS).turn, Ok(Turn::default()));
        assert!(pair.used(0).is_empty());
    }
}

/// Both ways at once: what is made and what was sent.
#[test]
fn who_makes_frames_takes_what_is_sent_too() {
    let made = Setup {
        frame: frame(60),
        ..setup()
    };
    for (chains, done, more) in [(256, 13, false), (5, 8, true), (3, 6, true)] {
        let mut pair = Pair::new(Mode::Generate(10), made.clone());
        pair.give(&[1526; 20]);
        for _ in 0..3 {
            pair.send(&PLAIN, &frame(60));
        }
        let turn = pair.turn(Bounds { chains, bytes: 1 << 30 }).turn.unwrap();
        assert_eq!((turn.done, turn.more), (done, more));
        assert_eq!(pair.counts()[..2], [3, (done - 3) as u64]);
    }
    let mut pair = Pair::new(Mode::Generate(1), made);
    pair.give(&[1526; 2]);
    for _ in 0..3 {
        pair.send(&PLAIN, &frame(60));
    }
    let turn = pair
        .turn(Bounds {
            chains: 2,
            bytes: 1 << 30,
        })
        .turn
        .unwrap();
    assert_eq!(
        (turn.done, turn.more),
        (3, true),
        "there is more to be taken, and none to be made"
    );
}

/// Whether what is available in the receive queue is work, and worth a kick (`looks`, `kicked`).
#[test]
fn room_is_work_for_who_makes_frames_until_it_does_not_fit() {
    let made = Setup {
        frame: frame(60),
        ..setup()
    };
    let looks = |pair: &Pair| (pair.packets.looks(0), pair.packets.kicked(0));
    // Nothing there: it waits for the first one.
    let mut pair = Pair::new(Mode::Generate(3), made.clone());
    assert_eq!(looks(&pair), (true, true));
    assert_eq!(pair.done(), 0);
    assert_eq!(looks(&pair), (true, true));
    pair.give(&[1526, 60]);
    assert_eq!(pair.done(), 1);
    // Too small: only another one can help.
    assert_eq!(
        (looks(&pair), pair.rules()),
        ((false, false), vec!["BufferTooSmall"; 2])
    );
    assert!(pair.packets.looks(1) && pair.packets.kicked(1));
    pair.packets.set_up(made.clone());
    assert_eq!(looks(&pair), (true, true));
    // Made as many as there should be.
    pair.packets.set_generated(3);
    assert_eq!(looks(&pair), (false, false));
    assert!(pair.packets.looks(1) && pair.packets.kicked(1));
    // Too few for one frame, until there are enough.
    let mergeable = Setup {
        mergeable: true,
        ..made.clone()
    };
    let mut pair = Pair::new(Mode::Generate(3), mergeable);
    pair.give(&[40]);
    assert_eq!(pair.done(), 0);
    assert_eq!(looks(&pair), (false, false));
    pair.give(&[32]);
    assert_eq!(pair.done(), 1);
    assert_eq!((pair.used(0), looks(&pair)), (vec![40, 32], (true, true)));
    for mode in [Mode::Loopback, Mode::Discard] {
        let pair = Native::Packets(Box::new(Pair::new(mode, setup()).packets));
        assert!(!pair.looks(0) && !pair.kicked(0) && pair.looks(1) && pair.kicked(1));
        assert_eq!(pair.queues(), 2);
    }
}

#[test]
fn only_who_needs_room_asks_for_kicks_of_it() {
    let made = Setup {
        frame: frame(60),
        ..setup()
    };
    for (mode, asks) in [(Mode::Loopback, false), (Mode::Generate(9), true)] {
        for (buffers, frames) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
            let mut pair = Pair::new(mode, made.clone());
            pair.give(&vec![1526; buffers]);
            for _ in 0..frames {
                pair.send(&PLAIN, &frame(60));
            }
            let pin = pair.mem.pin();
            let mem = pin.mapped();
            let [rx, tx] = &mut pair.devices;
            rx.disable_kicks(&mem).unwrap();
            tx.disable_kicks(&mem).unwrap();
            let found = arm(&pair.packets, &mem, &mut [rx, tx]).unwrap();
            assert_eq!(found, frames > 0 || (asks && buffers > 0));
            let wanted = [0, 1].map(|queue| pair.drivers[queue].wants_kick(&mem).unwrap());
            assert_eq!(wanted, [asks && buffers > 0, frames > 0]);
        }
    }
}

// ---------------------------------------------------------------------------------------------- what goes wrong

#[test]
fn memory_that_fails_or_is_lost_under_a_frame() {
    // A transfer that fails: nothing is known of that frame, or it goes nowhere, and all else goes on.
    for (sends, expected) in [(true, [1, 1, 0, 0]), (false, [2, 1, 1, 0])] {
        let far = Far::new(ODD, 0x2000);
        let mut pair = Pair::new(Mode::Loopback, setup());
        pair.mem.add(far.spec(true)).unwrap();
        if sends {
            pair.give(&[1526; 2]);
            pair.add(1, &[(ODD, 72)], &[]);
        } else {
            pair.add(0, &[], &[(ODD, 1526)]);
            pair.send(&PLAIN, &frame(60));
        }
        pair.send(&PLAIN, &frame(60));
        far.fails.store(far.count(), Ordering::Relaxed);
        assert_eq!(pair.done(), 2);
        assert_eq!((pair.used(1), pair.used(0)), (vec![0, 0], vec![72]));
        assert_eq!((pair.counts(), pair.rules()), (expected, vec![]));
    }
    // A file that was cut short: whoever gave it has broken a rule.
    for queue in [0, 1] {
        let cut = file(0x2000);
        let mut pair = Pair::new(Mode::Loopback, setup());
        pair.mem.add(received(ODD, 0x2000, &cut)).unwrap();
        if queue == 0 {
            pair.add(0, &[], &[(ODD, 1526)]);
        } else {
            pair.give(&[1526]);
            pair.add(1, &[(ODD, 72)], &[]);
        }
        pair.send(&PLAIN, &frame(60));
        ftruncate(&cut, 0).unwrap();
        let done = pair.turn(BOUNDS);
        assert_eq!(done.turn.unwrap_err().rule, Rule::MemoryLost);
        assert_eq!(done.broken[..], [u16::try_from(queue).unwrap()]);
        assert!(pair.used(0).is_empty());
        assert_eq!(
            pair.used(1).len(),
            1 - queue,
            "the frame was taken, whatever became of its buffer"
        );
        assert_eq!(pair.mem.read(ODD, &mut [0]), Err(MemoryError::Lost { gpa: ODD }));
    }
}

/// Both rings behind transfers. One fails, or all from there on: a queue breaks and that is said, or all is done; and no
/// frame that was sent is lost or answered twice.
#[test]
fn each_transfer_of_a_ring_that_fails_breaks_that_ring_or_nothing() {
    let made = Setup {
        frame: frame(60),
        mergeable: true,
        ..setup()
    };
    for (mode, sizes, for_good, frames) in [
        (Mode::Loopback, vec![40; 8], false, 3),
        (Mode::Loopback, vec![40; 8], true, 3),
        (Mode::Generate(130), vec![1526; 130], false, 3),
        (Mode::Generate(5), vec![1526; 8], false, 3),
        (Mode::Generate(5), vec![1526; 8], false, 0),
        (Mode::Generate(40), vec![20; 8], false, 3),
        (Mode::Generate(40), vec![40; 3], false, 3),
    ] {
        for number in 0.. {
            let far = Far::failing(0, 0x20000, NEVER, for_good);
            let ram = vec![far.spec(true), region(DATA, 0x10000), region(TABLES, 0x20_0000)];
            let mut pair = Pair::over(GuestMemory::new(ram, None).unwrap(), mode, made.clone());
            pair.give(&sizes);
            for _ in 0..frames {
                pair.send(&PLAIN, &frame(60));
            }
            let begun = far.count();
            far.fails.store(begun + number, Ordering::Relaxed);
            let done = pair.turn(BOUNDS);
            let failed = far.count() > begun + number;
            far.fails.store(NEVER, Ordering::Relaxed);
            assert_eq!(
                done.turn.is_err(),
                !done.broken.is_empty(),
                "{mode:?} {number}: {:?}",
                done.broken
            );
            if let Err(fault) = &done.turn {
                assert!(done.broken.contains(&fault.queue));
            }
            if !done.broken.contains(&1) {
                let before = pair.used(1).len();
                pair.turn(BOUNDS);
                assert_eq!(before + pair.used(1).len(), frames, "{mode:?} {number}");
            }
            if !failed {
                assert!(number > 20 && done.broken.is_empty());
                break;
            }
        }
    }
}

#[test]
fn the_longest_frame_of_all() {
    let longest = LONGEST + 1;
    let mut pair = Pair::new(Mode::Loopback, Setup { longest, ..setup() });
    let len = u32::try_from(12 + LONGEST).unwrap();
    pair.mem.fill(BIG, u64::from(len), 3).unwrap();
    pair.mem.write(BIG, &PLAIN).unwrap();
    for (len, came) in [(len, true), (len + 1, false)] {
        pair.add(0, &[], &[(BIG + 0x10_0000, len)]);
        pair.add(1, &[(BIG, len)], &[]);
        pair.done();
        assert_eq!(pair.used(0), if came { vec![len] } else { vec![] });
        assert_eq!(pair.rules(), if came { vec![] } else { vec!["FrameTooLong"] });
    }
}
