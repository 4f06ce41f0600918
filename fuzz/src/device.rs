//! The device end against an arbitrary driver: rings, tables and descriptors are the fuzzer's, and change between pops.
//!
//! Judged: what a pop hands out lies in memory, adds up and keeps the order; it takes no more loads than its chain can
//! have descriptors; one broken rule is raised once and then nothing is loaded or stored; stores go to the used side of
//! the ring, to what was asked for, and to writable segments, and to nothing else; what is completed stands in the ring as
//! it was said, and is announced with it.
//!
//! A pop comes before each move. A move is a byte: its low three bits choose, the others are an operand.

use virtio_test::chain::{Element, Segment};
use virtio_test::error::{Misuse, QueueError};
use virtio_test::iov::Iov;
use virtio_test::mem::{Access, At, GuestMemory};
use virtio_test::queue::{DeviceQueue, QueueState};
use virtio_test::ring::RingLayout;

use crate::setup::{MEMORY, lay, memory, overlay, setup};
use crate::watched::{Span, Watched};

/// The split ring.
pub fn split(data: &[u8]) {
    run(data, false);
}

/// The packed ring.
pub fn packed(data: &[u8]) {
    run(data, true);
}

fn run(data: &[u8], packed: bool) {
    thread_local!(static MEMORY: GuestMemory = memory());
    MEMORY.with(|memory| play(&memory.pin().mapped(), data, packed));
}

struct Held {
    element: Element,
    segments: Vec<Segment>,
}

struct Play<'a, A> {
    mem: &'a A,
    watched: Watched<'a, A>,
    layout: RingLayout,
    in_order: bool,
    strict: bool,
    queue: DeviceQueue,
    held: Vec<Held>,
    /// Slot and wrap counter of what was completed and not published.
    staged: Vec<(u16, bool)>,
    /// Slots that they stand for.
    slots: u32,
}

/// Where a device asks for kicks.
fn asking(layout: &RingLayout) -> [Span; 2] {
    let event = layout.device + 4 + 8 * u64::from(layout.size);
    if layout.packed {
        [(layout.device, 4), (layout.device, 4)]
    } else {
        [(layout.device, 2), (event, 2)]
    }
}

/// Where a device says what it used.
fn used(layout: &RingLayout) -> Span {
    if layout.packed {
        (layout.desc, layout.desc_bytes())
    } else {
        (layout.device + 2, layout.device_bytes() - 4)
    }
}

fn writable(segments: &[Segment]) -> impl Iterator<Item = Span> + '_ {
    let writable = segments.iter().filter(|segment| segment.writable);
    writable.map(|segment| (segment.at.gpa, u64::from(segment.len)))
}

fn play<A: Access>(mem: &A, data: &[u8], packed: bool) {
    let Some(setup) = setup(data, Some(packed)) else { return };
    lay(mem, setup.image);
    let watched = Watched::new(mem);
    let Ok(queue) = DeviceQueue::new(&watched, setup.config, setup.state) else {
        return;
    };
    let mut play = Play {
        mem,
        watched,
        layout: setup.layout,
        in_order: setup.config.has(virtio_test::queue::feature::IN_ORDER),
        strict: !setup.config.policy.duplicate_heads,
        queue,
        held: Vec::new(),
        staged: Vec::new(),
        slots: 0,
    };
    if !setup.kicks {
        play.watched.allow(asking(&play.layout));
        play.queue.disable_kicks(&play.watched).expect("the ring stays mapped");
    }
    let mut moves = setup.moves;
    for _ in 0..96 {
        play.pop(1);
        let Some(what) = moves.byte() else { break };
        match what & 7 {
            0 | 1 => {
                if let Some(held) = play.choose(what >> 3) {
                    play.fill(&held, what);
                    play.complete(&held, what);
                    play.publish();
                    play.announce();
                }
            }
            2 => {
                if let Some(held) = play.choose(what >> 3) {
                    play.complete(&held, what);
                }
            }
            3 => {
                if let Some(held) = play.choose(what >> 3) {
                    play.watched.allow([]);
                    play.queue.put_back(&held.element, &held.segments);
                }
            }
            4 | 5 => {
                let (place, bytes) = moves.overlay(what);
                overlay(mem, place, bytes);
            }
            6 => play.control(what >> 3, || moves.word().unwrap_or(0)),
            _ => play.pop(usize::from(what >> 3) % 9),
        }
    }
}

impl<A: Access> Play<'_, A> {
    fn choose(&mut self, which: u8) -> Option<Held> {
        let count = self.held.len().max(1);
        (!self.held.is_empty()).then(|| self.held.swap_remove(usize::from(which) % count))
    }

    fn dead(&self) -> bool {
        self.queue.broken()
    }

    fn pop(&mut self, limit: usize) {
        let (mut segments, mut elements) = (Vec::new(), Vec::new());
        self.watched.allow(asking(&self.layout));
        let (loads, stores) = (self.watched.loads(), self.watched.stores());
        let quiet = self.dead() || self.queue.stopped();
        let popped = if limit == 1 {
            self.queue
                .pop(&self.watched, &mut segments)
                .map(|popped| elements.extend(popped))
        } else {
            let popped = self.queue.pop_many(&self.watched, limit, &mut segments, &mut elements);
            popped.map(|count| assert_eq!(count, elements.len()))
        };
        let loads = self.watched.loads() - loads;
        // Per pop: idx, entry, the chain's own descriptors, a table; once more after asking, and for what is left alone.
        let each = 4 + 4 * u64::from(self.layout.size) + 2 * MEMORY / 16;
        assert!(loads <= each * (limit as u64 + 2), "{loads} loads for {limit} pops");
        if quiet {
            assert!(
                loads == 0 && self.watched.stores() == stores && elements.is_empty(),
                "it is dead"
            );
        }
        if popped.is_err() {
            assert!(elements.is_empty() && segments.is_empty(), "nothing is half done");
            self.broken_once();
        }
        for element in elements {
            let own = segments[element.first..element.first + element.count].to_vec();
            self.judge(&element, &own);
            self.held.push(Held { element, segments: own });
        }
        assert!(
            self.queue.in_flight() <= u32::from(self.layout.size),
            "more than the ring has room for"
        );
    }

    fn broken_once(&mut self) {
        assert!(self.queue.latched().is_some());
        let (loads, stores) = (self.watched.loads(), self.watched.stores());
        assert!(!self.queue.has_work(&self.watched), "a latched queue has no work");
        assert!(
            matches!(self.queue.pop(&self.watched, &mut Vec::new()), Ok(None)),
            "raised once"
        );
        assert_eq!((loads, stores), (self.watched.loads(), self.watched.stores()));
    }

    fn judge(&self, element: &Element, segments: &[Segment]) {
        let mut sums = [0u64; 2];
        let mut seen_writable = false;
        for segment in segments {
            let end = segment.at.gpa.checked_add(u64::from(segment.len));
            assert!(
                segment.len > 0 && end.is_some_and(|end| end <= MEMORY),
                "a segment lies in memory"
            );
            assert!(segment.writable || !seen_writable, "readable after writable");
            seen_writable |= segment.writable;
            sums[usize::from(segment.writable)] += u64::from(segment.len);
        }
        assert_eq!(sums, [element.readable, element.writable], "the parts add up");
        assert!(element.descriptors as usize >= segments.len().max(1));
        assert_eq!(element.generation, self.queue.generation());
        let size = self.layout.size;
        assert!(element.slots >= 1 && element.slots <= size);
        if !self.layout.packed {
            assert!(element.head < size && element.slots == 1);
        }
        if self.strict {
            assert_eq!(element.descriptors as usize, segments.len(), "no empty descriptor");
            let mut others = self.held.iter().map(|held| &held.element);
            let twice = |other: &Element| other.generation == element.generation && other.head == element.head;
            assert!(!others.any(twice), "a head that is in flight");
        }
    }

    /// Every byte of the writable part, and nothing else.
    fn fill(&mut self, held: &Held, value: u8) {
        self.watched.allow(writable(&held.segments));
        let iov = Iov::new(&held.segments, held.element.epoch);
        let half = usize::try_from(held.element.writable / 2).expect("it lies in memory");
        let done = iov.fill(&self.watched, half as u64, usize::MAX >> 1, value);
        assert_eq!(done.map(|done| done as u64), Ok(held.element.writable - half as u64));
        let done = iov.write(&self.watched, 0, &vec![value; half]);
        assert_eq!(done, Ok(half));
        let mut back = [0; 64];
        let read = iov
            .read(&self.watched, 0, &mut back)
            .expect("validated segments stay mapped");
        assert_eq!(read as u64, held.element.readable.min(64));
    }

    fn complete(&mut self, held: &Held, what: u8) {
        let ticket = held.element.ticket();
        self.watched.allow([]);
        let too_big = self.queue.complete(&self.watched, &ticket, ticket.writable + 1);
        assert!(matches!(too_big, Err(QueueError::Misuse(Misuse::WrittenTooBig { .. }))));
        let written = if what & 0x80 == 0 {
            ticket.writable
        } else {
            ticket.writable / 3
        };
        let current = self.queue.is_current(&ticket);
        if current {
            self.watched.allow([used(&self.layout)]);
        }
        let before = self.queue.in_flight();
        let done = self.queue.complete(&self.watched, &ticket, written);
        assert_eq!(done, Ok(current), "only what is of this generation is taken");
        if !current {
            return;
        }
        assert_eq!(self.queue.in_flight() + 1, before);
        if !self.in_order {
            self.stands(held, written);
        }
    }

    /// The completion just made stands in the ring.
    fn stands(&mut self, held: &Held, written: u64) {
        let state = self.queue.state().used;
        let size = u32::from(self.layout.size);
        let (address, [len, id]) = if self.layout.packed {
            let (slot, wrap) = (u32::from(state & 0x7fff) + self.slots % (2 * size), state & 0x8000 != 0);
            let slot_in = u16::try_from(slot % size).expect("below the size");
            self.staged.push((slot_in, wrap != (slot / size % 2 == 1)));
            self.slots += u32::from(held.element.slots);
            (self.layout.desc + 16 * u64::from(slot_in), [8, 12])
        } else {
            let slot = (u32::from(state) + self.slots) % size;
            self.slots += 1;
            (self.layout.device + 4 + 8 * u64::from(slot), [4, 0])
        };
        let at = At::unresolved(address);
        assert_eq!(self.mem.load_u32(at, len).map(u64::from), Ok(written));
        let id = if self.layout.packed {
            self.mem.load_u16(at, id).map(u32::from)
        } else {
            self.mem.load_u32(at, id)
        };
        assert_eq!(id, Ok(u32::from(held.element.head)));
    }

    fn publish(&mut self) {
        let before = self.queue.state().used;
        self.watched.allow([used(&self.layout)]);
        self.queue.publish(&self.watched).expect("the ring stays mapped");
        let after = self.queue.state().used;
        if !self.in_order && !self.dead() {
            let size = u32::from(self.layout.size);
            if !self.layout.packed {
                assert_eq!(u32::from(after.wrapping_sub(before)), self.slots & 0xffff);
            } else if self.slots <= size {
                for &(slot, wrap) in &self.staged {
                    let flags = self.mem.load_u16(At::unresolved(16 * u64::from(slot) + 14), 0);
                    let flags = flags.expect("the ring is mapped");
                    assert_eq!(
                        (flags & 0x80 != 0, flags & 0x8000 != 0),
                        (wrap, wrap),
                        "slot {slot} is used"
                    );
                }
            }
            self.staged.clear();
            self.slots = 0;
        }
        if !self.layout.packed && after != before {
            let idx = self.mem.load_u16(At::unresolved(self.layout.device + 2), 0);
            assert_eq!(idx, Ok(after), "used.idx is what we say");
        }
    }

    fn announce(&mut self) {
        self.watched.allow([]);
        let loads = self.watched.loads();
        let wants = self.queue.wants_call(&self.watched).expect("the ring stays mapped");
        assert!(self.watched.loads() - loads <= 3);
        assert!(!(wants && self.dead()), "nothing is announced by a dead queue");
        assert_eq!(self.queue.wants_call(&self.watched), Ok(false), "announced once");
    }

    fn control(&mut self, what: u8, mut word: impl FnMut() -> u16) {
        self.watched.allow(asking(&self.layout));
        let mem = &self.watched;
        match what {
            0..=3 => self.publish(),
            4..=6 => self.announce(),
            7 | 8 => drop(self.queue.enable_kicks(mem).expect("the ring stays mapped")),
            9 | 10 => self.queue.disable_kicks(mem).expect("the ring stays mapped"),
            11 | 12 => drop(self.queue.stop()),
            13..=16 => self.queue.resume(),
            17 | 18 => drop(self.queue.has_work(mem)),
            19 => self.queue.break_down(),
            _ => {
                self.watched.allow([]);
                let (avail, used) = (word(), word());
                let state = (what & 1 != 0).then_some(QueueState { avail, used });
                let before = (self.queue.generation(), self.queue.state(), self.queue.in_flight());
                let reset = self.queue.reset(&self.watched, None, state);
                let after = (self.queue.generation(), self.queue.state(), self.queue.in_flight());
                if reset.is_ok() {
                    let start = state.unwrap_or_else(|| QueueState::fresh(self.layout.packed));
                    assert_eq!(after, (before.0 + 1, start, 0));
                    self.staged.clear();
                    self.slots = 0;
                } else {
                    assert_eq!(after, before, "a refused reset changes nothing");
                }
            }
        }
    }
}
