//! Frames that are made ready in groups: what goes wrong in one, behind those of another.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::files::{file, received};
use common::pair::{BOUNDS, ODD, PLAIN, Pair, frame, setup};
use common::{BIG, HOLE};
use rustix::fs::ftruncate;
use virtio_test::rule::Rule;
use virtio_test::service::packet::{Mode, Setup};

/// Of frames of this length eleven are a group.
const LONG: usize = 1514;
const GROUP: usize = 11;

/// Send so many of them.
fn send(pair: &mut Pair, count: usize) {
    for at in (0..).take(count).map(|number| BIG + 0x1000 * number) {
        pair.mem.write(at, &[&PLAIN[..], &frame(LONG)].concat()).unwrap();
        pair.add(1, &[(at, 12 + 1514)], &[]);
    }
}

#[test]
fn a_chain_that_breaks_a_rule_is_named_whatever_group_it_is_in() {
    for before in [0, 1, GROUP - 1, GROUP, GROUP + 1] {
        let mut pair = Pair::new(Mode::Discard, setup());
        send(&mut pair, before);
        pair.send(&[0; 11], &[]);
        assert_eq!(pair.done(), before + 1);
        let heads: Vec<u16> = pair.told().take_findings().iter().map(|found| found.head).collect();
        assert_eq!(heads, [u16::try_from(before).unwrap()]);
    }
}

#[test]
fn frames_before_a_broken_receive_queue_are_answered_and_those_behind_it_read_again() {
    for good in [0, 1, GROUP - 1, GROUP, GROUP + 1] {
        let mut pair = Pair::new(Mode::Loopback, setup());
        pair.give(&vec![1526; good]);
        pair.add(0, &[], &[(HOLE, 1526)]);
        send(&mut pair, GROUP + 3);
        let done = pair.turn(BOUNDS);
        assert_eq!(done.turn.unwrap_err().rule, Rule::UnmappedAddress);
        assert_eq!(done.broken[..], [0]);
        assert_eq!(pair.used(1).len(), good + 1);
        // The rest finds no buffer any more.
        assert_eq!(pair.done(), GROUP + 2 - good);
        assert_eq!(pair.used(1).len(), GROUP + 2 - good);
        let [all, good] = [GROUP + 3, good].map(|count| u64::try_from(count).unwrap());
        assert_eq!(pair.counts(), [all, good, all - good, 0]);
    }
}

/// One breaks the receive queue, and what lies behind it would break its own: each is named in its turn.
#[test]
fn two_queues_that_break_in_one_group_are_both_told() {
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
