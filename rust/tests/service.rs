//! Services and their turns: bounds, publication, who is woken, whose fault it was; and the entropy service.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::far::{Far, NEVER};
use common::files::{file, received};
use common::{BIG, DATA, PACKED, World, config, region};
use rustix::fs::ftruncate;
use virtio_test::error::Fault;
use virtio_test::mem::{AliasSpec, GuestMemory, MemoryError};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue};
use virtio_test::rule::Rule;
use virtio_test::service::{Answer, Bounds, Burst, Done, Entropy, Native, Service, Turn, Wake, arm, each, run};

const BOUNDS: Bounds = Bounds {
    chains: 64,
    bytes: 1 << 30,
};
const ODD: u64 = BIG + (1 << 30);

fn turn(world: &mut World, service: &mut impl Service, bounds: Bounds) -> Done {
    let pin = world.mem.pin();
    let queues = &mut [&mut world.device];
    match pin.mediated() {
        Some(mem) => run(service, &mem, queues, bounds),
        None => run(service, &pin.mapped(), queues, bounds),
    }
}

fn met(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

// ------------------------------------------------------------------------------------------------------- entropy

#[test]
fn a_buffer_gets_random_bytes_up_to_the_limit() {
    let mut world = World::interop(8, 0);
    let mut entropy = Entropy::new(1000);
    let counters = Arc::clone(entropy.counters());
    world.mem.fill(DATA, 0x8000, 0xee).unwrap();
    let mut given = 0;
    // (readable, writable, used, odd)
    for (number, (readable, writable, used, odd)) in [
        (0, 64, 64, 0),
        (0, 256, 256, 0),
        (0, 257, 257, 0),
        (0, 1000, 1000, 0),
        (0, 2000, 1000, 0),
        (8, 64, 64, 1),
        (8, 0, 0, 2),
    ]
    .into_iter()
    .enumerate()
    {
        let gpa = DATA + 0x1000 * number as u64;
        let (readable, writable) = ([(DATA + 0x8000, readable)], [(gpa, writable)]);
        let readable = if readable[0].1 == 0 { &readable[..0] } else { &readable };
        let writable = if writable[0].1 == 0 { &writable[..0] } else { &writable };
        world.add(readable, writable);
        world.publish();
        let done = turn(&mut world, &mut entropy, BOUNDS);
        assert_eq!(done.turn.unwrap().done, 1);
        assert_eq!(world.used().unwrap().unwrap().1, used);
        given += u64::from(used);
        assert_eq!(
            (met(&counters.delivered), met(&counters.odd), met(&counters.failed)),
            (given, odd, 0)
        );
        let mut bytes = vec![0; 0x1000];
        world.mem.read(gpa, &mut bytes).unwrap();
        let (random, rest) = bytes.split_at(used as usize);
        assert!(rest.iter().all(|&byte| byte == 0xee));
        // 32 equal ones in a row come once in 2^248.
        assert!(
            random
                .chunks_exact(32)
                .all(|part| part.iter().any(|byte| *byte != part[0]))
        );
    }
    assert_eq!(entropy.queues(), 1);
    // A buffer of no bytes at all, which a driver of others may put in.
    let mut world = World::interop(8, 0);
    world.chain(&[(DATA, 0, common::WRITE, 0)]);
    assert_eq!(turn(&mut world, &mut entropy, BOUNDS).turn.unwrap().done, 1);
    assert_eq!(met(&counters.odd), 3);
}

#[test]
fn entropy_for_memory_that_has_gone_ends_there() {
    let far = Far::failing(ODD, 0x1000, 1, false);
    let mut world = World::interop(8, 0);
    world.mem.add(far.spec(true)).unwrap();
    let mut entropy = Entropy::new(1000);
    world.add(&[], &[(ODD, 600)]);
    world.publish();
    assert_eq!(turn(&mut world, &mut entropy, BOUNDS).turn.unwrap().done, 1);
    assert_eq!(world.used().unwrap().unwrap().1, 256);
    let counters = entropy.counters();
    assert_eq!((met(&counters.delivered), met(&counters.failed)), (256, 1));

    let cut = file(0x1000);
    let mut world = World::interop(8, 0);
    world.mem.add(received(ODD, 0x1000, &cut)).unwrap();
    world.add(&[], &[(ODD, 600)]);
    world.publish();
    ftruncate(&cut, 0).unwrap();
    let done = turn(&mut world, &mut entropy, BOUNDS);
    assert_eq!(done.turn.unwrap_err().rule, Rule::MemoryLost);
    assert_eq!(done.broken[..], [3]);
    assert_eq!(world.mem.read(ODD, &mut [0]), Err(MemoryError::Lost { gpa: ODD }));
}

// --------------------------------------------------------------------------------------------------------- turns

/// Uses no byte of any chain, and counts those that it was shown.
#[derive(Default)]
struct Counts {
    burst: Burst,
    shown: u64,
    charge: u64,
}

impl Service for Counts {
    fn queues(&self) -> usize {
        1
    }

    fn turn<A: virtio_test::mem::Access>(
        &mut self,
        mem: &A,
        queues: &mut [&mut DeviceQueue],
        bounds: Bounds,
    ) -> Result<Turn, Fault> {
        let Self { burst, shown, charge } = self;
        each(burst, mem, queues[0], bounds, |_, _, _| {
            *shown += 1;
            Ok(Answer {
                used: u64::MAX,
                charge: *charge,
            })
        })
    }
}

#[test]
fn a_turn_ends_at_its_bounds_and_what_is_left_comes_next() {
    for features in [0, PACKED] {
        // Chains of 24 bytes. (chains, bytes, how many at each turn)
        for (chains, bytes, expected) in [
            (64, 1 << 30, vec![50]),
            (50, 1 << 30, vec![50]),
            (49, 1 << 30, vec![49, 1]),
            (32, 1 << 30, vec![32, 18]),
            (64, 24 * 20, vec![20, 20, 10]),
            (64, 24 * 20 - 23, vec![20, 20, 10]),
            (64, 24 * 20 + 1, vec![21, 21, 8]),
            (64, 24 * 32, vec![32, 18]),
            (64, 24 * 50, vec![50]),
        ] {
            let mut world = World::interop(128, features);
            let tokens: Vec<_> = (0..50).map(|_| world.add(&[(DATA, 8)], &[(DATA + 64, 16)])).collect();
            world.publish();
            let mut service = Counts::default();
            let bounds = Bounds { chains, bytes };
            let mut seen = Vec::new();
            for &count in &expected {
                let turned = turn(&mut world, &mut service, bounds).turn.unwrap();
                assert_eq!(turned.done, count, "{chains} {bytes}");
                assert_eq!(
                    turned.more,
                    count == chains || count as u64 * 24 >= bytes,
                    "{chains} {bytes}"
                );
                for _ in 0..count {
                    seen.push(world.used().unwrap().unwrap());
                }
                assert_eq!(world.used().unwrap(), None);
            }
            assert_eq!(service.shown, 50);
            assert!(
                seen.iter()
                    .zip(&tokens)
                    .all(|(&(one, len), &other)| one == other && len == 16)
            );
            assert_eq!(turn(&mut world, &mut service, bounds).turn, Ok(Turn::default()));
        }
        let mut world = World::interop(8, features);
        world.give(true);
        let none = Bounds { chains: 0, bytes: 1 };
        let more = Turn {
            more: true,
            ..Turn::default()
        };
        assert_eq!(turn(&mut world, &mut Counts::default(), none).turn, Ok(more));
        assert!(world.has_work());
    }
}

#[test]
fn a_queue_that_breaks_is_named_once_and_what_was_answered_is_shown() {
    let mut world = World::interop(8, 0);
    let mut service = Counts::default();
    world.give(true);
    let done = turn(&mut world, &mut service, BOUNDS);
    assert_eq!((done.turn.unwrap().done, &done.broken[..]), (1, &[][..]));
    assert_eq!(
        done.wakes[..],
        [Wake {
            call: true,
            miss: false
        }]
    );
    assert!(world.used().unwrap().is_some());
    assert_eq!(turn(&mut world, &mut service, BOUNDS).wakes[..], [Wake::default()]);
    world.give(true);
    world.avail(99);
    let done = turn(&mut world, &mut service, BOUNDS);
    assert_eq!(done.turn.unwrap_err().rule, Rule::HeadOutOfRange);
    assert_eq!((&done.broken[..], service.shown), (&[3][..], 2));
    assert!(world.used().unwrap().is_some(), "the good one before it");
    let done = turn(&mut world, &mut service, BOUNDS);
    assert_eq!((done.turn, &done.broken[..]), (Ok(Turn::default()), &[][..]));
}

/// Rings behind transfers, of which each fails once: either the queue breaks and that is said, or all is done.
#[test]
fn each_transfer_that_fails_breaks_the_queue_or_nothing() {
    for features in [0, PACKED] {
        for number in 0.. {
            let far = Far::new(0, 0x10000);
            let mem = GuestMemory::new(vec![far.spec(true), region(DATA, 0x1000)], None).unwrap();
            let pin = mem.pin();
            let mem = pin.mediated().unwrap();
            let config = config(8, features, Policy::INTEROP);
            let mut driver = DriverQueue::new(&mem, config, None, None).unwrap();
            let mut device = DeviceQueue::new(&mem, config, None).unwrap();
            for _ in 0..3 {
                driver.add(&mem, &[(DATA, 8)], &[(DATA + 64, 8)], false).unwrap();
            }
            driver.publish(&mem).unwrap();
            let begun = far.count();
            far.fails.store(begun + number, Ordering::Relaxed);
            let mut service = Counts::default();
            let done = run(&mut service, &mem, &mut [&mut device], BOUNDS);
            let failed = far.count() > begun + number;
            far.fails.store(NEVER, Ordering::Relaxed);
            assert_eq!(done.turn.is_err(), !done.broken.is_empty(), "transfer {number}");
            let mut used = 0;
            while driver.get_used(&mem).unwrap().is_some() {
                used += 1;
            }
            assert!(used <= service.shown, "transfer {number}");
            if done.broken.is_empty() {
                assert_eq!((done.turn.unwrap().done, used), (3, 3), "transfer {number}");
            }
            if !failed {
                assert!(number > 10 && done.broken.is_empty());
                break;
            }
        }
    }
}

/// Whoever can get a translation is told of it each time, and by nobody else.
#[test]
fn a_turn_that_waits_for_a_translation_says_so_each_time() {
    let real = GuestMemory::new(vec![region(0, 0x40000)], None).unwrap();
    let shown = GuestMemory::new(vec![], None).unwrap();
    let alias = |gpa: u64, size: u64| AliasSpec {
        gpa,
        size,
        region: Arc::clone(&real.regions()[0]),
        skip: gpa,
        access: (true, true),
    };
    shown.translate(vec![], vec![alias(0, 0x4000)]).unwrap();
    let config = config(8, 0, Policy::INTEROP);
    let pin = real.pin();
    let mut driver = DriverQueue::new(&pin.mapped(), config, None, None).unwrap();
    let mut device = DeviceQueue::new(&shown.pin().mapped(), config, None).unwrap();
    driver.add(&pin.mapped(), &[], &[(0x8000, 8)], false).unwrap();
    driver.publish(&pin.mapped()).unwrap();
    let mut service = Counts::default();
    for _ in 0..2 {
        let done = run(&mut service, &shown.pin().mapped(), &mut [&mut device], BOUNDS);
        assert_eq!(
            done.wakes[..],
            [Wake {
                call: false,
                miss: true
            }]
        );
        assert!(!device.waits_anew(), "it has been told");
    }
    shown.translate(vec![], vec![alias(0x8000, 0x1000)]).unwrap();
    let done = run(&mut service, &shown.pin().mapped(), &mut [&mut device], BOUNDS);
    assert_eq!(
        done.wakes[..],
        [Wake {
            call: true,
            miss: false
        }]
    );
    assert_eq!(service.shown, 1);
}

// ------------------------------------------------------------------------------------------------------- arming

#[test]
fn who_arms_asks_for_kicks_and_hears_of_what_is_there() {
    let entropy = Native::Entropy(Entropy::new(1));
    assert!(entropy.looks(0) && entropy.kicked(0));
    assert_eq!(entropy.queues(), 1);
    let mut world = World::interop(8, 0);
    for there in [false, true] {
        if there {
            world.give(true);
        }
        let pin = world.mem.pin();
        world.device.disable_kicks(&pin.mapped()).unwrap();
        let found = arm(&entropy, &pin.mapped(), &mut [&mut world.device]).unwrap();
        drop(pin);
        assert_eq!(found, there);
        assert_eq!(
            world.get("used.flags", 0),
            0,
            "NO_NOTIFY is clear where a kick is wanted (2.7.10)"
        );
    }
}
