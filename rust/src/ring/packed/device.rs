//! The device end of a packed virtqueue.

use super::{Place, arm, disarm};
use crate::chain::{ChainRules, Element, Segment, Table, Walk};
use crate::error::Fault;
use crate::mem::{Access, MemoryError};
use crate::ring::desc::Raw;
use crate::ring::event::DISABLE;
use crate::ring::{Areas, End, PackedEvent, RingLayout, desc, packed_need_event};
use crate::rule::Rule;

/// Private state of the device end.
#[derive(Debug)]
pub(crate) struct PackedDevice {
    areas: Areas,
    layout: RingLayout,
    event_idx: bool,
    next_avail: Place,
    /// Where the next used descriptor goes; entries from `published` to it are staged.
    next_used: Place,
    published: Place,
    /// Place and flags of the first staged descriptor, whose flags are stored last.
    staged: Option<(u16, u16)>,
    /// Slots that the staged descriptors stand for.
    staged_slots: u32,
    /// `published` when the driver was last considered for a notification; None before the first time.
    signalled: Option<Place>,
    /// Slots published as used since then.
    moved: u32,
    /// Slots of popped chains that were not yet written back.
    slots_in_flight: u32,
}

impl PackedDevice {
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
            next_avail: Place::from_bits(avail),
            next_used: Place::from_bits(used),
            published: Place::from_bits(used),
            staged: None,
            staged_slots: 0,
            signalled: None,
            moved: 0,
            slots_in_flight: 0,
        })
    }

    pub(crate) fn refresh<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        self.areas.refresh(mem, &self.layout, End::Device)
    }

    pub(crate) const fn state(&self) -> (u16, u16) {
        (self.next_avail.bits(), self.published.bits())
    }

    #[inline]
    fn load_flags<A: Access>(&self, mem: &A, slot: u16) -> Result<u16, MemoryError> {
        mem.load_u16_acquire(self.areas.desc, desc::flags_off(slot))
    }

    /// Whether the next slot is available.
    #[inline]
    pub(crate) fn look<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<bool, Fault> {
        let flags = self
            .load_flags(mem, self.next_avail.slot)
            .map_err(|e| self.unmapped(rules, e))?;
        Ok(self.next_avail.is_avail(flags))
    }

    #[cold]
    pub(crate) fn unmapped(&self, rules: &ChainRules, error: MemoryError) -> Fault {
        let mut fault = rules.fault(Rule::RingUnmapped.of_memory(&error), error.to_string());
        fault.position = Some(self.next_avail.slot);
        fault.address = Some(error.address());
        fault
    }

    /// Pop the next list into `segments`; `busy` says whether a buffer id is in flight. Nothing changes on a
    /// fault. The id is opaque to us (2.8.1): it is compared and handed back, never used as an index. Its descriptors are
    /// appended to `copies`, for a record of what is in flight.
    #[inline]
    pub(crate) fn pop<A: Access>(
        &mut self,
        mem: &A,
        rules: &ChainRules,
        segments: &mut Vec<Segment>,
        busy: impl Fn(u16) -> bool,
        mut copies: Option<&mut Vec<Raw>>,
    ) -> Result<Option<Element>, Fault> {
        let size = self.layout.size;
        let mut place = self.next_avail;
        let mut flags = self.load_flags(mem, place.slot).map_err(|e| self.unmapped(rules, e))?;
        if !place.is_avail(flags) {
            return Ok(None);
        }
        let mut walk = Walk::new(mem, rules, segments, place.slot, 0);
        let mut slots: u16 = 0;
        loop {
            let index = u32::from(place.slot);
            // 2.8.17: the whole list fits into the ring beside what is in flight.
            if self.slots_in_flight + u32::from(slots) >= u32::from(size) {
                let (rule, message) = if slots >= size {
                    (
                        Rule::ChainTooLong,
                        format!("the list goes on after all {size} descriptors of the ring"),
                    )
                } else {
                    let busy = self.slots_in_flight;
                    (
                        Rule::TooManyInFlight,
                        format!("slot {index} is available while {busy} descriptors are in flight"),
                    )
                };
                return Err(walk.fault(rule, index, None, message));
            }
            let (addr, len, id) = match desc::load_packed(mem, self.areas.desc, place.slot) {
                Ok(fields) => fields,
                Err(error) => return Err(walk.ring_fault(index, error)),
            };
            if let Some(copies) = &mut copies {
                copies.push(Raw { addr, len, id, flags });
            }
            slots += 1;
            place = place.forward(1, size);
            // 2.8.1: the id of the buffer is that of its last descriptor.
            walk.set_head(id);
            if flags & desc::INDIRECT != 0 {
                // 2.8.19: no INDIRECT in a list linked by NEXT.
                if slots > 1 {
                    let message = "an INDIRECT descriptor follows direct ones in a list".to_owned();
                    return Err(walk.fault(Rule::IndirectAfterDirect, index, Some(addr), message));
                }
                walk_table(&mut walk, rules, index, addr, len, flags)?;
                break;
            }
            walk.take(index, addr, len, flags)?;
            if flags & desc::NEXT == 0 {
                break;
            }
            if slots >= size {
                let message = format!("the list goes on after all {size} descriptors of the ring");
                return Err(walk.fault(Rule::ChainTooLong, index, None, message));
            }
            flags = match self.load_flags(mem, place.slot) {
                Ok(flags) => flags,
                Err(error) => return Err(walk.ring_fault(u32::from(place.slot), error)),
            };
            // 2.8.17: the first descriptor becomes available after all that follow it in the list.
            if !place.is_avail(flags) {
                let message = format!("the list goes on in slot {}, which is not available", place.slot);
                return Err(walk.fault(Rule::ChainNotAvail, u32::from(place.slot), None, message));
            }
        }
        let element = walk.finish(slots);
        if !rules.policy.duplicate_heads && busy(element.head) {
            segments.truncate(element.first);
            let mut fault = rules.fault(
                Rule::IdInFlight,
                format!("buffer id {} is already in flight", element.head),
            );
            fault.position = Some(element.position);
            fault.head = Some(element.head);
            return Err(fault);
        }
        self.next_avail = place;
        self.slots_in_flight += u32::from(slots);
        Ok(Some(element))
    }

    /// A list that an earlier device end took, from copies of its descriptors, which this ring counts as taken.
    pub(crate) fn pop_again<A: Access>(
        &self,
        mem: &A,
        rules: &ChainRules,
        segments: &mut Vec<Segment>,
        descs: &[Raw],
    ) -> Result<Element, Fault> {
        let mut walk = Walk::new(mem, rules, segments, self.published.slot, 0);
        let mut slots = 0;
        for (index, desc) in (0u32..).zip(descs) {
            slots += 1;
            walk.set_head(desc.id);
            if desc.flags & desc::INDIRECT != 0 {
                if slots > 1 {
                    let message = "an INDIRECT descriptor follows direct ones in a list".to_owned();
                    return Err(walk.fault(Rule::IndirectAfterDirect, index, Some(desc.addr), message));
                }
                walk_table(&mut walk, rules, index, desc.addr, desc.len, desc.flags)?;
                break;
            }
            walk.take(index, desc.addr, desc.len, desc.flags)?;
        }
        Ok(walk.finish(slots))
    }

    /// `slots` of this ring were taken by an earlier device end and not given back.
    pub(crate) const fn count_taken(&mut self, slots: u32) {
        self.slots_in_flight = slots;
    }

    /// Where the next used descriptor is published when this one, of a list of `slots`, is staged and published.
    pub(crate) const fn used_after(&self, slots: u16) -> u16 {
        self.next_used.forward(slots, self.layout.size).bits()
    }

    /// Undo the newest pop of a list of `slots` descriptors.
    pub(crate) fn unpop(&mut self, slots: u16) {
        self.next_avail = self.next_avail.back(slots, self.layout.size);
        self.slots_in_flight = self.slots_in_flight.saturating_sub(u32::from(slots));
    }

    /// Write a used descriptor that is not visible yet: of several the first one's flags come last.
    #[inline]
    pub(crate) fn stage<A: Access>(&mut self, mem: &A, id: u16, slots: u16, written: u32) -> Result<(), MemoryError> {
        let Place { slot, .. } = self.next_used;
        let off = desc::BYTES * u64::from(slot);
        mem.store_u32(self.areas.desc, off + 8, written)?;
        mem.store_u16(self.areas.desc, off + 12, id)?;
        // 2.8.3: WRITE says that something was written; 2.8.6: all other flags are reserved.
        let flags = self.next_used.used_flags() | if written > 0 { desc::WRITE } else { 0 };
        if self.staged.is_none() {
            self.staged = Some((slot, flags));
        } else {
            mem.store_u16_release(self.areas.desc, desc::flags_off(slot), flags)?;
        }
        self.next_used = self.next_used.forward(slots, self.layout.size);
        self.staged_slots = self.staged_slots.saturating_add(u32::from(slots));
        self.slots_in_flight = self.slots_in_flight.saturating_sub(u32::from(slots));
        Ok(())
    }

    /// Make all staged descriptors visible; whether there were any.
    #[inline]
    pub(crate) fn publish<A: Access>(&mut self, mem: &A) -> Result<bool, MemoryError> {
        let Some((slot, flags)) = self.staged else {
            return Ok(false);
        };
        mem.store_u16_release(self.areas.desc, desc::flags_off(slot), flags)?;
        self.staged = None;
        self.published = self.next_used;
        self.moved = self.moved.saturating_add(std::mem::take(&mut self.staged_slots));
        Ok(true)
    }

    /// Whether the driver wants to hear of what was published since the last call (2.8.10, 2.8.14).
    pub(crate) fn wants_call<A: Access>(&mut self, mem: &A) -> Result<bool, MemoryError> {
        let new = self.published;
        mem.fence();
        let event = PackedEvent::load(mem, self.areas.driver)?;
        // A whole lap or more since the last decision passes every place there is.
        let lap = std::mem::take(&mut self.moved) > u32::from(self.layout.size);
        let passed = |old: Place| packed_need_event(event, self.event_idx, self.layout.size, new.pair(), old.pair());
        let wants = event.flags & 3 != DISABLE && (lap || self.signalled.is_none_or(passed));
        self.signalled = Some(new);
        Ok(wants)
    }

    /// Ask for kicks; the caller looks for work again afterwards.
    pub(crate) fn arm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        arm(mem, self.areas.device, self.event_idx, self.next_avail)
    }

    /// Ask for no kicks.
    pub(crate) fn disarm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        disarm(mem, self.areas.device)
    }
}

/// 2.8.7: the table is read from its start to its end; ids and flags other than WRITE are reserved in it.
fn walk_table<A: Access>(
    walk: &mut Walk<'_, A>,
    rules: &ChainRules,
    index: u32,
    addr: u64,
    len: u32,
    flags: u16,
) -> Result<(), Fault> {
    let table = walk.table(index, addr, len, flags)?;
    let walked = walk_entries(walk, rules, table);
    walk.read_from(table, walked)
}

fn walk_entries<A: Access>(walk: &mut Walk<'_, A>, rules: &ChainRules, table: Table) -> Result<(), Fault> {
    for index in 0..table.entries {
        // The two formats keep flags at different offsets of an entry.
        let entry = walk.load_packed_entry(table, index)?;
        if entry.flags & desc::INDIRECT != 0 && !rules.policy.packed_table_flags {
            let message = "an entry of an indirect table has INDIRECT set".to_owned();
            return Err(walk.fault(Rule::NestedIndirect, index, Some(entry.addr), message));
        }
        walk.take(index, entry.addr, entry.len, entry.flags)?;
    }
    Ok(())
}
