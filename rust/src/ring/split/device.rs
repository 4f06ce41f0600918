//! The device end of a split virtqueue.

use super::{arm, disarm};
use crate::chain::{ChainRules, Element, Segment, Table, Walk};
use crate::error::Fault;
use crate::mem::{Access, MemoryError};
use crate::ring::desc::{self, Desc};
use crate::ring::layout::{AVAIL_IDX, AVAIL_RING, FLAGS, USED_IDX, USED_RING};
use crate::ring::{Areas, End, RingLayout, need_event};
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
            areas: Areas::resolve(mem, &layout, End::Device)?,
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

    pub(crate) fn refresh<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        self.areas.refresh(mem, &self.layout, End::Device)
    }

    pub(crate) const fn state(&self) -> (u16, u16) {
        (self.next_avail, self.published)
    }

    /// Whether the avail ring holds something new. `avail.idx` is loaded only when nothing more is known.
    #[inline]
    pub(crate) fn look<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<bool, Fault> {
        if self.next_avail != self.seen_avail {
            return Ok(true);
        }
        self.load_avail(mem, rules)
    }

    /// Load `avail.idx` and check it against what was consumed.
    #[inline]
    fn load_avail<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<bool, Fault> {
        let idx = mem
            .load_u16_acquire(self.areas.driver, AVAIL_IDX)
            .map_err(|e| self.unmapped(rules, e))?;
        let ahead = idx.wrapping_sub(self.next_avail);
        // 2.7.6.1: idx is never decremented; a free-running index at most `size` ahead is all that can be.
        if ahead > self.layout.size {
            let message = format!(
                "avail.idx is {idx}, {ahead} ahead of the {} consumed, in a queue of {}",
                self.next_avail, self.layout.size
            );
            return Err(self.avail_fault(rules, Rule::AvailIdxTooFar, message));
        }
        self.seen_avail = idx;
        Ok(ahead != 0)
    }

    /// Strict: load `avail.idx` for every pop and compare it with the highest value seen (2.7.6.1).
    fn check_decrease<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<(), Fault> {
        let before = self.seen_avail;
        let known = before.wrapping_sub(self.next_avail);
        self.load_avail(mem, rules)?;
        if self.seen_avail.wrapping_sub(self.next_avail) < known {
            let message = format!("avail.idx went back from {before} to {}", self.seen_avail);
            // Nothing changes on a fault: who swallows it (`pop_many` behind good chains) meets it again.
            self.seen_avail = before;
            return Err(self.avail_fault(rules, Rule::AvailIdxDecreased, message));
        }
        Ok(())
    }

    #[cold]
    fn avail_fault(&self, rules: &ChainRules, rule: Rule, message: String) -> Fault {
        let mut fault = rules.fault(rule, message);
        fault.position = Some(self.next_avail);
        fault.address = Some(self.layout.driver.wrapping_add(AVAIL_IDX));
        fault
    }

    #[cold]
    pub(crate) fn unmapped(&self, rules: &ChainRules, error: MemoryError) -> Fault {
        let mut fault = rules.fault(Rule::RingUnmapped.of_memory(&error), error.to_string());
        fault.position = Some(self.next_avail);
        fault.address = Some(error.address());
        fault
    }

    /// Pop the next chain into `segments`; `busy` says whether a head is in flight. Nothing changes on a fault.
    #[inline]
    pub(crate) fn pop<A: Access>(
        &mut self,
        mem: &A,
        rules: &ChainRules,
        segments: &mut Vec<Segment>,
        busy: impl Fn(u16) -> bool,
        room: bool,
    ) -> Result<Option<Element>, Fault> {
        if self.next_avail == self.seen_avail {
            if !self.load_avail(mem, rules)? {
                return Ok(None);
            }
        } else if !rules.policy.avail_decrease {
            self.check_decrease(mem, rules)?;
        }
        // 2.7.13.1: only free descriptors are made available, so `size` heads in flight is the most.
        if !room {
            let message = format!("a chain is available while {} are in flight", self.layout.size);
            return Err(self.avail_fault(rules, Rule::TooManyInFlight, message));
        }
        let position = self.next_avail;
        let slot = AVAIL_RING + 2 * u64::from(position & self.mask);
        let head = mem
            .load_u16(self.areas.driver, slot)
            .map_err(|e| self.unmapped(rules, e))?;
        let mut walk = Walk::new(mem, rules, segments, position, head);
        // 2.7.6: an avail ring entry is the index of a descriptor.
        if head >= self.layout.size {
            let message = format!(
                "avail ring entry {head} is no index of {} descriptors",
                self.layout.size
            );
            let address = self.layout.driver.wrapping_add(slot);
            let mut fault = walk.fault(Rule::HeadOutOfRange, u32::from(head), Some(address), message);
            fault.descriptor = None;
            return Err(fault);
        }
        if !rules.policy.duplicate_heads && busy(head) {
            let message = format!("head {head} was made available again while it is in flight");
            return Err(walk.fault(Rule::HeadInFlight, u32::from(head), None, message));
        }
        self.walk(&mut walk, mem, head)?;
        self.next_avail = position.wrapping_add(1);
        Ok(Some(walk.finish(1)))
    }

    /// Follow the chain from `head`; every table is visited at most once per entry, so a loop ends.
    #[inline]
    fn walk<A: Access>(&self, walk: &mut Walk<'_, A>, mem: &A, head: u16) -> Result<(), Fault> {
        let mut index = u32::from(head);
        for _ in 0..self.layout.size {
            let desc = match Desc::load(mem, self.areas.desc, index) {
                Ok(desc) => desc,
                Err(error) => return Err(walk.ring_fault(index, error)),
            };
            if desc.flags & desc::INDIRECT != 0 {
                return self.walk_table(walk, index, &desc);
            }
            walk.take(index, desc.addr, desc.len, desc.flags)?;
            if desc.flags & desc::NEXT == 0 {
                return Ok(());
            }
            // 2.7.5: next is an index of the same table.
            if desc.next >= self.layout.size {
                let message = format!("next is {}, the table has {} descriptors", desc.next, self.layout.size);
                return Err(walk.fault(Rule::NextOutOfRange, index, None, message));
            }
            index = u32::from(desc.next);
        }
        // 2.7.5.3.1: no chain longer than the queue size; 2.7.5.2: loops are forbidden.
        let message = format!("the chain goes on after {} descriptors, so it loops", self.layout.size);
        Err(walk.fault(Rule::ChainTooLong, index, None, message))
    }

    /// 2.7.5.3.2: zero or more direct descriptors may precede the table.
    fn walk_table<A: Access>(&self, walk: &mut Walk<'_, A>, index: u32, desc: &Desc) -> Result<(), Fault> {
        let table = walk.table(index, desc.addr, desc.len, desc.flags)?;
        let walked = self.walk_entries(walk, table);
        walk.read_from(table, walked)
    }

    fn walk_entries<A: Access>(&self, walk: &mut Walk<'_, A>, table: Table) -> Result<(), Fault> {
        let limit = if walk.beyond_queue() {
            u32::MAX
        } else {
            u32::from(self.layout.size)
        };
        let mut index = 0;
        for _ in 0..table.entries {
            let entry = walk.load_entry(table, index)?;
            // 2.7.5.3.1: one table per descriptor.
            if entry.flags & desc::INDIRECT != 0 {
                let message = "an entry of an indirect table has INDIRECT set".to_owned();
                return Err(walk.fault(Rule::NestedIndirect, index, Some(entry.addr), message));
            }
            if walk.descriptors() >= limit {
                let message = format!("the chain has more than {limit} descriptors with its table");
                return Err(walk.fault(Rule::ChainTooLong, index, None, message));
            }
            walk.take(index, entry.addr, entry.len, entry.flags)?;
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
    ) -> Result<Element, Fault> {
        let mut walk = Walk::new(mem, rules, segments, self.published, head);
        self.walk(&mut walk, mem, head)?;
        Ok(walk.finish(1))
    }

    /// `used.idx` when one more entry is staged and published.
    pub(crate) const fn used_after(&self) -> u16 {
        self.next_used.wrapping_add(1)
    }

    /// Undo the newest pop.
    pub(crate) fn unpop(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Write a used entry that is not visible yet.
    #[inline]
    pub(crate) fn stage<A: Access>(&mut self, mem: &A, head: u16, written: u32) -> Result<(), MemoryError> {
        let entry = USED_RING + 8 * u64::from(self.next_used & self.mask);
        mem.store_u32(self.areas.device, entry, u32::from(head))?;
        mem.store_u32(self.areas.device, entry + 4, written)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Make all staged entries visible (2.7.8.2: len is set before idx is updated); whether there were any.
    #[inline]
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
            let event = mem.load_u16(self.areas.driver, self.layout.used_event())?;
            lap || self.signalled.is_none_or(|old| need_event(event, new, old))
        } else {
            mem.load_u16(self.areas.driver, FLAGS)? & 1 == 0
        };
        self.signalled = Some(new);
        Ok(wants)
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
