//! The driver end of a split virtqueue.
//!
//! The free list and everything about a chain in flight live in private memory: nothing is ever read back
//! from the descriptor table, which the device could have changed although it must not (2.7.5.1).

use super::{arm, disarm};
use crate::chain::ChainRules;
use crate::error::{Fault, Misuse};
use crate::mem::{AHEAD, Access, DescStores, HeadStores, MemoryError, Want};
use crate::queue::{Buffers, Measured, Used};
use crate::ring::desc::{self, Desc};
use crate::ring::layout::{AVAIL_IDX, AVAIL_RING, FLAGS, USED_IDX, USED_RING};
use crate::ring::{Areas, AvailRing, RingLayout, Side, need_event};
use crate::rule::Rule;

/// Offset of entry `slot` of the used ring.
const fn used_off(slot: u16) -> u64 {
    USED_RING + 8 * slot as u64
}

/// Used entries that are fetched at once: more would push out of the cache what is needed first.
const FETCHED: u16 = 64;

/// Private state of the driver end.
#[derive(Debug)]
pub(crate) struct SplitDriver {
    areas: Areas,
    layout: RingLayout,
    event_idx: bool,
    in_order: bool,
    mask: u16,
    /// Next free descriptor of each free descriptor; of a chain in flight, its next one.
    next: Vec<u16>,
    free_head: u16,
    /// Of another width than what changes with it: the two stored by one instruction, and loaded by a wider one for the next
    /// chain, would have that wait until the store is through.
    free: u32,
    next_avail: u16,
    published: u16,
    kicked: u16,
    /// Entries published since the last kick decision: more than 16 bits of them pass every event there is.
    moved: u32,
    last_used: u16,
    /// `used.idx` as last loaded.
    seen_used: u16,
}

/// Where descriptors and avail entries go, and what is free.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adding<'a> {
    descs: DescStores<'a>,
    heads: HeadStores<'a>,
    head: u16,
    free: u32,
    avail: u16,
}

impl SplitDriver {
    pub(crate) fn new<A: Access>(
        mem: &A,
        layout: RingLayout,
        event_idx: bool,
        in_order: bool,
        avail: u16,
        used: u16,
    ) -> Result<Self, MemoryError> {
        let size = layout.size;
        Ok(Self {
            areas: Areas::resolve(mem, &layout, Side::Driver)?,
            layout,
            event_idx,
            in_order,
            mask: size - 1,
            next: (0..size).map(|i| (i + 1) & (size - 1)).collect(),
            free_head: 0,
            free: u32::from(size),
            next_avail: avail,
            published: avail,
            kicked: avail,
            moved: 0,
            last_used: used,
            seen_used: used,
        })
    }

    #[inline(always)]
    pub(crate) fn refresh<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        self.areas.refresh(mem, &self.layout, Side::Driver)
    }

    pub(crate) const fn state(&self) -> (u16, u16) {
        (self.published, self.last_used)
    }

    pub(crate) fn free(&self) -> u16 {
        u16::try_from(self.free).unwrap_or(u16::MAX)
    }

    /// The head that the next chain will get.
    pub(crate) const fn next_head(&self) -> u16 {
        self.free_head
    }

    #[inline(always)]
    fn follow(&self, index: u16) -> u16 {
        self.next.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// Write a chain of `count` descriptors (one INDIRECT descriptor, or the buffers themselves) and its avail entry; its head
    /// and its tail.
    /// The caller has checked that `free` suffices and that there is at least one.
    #[inline(never)]
    pub(crate) fn add<A: Access>(
        &mut self,
        mem: &A,
        count: u16,
        buffers: Buffers<'_>,
    ) -> Result<(u16, u16), MemoryError> {
        let ring = self.areas.desc;
        let store = |index, words| mem.store_desc(ring, desc::BYTES * u64::from(index), words);
        let (next, tail) = self.lay(self.free_head, buffers, store)?;
        let slot = AVAIL_RING + 2 * u64::from(self.next_avail & self.mask);
        let head = self.free_head;
        mem.store_u16(self.areas.driver, slot, head)?;
        self.free_head = next;
        self.free = self.free.wrapping_sub(u32::from(count));
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok((head, tail))
    }

    /// Give the descriptors of a chain, from this free one on, to `store`; the one that is free after it, and its tail.
    #[inline(always)]
    fn lay<E>(
        &self,
        head: u16,
        buffers: Buffers<'_>,
        store: impl Fn(u16, (u64, u64)) -> Result<(), E>,
    ) -> Result<(u16, u16), E> {
        let (mut index, mut tail) = (head, head);
        buffers.describe(|(addr, len), flags| {
            let next = self.follow(index);
            // IN_ORDER asks that next be the following index, even in the last one (2.7.5.2); so we always do.
            store(index, (addr, Desc::rest(len, flags, next)))?;
            tail = index;
            index = next;
            Ok(())
        })?;
        Ok((index, tail))
    }

    /// Make everything added visible (2.7.13.3.1: a barrier before the idx update).
    pub(crate) fn publish<A: Access>(&mut self, mem: &A) -> Result<u16, MemoryError> {
        let count = self.next_avail.wrapping_sub(self.published);
        if count != 0 {
            mem.store_u16_release(self.areas.driver, AVAIL_IDX, self.next_avail)?;
            self.published = self.next_avail;
            self.moved = self.moved.saturating_add(u32::from(count));
        }
        Ok(count)
    }

    /// Whether the device wants to hear of what was published since the last kick (2.7.10.1, 2.7.13.4.1).
    pub(crate) fn wants_kick<A: Access>(&mut self, mem: &A) -> Result<bool, MemoryError> {
        if self.moved == 0 {
            return Ok(false);
        }
        let (new, old) = (self.published, self.kicked);
        mem.fence();
        self.kicked = new;
        let lap = std::mem::take(&mut self.moved) > u32::from(u16::MAX);
        if self.event_idx {
            let event = mem.load_u16(self.areas.device, self.layout.avail_event())?;
            Ok(lap || need_event(event, new, old))
        } else {
            Ok(mem.load_u16(self.areas.device, FLAGS)? & 1 == 0)
        }
    }

    /// Whether the used ring holds something new; `in_flight` bounds how much that can be.
    #[inline(always)]
    pub(crate) fn look<A: Access>(&mut self, mem: &A, rules: &ChainRules, in_flight: u32) -> Result<bool, Fault> {
        if self.seen_used != self.last_used {
            return Ok(true);
        }
        let idx = mem
            .load_u16_acquire(self.areas.device, USED_IDX)
            .map_err(|e| self.unmapped(rules, e))?;
        let ahead = idx.wrapping_sub(self.last_used);
        // 2.7.8: idx counts used buffers, and only what is in flight (and was published) can be used.
        if u32::from(ahead) > in_flight {
            return Err(self.too_far(rules, idx, in_flight));
        }
        self.seen_used = idx;
        if ahead > 1 {
            self.prefetch(mem, ahead.min(FETCHED));
        }
        Ok(ahead != 0)
    }

    /// Have so many used entries fetched at once, which come one by one else. Out of line: it is there once for many, and would
    /// cost the rest its registers.
    #[inline(never)]
    fn prefetch<A: Access>(&self, mem: &A, count: u16) {
        for next in (0..count).step_by(AHEAD / 8) {
            let slot = self.last_used.wrapping_add(next) & self.mask;
            mem.prefetch(self.areas.device, used_off(slot), Want::Read);
        }
    }

    #[cold]
    fn too_far(&self, rules: &ChainRules, idx: u16, in_flight: u32) -> Fault {
        let ahead = idx.wrapping_sub(self.last_used);
        let message = format!(
            "used.idx is {idx}, {ahead} ahead of the {} taken, while {in_flight} are in flight",
            self.last_used
        );
        let mut fault = rules.fault(Rule::UsedIdxTooFar, message);
        fault.position = Some(self.last_used);
        fault.address = Some(self.layout.device.wrapping_add(USED_IDX));
        fault
    }

    /// The next used entry. Does not consume it: `advance` does, when it was found good.
    pub(crate) fn load<A: Access>(&self, mem: &A) -> Result<Used, MemoryError> {
        let (id, len) = mem.load_used(self.areas.device, used_off(self.last_used & self.mask))?;
        Ok(self.used(id, len))
    }

    #[cold]
    fn used(&self, id: u32, len: u32) -> Used {
        let off = used_off(self.last_used & self.mask);
        Used {
            id,
            len,
            told: true,
            position: self.last_used,
            address: self.layout.device.wrapping_add(off),
        }
    }

    /// Up to `limit` entries that are known to be there, without IN_ORDER and where the used ring can be reached directly:
    /// consumed, as long as `judge` knows their tail and the number of their descriptors. The one of which it does not.
    #[inline(always)]
    pub(crate) fn take_at_once<A: Access>(
        &mut self,
        mem: &A,
        limit: usize,
        mut judge: impl FnMut(u32, u32) -> Option<(u16, u16, u16)>,
    ) -> Option<Used> {
        let useds = mem.useds(self.areas.device)?;
        let descs = mem.desc_stores(self.areas.desc).unwrap_or(DescStores::none()).settled();
        let (mut left, mut odd) = (limit.min(usize::from(self.ready())), None);
        while left > 0 {
            let (id, len) = useds.used(self.last_used & self.mask)?;
            let Some((head, tail, descriptors)) = judge(id, len) else {
                odd = Some((id, len));
                break;
            };
            // The next chains get these descriptors, which the device has read.
            descs.prefetch(head);
            self.advance(head, tail, descriptors);
            left -= 1;
        }
        odd.map(|(id, len)| self.used(id, len))
    }

    /// Consume one used entry whose chain was `head` to `tail`, with `descriptors` ring descriptors.
    #[inline(always)]
    pub(crate) fn advance(&mut self, head: u16, tail: u16, descriptors: u16) {
        self.last_used = self.last_used.wrapping_add(1);
        self.free += u32::from(descriptors);
        // 2.7.5: with IN_ORDER descriptors are used in ring order, so the free ones follow by themselves.
        if !self.in_order {
            if let Some(next) = self.next.get_mut(usize::from(tail)) {
                *next = self.free_head;
            }
            self.free_head = head;
        }
    }

    /// How many used entries are known to be there and not consumed.
    #[inline(always)]
    pub(crate) const fn ready(&self) -> u16 {
        self.seen_used.wrapping_sub(self.last_used)
    }

    /// Ask for calls (2.7.7.1); the caller looks again afterwards.
    pub(crate) fn arm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        arm(
            mem,
            self.areas.driver,
            self.event_idx,
            self.layout.used_event(),
            self.last_used,
        )
    }

    /// Ask for no calls.
    pub(crate) fn disarm<A: Access>(&mut self, mem: &A) -> Result<(), MemoryError> {
        disarm(mem, self.areas.driver, self.event_idx)
    }

    #[cold]
    pub(crate) fn unmapped(&self, rules: &ChainRules, error: MemoryError) -> Fault {
        let mut fault = rules.fault(Rule::RingUnmapped.of_memory(&error), error.to_string());
        fault.position = Some(self.last_used);
        fault.address = Some(error.address());
        fault
    }

    /// Whether `needed` ring descriptors are free.
    #[inline(always)]
    pub(crate) fn check_room(&self, needed: u16) -> Result<(), Misuse> {
        if u32::from(needed) > self.free {
            return Err(Misuse::QueueFull {
                needed: u32::from(needed),
                free: self.free,
            });
        }
        Ok(())
    }
}

impl AvailRing for SplitDriver {
    type Adding<'a> = Adding<'a>;

    #[inline(always)]
    fn adding<'a, A: Access>(&self, mem: &'a A) -> Option<Adding<'a>> {
        Some(Adding {
            descs: mem.desc_stores(self.areas.desc)?,
            heads: mem.head_stores(self.areas.driver)?,
            head: self.free_head,
            free: self.free,
            avail: self.next_avail,
        })
    }

    #[inline(always)]
    fn put(&mut self, adding: &mut Adding<'_>, chain: Measured<'_>) -> Option<(u16, u16)> {
        let &mut Adding {
            descs,
            heads,
            head,
            free,
            avail,
        } = adding;
        let free = free.checked_sub(u32::from(chain.count))?;
        let store = |index, words| if descs.split(index, words) { Ok(()) } else { Err(()) };
        let (next, tail) = self.lay(head, chain.buffers, store).ok()?;
        if !heads.head(avail & self.mask, head) {
            return None;
        }
        (adding.head, adding.free, adding.avail) = (next, free, avail.wrapping_add(1));
        Some((head, tail))
    }

    #[inline(always)]
    fn settle(&mut self, adding: Adding<'_>) {
        self.free_head = adding.head;
        self.free = adding.free;
        self.next_avail = adding.avail;
    }
}
