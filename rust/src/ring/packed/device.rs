//! The device end of a packed virtqueue.

use super::{Place, arm, disarm};
use crate::chain::{Bounds, ChainRules, Element, Elements, End, Segment, Stamp, Table, Walk};
use crate::error::Fault;
use crate::mem::{AHEAD, Access, DescStores, Descs, MemoryError, Near, Want};
use crate::queue::heads::HeadSet;
use crate::ring::desc::Raw;
use crate::ring::event::DISABLE;
use crate::ring::{Areas, PackedEvent, RingLayout, Side, UsedRing, desc, packed_need_event};
use crate::rule::Rule;

/// Private state of the device end.
#[derive(Debug)]
pub(crate) struct PackedDevice {
    areas: Areas,
    layout: RingLayout,
    event_idx: bool,
    next_avail: Place,
    /// Used descriptors from here on are staged.
    published: Place,
    staged: Staged,
    /// `published` when the driver was last considered for a notification; None before the first time.
    signalled: Option<Place>,
    /// Slots published as used since then.
    moved: u32,
    /// Slots of popped chains that were not yet written back.
    slots_in_flight: u32,
    /// Lists of one descriptor that the last run found: so many are fetched together for the next.
    run: u16,
}

/// Used descriptors that are written and not visible yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Staged {
    /// Where the next one goes.
    next: Place,
    /// Place and flags of the first, whose flags are stored last.
    first: Option<(u16, u16)>,
    /// Slots that they stand for.
    slots: u32,
}

impl Staged {
    const fn none(next: Place) -> Self {
        Self {
            next,
            first: None,
            slots: 0,
        }
    }
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
            areas: Areas::resolve(mem, &layout, Side::Device)?,
            layout,
            event_idx,
            next_avail: Place::from_bits(avail),
            published: Place::from_bits(used),
            staged: Staged::none(Place::from_bits(used)),
            signalled: None,
            moved: 0,
            slots_in_flight: 0,
            run: 0,
        })
    }

    #[inline(always)]
    pub(crate) fn refresh<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        self.areas.refresh(mem, &self.layout, Side::Device)
    }

    pub(crate) const fn state(&self) -> (u16, u16) {
        (self.next_avail.bits(), self.published.bits())
    }

    #[inline(always)]
    fn load_flags<A: Access>(&self, mem: &A, slot: u16) -> Result<u16, MemoryError> {
        mem.load_u16_acquire(self.areas.desc, desc::flags_off(slot))
    }

    /// Whether the next slot is available.
    #[inline(always)]
    pub(crate) fn look<A: Access>(&mut self, mem: &A, rules: &ChainRules) -> Result<bool, Fault> {
        let flags = self
            .load_flags(mem, self.next_avail.slot)
            .map_err(|e| self.unmapped(rules, e))?;
        Ok(self.next_avail.is_avail(flags))
    }

    #[cold]
    #[inline(never)]
    pub(crate) fn unmapped(&self, rules: &ChainRules, error: MemoryError) -> Fault {
        let mut fault = rules.fault(Rule::RingUnmapped.of_memory(&error), error.to_string());
        fault.position = Some(self.next_avail.slot);
        fault.address = Some(error.address());
        fault
    }

    /// Pop lists into segments and elements, within bounds; how many, and what ended it. `busy` are the ids in flight. The id
    /// is opaque to us (2.8.1): it is compared and handed back, never used as an index. Descriptors are appended to `copies`,
    /// for a record of what is in flight. A list on which there is a fault changes nothing.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is another's, and all of them are changed"
    )]
    pub(crate) fn pop<A: Access>(
        &mut self,
        mem: &A,
        rules: &ChainRules,
        bounds: Bounds,
        (segments, elements): (&mut Vec<Segment>, &mut impl Elements),
        stamp: Stamp,
        busy: &mut HeadSet,
        mut copies: Option<&mut Vec<Raw>>,
    ) -> (u64, End) {
        let words = mem.descs(self.areas.descs).settled();
        let (mut near, mut count) = (Near::nothing(), 0);
        loop {
            if count >= bounds.chains || segments.len() >= bounds.segments {
                return (count, End::More);
            }
            let mut flags = match desc::load_flags(mem, words, self.areas.desc, self.next_avail.slot) {
                Ok(flags) => flags,
                Err(error) => return (count, End::Fault(self.unmapped(rules, error))),
            };
            // A run looks at its first slot once more: what this look saw is judged only where there is no run.
            if copies.is_none() && self.next_avail.is_alone(flags) {
                let left = Bounds {
                    chains: bounds.chains - count,
                    ..bounds
                };
                let (at, into) = ((mem, &mut near, words), (&mut *segments, &mut *elements));
                let (popped, next) = self.pop_buffers(at, rules, left, into, stamp.later(count), busy);
                count += popped;
                match next {
                    Ok(Some(next)) => flags = next,
                    Ok(None) if popped > 0 => continue,
                    // No words, or no room: who takes lists says what is to be said.
                    Ok(None) => {}
                    Err(fault) => return (count, End::Fault(fault)),
                }
            }
            let place = self.next_avail;
            if !place.is_avail(flags) {
                return (count, End::Empty);
            }
            let (walk, stamp) = (
                Walk::new((mem, &mut near), rules, segments, place.slot, 0),
                stamp.later(count),
            );
            let copies = copies.as_deref_mut();
            if let Err(fault) = self.pop_list((mem, words), walk, rules, flags, elements, stamp, busy, copies) {
                return (count, End::Fault(fault));
            }
            count += 1;
        }
    }

    /// Pop lists of one descriptor, as long as there are any in this lap, room for them, and words for them; how many, and the
    /// flags of the slot behind them if they were looked at: it has none of these then.
    #[inline(always)]
    fn pop_buffers<'a, A: Access>(
        &mut self,
        (mem, near, words): (&'a A, &mut Near<'a>, Descs<'_>),
        rules: &ChainRules,
        bounds: Bounds,
        (segments, elements): (&mut Vec<Segment>, &mut impl Elements),
        stamp: Stamp,
        busy: &mut HeadSet,
    ) -> (u64, Result<Option<u16>, Fault>) {
        let (size, start) = (u32::from(self.layout.size), self.next_avail);
        // 2.8.17: a list fits into the ring beside what is in flight.
        let room = size.saturating_sub(self.slots_in_flight);
        let room = u64::from(room.min(size.saturating_sub(u32::from(start.slot))));
        let room = room
            .min(bounds.chains)
            .min(bounds.segments.saturating_sub(segments.len()) as u64);
        let end = start.slot.saturating_add(u16::try_from(room).unwrap_or(u16::MAX));
        let mut slot = start.slot;
        for ahead in (slot..end.min(slot.saturating_add(self.run))).step_by(AHEAD / 16) {
            self.prefetch(mem, ahead, Want::Read);
        }
        let next = loop {
            if slot >= end {
                break Ok(None);
            }
            let Some(flags) = words.flags(slot) else { break Ok(None) };
            if !start.is_alone(flags) {
                break Ok(Some(flags));
            }
            let Some((addr, len, id)) = words.packed(slot) else {
                break Ok(None);
            };
            let mut walk = Walk::new((mem, &mut *near), rules, &mut *segments, slot, id);
            if let Err(fault) = walk.take(u32::from(slot), addr, len, flags & desc::WRITE != 0) {
                break Err(fault);
            }
            if !rules.policy.duplicate_heads {
                if busy.contains(id) {
                    walk.cut();
                    break Err(in_flight(rules, id, slot));
                }
                busy.insert(id);
            }
            elements.put(walk.finish(1, stamp.later(u64::from(slot - start.slot))));
            slot += 1;
        };
        let popped = slot - start.slot;
        self.next_avail = start.forward(popped, self.layout.size);
        self.slots_in_flight += u32::from(popped);
        self.run = popped;
        (u64::from(popped), next)
    }

    /// Pop a list of which the first descriptor has these flags.
    #[expect(clippy::too_many_arguments, reason = "as in `pop`, which it is a part of")]
    #[inline(always)]
    fn pop_list<A: Access>(
        &mut self,
        (mem, words): (&A, Descs<'_>),
        mut walk: Walk<'_, '_, A>,
        rules: &ChainRules,
        mut flags: u16,
        elements: &mut impl Elements,
        stamp: Stamp,
        busy: &mut HeadSet,
        mut copies: Option<&mut Vec<Raw>>,
    ) -> Result<(), Fault> {
        let (size, ring) = (self.layout.size, self.areas.desc);
        let mut place = self.next_avail;
        let (mut slots, taken) = (0u16, self.slots_in_flight);
        loop {
            let index = u32::from(place.slot);
            // 2.8.17: the whole list fits into the ring beside what is in flight.
            if taken + u32::from(slots) >= u32::from(size) {
                let (rule, message) = no_room(index, slots, size, taken);
                return Err(walk.fault(rule, index, None, message));
            }
            let (addr, len, id) = match desc::load_packed(mem, words, ring, place.slot) {
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
                let (buffer, stamp) = ((addr, len, flags), (slots, stamp));
                let double = !rules.policy.duplicate_heads && busy.contains(id);
                walk_table(walk, rules, index, buffer, stamp, double, |element| {
                    elements.put(element);
                })?;
                if double {
                    return Err(in_flight(rules, id, self.next_avail.slot));
                }
            } else {
                walk.take(index, addr, len, flags & desc::WRITE != 0)?;
                if flags & desc::NEXT != 0 {
                    if slots >= size {
                        return Err(walk.fault(Rule::ChainTooLong, index, None, too_long(size)));
                    }
                    flags = match desc::load_flags(mem, words, ring, place.slot) {
                        Ok(flags) => flags,
                        Err(error) => return Err(walk.ring_fault(u32::from(place.slot), error)),
                    };
                    // 2.8.17: the first descriptor becomes available after all that follow it in the list.
                    if !place.is_avail(flags) {
                        let message = not_available(place.slot);
                        return Err(walk.fault(Rule::ChainNotAvail, u32::from(place.slot), None, message));
                    }
                    continue;
                }
                if !rules.policy.duplicate_heads && busy.contains(id) {
                    walk.cut();
                    return Err(in_flight(rules, id, self.next_avail.slot));
                }
                elements.put(walk.finish(slots, stamp));
            }
            self.next_avail = place;
            self.slots_in_flight = taken + u32::from(slots);
            busy.insert(id);
            return Ok(());
        }
    }

    /// A list that an earlier device end took, from copies of its descriptors, which this ring counts as taken.
    pub(crate) fn pop_again<A: Access>(
        &self,
        mem: &A,
        rules: &ChainRules,
        segments: &mut Vec<Segment>,
        descs: &[Raw],
    ) -> Result<Option<Element>, Fault> {
        let mut near = Near::nothing();
        let mut walk = Walk::new((mem, &mut near), rules, segments, self.published.slot, 0);
        let mut slots = 0;
        for (index, desc) in (0u32..).zip(descs) {
            slots += 1;
            walk.set_head(desc.id);
            if desc.flags & desc::INDIRECT != 0 {
                if slots > 1 {
                    let message = "an INDIRECT descriptor follows direct ones in a list".to_owned();
                    return Err(walk.fault(Rule::IndirectAfterDirect, index, Some(desc.addr), message));
                }
                let buffer = (desc.addr, desc.len, desc.flags);
                let mut found = None;
                walk_table(
                    walk,
                    rules,
                    index,
                    buffer,
                    (slots, Stamp::default()),
                    false,
                    |element| {
                        found = Some(element);
                    },
                )?;
                return Ok(found);
            }
            walk.take(index, desc.addr, desc.len, desc.flags & desc::WRITE != 0)?;
        }
        Ok(Some(walk.finish(slots, Stamp::default())))
    }

    /// `slots` of this ring were taken by an earlier device end and not given back.
    pub(crate) const fn count_taken(&mut self, slots: u32) {
        self.slots_in_flight = slots;
    }

    /// Where the next used descriptor is published when this one, of a list of `slots`, is staged and published.
    pub(crate) const fn used_after(&self, slots: u16) -> u16 {
        self.staged.next.forward(slots, self.layout.size).bits()
    }

    /// Undo the newest pop of a list of `slots` descriptors.
    pub(crate) fn unpop(&mut self, slots: u16) {
        self.next_avail = self.next_avail.back(slots, self.layout.size);
        self.slots_in_flight = self.slots_in_flight.saturating_sub(u32::from(slots));
    }

    /// Have what the next `count` used descriptors are written to fetched.
    #[inline(always)]
    pub(crate) fn prefetch_used<A: Access>(&self, mem: &A, count: u16) {
        let size = self.layout.size;
        for ahead in (0..count.min(size)).step_by(AHEAD / 16) {
            let Place { slot, .. } = self.staged.next.forward(ahead, size);
            self.prefetch(mem, slot, Want::Write);
        }
    }

    /// Have the descriptor in this slot fetched, and those that come with it: [`AHEAD`] bytes.
    #[inline(always)]
    fn prefetch<A: Access>(&self, mem: &A, slot: u16, want: Want) {
        mem.prefetch(self.areas.desc, desc::BYTES * u64::from(slot), want);
    }

    /// Make all staged descriptors visible; whether there were any.
    #[inline(always)]
    pub(crate) fn publish<A: Access>(&mut self, mem: &A) -> Result<bool, MemoryError> {
        let Some((slot, flags)) = self.staged.first else {
            return Ok(false);
        };
        mem.store_u16_release(self.areas.desc, desc::flags_off(slot), flags)?;
        self.published = self.staged.next;
        self.moved = self.moved.saturating_add(self.staged.slots);
        self.staged = Staged::none(self.published);
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

impl UsedRing for PackedDevice {
    /// Where descriptors go, if that is all there is to storing them, and what is staged.
    type Staging<'a> = (DescStores<'a>, Staged);

    #[inline(always)]
    fn staging<'a, A: Access>(&self, mem: &'a A) -> Self::Staging<'a> {
        let stores = mem.desc_stores(self.areas.desc).unwrap_or(DescStores::none());
        (stores.settled(), self.staged)
    }

    /// Of several the first one's flags come last.
    #[inline(always)]
    fn stage<A: Access>(
        &self,
        mem: &A,
        (stores, staged): &mut Self::Staging<'_>,
        id: u16,
        slots: u16,
        written: u32,
    ) -> Result<(), MemoryError> {
        let Place { slot, .. } = staged.next;
        if !stores.packed_used(slot, (written, id)) {
            mem.store_packed_used(self.areas.desc, desc::BYTES * u64::from(slot) + 8, (written, id))?;
        }
        // 2.8.3: WRITE says that something was written; 2.8.6: all other flags are reserved.
        let flags = staged.next.used_flags() | if written > 0 { desc::WRITE } else { 0 };
        if staged.first.is_none() {
            staged.first = Some((slot, flags));
        } else if !stores.flags(slot, flags) {
            mem.store_u16_release(self.areas.desc, desc::flags_off(slot), flags)?;
        }
        staged.next = staged.next.forward(slots, self.layout.size);
        staged.slots = staged.slots.saturating_add(u32::from(slots));
        Ok(())
    }

    #[inline(always)]
    fn settle(&mut self, (_, staged): Self::Staging<'_>) {
        let more = staged.slots.saturating_sub(self.staged.slots);
        self.slots_in_flight = self.slots_in_flight.saturating_sub(more);
        self.staged = staged;
    }
}

#[cold]
#[inline(never)]
fn no_room(index: u32, slots: u16, size: u16, busy: u32) -> (Rule, String) {
    if slots >= size {
        return (Rule::ChainTooLong, too_long(size));
    }
    let message = format!("slot {index} is available while {busy} descriptors are in flight");
    (Rule::TooManyInFlight, message)
}

#[cold]
#[inline(never)]
fn too_long(size: u16) -> String {
    format!("the list goes on after all {size} descriptors of the ring")
}

#[cold]
#[inline(never)]
fn not_available(slot: u16) -> String {
    format!("the list goes on in slot {slot}, which is not available")
}

#[cold]
#[inline(never)]
fn in_flight(rules: &ChainRules, id: u16, position: u16) -> Fault {
    let mut fault = rules.fault(Rule::IdInFlight, format!("buffer id {id} is already in flight"));
    fault.position = Some(position);
    fault.head = Some(id);
    fault
}

/// 2.8.7: the table is read from its start to its end; ids and flags other than WRITE are reserved in it. Of the
/// descriptor: address, length, flags. A `double` one, whose id is in flight, is judged like any other and given to nobody.
#[inline(never)]
fn walk_table<A: Access>(
    mut walk: Walk<'_, '_, A>,
    rules: &ChainRules,
    index: u32,
    (addr, len, flags): (u64, u32, u16),
    (slots, stamp): (u16, Stamp),
    double: bool,
    done: impl FnOnce(Element),
) -> Result<(), Fault> {
    let table = walk.table(index, addr, len, flags)?;
    let walked = walk_entries(&mut walk, rules, &table);
    walk.read_from(&table)?;
    walked.map(|()| {
        if double {
            walk.cut();
        } else {
            done(walk.finish(slots, stamp));
        }
    })
}

#[inline(always)]
fn walk_entries<A: Access>(walk: &mut Walk<'_, '_, A>, rules: &ChainRules, table: &Table) -> Result<(), Fault> {
    let words = walk.words(table);
    for index in 0..table.entries {
        // The two formats keep flags at different offsets of an entry.
        let entry = walk.load_packed_entry(table, words, index)?;
        if entry.flags & desc::INDIRECT != 0 && !rules.policy.packed_table_flags {
            let message = "an entry of an indirect table has INDIRECT set".to_owned();
            return Err(walk.fault(Rule::NestedIndirect, index, Some(entry.addr), message));
        }
        walk.take(index, entry.addr, entry.len, entry.flags & desc::WRITE != 0)?;
    }
    Ok(())
}
