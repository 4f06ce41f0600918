//! The driver end against an arbitrary device: whatever it writes to the used ring, into packed slots or into event areas.
//!
//! Judged: each buffer comes back at most once, with a length that fits; one broken rule is raised once; stores go to the
//! driver's own parts and its tables; a look takes a bounded number of loads; what is left is given back by `detach`. All of it
//! once asking for each word, and once reaching the ring directly: the same comes of both.
//!
//! A move is a byte: its low three bits choose, the others are an operand.

use std::collections::BTreeMap;

use virtio_test::mem::{Access, GuestMemory, Want};
use virtio_test::queue::{DriverQueue, IndirectArea, QueueState};
use virtio_test::ring::RingLayout;

use crate::setup::{Bytes, MEMORY, lay, memory, overlay, setup};
use crate::watched::{Span, Watched};

const TABLES: u64 = 2048;
const ENTRIES: u16 = 4;

/// Both formats: byte 0 says which.
pub fn run(data: &[u8]) {
    thread_local!(static OURS: GuestMemory = memory());
    OURS.with(|memory| {
        let pin = memory.pin();
        let mem = pin.mapped();
        let asked = play(&mem, Watched::new(&mem), data);
        assert_eq!(play(&mem, Watched::new(&mem).open(), data), asked, "reached directly");
    });
}

/// What became of a queue: what came back, how it stands, and all memory.
type End = (Vec<(u64, u32)>, String, Vec<u8>);

/// What a driver may store to while it works: not the split used ring, nor the device's events.
fn own(layout: &RingLayout) -> [Span; 3] {
    [
        (layout.desc, layout.desc_bytes()),
        (layout.driver, layout.driver_bytes()),
        (TABLES, 16 * u64::from(ENTRIES) * u64::from(layout.size)),
    ]
}

struct Play<'a, A> {
    watched: Watched<'a, A>,
    layout: RingLayout,
    queue: DriverQueue,
    /// Writable bytes of each buffer that was added and did not come back.
    held: BTreeMap<u64, u64>,
    back: Vec<(u64, u32)>,
}

fn play<A: Access>(mem: &A, watched: Watched<'_, A>, data: &[u8]) -> Option<End> {
    let setup = setup(data, None)?;
    lay(mem, setup.image);
    let layout = setup.layout;
    // A fresh ring is zeroed, all three areas of it.
    let whole = (0, layout.device + layout.device_bytes());
    watched.allow([whole]);
    let area = IndirectArea {
        address: TABLES,
        entries: ENTRIES,
    };
    let queue = DriverQueue::new(&watched, setup.config, setup.state, Some(area)).ok()?;
    let mut play = Play {
        watched,
        layout,
        queue,
        held: BTreeMap::new(),
        back: Vec::new(),
    };
    let mut moves = setup.moves;
    for _ in 0..96 {
        let Some(what) = moves.byte() else { break };
        play.watched.allow(own(&layout));
        match what & 7 {
            0 | 1 => play.add(what >> 3),
            2 => {
                play.publish();
            }
            3 | 4 => {
                let (place, bytes) = moves.overlay(what);
                overlay(mem, place, bytes);
            }
            5 => play.get(1),
            6 => play.get(usize::from(what >> 3) % 9),
            _ => play.control(what >> 3, &mut moves),
        }
        assert_eq!(usize::try_from(play.queue.in_flight()).ok(), Some(play.held.len()));
        assert!(play.queue.free() <= layout.size);
    }
    let queue = &mut play.queue;
    let stands = format!("{:?} {:?} {:?}", queue.state(), queue.counters(), queue.latched());
    let tokens = queue.detach();
    let left: Vec<u64> = play.held.keys().copied().collect();
    assert_eq!(tokens, left, "detach gives back what is left, once");
    let mut bytes = vec![0; MEMORY as usize];
    let all = mem.resolve(0, MEMORY, Want::Read).expect("it is mapped");
    mem.read(all, 0, &mut bytes).expect("it is mapped");
    Some((play.back, stands, bytes))
}

impl<A: Access> Play<'_, A> {
    fn dead(&self) -> bool {
        self.queue.latched().is_some() || self.queue.detached()
    }

    fn add(&mut self, what: u8) {
        let (readable, writable) = (usize::from(what & 3), usize::from(what >> 2 & 3));
        let buffers = [(1024, 16), (1040, 16), (1056, 16)];
        let (free, dead) = (self.queue.free(), self.dead());
        let added = self.queue.add(
            &self.watched,
            &buffers[..readable],
            &buffers[..writable],
            what & 16 != 0,
        );
        if let Ok(token) = added {
            assert!(
                !dead && self.held.insert(token, 16 * writable as u64).is_none(),
                "a token is given once"
            );
            let slots = if what & 16 != 0 { 1 } else { readable + writable };
            assert_eq!(usize::from(free - self.queue.free()), slots);
        } else {
            assert_eq!(self.queue.free(), free, "what is refused changes nothing");
        }
    }

    fn publish(&mut self) {
        let dead = self.dead();
        let count = self.queue.publish(&self.watched).expect("the ring stays mapped");
        assert!(!dead || count == 0);
        self.watched.allow([]);
        let wants = self.queue.wants_kick(&self.watched).expect("the ring stays mapped");
        assert!(!(dead && wants));
    }

    fn get(&mut self, limit: usize) {
        let (loads, dead) = (self.watched.loads(), self.dead());
        self.watched.allow([(self.layout.driver, self.layout.driver_bytes())]);
        let used = if limit == 1 {
            self.queue
                .get_used(&self.watched)
                .map(|used| used.into_iter().collect())
        } else {
            self.queue.get_used_many(&self.watched, limit)
        };
        assert!(self.watched.loads() - loads <= 5 * (limit as u64 + 1));
        match used {
            Ok(used) => {
                assert!(used.len() <= limit && (used.is_empty() || !dead));
                for (token, written) in used {
                    let writable = self.held.remove(&token).expect("a buffer comes back once");
                    assert!(u64::from(written) <= writable, "a length fits its buffer");
                    self.back.push((token, written));
                }
            }
            Err(_) => {
                assert!(self.queue.latched().is_some());
                let (loads, stores) = (self.watched.loads(), self.watched.stores());
                assert!(matches!(self.queue.get_used(&self.watched), Ok(None)), "raised once");
                assert!(!self.queue.has_used(&self.watched));
                assert_eq!((loads, stores), (self.watched.loads(), self.watched.stores()));
            }
        }
    }

    fn control(&mut self, what: u8, moves: &mut Bytes<'_>) {
        let driver = (self.layout.driver, self.layout.driver_bytes());
        self.watched.allow([driver]);
        let mem = &self.watched;
        match what {
            0..=5 => drop(self.queue.enable_calls(mem).expect("the ring stays mapped")),
            6..=11 => self.queue.disable_calls(mem).expect("the ring stays mapped"),
            12..=16 => drop(self.queue.has_used(mem)),
            17..=22 => {
                let taken = self.queue.get_used_many(mem, 2).unwrap_or_default();
                let before = self.queue.in_flight();
                let count = taken.len();
                self.queue.give_back(taken);
                assert_eq!(self.queue.in_flight() as usize, before as usize + count);
            }
            23 => {
                let tokens = self.queue.detach();
                assert_eq!(tokens, std::mem::take(&mut self.held).into_keys().collect::<Vec<_>>());
            }
            _ => {
                self.watched
                    .allow([(0, self.layout.device + self.layout.device_bytes())]);
                let place = moves.word().unwrap_or(0);
                let state = (what & 1 != 0).then_some(QueueState {
                    avail: place,
                    used: place,
                });
                let before = self.queue.generation();
                if self.queue.reset(&self.watched, None, state).is_ok() {
                    assert_eq!(self.queue.generation(), before + 1);
                    assert_eq!(self.queue.free(), self.layout.size);
                    self.held.clear();
                } else {
                    assert_eq!(self.queue.generation(), before);
                }
            }
        }
    }
}
