//! The driver end of a packed virtqueue.

use super::{Place, arm, disarm};
use crate::chain::ChainRules;
use crate::error::{Fault, Misuse};
use crate::mem::{Access, DescStores, MemoryError};
use crate::queue::{Buffers, Measured, Used};
use crate::ring::event::DISABLE;
use crate::ring::{Areas, AvailRing, PackedEvent, RingLayout, Side, desc, packed_need_event};
use crate::rule::Rule;

/// The flag that makes a length one. Without it the length is reserved (2.8.4); QEMU never sets it and means the length, DPDK
/// leaves there what the driver wrote.
const fn trusted(rules: &ChainRules) -> u16 {
    if rules.policy.used_without_write {
        desc::WRITE
    } else {
        0
    }
}

/// Private state of the driver end.
#[derive(Debug)]
pub(crate) struct PackedDriver {
    areas: Areas,
    layout: RingLayout,
    event_idx: bool,
    /// Free buffer ids: the first `free_ids` of these, the next one last.
    ids: Box<[u16]>,
    free_ids: u16,
    /// Of another width than what changes with it: the two stored by one instruction, and loaded by a wider one for the next
    /// chain, would have that wait until the store is through.
    free: u32,
    next_avail: Place,
    published: Place,
    /// Place and flags of the first descriptor added since the last publication, stored last.
    staged: Option<(u16, u16)>,
    added: u16,
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
            ids: (0..layout.size).rev().collect(),
            free_ids: layout.size,
            free: u32::from(layout.size),
            next_avail: Place::from_bits(avail),
            published: Place::from_bits(avail),
            staged: None,
            added: 0,
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

    pub(crate) fn free(&self) -> u16 {
        u16::try_from(self.free).unwrap_or(u16::MAX)
    }

    /// The id that the next buffer will get.
    #[inline(always)]
    pub(crate) fn next_head(&self) -> u16 {
        let last = usize::from(self.free_ids.wrapping_sub(1));
        self.ids.get(last).copied().unwrap_or(0)
    }

    #[inline(always)]
    pub(crate) fn check_room(&self, needed: u16) -> Result<(), Misuse> {
        // 2.8.17: there is room for the whole list before its first descriptor becomes available.
        if u32::from(needed) > self.free {
            return Err(Misuse::QueueFull {
                needed: u32::from(needed),
                free: self.free,
            });
        }
        Ok(())
    }

    /// Write a list of `count` descriptors; its id, twice, as a chain has a head and a tail. The caller has checked that
    /// there is room and at least one.
    #[inline(never)]
    pub(crate) fn add<A: Access>(
        &mut self,
        mem: &A,
        count: u16,
        buffers: Buffers<'_>,
    ) -> Result<(u16, u16), MemoryError> {
        let (id, ring, size) = (self.next_head(), self.areas.desc, self.layout.size);
        let (mut place, mut head_flags) = (self.next_avail, 0);
        buffers.describe(|(addr, len), flags| {
            mem.store_packed_desc(ring, desc::BYTES * u64::from(place.slot), (addr, len, id))?;
            let flags = flags | place.avail_flags();
            // A list is no longer than the ring.
            if place.slot == self.next_avail.slot {
                head_flags = flags;
            } else {
                mem.store_u16_release(ring, desc::flags_off(place.slot), flags)?;
            }
            place = place.forward(1, size);
            Ok(())
        })?;
        let first = self.next_avail.slot;
        if self.staged.is_some() {
            mem.store_u16_release(ring, desc::flags_off(first), head_flags)?;
        }
        Ok(self.added(id, count, head_flags))
    }

    /// A list of `count` descriptors is written, but for the flags of the first after a publication; its id, twice.
    #[inline(always)]
    fn added(&mut self, id: u16, count: u16, head_flags: u16) -> (u16, u16) {
        if self.staged.is_none() {
            self.staged = Some((self.next_avail.slot, head_flags));
        }
        self.free_ids = self.free_ids.wrapping_sub(1);
        self.free = self.free.wrapping_sub(u32::from(count));
        self.next_avail = self.next_avail.forward(count, self.layout.size);
        self.added += 1;
        (id, id)
    }

    /// Make everything added visible (2.8.21.1.1: a barrier before the flags update).
    pub(crate) fn publish<A: Access>(&mut self, mem: &A) -> Result<u16, MemoryError> {
        let count = self.added;
        if let Some((slot, flags)) = self.staged {
            mem.store_u16_release(self.areas.desc, desc::flags_off(slot), flags)?;
            self.staged = None;
            self.added = 0;
            let slots = self.published.distance(self.next_avail, self.layout.size);
            self.published = self.next_avail;
            self.moved = self.moved.saturating_add(slots);
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
    pub(crate) fn load<A: Access>(&self, mem: &A, rules: &ChainRules) -> Result<Option<Used>, MemoryError> {
        let (slot, ring) = (self.next_used.slot, self.areas.desc);
        let flags = mem.load_u16_acquire(ring, desc::flags_off(slot))?;
        if !self.next_used.is_used(flags) {
            return Ok(None);
        }
        let (len, id) = mem.load_packed_used(ring, desc::BYTES * u64::from(slot) + 8)?;
        Ok(Some(self.used(flags, id, len, rules)))
    }

    #[cold]
    fn used(&self, flags: u16, id: u16, len: u32, rules: &ChainRules) -> Used {
        let slot = self.next_used.slot;
        let told = flags & desc::WRITE != 0;
        Used {
            id: u32::from(id),
            len: if (flags | trusted(rules)) & desc::WRITE != 0 {
                len
            } else {
                0
            },
            told,
            position: slot,
            address: self.layout.desc.wrapping_add(desc::BYTES * u64::from(slot)),
        }
    }

    /// Up to `limit` used descriptors, where the ring can be reached directly: consumed, as long as `judge` knows how many
    /// slots their buffers occupied. The one of which it does not.
    #[inline(always)]
    pub(crate) fn take_at_once<A: Access>(
        &mut self,
        mem: &A,
        limit: usize,
        rules: &ChainRules,
        mut judge: impl FnMut(u32, u32) -> Option<(u16, u16, u16)>,
    ) -> Option<Used> {
        let (descs, trusted) = (mem.descs(self.areas.descs), trusted(rules));
        let (mut left, mut odd) = (limit, None);
        while left > 0 {
            let slot = self.next_used.slot;
            let flags = descs.flags(slot)?;
            if !self.next_used.is_used(flags) {
                break;
            }
            let (len, id) = descs.packed_used(slot)?;
            let written = if (flags | trusted) & desc::WRITE != 0 { len } else { 0 };
            let Some((id, _, descriptors)) = judge(u32::from(id), written) else {
                odd = Some((flags, id, len));
                break;
            };
            self.advance(id, descriptors);
            left -= 1;
        }
        odd.map(|(flags, id, len)| self.used(flags, id, len, rules))
    }

    /// Consume the used buffer `id`, which occupied `descriptors` slots.
    #[inline(always)]
    pub(crate) fn advance(&mut self, id: u16, descriptors: u16) {
        self.next_used = self.next_used.forward(descriptors, self.layout.size);
        self.free += u32::from(descriptors);
        if let Some(slot) = self.ids.get_mut(usize::from(self.free_ids)) {
            *slot = id;
            self.free_ids += 1;
        }
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

impl AvailRing for PackedDriver {
    /// What changes with each list stays in the ring: kept apart it would be too much for registers.
    type Adding<'a> = DescStores<'a>;

    #[inline(always)]
    fn adding<'a, A: Access>(&self, mem: &'a A) -> Option<DescStores<'a>> {
        mem.desc_stores(self.areas.desc)
    }

    /// A list that crosses the end is left to `add`: behind the last slot nothing can be stored, and all of this one have the
    /// same marks.
    #[inline(always)]
    fn put(&mut self, descs: &mut DescStores<'_>, list: Measured<'_>) -> Option<(u16, u16)> {
        let (id, first) = (self.next_head(), self.next_avail.slot);
        if u32::from(list.count) > self.free {
            return None;
        }
        let (marks, mut slot, mut head_flags) = (self.next_avail.avail_flags(), first, 0);
        let written = list.buffers.describe(|(addr, len), flags| {
            let flags = flags | marks;
            if !descs.packed(slot, (addr, len, id)) {
                return Err(());
            }
            if slot == first {
                head_flags = flags;
            } else if !descs.flags(slot, flags) {
                return Err(());
            }
            slot = slot.wrapping_add(1);
            Ok(())
        });
        written.ok()?;
        if self.staged.is_some() && !descs.flags(first, head_flags) {
            return None;
        }
        Some(self.added(id, list.count, head_flags))
    }

    #[inline(always)]
    fn settle(&mut self, _: DescStores<'_>) {}
}
