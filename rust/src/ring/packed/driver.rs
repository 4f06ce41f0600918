//! The driver end of a packed virtqueue.

use super::{Place, arm, disarm};
use crate::chain::ChainRules;
use crate::error::{Fault, Misuse};
use crate::mem::{Access, MemoryError};
use crate::queue::{Parts, Used};
use crate::ring::event::DISABLE;
use crate::ring::{Areas, PackedEvent, RingLayout, Side, desc, packed_need_event};
use crate::rule::Rule;

/// Private state of the driver end.
#[derive(Debug)]
pub(crate) struct PackedDriver {
    areas: Areas,
    layout: RingLayout,
    event_idx: bool,
    /// Free buffer ids; with IN_ORDER they come back in the order in which they were given.
    ids: std::collections::VecDeque<u16>,
    free: u16,
    next_avail: Place,
    published: Place,
    /// Place and flags of the first descriptor added since the last publication, stored last.
    staged: Option<(u16, u16)>,
    added: u16,
    /// Slots added since the last publication.
    added_slots: u32,
    /// Slots published since the last kick decision, and where the ring stood then.
    moved: u32,
    kicked: Place,
    next_used: Place,
}

impl PackedDriver {
    pub(crate) fn new<A: Access>(
        mem: &A,
        layout: RingLayout,
        event_idx: bool,
        avail: u16,
        used: u16,
    ) -> Result<Self, MemoryError> {
        Ok(Self {
            areas: Areas::resolve(mem, &layout, Side::Driver)?,
            layout,
            event_idx,
            ids: (0..layout.size).collect(),
            free: layout.size,
            next_avail: Place::from_bits(avail),
            published: Place::from_bits(avail),
            staged: None,
            added: 0,
            added_slots: 0,
            moved: 0,
            kicked: Place::from_bits(avail),
            next_used: Place::from_bits(used),
        })
    }

    #[inline(always)]
    pub(crate) fn refresh<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        self.areas.refresh(mem, &self.layout, Side::Driver)
    }

    pub(crate) const fn state(&self) -> (u16, u16) {
        (self.published.bits(), self.next_used.bits())
    }

    pub(crate) const fn free(&self) -> u16 {
        self.free
    }

    /// The id that the next buffer will get.
    #[inline(always)]
    pub(crate) fn next_head(&self) -> u16 {
        self.ids.front().copied().unwrap_or(0)
    }

    #[inline(always)]
    pub(crate) fn check_room(&self, needed: u16) -> Result<(), Misuse> {
        // 2.8.17: there is room for the whole list before its first descriptor becomes available.
        if needed > self.free || self.ids.is_empty() {
            return Err(Misuse::QueueFull {
                needed: u32::from(needed),
                free: u32::from(self.free),
            });
        }
        Ok(())
    }

    /// Write a list of `count` descriptors; its id, twice, as a chain has a head and a tail. The caller has checked that
    /// there is room and at least one.
    #[inline(always)]
    pub(crate) fn add<A: Access, const N: usize>(
        &mut self,
        mem: &A,
        count: u16,
        parts: Parts<'_, N>,
    ) -> Result<(u16, u16), MemoryError> {
        let (id, ring, size) = (self.next_head(), self.areas.desc, self.layout.size);
        let first = self.next_avail;
        let (mut place, mut left, mut head_flags) = (first, count, 0);
        for (buffers, flags) in parts {
            for &(addr, len) in buffers {
                mem.store_packed_desc(ring, desc::BYTES * u64::from(place.slot), (addr, len, id))?;
                let more = if left > 1 { desc::NEXT } else { 0 };
                let flags = flags | place.avail_flags() | more;
                if left == count {
                    head_flags = flags;
                } else {
                    mem.store_u16_release(ring, desc::flags_off(place.slot), flags)?;
                }
                left = left.saturating_sub(1);
                place = place.forward(1, size);
            }
        }
        if self.staged.is_none() {
            self.staged = Some((first.slot, head_flags));
        } else {
            mem.store_u16_release(ring, desc::flags_off(first.slot), head_flags)?;
        }
        self.ids.pop_front();
        self.free = self.free.saturating_sub(count);
        self.next_avail = place;
        self.added_slots = self.added_slots.saturating_add(u32::from(count));
        self.added += 1;
        Ok((id, id))
    }

    /// Make everything added visible (2.8.21.1.1: a barrier before the flags update).
    pub(crate) fn publish<A: Access>(&mut self, mem: &A) -> Result<u16, MemoryError> {
        let count = self.added;
        if let Some((slot, flags)) = self.staged {
            mem.store_u16_release(self.areas.desc, desc::flags_off(slot), flags)?;
            self.staged = None;
            self.added = 0;
            self.published = self.next_avail;
            self.moved = self.moved.saturating_add(std::mem::take(&mut self.added_slots));
        }
        Ok(count)
    }

    /// Whether the device wants to hear of what was published since the last kick (2.8.21.3.1).
    pub(crate) fn wants_kick<A: Access>(&mut self, mem: &A) -> Result<bool, MemoryError> {
        if self.moved == 0 {
            return Ok(false);
        }
        let (new, old) = (self.published, self.kicked);
        mem.fence();
        self.kicked = new;
        // A whole lap or more since the last decision passes every place there is.
        let lap = std::mem::take(&mut self.moved) > u32::from(self.layout.size);
        let event = PackedEvent::load(mem, self.areas.device)?;
        let passed = packed_need_event(event, self.event_idx, self.layout.size, new.pair(), old.pair());
        Ok(passed || (lap && event.flags & 3 != DISABLE))
    }

    /// Whether the next slot is used.
    #[inline(always)]
    pub(crate) fn look<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<bool, Fault> {
        let slot = self.next_used.slot;
        match mem.load_u16_acquire(self.areas.desc, desc::flags_off(slot)) {
            Ok(flags) => Ok(self.next_used.is_used(flags)),
            Err(error) => Err(self.unmapped(rules, error)),
        }
    }

    /// The next used descriptor, if there is one. Does not consume it: `advance` does.
    #[inline(always)]
    pub(crate) fn peek<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<Option<Used>, Fault> {
        let slot = self.next_used.slot;
        let off = desc::BYTES * u64::from(slot);
        let flags = match mem.load_u16_acquire(self.areas.desc, desc::flags_off(slot)) {
            Ok(flags) => flags,
            Err(error) => return Err(self.unmapped(rules, error)),
        };
        if !self.next_used.is_used(flags) {
            return Ok(None);
        }
        let (len, id) = match mem.load_packed_used(self.areas.desc, off + 8) {
            Ok(fields) => fields,
            Err(error) => return Err(self.unmapped(rules, error)),
        };
        // 2.8.4: without WRITE the length is reserved; QEMU never sets WRITE and means the length, DPDK leaves there what
        // the driver wrote.
        let told = flags & desc::WRITE != 0;
        let len = if told || rules.policy.used_without_write {
            len
        } else {
            0
        };
        let address = self.layout.desc.wrapping_add(off);
        Ok(Some(Used {
            id: u32::from(id),
            len,
            told,
            position: slot,
            address,
        }))
    }

    /// Consume the used buffer `id`, which occupied `descriptors` slots.
    #[inline(always)]
    pub(crate) fn advance(&mut self, id: u16, descriptors: u16) {
        self.next_used = self.next_used.forward(descriptors, self.layout.size);
        self.free += descriptors;
        self.ids.push_back(id);
    }

    /// Ask for calls; the caller looks again afterwards.
    pub(crate) fn arm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        arm(mem, self.areas.driver, self.event_idx, self.next_used)
    }

    /// Ask for no calls.
    pub(crate) fn disarm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        disarm(mem, self.areas.driver)
    }

    #[cold]
    pub(crate) fn unmapped(&self, rules: &ChainRules, error: MemoryError) -> Fault {
        let mut fault = rules.fault(Rule::RingUnmapped.of_memory(&error), error.to_string());
        fault.position = Some(self.next_used.slot);
        fault.address = Some(error.address());
        fault
    }
}
