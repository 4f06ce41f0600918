//! Frames that go straight from buffer to buffer: what must not, and what goes wrong on the way, behind others that went so.
//!
//! The first frame of a burst takes receive buffers, so none goes straight before the second. What memory hands out no
//! address of is never passed so: the same frames there say what must come of all this.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::os::fd::AsFd as _;
use std::sync::Arc;

use common::far::Far;
use common::files::{file, received};
use common::pair::{BOUNDS, ODD, ONE, PLAIN, Pair, configs, frame, header, setup};
use common::{BIG, HOLE, region};
use rustix::fs::ftruncate;
use virtio_test::inflight::{Area, Part};
use virtio_test::mem::{Log, MemoryError};
use virtio_test::queue::{DeviceQueue, QueueState};
use virtio_test::rule::Rule;
use virtio_test::service::packet::{Finding, LONGEST, Mode, Setup};
use virtio_test::service::{Bounds, run};

/// Frames lie from here on, and buffers for them.
const SENT: u64 = BIG;
const ROOM: u64 = BIG + (1 << 22);
const APART: u64 = 0x2000;

/// Send this, cut into several buffers at these places, and with bytes to write to behind them.
fn send(pair: &mut Pair, gpa: u64, bytes: &[u8], cuts: &[usize], writable: u32) {
    let ends = cuts.iter().copied().chain([bytes.len()]);
    let mut from = 0;
    let parts: Vec<_> = (0..)
        .zip(ends)
        .map(|(number, end)| {
            let part = &bytes[std::mem::replace(&mut from, end)..end];
            let at = gpa + 0x800 * number;
            pair.mem.write(at, part).unwrap();
            (at, u32::try_from(part.len()).unwrap())
        })
        .collect();
    let behind = [(gpa + 0x1800, writable)];
    pair.add(1, &parts, if writable > 0 { &behind } else { &[] });
}

/// A plain frame of 60 bytes, which says by its first which one it is.
fn plain(pair: &mut Pair, number: u8) {
    let mut bytes = [&PLAIN[..], &frame(60)].concat();
    bytes[12] = number;
    send(pair, SENT + APART * u64::from(number), &bytes, &[], 0);
}

/// Room for one that long.
fn give(pair: &mut Pair, number: u8) {
    pair.add(0, &[], &[(ROOM + APART * u64::from(number), 1526)]);
}

fn bytes(pair: &Pair, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    pair.mem.read(gpa, &mut bytes).unwrap();
    bytes
}

/// The plain frame of this number lies there, behind a header of ours.
fn came(pair: &Pair, number: u8, gpa: u64) {
    let mut expected = [&ONE[..], &frame(60)].concat();
    expected[12] = number;
    assert_eq!(bytes(pair, gpa, 72), expected, "frame {number}");
}

// ----------------------------------------------------------------------------------------------- what is not so plain

/// Header, bytes of the frame, where it is cut, and bytes to be written to.
type Sent = ([u8; 12], usize, &'static [usize], u32);

const ODDITIES: [Sent; 18] = [
    (PLAIN, 60, &[], 0),
    (PLAIN, 1, &[], 0),
    (PLAIN, 100, &[], 0),
    (PLAIN, 101, &[], 0),
    (PLAIN, 0, &[], 0),
    // What asks for something, or means nothing.
    (header(1, 0, 34, 24), 60, &[], 0),
    (header(1, 0, 34, 25), 60, &[], 0),
    (header(2, 0, 0, 0), 60, &[], 0),
    (header(4, 0, 0, 0), 60, &[], 0),
    (header(8, 0, 7, 7), 60, &[], 0),
    (header(0, 1, 0, 0), 60, &[], 0),
    (header(0, 0x80, 0, 0), 60, &[], 0),
    (header(0, 0, 0xffff, 9), 60, &[], 0),
    // Not all of it in one buffer, or not alone.
    (PLAIN, 60, &[5], 0),
    (PLAIN, 60, &[12], 0),
    (PLAIN, 60, &[12, 40], 0),
    (PLAIN, 60, &[], 16),
    (PLAIN, 60, &[30], 7),
];

/// What buffers are to be read and written, by their bytes, in each chain.
const PLACES: [&[(u32, &[u32])]; 11] = [
    &[(0, &[1526]), (0, &[1526]), (0, &[1526])],
    &[(0, &[72]), (0, &[72]), (0, &[72])],
    &[(0, &[72]), (0, &[71]), (0, &[72])],
    &[(0, &[72]), (0, &[12, 60]), (0, &[100])],
    &[(0, &[72]), (0, &[30, 1000]), (0, &[100])],
    &[(0, &[72]), (8, &[72]), (0, &[72])],
    &[(0, &[72]), (200, &[72]), (0, &[72])],
    &[(0, &[72]), (200, &[]), (0, &[72])],
    &[(0, &[1526]), (0, &[40]), (0, &[32]), (0, &[1526]), (0, &[90])],
    &[(0, &[1526]), (0, &[11]), (0, &[72])],
    &[(0, &[1526])],
];

fn setups() -> [Setup; 8] {
    let base = Setup {
        longest: 100,
        ..setup()
    };
    [
        base.clone(),
        Setup {
            mergeable: true,
            ..base.clone()
        },
        Setup {
            checksum: true,
            ..base.clone()
        },
        Setup {
            checksum: true,
            guest_checksum: true,
            ..base.clone()
        },
        Setup {
            header: 10,
            ..base.clone()
        },
        Setup {
            usable: false,
            ..base.clone()
        },
        Setup {
            longest: 1,
            ..base.clone()
        },
        Setup {
            longest: LONGEST,
            ..base
        },
    ]
}

/// All that a turn changes and says, until there is nothing more to do.
#[derive(Debug, PartialEq)]
struct Became {
    turns: Vec<(usize, bool)>,
    used: [Vec<u32>; 2],
    counts: [u64; 4],
    findings: Vec<Finding>,
    states: [QueueState; 2],
    places: Vec<Vec<u8>>,
}

/// What becomes of three frames, the second of which is odd, with one turn after the other.
fn becomes(mode: Mode, setup: &Setup, odd: Sent, places: &[(u32, &[u32])], bounds: Bounds, whole: bool) -> Became {
    let mut pair = Pair::new(mode, setup.clone());
    for (number, &(readable, writable)) in (0..).zip(places) {
        let place = ROOM + APART * number;
        pair.mem.fill(place, 0x1800, 0xee).unwrap();
        let parts: Vec<_> = (0..)
            .zip(writable)
            .map(|(part, &len)| (place + 0x800 * part, len))
            .collect();
        let before = [(place + 0x1700, readable)];
        pair.add(0, if readable > 0 { &before } else { &[] }, &parts);
    }
    for (number, (header, len, cuts, writable)) in (0..).zip([ODDITIES[0], odd, ODDITIES[0]]) {
        let mut bytes = [&header[..setup.header], &frame(len)].concat();
        if let Some(first) = bytes.get_mut(setup.header) {
            *first = u8::try_from(number).unwrap();
        }
        send(&mut pair, SENT + APART * number, &bytes, cuts, writable);
    }
    let mut turns = Vec::new();
    loop {
        let pin = pair.mem.pin();
        let [rx, tx] = &mut pair.devices;
        let done = if whole {
            run(&mut pair.packets, &pin.whole(), &mut [rx, tx], bounds)
        } else {
            run(&mut pair.packets, &pin.mapped(), &mut [rx, tx], bounds)
        };
        let turn = done.turn.unwrap();
        turns.push((turn.done, turn.more));
        if turn.done == 0 {
            break;
        }
    }
    Became {
        turns,
        used: [pair.used(0), pair.used(1)],
        counts: pair.counts(),
        findings: pair.told().take_findings(),
        states: [0, 1].map(|queue| pair.devices[queue].state()),
        places: (0..6)
            .map(|number| bytes(&pair, ROOM + APART * number, 0x1800))
            .collect(),
    }
}

/// A turn may end before, at and behind each of them.
const ENDS: [Bounds; 7] = [
    BOUNDS,
    Bounds { chains: 1, ..BOUNDS },
    Bounds { chains: 2, ..BOUNDS },
    Bounds { bytes: 1, ..BOUNDS },
    Bounds { bytes: 133, ..BOUNDS },
    Bounds {
        bytes: 2 * 132,
        ..BOUNDS
    },
    Bounds {
        bytes: 2 * 132 + 16,
        ..BOUNDS
    },
];

#[test]
fn whatever_is_odd_becomes_what_it_does_where_nothing_goes_straight() {
    let (mut passed, mut ends) = (0, ENDS.into_iter().cycle());
    for (setup, odd) in setups().iter().flat_map(|setup| ODDITIES.map(|odd| (setup, odd))) {
        for (mode, places) in [Mode::Loopback, Mode::Discard]
            .into_iter()
            .flat_map(|mode| PLACES.map(|at| (mode, at)))
        {
            let bounds = ends.next().unwrap();
            let expected = becomes(mode, setup, odd, places, bounds, true);
            assert_eq!(
                becomes(mode, setup, odd, places, bounds, false),
                expected,
                "{mode:?} {setup:?} {odd:?} {places:?} {bounds:?}"
            );
            passed += expected.counts[1];
        }
    }
    assert!(passed > 1500, "{passed}");
}

/// One buffer that only we may write is no frame, whatever lies in it.
#[test]
fn what_can_only_be_written_is_not_passed_on() {
    let longest = Setup {
        longest: usize::MAX,
        ..setup()
    };
    let mut pair = Pair::new(Mode::Loopback, longest);
    plain(&mut pair, 0);
    pair.add(1, &[], &[(SENT, 72)]);
    plain(&mut pair, 2);
    for number in 0..3 {
        give(&mut pair, number);
    }
    assert_eq!(pair.done(), 3);
    assert_eq!((pair.used(0), pair.used(1)), (vec![72; 2], vec![0; 3]));
    assert_eq!((pair.rules(), pair.counts()), (vec!["HeaderTooShort"], [2, 2, 0, 1]));
    came(&pair, 0, ROOM);
    came(&pair, 2, ROOM + APART);
}

/// A buffer that the frame itself lies in, or the next one does, wherever they begin; and whatever is lost elsewhere.
#[test]
fn a_frame_may_lie_in_the_buffer_that_it_goes_to() {
    lie_in_the_buffer();
    let cut = file(0x2000);
    let other = Pair::new(Mode::Loopback, setup());
    other.mem.add(received(ODD, 0x2000, &cut)).unwrap();
    ftruncate(&cut, 0).unwrap();
    assert!(other.mem.read(ODD, &mut [0; 8]).is_err());
    lie_in_the_buffer();
}

fn lie_in_the_buffer() {
    for (len, apart) in [1, 4, 40, 60, 200]
        .into_iter()
        .flat_map(|len| (0..100).map(move |apart| (len, apart)))
    {
        let mut pair = Pair::new(Mode::Loopback, setup());
        plain(&mut pair, 0);
        give(&mut pair, 0);
        let whole = [&PLAIN[..], &frame(len)].concat();
        let (from, to) = (SENT + APART + 50, SENT + APART + apart);
        send(&mut pair, from, &whole, &[], 0);
        pair.add(0, &[], &[(to, 1526)]);
        // What was received is sent once more, with whatever lies behind it now.
        pair.add(1, &[(to, u32::try_from(whole.len()).unwrap())], &[]);
        give(&mut pair, 2);
        assert_eq!(pair.done(), 3);
        let expected = [&ONE[..], &frame(len)].concat();
        assert_eq!(
            bytes(&pair, to, expected.len()),
            expected,
            "{len} bytes from 50 to {apart}"
        );
        assert_eq!(bytes(&pair, ROOM + 2 * APART, expected.len()), expected);
        assert_eq!(pair.counts(), [3, 3, 0, 0]);
    }
}

/// A buffer over a ring of either queue: what a frame leaves there is judged like anything that a driver writes, one rule is
/// named or none, and no more becomes of it.
#[test]
fn a_frame_may_land_on_a_ring() {
    let areas = configs().map(|config| [config.desc, config.driver, config.device]);
    let mut named = Vec::new();
    for (start, off) in areas
        .as_flattened()
        .iter()
        .flat_map(|start| [(start, 0), (start, 4), (start, 64)])
    {
        for fill in [0, 0x7f, 0x80, 0xff] {
            let mut pair = Pair::new(Mode::Loopback, setup());
            plain(&mut pair, 0);
            give(&mut pair, 0);
            let whole = [&PLAIN[..], &[fill; 200]].concat();
            send(&mut pair, SENT + APART, &whole, &[], 0);
            pair.add(0, &[], &[(start + off, 1526)]);
            let mut broken = Vec::new();
            for _ in 0..4 {
                let done = pair.turn(BOUNDS);
                broken.extend(done.broken.iter().copied());
                assert_eq!(
                    done.turn.is_err(),
                    !done.broken.is_empty(),
                    "a rule is told as it breaks a queue"
                );
                named.extend(done.turn.err().map(|fault| fault.rule));
            }
            // Each queue once at most.
            broken.sort_unstable();
            let mut once = broken.clone();
            once.dedup();
            assert_eq!(broken, once);
            let [sent, received, dropped, _] = pair.counts();
            assert!(sent >= received + dropped && received <= 2 + 128);
        }
    }
    assert!(named.contains(&Rule::AvailIdxTooFar), "{named:?}");
}

/// Somebody who reads the log copies what is marked; nobody reads what was sent for it.
#[test]
fn frames_are_marked_in_a_dirty_log() {
    let mut pair = Pair::new(Mode::Loopback, setup());
    for number in 0..4 {
        plain(&mut pair, number);
        give(&mut pair, number);
    }
    let (log, fd) = Log::fresh((SENT + (1 << 23)) / 0x1000 / 8).unwrap();
    let size = (SENT + (1 << 23)) / 0x1000 / 8;
    pair.mem
        .set_log(Some(Log::new(fd.as_fd(), 0, size, vec![]).unwrap()))
        .unwrap();
    assert_eq!(pair.done(), 4);
    let marked: Vec<_> = log.take().into_iter().filter(|page| *page >= SENT / 0x1000).collect();
    let pages = (0..4).map(|number| (ROOM + APART * number) / 0x1000);
    assert_eq!(marked, pages.collect::<Vec<_>>());
    for number in 0..4 {
        came(&pair, number, ROOM + APART * u64::from(number));
    }
}

/// Memory that somebody carries is read as a whole, and once.
#[test]
fn a_frame_that_somebody_carries_is_read_once() {
    let far = Far::new(ODD, 0x8000);
    let mut pair = Pair::new(Mode::Loopback, setup());
    pair.mem.add(far.spec(true)).unwrap();
    plain(&mut pair, 0);
    give(&mut pair, 0);
    let mut whole = [&PLAIN[..], &frame(60)].concat();
    for number in 1..4 {
        whole[12] = number;
        send(&mut pair, ODD + APART * u64::from(number), &whole, &[], 0);
        pair.add(0, &[], &[(ODD + APART * u64::from(number) + 0x1000, 1526)]);
    }
    far.lengths.lock().unwrap().clear();
    assert_eq!(pair.done(), 4);
    assert_eq!(far.lengths.lock().unwrap()[..], [72; 6]);
    for number in 1..4 {
        came(&pair, number, ODD + APART * u64::from(number) + 0x1000);
    }
    came(&pair, 0, ROOM);
}

// ---------------------------------------------------------------------------------------------------- what goes wrong

/// A file that is cut short, at its start or within a frame or a buffer: the second of three is in it, or goes to it.
#[test]
fn a_frame_on_its_way_from_or_to_lost_memory_is_shown_to_nobody() {
    for (queue, at) in [0, 1]
        .into_iter()
        .flat_map(|queue| [0x100, 0xfff, 0xff8, 0xff0, 0xfc0].map(|at| (queue, at)))
    {
        let cut = file(0x2000);
        let mut pair = Pair::new(Mode::Loopback, setup());
        pair.mem.add(received(ODD, 0x2000, &cut)).unwrap();
        for number in 0..3 {
            let odd = number == 1;
            if odd && queue == 1 {
                send(&mut pair, ODD + at, &[&PLAIN[..], &frame(60)].concat(), &[], 0);
            } else {
                plain(&mut pair, number);
            }
            if odd && queue == 0 {
                pair.add(0, &[], &[(ODD + at, 72)]);
            } else {
                give(&mut pair, number);
            }
        }
        // All of it, or the second page only.
        ftruncate(&cut, if at == 0x100 { 0 } else { 0x1000 }).unwrap();
        let done = pair.turn(BOUNDS);
        assert_eq!(done.turn.unwrap_err().rule, Rule::MemoryLost);
        assert_eq!(done.broken[..], [queue]);
        if queue == 1 {
            // The one before it came; the driver hears of no chain of a broken queue.
            assert_eq!((pair.used(0), pair.used(1)), (vec![72], vec![]));
            assert_eq!(pair.counts(), [1, 1, 0, 0]);
            came(&pair, 0, ROOM);
        } else {
            assert_eq!((pair.used(0), pair.used(1)), (vec![], vec![0, 0]));
            assert_eq!(pair.counts(), [2, 1, 1, 0]);
            // The last one finds no buffer.
            assert_eq!((pair.done(), pair.used(1)), (1, vec![0]));
            assert_eq!(pair.counts(), [3, 1, 2, 0]);
        }
        assert_eq!(
            pair.mem.read(ODD + 0x1000, &mut [0]),
            Err(MemoryError::Lost { gpa: ODD + 0x1000 })
        );
    }
}

/// Buffers that an earlier device end left do not go back into the ring: put back, they come again under another table, where
/// the same addresses are other memory.
#[test]
fn a_buffer_that_was_put_back_is_found_anew() {
    let mut pair = Pair::new(Mode::Loopback, setup());
    let record = file(0x4000);
    let area = Arc::new(Area::new(0x4000, received(0, 0x4000, &record).backing, None).unwrap());
    let begin = |pair: &mut Pair| {
        let pin = pair.mem.pin();
        let part = Part::new(Arc::clone(&area), 0, 256);
        pair.devices[0] = DeviceQueue::recorded(&pin.mapped(), configs()[0], None, part).unwrap();
    };
    begin(&mut pair);
    for number in 0..4 {
        give(&mut pair, number);
    }
    let pin = pair.mem.pin();
    let popped = pair.devices[0].pop_many(&pin.mapped(), 4, &mut Vec::new(), &mut Vec::new());
    assert_eq!(popped, Ok(4));
    drop(pin);
    begin(&mut pair);
    assert_eq!(pair.devices[0].left(), 4);
    plain(&mut pair, 0);
    for _ in 0..3 {
        pair.send(&[0; 11], &[]);
    }
    assert_eq!(pair.done(), 4);
    came(&pair, 0, ROOM);
    assert_eq!((pair.used(0), pair.devices[0].left()), (vec![72], 0));
    pair.mem.remove(BIG, 256 << 20).unwrap();
    pair.mem.add(region(BIG, 256 << 20)).unwrap();
    for number in 1..4 {
        plain(&mut pair, number);
    }
    assert_eq!((pair.done(), pair.used(0)), (3, vec![72; 3]));
    for number in 1..4 {
        came(&pair, number, ROOM + APART * u64::from(number));
    }
    assert_eq!(bytes(&pair, ROOM, 72), [0; 72], "what was there is gone");
}

/// Whatever was lost elsewhere, nothing becomes of frames but what does anyhow.
#[test]
fn frames_that_have_to_do_with_nothing_lost_come_back() {
    let cut = file(0x2000);
    let mut pair = Pair::new(Mode::Loopback, setup());
    pair.mem.add(received(ODD, 0x2000, &cut)).unwrap();
    ftruncate(&cut, 0).unwrap();
    pair.mem.read(ODD, &mut [0]).unwrap_err();
    for number in 0..4 {
        plain(&mut pair, number);
        give(&mut pair, number);
    }
    assert_eq!(pair.done(), 4);
    for number in 0..4 {
        came(&pair, number, ROOM + APART * u64::from(number));
    }
    assert_eq!((pair.used(0), pair.used(1)), (vec![72; 4], vec![0; 4]));
}

#[test]
fn a_chain_that_breaks_a_rule_is_named_behind_however_many() {
    for before in [0, 1, 2, 127, 128, 129] {
        let mut pair = Pair::new(Mode::Loopback, setup());
        for number in 0..before {
            plain(&mut pair, number);
            give(&mut pair, number);
        }
        pair.send(&[0; 11], &[]);
        assert_eq!(pair.done(), usize::from(before) + 1);
        let heads: Vec<u16> = pair.told().take_findings().iter().map(|found| found.head).collect();
        assert_eq!(heads, [u16::from(before)]);
        assert_eq!(pair.counts(), [before.into(), before.into(), 0, 1]);
    }
}

#[test]
fn frames_before_a_broken_receive_queue_are_answered_and_those_behind_it_read_again() {
    for good in [0, 1, 2, 11, 13] {
        let mut pair = Pair::new(Mode::Loopback, setup());
        for number in 0..good {
            give(&mut pair, number);
        }
        pair.add(0, &[], &[(HOLE, 1526)]);
        for number in 0..14 {
            plain(&mut pair, number);
        }
        let done = pair.turn(BOUNDS);
        assert_eq!(done.turn.unwrap_err().rule, Rule::UnmappedAddress);
        assert_eq!(done.broken[..], [0]);
        assert_eq!(pair.used(1).len(), usize::from(good) + 1);
        // The rest finds no buffer any more.
        let rest = usize::from(13 - good);
        assert_eq!((pair.done(), pair.used(1).len()), (rest, rest));
        assert_eq!(pair.counts(), [14, good.into(), (14 - good).into(), 0]);
    }
}

/// One breaks the receive queue, and what lies behind it would break its own: each is named in its turn.
#[test]
fn two_queues_that_break_in_one_burst_are_both_told() {
    let cut = file(0x2000);
    let mut pair = Pair::new(Mode::Loopback, setup());
    pair.mem.add(received(ODD, 0x2000, &cut)).unwrap();
    pair.add(0, &[], &[(ODD, 1526)]);
    pair.send(&PLAIN, &frame(60));
    pair.add(1, &[(ODD, 72)], &[]);
    ftruncate(&cut, 0).unwrap();
    for (queue, used) in [(0, 1), (1, 0)] {
        let done = pair.turn(BOUNDS);
        assert_eq!(done.turn.unwrap_err().rule, Rule::MemoryLost);
        assert_eq!(done.broken[..], [queue]);
        assert_eq!(pair.used(1).len(), used);
    }
}

/// A slot that a frame over two buffers has left is used again for one in one buffer.
#[test]
fn each_frame_that_is_made_says_over_how_many_buffers_it_lies() {
    for len in [64, 1000] {
        let made = Setup {
            mergeable: true,
            frame: frame(len),
            ..setup()
        };
        let mut pair = Pair::new(Mode::Generate(64), made);
        let half = u32::try_from(len / 2).unwrap();
        for at in (0..).take(32).map(|number| BIG + 0x1000 * number) {
            pair.add(0, &[], &[(at, 12 + half)]);
            pair.add(0, &[], &[(at + 0x800, half)]);
        }
        for at in (32..).take(32).map(|number| BIG + 0x1000 * number) {
            pair.add(0, &[], &[(at, 12 + 2 * half)]);
        }
        assert_eq!(pair.done(), 64);
        assert_eq!(pair.used(0).len(), 96);
        for number in 0..64 {
            let mut header = [0; 12];
            pair.mem.read(BIG + 0x1000 * number, &mut header).unwrap();
            assert_eq!(
                header,
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, if number < 32 { 2 } else { 1 }, 0]
            );
        }
    }
}
