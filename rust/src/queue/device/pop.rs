//! Taking chains: one by one, or a burst.
//!
//! # Theory
//!
//! One loop of each ring takes all that it has, whichever call asked, so that what a walk knows lives in registers. What is
//! counted per chain is added up when the loop has ended, and an element is made where it will stay: to copy it about would
//! cost more than all checks.
//!
//! Beside the ring there are two more places where chains come from, both rare: those that were put back (`returned`) and
//! those that an earlier device end left (`recorded`).

use super::{DeviceQueue, Life, MAX_SEGMENTS, Ring};
use crate::chain::{Bounds, Element, Elements, End, Segment, Stamp};
use crate::error::Fault;
use crate::mem::{Access, any_lost};

/// One chain.
const ONE: Bounds = Bounds {
    chains: 1,
    segments: usize::MAX,
};

/// A call that is under way: how many chains it wants, what the arena had before, and how many it has so far.
struct Begun {
    limit: usize,
    first: usize,
    count: usize,
}

impl DeviceQueue {
    /// Pop the next chain; its segments are appended to `segments`.
    ///
    /// A pop that comes to the end of the ring asks the driver for a kick, unless kicks are disabled. One that lacks a
    /// translation gives None, and `waits` says which.
    ///
    /// # Errors
    /// The rule that the driver broke; the queue is then latched.
    #[inline]
    pub fn pop<A: Access>(&mut self, mem: &A, segments: &mut Vec<Segment>) -> Result<Option<Element>, Fault> {
        let mut element = None;
        self.pop_up_to(mem, 1, segments, &mut element)?;
        Ok(element)
    }

    /// Pop up to `limit` chains, fewer when they have very many segments together; their number. A broken chain
    /// behind good ones is left for the next call; of memory that is lost, none is good.
    ///
    /// # Errors
    /// As [`DeviceQueue::pop`], when the first chain is broken.
    #[inline]
    pub fn pop_many<A: Access>(
        &mut self,
        mem: &A,
        limit: usize,
        segments: &mut Vec<Segment>,
        elements: &mut Vec<Element>,
    ) -> Result<usize, Fault> {
        self.pop_up_to(mem, limit, segments, elements)
    }

    #[inline(always)]
    fn pop_up_to<A: Access, E: Elements>(
        &mut self,
        mem: &A,
        limit: usize,
        segments: &mut Vec<Segment>,
        elements: &mut E,
    ) -> Result<usize, Fault> {
        let begun = Begun {
            limit,
            first: segments.len(),
            count: 0,
        };
        // All that is asked for, out of the ring, and nothing beside it: what nearly every call comes to.
        let plain = matches!(self.life, Life::Running) && self.returned.is_empty() && self.recorded.is_none();
        if !plain || limit == 0 {
            return self.pop_on(mem, begun, End::More, segments, elements);
        }
        let bounds = Bounds {
            chains: limit as u64,
            segments: begun.first.saturating_add(MAX_SEGMENTS),
        };
        let (popped, end) = self.pop_burst(mem, bounds, segments, elements);
        let count = usize::try_from(popped).unwrap_or(usize::MAX);
        if !matches!(end, End::More) || !self.waits.is_none() || any_lost() {
            let begun = Begun { count, ..begun };
            return self.pop_on(mem, begun, end, segments, elements);
        }
        Ok(count)
    }

    /// Go on where a burst of pops ended so.
    #[inline(never)]
    fn pop_on<A: Access, E: Elements>(
        &mut self,
        mem: &A,
        Begun {
            limit,
            first,
            mut count,
        }: Begun,
        mut end: End,
        segments: &mut Vec<Segment>,
        elements: &mut E,
    ) -> Result<usize, Fault> {
        if !matches!(self.life, Life::Running) {
            return Ok(0);
        }
        let full = first.saturating_add(MAX_SEGMENTS);
        let fault = loop {
            match end {
                // Who comes to the end asks for a kick, and then looks once more: each in its turn.
                End::Empty => match self.arm(mem) {
                    Ok(true) => {}
                    Ok(false) => break None,
                    Err(found) => break Some(found),
                },
                End::More => {}
                End::Fault(found) => break Some(found),
            }
            if count >= limit || segments.len() >= full {
                break None;
            }
            let bounds = Bounds {
                chains: (limit - count) as u64,
                segments: full,
            };
            let popped;
            (popped, end) = if self.returned.is_empty() && self.recorded.is_none() {
                self.pop_ring(mem, bounds, segments, elements)
            } else {
                self.pop_kept(mem, segments, elements)
            };
            count = count.saturating_add(usize::try_from(popped).unwrap_or(usize::MAX));
        };
        let broken = if let Some(fault) = fault {
            self.waits.judge(mem.epoch(), fault)
        } else {
            self.waits.clear();
            None
        };
        if any_lost() {
            self.withdraw(mem, segments, first, elements, count)?;
        }
        match broken {
            Some(fault) if count == 0 => Err(self.latched_by(fault)),
            _ => Ok(count),
        }
    }

    /// Take from the ring.
    #[inline(never)]
    fn pop_ring<A: Access, E: Elements>(
        &mut self,
        mem: &A,
        bounds: Bounds,
        segments: &mut Vec<Segment>,
        elements: &mut E,
    ) -> (u64, End) {
        self.pop_burst(mem, bounds, segments, elements)
    }

    /// As `pop_ring`, in line.
    #[inline(always)]
    fn pop_burst<A: Access, E: Elements>(
        &mut self,
        mem: &A,
        bounds: Bounds,
        segments: &mut Vec<Segment>,
        elements: &mut E,
    ) -> (u64, End) {
        // With IN_ORDER a completed chain that waits for earlier ones is still in flight for the driver.
        let busy_slots = match &self.order {
            Some(order) => order.waiting(self.next_seq),
            None => u64::from(self.in_flight),
        };
        let room = u64::from(self.layout.size).saturating_sub(busy_slots);
        let stamp = Stamp {
            seq: self.next_seq,
            generation: self.generation,
        };
        let (rules, busy, into) = (&self.rules, &mut self.busy, (segments, elements));
        let refreshed = each!(&mut self.ring, ring => ring.refresh(mem));
        if let Err(error) = refreshed {
            let fault = each!(&self.ring, ring => ring.unmapped(rules, error));
            return (0, End::Fault(fault));
        }
        let (popped, end) = match &mut self.ring {
            Ring::Split(ring) => ring.pop(mem, rules, bounds, into, stamp, busy, room),
            Ring::Packed(ring) => {
                let copies = self.recorded.as_mut().map(|recorded| &mut recorded.copies);
                ring.pop(mem, rules, bounds, into, stamp, busy, copies)
            }
        };
        if popped > 0 {
            self.next_seq += popped;
            self.counters.popped += popped;
            self.in_flight += u32::try_from(popped).unwrap_or(u32::MAX);
            self.armed = false;
        }
        (popped, end)
    }

    /// One chain of those put back, of those that an earlier device end left, or of a ring of which a record is kept.
    #[cold]
    #[inline(never)]
    fn pop_kept<A: Access, E: Elements>(
        &mut self,
        mem: &A,
        segments: &mut Vec<Segment>,
        elements: &mut E,
    ) -> (u64, End) {
        if let Some(element) = self.pop_returned(segments) {
            elements.put(element);
            return (1, End::More);
        }
        if self.left() > 0 {
            return match self.pop_left(mem, segments) {
                Ok(None) => (0, End::Empty),
                Ok(Some(mut element)) => {
                    self.number(&mut element);
                    elements.put(element);
                    (1, End::More)
                }
                Err(fault) => (0, End::Fault(fault)),
            };
        }
        if let Some(recorded) = &mut self.recorded {
            recorded.copies.clear();
        }
        let (popped, end) = self.pop_burst(mem, ONE, segments, elements);
        let Some(element) = elements.newest(usize::try_from(popped).unwrap_or(0)).first_mut() else {
            return (0, end);
        };
        if let Err(fault) = self.note_taken(element) {
            self.next_seq -= 1;
            self.counters.popped -= 1;
            self.in_flight -= 1;
            self.busy.remove(element.head);
            segments.truncate(element.first);
            elements.drop_newest(1);
            return (0, End::Fault(fault));
        }
        (1, End::More)
    }

    /// Count a chain that an earlier device end left: in flight it has been from the start.
    fn number(&mut self, element: &mut Element) {
        element.seq = self.next_seq;
        element.generation = self.generation;
        self.next_seq += 1;
        self.armed = false;
        self.counters.popped += 1;
        self.busy.insert(element.head);
    }

    /// What was just popped was perhaps read from lost memory: then it goes back, and the queue is latched.
    #[cold]
    #[inline(never)]
    fn withdraw<A: Access, E: Elements>(
        &mut self,
        mem: &A,
        segments: &mut Vec<Segment>,
        first: usize,
        elements: &mut E,
        count: usize,
    ) -> Result<(), Fault> {
        let Err(fault) = self.intact(mem) else { return Ok(()) };
        for element in elements.newest(count).iter().rev() {
            let own = segments.get(element.first..).unwrap_or_default();
            self.put_back(element, own.get(..element.count).unwrap_or_default());
        }
        elements.drop_newest(count);
        segments.truncate(first);
        Err(self.latched_by(fault))
    }
}
