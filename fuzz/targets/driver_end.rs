//! The driver end against an arbitrary device: whatever it writes to the used ring or into packed slots, the
//! driver gives each of its buffers back at most once, with a length that fits, or reports one broken rule.
#![no_main]

mod common;

use std::collections::BTreeMap;

use common::{overlay, setup};
use libfuzzer_sys::fuzz_target;
use virtio_test::mem::{Access, GuestMemory};
use virtio_test::queue::{DriverQueue, IndirectArea};

fn run<A: Access>(mem: &A, data: &[u8]) {
    let Some(setup) = setup(data) else { return };
    let area = IndirectArea {
        address: 2048,
        entries: 8,
    };
    let Ok(mut queue) = DriverQueue::new(mem, setup.config, setup.state, Some(area)) else {
        return;
    };
    let mut held: BTreeMap<u64, u64> = BTreeMap::new();
    let mut moves = setup.rest;
    for _ in 0..64 {
        let Some((&what, rest)) = moves.split_first() else {
            break;
        };
        moves = rest;
        match what % 4 {
            0 => {
                let (readable, writable) = (usize::from(what >> 2 & 3), usize::from(what >> 4 & 3));
                let buffers = [(4096, 16), (4112, 16), (4128, 16)];
                let indirect = what & 128 != 0;
                if let Ok(token) = queue.add(mem, &buffers[..readable], &buffers[..writable], indirect) {
                    assert!(
                        held.insert(token, 16 * writable as u64).is_none(),
                        "a token is given once"
                    );
                }
            }
            1 => {
                queue.publish(mem).expect("the ring stays mapped");
                queue.wants_kick(mem).expect("the ring stays mapped");
            }
            2 => {
                let (place, bytes) = moves.split_at(moves.len().min(2));
                let (change, rest) = bytes.split_at(bytes.len().min(usize::from(what >> 2) % 16 + 1));
                let offset = place.iter().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
                overlay(mem, offset % 512, change);
                moves = rest;
            }
            _ => match queue.get_used(mem) {
                Ok(Some((token, written))) => {
                    let writable = held.remove(&token).expect("a buffer comes back once");
                    assert!(u64::from(written) <= writable, "a length fits its buffer");
                }
                Ok(None) => {}
                Err(_) => assert!(matches!(queue.get_used(mem), Ok(None)), "raised once"),
            },
        }
        assert_eq!(usize::try_from(queue.in_flight()).ok(), Some(held.len()));
    }
    let tokens = queue.detach();
    assert_eq!(
        tokens,
        held.keys().copied().collect::<Vec<_>>(),
        "detach gives back what is left, once"
    );
}

fuzz_target!(init: {}, |data: &[u8]| {
    thread_local!(static MEMORY: GuestMemory = common::memory());
    MEMORY.with(|memory| run(&memory.pin().mapped(), data));
});
