//! The device end against an arbitrary driver: rings, tables and descriptors are the fuzzer's, and change
//! between pops. Panics, overflows, accesses outside the mapping and broken invariants are findings.
#![no_main]

mod common;

use common::{MEMORY, overlay, setup};
use libfuzzer_sys::fuzz_target;
use virtio_test::chain::{Element, Segment};
use virtio_test::iov::Iov;
use virtio_test::mem::{Access, GuestMemory};
use virtio_test::queue::DeviceQueue;

fn check(element: &Element, segments: &[Segment]) {
    let sum = |writable| -> u64 {
        segments
            .iter()
            .filter(|s| s.writable == writable)
            .map(|s| u64::from(s.len))
            .sum()
    };
    assert_eq!(
        sum(false),
        element.readable,
        "readable bytes are the sum of their segments"
    );
    assert_eq!(
        sum(true),
        element.writable,
        "writable bytes are the sum of their segments"
    );
    for segment in segments {
        assert!(
            segment
                .at
                .gpa
                .checked_add(u64::from(segment.len))
                .is_some_and(|end| end <= MEMORY)
        );
    }
}

fn run<A: Access>(mem: &A, data: &[u8]) {
    let Some(setup) = setup(data) else { return };
    mem.fill(virtio_test::mem::At::unresolved(0), 0, MEMORY, 0)
        .expect("the memory is mapped");
    let Some((&image, rest)) = setup.rest.split_first() else {
        return;
    };
    let (image, mut moves) = rest.split_at(rest.len().min(usize::from(image)));
    overlay(mem, 0, image);
    let Ok(mut queue) = DeviceQueue::new(mem, setup.config, setup.state) else {
        return;
    };
    let size = setup.config.size;
    let mut held: Vec<(Element, Vec<Segment>)> = Vec::new();
    for _ in 0..128 {
        let mut segments = Vec::new();
        match queue.pop(mem, &mut segments) {
            Ok(Some(element)) => {
                assert!(
                    queue.in_flight() <= size,
                    "no more in flight than the queue has room for"
                );
                check(&element, &segments);
                held.push((element, segments));
            }
            Ok(None) => {}
            Err(_) => {
                assert!(queue.latched().is_some());
                assert!(!queue.has_work(mem), "a latched queue has no work");
                assert!(matches!(queue.pop(mem, &mut Vec::new()), Ok(None)), "raised once");
            }
        }
        let Some((&what, rest)) = moves.split_first() else {
            break;
        };
        moves = rest;
        match what % 4 {
            0 if !held.is_empty() => {
                let (element, segments) = held.swap_remove(usize::from(what / 4) % held.len());
                let iov = Iov::new(&segments, element.epoch);
                let written = iov.write(mem, 0, &[what; 64]).expect("validated segments stay mapped");
                let done = queue.complete(mem, &element.ticket(), written as u64);
                assert_eq!(done, Ok(queue.latched().is_none()));
                queue.publish(mem).expect("the ring stays mapped");
                queue.wants_call(mem).expect("the ring stays mapped");
            }
            1 if !held.is_empty() => {
                let (element, _) = held.pop().expect("it is not empty");
                if queue.unpop(&element.ticket()).is_err() {
                    queue.complete(mem, &element.ticket(), 0).expect("0 bytes always fit");
                }
            }
            _ => {
                let (place, bytes) = moves.split_at(moves.len().min(2));
                let (change, rest) = bytes.split_at(bytes.len().min(usize::from(what >> 2) + 1));
                let offset = place.iter().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
                overlay(mem, offset % 512, change);
                moves = rest;
            }
        }
    }
}

fuzz_target!(init: {}, |data: &[u8]| {
    thread_local!(static MEMORY: GuestMemory = common::memory());
    MEMORY.with(|memory| run(&memory.pin().mapped(), data));
});
