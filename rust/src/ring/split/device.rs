//! The device end of a split virtqueue.

use super::{arm, disarm};
use crate::chain::{Bounds, ChainRules, Element, Elements, End, Segment, Stamp, Table, Walk};
use crate::error::Fault;
use crate::mem::{AHEAD, Access, Descs, Heads, MemoryError, Near, UsedStores, Want};
use crate::queue::heads::HeadSet;
use crate::ring::desc::{self, Desc, halves, whole};
use crate::ring::layout::{AVAIL_IDX, AVAIL_RING, FLAGS, USED_IDX, USED_RING};
use crate::ring::{Areas, RingLayout, Side, UsedRing, need_event};
use crate::rule::Rule;

/// Private state of the device end.
#[derive(Debug)]
pub(crate) struct SplitDevice {
    areas: Areas,
    layout: RingLayout,
    event_idx: bool,
    mask: u16,
    /// Next avail entry to pop.
    next_avail: u16,
    /// `avail.idx` as last loaded: entries before it are known to be published.
    seen_avail: u16,
    /// Next used entry to write; entries from `published` to it are staged.
    next_used: u16,
    published: u16,
    /// `used.idx` when the driver was last considered for a notification; None before the first time.
    signalled: Option<u16>,
    /// Entries published since then: more than 16 bits of them pass every event there is.
    moved: u32,
}

impl SplitDevice {
    pub(crate) fn new<A: Access>(
        mem: &A,
        layout: RingLayout,
        event_idx: bool,
        avail: u16,
        used: u16,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            areas: Areas::resolve(mem, &layout, Side::Device)?,
            layout,
            event_idx,
            mask: layout.size - 1,
            next_avail: avail,
            seen_avail: avail,
            next_used: used,
            published: used,
            signalled: None,
            moved: 0,
        })
    }

    #[inline(always)]
    pub(crate) fn refresh<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        self.areas.refresh(mem, &self.layout, Side::Device)
    }

    pub(crate) const fn state(&self) -> (u16, u16) {
        (self.next_avail, self.published)
    }

    /// Whether the avail ring holds something new. `avail.idx` is loaded only when nothing more is known.
    #[inline(always)]
    pub(crate) fn look<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<bool, Fault> {
        if self.next_avail != self.seen_avail {
            return Ok(true);
        }
        self.load_avail(mem, mem.heads(self.areas.heads), rules)
    }

    /// Load `avail.idx` and check it against what was consumed.
    #[inline(always)]
    fn load_avail<A: Access>(&mut self, mem: &A, heads: Heads<'_>, rules: &ChainRules) -> Result<bool, Fault> {
        let idx = match heads.idx() {
            Some(idx) => idx,
            None => self.load_idx(mem, rules)?,
        };
        let ahead = idx.wrapping_sub(self.next_avail);
        // 2.7.6.1: idx is never decremented; a free-running index at most `size` ahead is all that can be.
        if ahead > self.layout.size {
            return Err(self.too_far(rules, idx, ahead));
        }
        self.seen_avail = idx;
        Ok(ahead != 0)
    }

    /// `avail.idx`, where words cannot be reached directly.
    #[cold]
    #[inline(never)]
    fn load_idx<A: Access>(&self, mem: &A, rules: &ChainRules) -> Result<u16, Fault> {
        let idx = mem.load_u16_acquire(self.areas.driver, AVAIL_IDX);
        idx.map_err(|error| self.unmapped(rules, error))
    }

    #[cold]
    #[inline(never)]
    fn too_far(&self, rules: &ChainRules, idx: u16, ahead: u16) -> Fault {
        let message = format!(
            "avail.idx is {idx}, {ahead} ahead of the {} consumed, in a queue of {}",
            self.next_avail, self.layout.size
        );
        self.avail_fault(rules, Rule::AvailIdxTooFar, message)
    }

    /// Strict: load `avail.idx` for every pop and compare it with the highest value seen (2.7.6.1).
    #[inline(never)]
    fn check_decrease<A: Access>(&mut self, mem: &A, heads: Heads<'_>, rules: &ChainRules) -> Result<(), Fault> {
        let before = self.seen_avail;
        let known = before.wrapping_sub(self.next_avail);
        self.load_avail(mem, heads, rules)?;
        if self.seen_avail.wrapping_sub(self.next_avail) < known {
            let message = format!("avail.idx went back from {before} to {}", self.seen_avail);
            // Nothing changes on a fault: who swallows it (`pop_many` behind good chains) meets it again.
            self.seen_avail = before;
            return Err(self.avail_fault(rules, Rule::AvailIdxDecreased, message));
        }
        Ok(())
    }

    #[cold]
    #[inline(never)]
    fn avail_fault(&self, rules: &ChainRules, rule: Rule, message: String) -> Fault {
        let mut fault = rules.fault(rule, message);
        fault.position = Some(self.next_avail);
        fault.address = Some(self.layout.driver.wrapping_add(AVAIL_IDX));
        fault
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn unmapped(&self, rules: &ChainRules, error: MemoryError) -> Fault {
        let mut fault = rules.fault(Rule::RingUnmapped.of_memory(&error), error.to_string());
        fault.position = Some(self.next_avail);
        fault.address = Some(error.address());
        fault
    }

    /// Pop chains into segments and elements, within bounds; how many, and what ended it. `busy` are the heads in flight,
    /// `room` is how many more there can be. A chain on which there is a fault changes nothing.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is another's, and all of them are changed"
    )]
    #[inline(always)]
    pub(crate) fn pop<A: Access>(
        &mut self,
        mem: &A,
        rules: &ChainRules,
        bounds: Bounds,
        (segments, elements): (&mut Vec<Segment>, &mut impl Elements),
        stamp: Stamp,
        busy: &mut HeadSet,
        room: u64,
    ) -> (u64, End) {
        let words = (
            mem.descs(self.areas.descs).settled(),
            mem.heads(self.areas.heads).settled(),
        );
        let (mut near, mut count) = (Near::nothing(), 0);
        loop {
            if count >= bounds.chains || segments.len() >= bounds.segments {
                return (count, End::More);
            }
            let ready = match self.ready((mem, words.1), rules) {
                Ok(0) => return (count, End::Empty),
                Ok(ready) => u64::from(ready),
                Err(fault) => return (count, End::Fault(fault)),
            };
            // 2.7.13.1: only free descriptors are made available, so `size` heads in flight is the most.
            if count >= room {
                return (count, End::Fault(self.no_room(rules)));
            }
            let end = bounds.chains.min(room).min(count.saturating_add(ready));
            self.prefetch(mem, words, end.saturating_sub(count));
            while count < end && segments.len() < bounds.segments {
                let place = (mem, &mut near, words);
                if let Err(fault) = self.pop_one(place, rules, (segments, elements), stamp.later(count), busy) {
                    return (count, End::Fault(fault));
                }
                count += 1;
            }
        }
    }

    /// Have descriptors of the next `count` chains fetched, and what their used entries are written to: a driver on another
    /// core had them last, and one after the other each would be waited for. Chains of several descriptors that follow each
    /// other have few of them in a cache line of four, so every second chain is asked for. What is read for this is for
    /// nothing else.
    #[inline(always)]
    fn prefetch<A: Access>(&self, mem: &A, (descs, heads): (Descs<'_>, Heads<'_>), count: u64) {
        if count < 2 {
            return;
        }
        let count = u16::try_from(count).unwrap_or(u16::MAX).min(32);
        self.prefetch_used(mem, count);
        for ahead in (0..count).step_by(2) {
            if let Some(head) = heads.head(self.next_avail.wrapping_add(ahead) & self.mask) {
                descs.prefetch(head);
            }
        }
    }

    /// How many chains are known to be available, and may be popped before anything else is looked at.
    #[inline(always)]
    fn ready<A: Access>(&mut self, (mem, heads): (&A, Heads<'_>), rules: &ChainRules) -> Result<u16, Fault> {
        if self.next_avail == self.seen_avail {
            self.load_avail(mem, heads, rules)?;
        } else if !rules.policy.avail_decrease {
            self.check_decrease(mem, heads, rules)?;
        }
        let ready = self.seen_avail.wrapping_sub(self.next_avail);
        Ok(if rules.policy.avail_decrease {
            ready
        } else {
            ready.min(1)
        })
    }

    /// Pop the next chain, which is known to be available.
    #[inline(always)]
    fn pop_one<'a, A: Access>(
        &mut self,
        (mem, near, (descs, heads)): (&'a A, &mut Near<'a>, (Descs<'_>, Heads<'_>)),
        rules: &ChainRules,
        (segments, elements): (&mut Vec<Segment>, &mut impl Elements),
        stamp: Stamp,
        busy: &mut HeadSet,
    ) -> Result<(), Fault> {
        let position = self.next_avail;
        let slot = position & self.mask;
        let head = match heads.head(slot) {
            Some(head) => head,
            None => self.load_head(mem, rules, slot)?,
        };
        // 2.7.6: an avail ring entry is the index of a descriptor.
        if head >= self.layout.size {
            return Err(self.head_fault(rules, position, head));
        }
        let mut walk = Walk::new((mem, near), rules, segments, position, head);
        if !rules.policy.duplicate_heads && busy.contains(head) {
            return Err(walk.fault(Rule::HeadInFlight, u32::from(head), None, in_flight(head)));
        }
        self.walk(walk, (mem, descs), head, stamp, |element| elements.put(element))?;
        self.next_avail = position.wrapping_add(1);
        busy.insert(head);
        Ok(())
    }

    /// Follow the chain from `head`, and give what it is to `done`; as many descriptors as the table has are the most that are
    /// taken, so a loop ends.
    #[inline(always)]
    fn walk<A: Access>(
        &self,
        mut walk: Walk<'_, '_, A>,
        (mem, descs): (&A, Descs<'_>),
        head: u16,
        stamp: Stamp,
        done: impl FnOnce(Element),
    ) -> Result<(), Fault> {
        let (mut index, size) = (u32::from(head), self.layout.size);
        let (mut addr, mut rest) = self.load(&mut walk, (mem, descs), index)?;
        // One buffer: nothing that a chain needs is kept then.
        if !Desc::has(rest, desc::NEXT | desc::INDIRECT) {
            let desc = Desc::from_words(addr, rest);
            walk.take(index, desc.addr, desc.len, Desc::has(rest, desc::WRITE))?;
            done(walk.finish(1, stamp));
            return Ok(());
        }
        for _ in 0..size {
            let desc = Desc::from_words(addr, rest);
            if Desc::has(rest, desc::INDIRECT) {
                return self.walk_table(walk, index, (addr, rest), stamp, done);
            }
            walk.take(index, desc.addr, desc.len, Desc::has(rest, desc::WRITE))?;
            if !Desc::has(rest, desc::NEXT) {
                done(walk.finish(1, stamp));
                return Ok(());
            }
            // 2.7.5: next is an index of the same table.
            if desc.next >= size {
                let message = beyond_table(desc.next, size);
                return Err(walk.fault(Rule::NextOutOfRange, index, None, message));
            }
            index = u32::from(desc.next);
            (addr, rest) = self.load(&mut walk, (mem, descs), index)?;
        }
        // 2.7.5.3.1: no chain longer than the queue size; 2.7.5.2: loops are forbidden.
        Err(walk.fault(Rule::ChainTooLong, index, None, looping(size)))
    }

    /// Descriptor `index` of a chain: two relaxed loads.
    #[inline(always)]
    fn load<A: Access>(
        &self,
        walk: &mut Walk<'_, '_, A>,
        (mem, descs): (&A, Descs<'_>),
        index: u32,
    ) -> Result<(u64, u64), Fault> {
        if let Some(words) = descs.split(index) {
            return Ok(words);
        }
        match self.load_desc(mem, index) {
            Ok(both) => Ok(halves(both)),
            Err(error) => Err(walk.ring_fault(index, error)),
        }
    }

    /// Descriptor `index`, where words cannot be reached directly.
    #[cold]
    #[inline(never)]
    fn load_desc<A: Access>(&self, mem: &A, index: u32) -> Result<u128, MemoryError> {
        mem.load_desc(self.areas.desc, desc::BYTES * u64::from(index))
            .map(whole)
    }

    #[cold]
    #[inline(never)]
    fn load_head<A: Access>(&self, mem: &A, rules: &ChainRules, slot: u16) -> Result<u16, Fault> {
        mem.load_u16(self.areas.driver, AVAIL_RING + 2 * u64::from(slot))
            .map_err(|error| self.unmapped(rules, error))
    }

    #[cold]
    #[inline(never)]
    fn no_room(&self, rules: &ChainRules) -> Fault {
        let message = format!("a chain is available while {} are in flight", self.layout.size);
        self.avail_fault(rules, Rule::TooManyInFlight, message)
    }

    #[cold]
    #[inline(never)]
    fn head_fault(&self, rules: &ChainRules, position: u16, head: u16) -> Fault {
        let message = format!(
            "avail ring entry {head} is no index of {} descriptors",
            self.layout.size
        );
        let mut fault = rules.fault(Rule::HeadOutOfRange, message);
        fault.position = Some(position);
        fault.head = Some(head);
        let slot = AVAIL_RING + 2 * u64::from(position & self.mask);
        fault.address = Some(self.layout.driver.wrapping_add(slot));
        fault
    }

    /// 2.7.5.3.2: zero or more direct descriptors may precede the table.
    #[inline(never)]
    fn walk_table<A: Access>(
        &self,
        mut walk: Walk<'_, '_, A>,
        index: u32,
        (addr, rest): (u64, u64),
        stamp: Stamp,
        done: impl FnOnce(Element),
    ) -> Result<(), Fault> {
        let desc = Desc::from_words(addr, rest);
        let table = walk.table(index, desc.addr, desc.len, desc.flags)?;
        let walked = self.walk_entries(&mut walk, &table);
        walk.read_from(&table)?;
        walked.map(|()| done(walk.finish(1, stamp)))
    }

    #[inline(always)]
    fn walk_entries<A: Access>(&self, walk: &mut Walk<'_, '_, A>, table: &Table) -> Result<(), Fault> {
        let limit = if walk.beyond_queue() {
            u32::MAX
        } else {
            u32::from(self.layout.size)
        };
        let (mut index, words) = (0, walk.words(table));
        for _ in 0..table.entries {
            let entry = walk.load_entry(table, words, index)?;
            // 2.7.5.3.1: one table per descriptor.
            if entry.flags & desc::INDIRECT != 0 {
                let message = "an entry of an indirect table has INDIRECT set".to_owned();
                return Err(walk.fault(Rule::NestedIndirect, index, Some(entry.addr), message));
            }
            if walk.descriptors() >= limit {
                let message = format!("the chain has more than {limit} descriptors with its table");
                return Err(walk.fault(Rule::ChainTooLong, index, None, message));
            }
            walk.take(index, entry.addr, entry.len, entry.flags & desc::WRITE != 0)?;
            if entry.flags & desc::NEXT == 0 {
                return Ok(());
            }
            if u32::from(entry.next) >= table.entries {
                let message = format!(
                    "next is {}, the indirect table has {} entries",
                    entry.next, table.entries
                );
                return Err(walk.fault(Rule::NextOutOfRange, index, None, message));
            }
            index = u32::from(entry.next);
        }
        let message = format!("the chain goes on after {} table entries, so it loops", table.entries);
        Err(walk.fault(Rule::ChainTooLong, index, None, message))
    }

    /// The chain of a head that an earlier device end took, which this ring counts as taken.
    pub(crate) fn pop_again<A: Access>(
        &self,
        mem: &A,
        rules: &ChainRules,
        segments: &mut Vec<Segment>,
        head: u16,
    ) -> Result<Option<Element>, Fault> {
        let mut near = Near::nothing();
        let walk = Walk::new((mem, &mut near), rules, segments, self.published, head);
        let mut found = None;
        let descs = mem.descs(self.areas.descs);
        self.walk(walk, (mem, descs), head, Stamp::default(), |element| {
            found = Some(element);
        })?;
        Ok(found)
    }

    /// `used.idx` when one more entry is staged and published.
    pub(crate) const fn used_after(&self) -> u16 {
        self.next_used.wrapping_add(1)
    }

    /// Undo the newest pop.
    pub(crate) fn unpop(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Have what the next `count` used entries are written to fetched.
    #[inline(always)]
    pub(crate) fn prefetch_used<A: Access>(&self, mem: &A, count: u16) {
        for ahead in (0..count).step_by(AHEAD / 8) {
            let slot = self.next_used.wrapping_add(ahead) & self.mask;
            mem.prefetch(self.areas.device, USED_RING + 8 * u64::from(slot), Want::Write);
        }
    }

    /// Make all staged entries visible (2.7.8.2: len is set before idx is updated); whether there were any.
    #[inline(always)]
    pub(crate) fn publish<A: Access>(&mut self, mem: &A) -> Result<bool, MemoryError> {
        let count = self.next_used.wrapping_sub(self.published);
        if count == 0 {
            return Ok(false);
        }
        mem.store_u16_release(self.areas.device, USED_IDX, self.next_used)?;
        self.published = self.next_used;
        self.moved = self.moved.saturating_add(u32::from(count));
        Ok(true)
    }

    /// Whether the driver wants to hear of what was published since the last call (2.7.7.2).
    pub(crate) fn wants_call<A: Access>(&mut self, mem: &A) -> Result<bool, MemoryError> {
        let new = self.published;
        mem.fence();
        let lap = std::mem::take(&mut self.moved) > u32::from(u16::MAX);
        let wants = if self.event_idx {
            // It lies behind the ring's last entry.
            let event = match mem.heads(self.areas.heads).head(self.layout.size) {
                Some(event) => event,
                None => self.load_event(mem)?,
            };
            lap || self.signalled.is_none_or(|old| need_event(event, new, old))
        } else {
            mem.load_u16(self.areas.driver, FLAGS)? & 1 == 0
        };
        self.signalled = Some(new);
        Ok(wants)
    }

    /// `used_event`, where words cannot be reached directly.
    #[cold]
    #[inline(never)]
    fn load_event<A: Access>(&self, mem: &A) -> Result<u16, MemoryError> {
        mem.load_u16(self.areas.driver, self.layout.used_event())
    }

    /// Whether everything that the driver made available was used (6.3, NOTIFY_ON_EMPTY).
    pub(crate) fn ran_empty<A: Access>(&self, mem: &A) -> Result<bool, MemoryError> {
        let idx = mem.load_u16_acquire(self.areas.driver, AVAIL_IDX)?;
        Ok(self.published == self.next_avail && idx == self.next_avail)
    }

    /// Ask for kicks (2.7.10.2); the caller looks for work again afterwards.
    pub(crate) fn arm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        arm(
            mem,
            self.areas.device,
            self.event_idx,
            self.layout.avail_event(),
            self.next_avail,
        )
    }

    /// Ask for no kicks.
    pub(crate) fn disarm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        disarm(mem, self.areas.device, self.event_idx)
    }
}

impl UsedRing for SplitDevice {
    /// Where entries go, if that is all there is to storing them, and the next one.
    type Staging<'a> = (UsedStores<'a>, u16);

    #[inline(always)]
    fn staging<'a, A: Access>(&self, mem: &'a A) -> Self::Staging<'a> {
        let stores = mem.used_stores(self.areas.device).unwrap_or(UsedStores::none());
        (stores.settled(), self.next_used)
    }

    #[inline(always)]
    fn stage<A: Access>(
        &self,
        mem: &A,
        (stores, next): &mut Self::Staging<'_>,
        head: u16,
        slots: u16,
        written: u32,
    ) -> Result<(), MemoryError> {
        let (slot, entry) = (*next & self.mask, (u32::from(head), written));
        if !stores.used(slot, entry) {
            mem.store_used(self.areas.device, USED_RING + 8 * u64::from(slot), entry)?;
        }
        *next = next.wrapping_add(slots);
        Ok(())
    }

    #[inline(always)]
    fn settle(&mut self, (_, next): Self::Staging<'_>) {
        self.next_used = next;
    }
}

#[cold]
#[inline(never)]
fn in_flight(head: u16) -> String {
    format!("head {head} was made available again while it is in flight")
}

#[cold]
#[inline(never)]
fn beyond_table(next: u16, size: u16) -> String {
    format!("next is {next}, the table has {size} descriptors")
}

#[cold]
#[inline(never)]
fn looping(size: u16) -> String {
    format!("the chain goes on after {size} descriptors, so it loops")
}
