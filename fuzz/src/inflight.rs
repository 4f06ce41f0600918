//! A device end that begins with a record of what is in flight, which is the fuzzer's, and later with its own.
//!
//! Judged: a record that is refused is not changed; one that is taken says at most as much as the ring has room for, and each
//! head once; nothing is stored outside the used side. Then a device end that ends anywhere and begins anew from its record has
//! in flight what was in flight: nothing is lost, and nothing is handed out that the driver had back.
//!
//! Input as in `setup`; the image is followed by a word, the bytes of the record modulo 512, and the record. A move is a byte:
//! bits 0 and 1 pop, complete, publish, or begin anew; the others are an operand.

use std::sync::Arc;

use virtio_test::chain::{Element, Segment};
use virtio_test::inflight::{Area, Part};
use virtio_test::mem::{Access, At, Backing, GuestMemory, RegionSpec};
use virtio_test::queue::{DeviceQueue, QueueState, StartError};

use crate::setup::{Setup, lay, memory, setup};
use crate::watched::Watched;

const RECORD: u64 = 512;

struct Shared {
    memory: GuestMemory,
    /// Maps what `area` maps, for whoever wrote the record before.
    records: GuestMemory,
    area: Arc<Area>,
}

impl Shared {
    fn new() -> Self {
        let region = RegionSpec {
            gpa: 0,
            size: 4096,
            backing: Backing::Memfd,
        };
        let records = GuestMemory::new(vec![region], None).expect("fresh memory can be mapped");
        let regions = records.regions();
        let fd = regions[0].fd().expect("a memfd has one");
        let backing = Backing::Received {
            fd: fd.try_clone().expect("one more descriptor"),
            offset: 0,
            writable: true,
        };
        let area = Area::new(4096, backing, None).expect("it can be mapped twice");
        Self {
            memory: memory(),
            records,
            area: Arc::new(area),
        }
    }

    fn record(&self) -> [u8; RECORD as usize] {
        let mut bytes = [0; RECORD as usize];
        self.records.read(0, &mut bytes).expect("it is mapped");
        bytes
    }
}

/// See the module's head.
pub fn run(data: &[u8]) {
    thread_local!(static SHARED: Shared = Shared::new());
    SHARED.with(|shared| play(shared, &shared.memory.pin().mapped(), data));
}

/// A device end, and the record as it was if that was refused.
fn begin<A: Access>(
    shared: &Shared,
    watched: &Watched<'_, A>,
    setup: &Setup<'_>,
    state: Option<QueueState>,
) -> Option<DeviceQueue> {
    let before = shared.record();
    let part = Part::new(Arc::clone(&shared.area), 0, setup.layout.size);
    watched.allow([]);
    match DeviceQueue::recorded(watched, setup.config, state, part) {
        Ok(queue) => {
            assert!(queue.left() <= usize::from(setup.layout.size));
            assert_eq!(queue.left() as u32, queue.in_flight());
            Some(queue)
        }
        Err(StartError::Record(_) | StartError::Fault(_)) => {
            assert!(before == shared.record(), "a record that is refused is not changed");
            None
        }
    }
}

fn play<A: Access>(shared: &Shared, mem: &A, data: &[u8]) {
    let Some(mut setup) = setup(data, None) else { return };
    lay(mem, setup.image);
    if !setup.layout.packed {
        // The device's own word, which tells how far the last update came: as whoever was here before has left it.
        let used = setup.state.map_or(0, |state| state.used);
        mem.store_u16(At::unresolved(setup.layout.device + 2), 0, used)
            .expect("the ring is mapped");
    }
    shared.records.fill(0, RECORD, 0).expect("it is mapped");
    let count = usize::from(setup.moves.word().unwrap_or(0)) % RECORD as usize;
    let record = setup.moves.take(count);
    shared.records.write(0, record).expect("it is mapped");
    let watched = Watched::new(mem);
    let Some(mut queue) = begin(shared, &watched, &setup, setup.state) else {
        return;
    };
    let layout = setup.layout;
    let (ring, events) = if layout.packed {
        ((layout.desc, layout.desc_bytes()), (layout.device, 4))
    } else {
        ((layout.device, layout.device_bytes()), (layout.device, 2))
    };
    let mut held: Vec<Element> = Vec::new();
    // Completed and not published: still in flight for whoever begins anew.
    let mut done: Vec<u16> = Vec::new();
    // A driver that offers one head twice: the record has room for it once.
    let mut twice = false;
    for _ in 0..64 {
        let Some(what) = setup.moves.byte() else { break };
        watched.allow([ring, events]);
        match what & 3 {
            0 => {
                let mut segments: Vec<Segment> = Vec::new();
                if let Ok(Some(element)) = queue.pop(&watched, &mut segments) {
                    assert_eq!(element.count, segments.len());
                    twice |= held
                        .iter()
                        .map(|other| other.head)
                        .chain(done.iter().copied())
                        .any(|head| head == element.head);
                    held.push(element);
                }
                assert!(queue.in_flight() <= u32::from(layout.size));
            }
            1 if !held.is_empty() => {
                let element = held.swap_remove(usize::from(what >> 2) % held.len());
                let taken = queue
                    .complete(&watched, &element.ticket(), 0)
                    .expect("0 bytes always fit");
                assert_eq!(taken, !queue.broken());
                done.push(element.head);
            }
            2 => {
                queue.publish(&watched).expect("ring and record stay mapped");
                if !queue.broken() {
                    done.clear();
                }
            }
            _ => {
                let mut heads: Vec<u16> = held
                    .iter()
                    .map(|element| element.head)
                    .chain(done.iter().copied())
                    .collect();
                let flying = queue.left() + heads.len();
                heads.sort_unstable();
                let plain = !queue.broken() && !twice && queue.left() == 0;
                twice = false;
                let in_order = setup.config.has(virtio_test::queue::feature::IN_ORDER);
                drop(queue);
                let Some(fresh) = begin(shared, &watched, &setup, setup.state) else {
                    return;
                };
                queue = fresh;
                if plain && !in_order {
                    assert_eq!(queue.left(), flying, "what was in flight is in flight");
                    let mut again = Vec::new();
                    let mut segments = Vec::new();
                    watched.allow([ring, events]);
                    for _ in 0..flying {
                        let popped = queue.pop(&watched, &mut segments);
                        again.push(popped.expect("it was good before").expect("it is left"));
                    }
                    let mut found: Vec<u16> = again.iter().map(|element| element.head).collect();
                    found.sort_unstable();
                    assert_eq!(found, heads, "the same chains, each once");
                    held = again;
                } else {
                    held.clear();
                }
                done.clear();
            }
        }
    }
}
