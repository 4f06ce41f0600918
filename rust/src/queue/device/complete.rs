//! Completing chains: one by one, or a burst.
//!
//! # Theory
//!
//! With IN_ORDER chains are used in the order in which they were made available (2.7.9, 2.8.8). Most handlers complete them in
//! that order anyhow, and then one number says all there is to know: that of the oldest that is not used up. What is
//! completed before its turn waits beside it, and is used up when all that were popped earlier are.
//!
//! Of a queue that keeps a record of what is in flight, nothing is written before it is published.

use std::collections::VecDeque;
use std::iter::once;

use super::recorded::Done;
use super::{DeviceQueue, Ring, Ticket};
use crate::error::{Fault, Misuse, QueueError};
use crate::mem::{Access, MemoryError};
use crate::queue::heads::HeadSet;
use crate::ring::UsedRing;

/// What is in flight, with IN_ORDER.
#[derive(Debug, Default)]
pub(super) struct InOrder {
    /// Number of the oldest pop that is not used up.
    oldest: u64,
    /// Those that are completed before their turn, by number.
    early: VecDeque<(u64, Done)>,
}

impl InOrder {
    /// How many wait, completed or not; `next` is the number of the next pop.
    #[inline(always)]
    pub(super) const fn waiting(&self, next: u64) -> u64 {
        next.saturating_sub(self.oldest)
    }

    /// Whether it is this one's turn, and no other's after it.
    #[inline(always)]
    fn is_next(&self, seq: u64) -> bool {
        seq == self.oldest && self.early.is_empty()
    }

    /// Keep one until it is its turn; the latest that is said of it holds, and nothing of one that is used up.
    fn keep(&mut self, seq: u64, done: Done) {
        if seq < self.oldest {
            return;
        }
        let place = self.early.partition_point(|(other, _)| *other < seq);
        match self.early.get_mut(place) {
            Some((other, kept)) if *other == seq => *kept = done,
            _ => self.early.insert(place, (seq, done)),
        }
    }

    /// The one whose turn it is, if it is completed.
    fn due(&self) -> Option<Done> {
        let (seq, done) = self.early.front()?;
        (*seq == self.oldest).then_some(*done)
    }

    /// That one is used up.
    fn pass(&mut self) {
        self.early.pop_front();
        self.oldest += 1;
    }

    /// The newest pop is undone, and the next has its number.
    pub(super) fn forget(&mut self, seq: u64) {
        self.oldest = self.oldest.min(seq);
        if self.early.back().is_some_and(|(other, _)| *other == seq) {
            self.early.pop_back();
        }
    }
}

/// What ended a burst of completions.
enum Stop {
    Done,
    /// Before its turn.
    Early(Ticket, u64),
    /// Bytes written, and how many can be.
    TooBig(u64, u64),
    Stale,
    Unmapped(MemoryError),
}

/// What a burst of completions begins with.
#[derive(Clone, Copy)]
struct Now {
    generation: u64,
    in_flight: u64,
}

impl Now {
    /// Judge a completion, of which there were `count` before; false when it is of a generation that is gone.
    #[inline(always)]
    fn judge(&self, ticket: &Ticket, written: u64, count: u64) -> Result<bool, Stop> {
        if written > ticket.writable {
            return Err(Stop::TooBig(written, ticket.writable));
        }
        // Of an old generation nothing is written (2.4.1, 2.1.1).
        if ticket.generation != self.generation {
            return Ok(false);
        }
        if count >= self.in_flight {
            return Err(Stop::Stale);
        }
        Ok(true)
    }
}

/// 2.7.5.2 lets a chain have 2^32 bytes, which the 32-bit length of a used entry cannot say.
#[inline(always)]
fn used_len(written: u64) -> u32 {
    u32::try_from(written).unwrap_or(u32::MAX)
}

/// Stage each of them; how many were, how many were dropped, and what ended it.
#[inline(always)]
fn complete_as_they_come<R: UsedRing, A: Access>(
    ring: &mut R,
    mem: &A,
    now: Now,
    done: &mut impl Iterator<Item = (Ticket, u64)>,
    busy: &mut HeadSet,
) -> (u64, u64, Stop) {
    let (mut staging, mut count, mut dropped) = (ring.staging(mem), 0, 0);
    let end = loop {
        let Some((ticket, written)) = done.next() else {
            break Stop::Done;
        };
        match now.judge(&ticket, written, count) {
            Ok(true) => {}
            Ok(false) => {
                dropped += 1;
                continue;
            }
            Err(stop) => break stop,
        }
        if let Err(error) = ring.stage(mem, &mut staging, ticket.head, ticket.slots, used_len(written)) {
            break Stop::Unmapped(error);
        }
        busy.remove(ticket.head);
        count += 1;
    };
    ring.settle(staging);
    (count, dropped, end)
}

/// As `complete_as_they_come`, of those whose turn it is. 2.7.9, 2.8.8: the last of a batch stands for all of it, which says
/// that the others were used whole; so it does for those that have nothing to write to.
#[inline(always)]
fn complete_ordered<R: UsedRing, A: Access>(
    ring: &mut R,
    mem: &A,
    (now, oldest): (Now, u64),
    done: &mut impl Iterator<Item = (Ticket, u64)>,
    busy: &mut HeadSet,
) -> (u64, u64, Stop) {
    let (mut staging, mut count, mut dropped) = (ring.staging(mem), 0, 0);
    // The last of those that another will stand for, and the slots of all of them.
    let (mut last, mut passed) = (0, 0_u16);
    let mut end = loop {
        let Some((ticket, written)) = done.next() else {
            break Stop::Done;
        };
        match now.judge(&ticket, written, count) {
            Ok(true) => {}
            Ok(false) => {
                dropped += 1;
                continue;
            }
            Err(stop) => break stop,
        }
        if oldest.wrapping_add(count) != ticket.seq {
            break Stop::Early(ticket, written);
        }
        (last, passed) = (ticket.head, passed.saturating_add(ticket.slots));
        if ticket.writable > 0 {
            if let Err(error) = ring.stage(mem, &mut staging, last, passed, used_len(written)) {
                break Stop::Unmapped(error);
            }
            passed = 0;
        }
        busy.remove(ticket.head);
        count += 1;
    };
    if passed > 0 && !matches!(end, Stop::Unmapped(_)) {
        if let Err(error) = ring.stage(mem, &mut staging, last, passed, 0) {
            end = Stop::Unmapped(error);
        }
    }
    ring.settle(staging);
    (count, dropped, end)
}

impl DeviceQueue {
    /// Complete a chain with `written` bytes; not visible before `publish`. False when it was dropped.
    ///
    /// # Errors
    /// `WrittenTooBig`, with nothing changed; a violation when the ring is no longer mapped.
    #[inline(always)]
    pub fn complete<A: Access>(&mut self, mem: &A, ticket: &Ticket, written: u64) -> Result<bool, QueueError> {
        if written > ticket.writable {
            return Err(written_too_big(written, ticket.writable));
        }
        // Of an old generation, or after a latch, nothing is written (2.4.1, 2.1.1).
        if !self.is_current(ticket) {
            self.counters.dropped += 1;
            return Ok(false);
        }
        let Some(in_flight) = self.in_flight.checked_sub(1) else {
            return Err(stale_chain());
        };
        // 2.7.5.2 lets a chain have 2^32 bytes, which the 32-bit length of a used entry cannot say.
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        let order = self.order.as_ref();
        if self.recorded.is_some() || order.is_some_and(|order| !order.is_next(ticket.seq)) {
            self.complete_kept(mem, ticket, written)?;
        } else {
            self.use_up_now(mem, ticket.head, ticket.slots, written)?;
            if let Some(order) = &mut self.order {
                order.oldest += 1;
            }
        }
        self.in_flight = in_flight;
        self.counters.pushed += 1;
        Ok(true)
    }

    /// Complete chains one after the other, each with the bytes written to it, as [`DeviceQueue::complete`] does; how many
    /// were not dropped.
    ///
    /// # Errors
    /// As [`DeviceQueue::complete`], at the first that is wrong; those before it are completed.
    pub fn complete_many<A: Access>(
        &mut self,
        mem: &A,
        mut done: impl Iterator<Item = (Ticket, u64)>,
    ) -> Result<u64, QueueError> {
        let refreshed = each!(&mut self.ring, ring => ring.refresh(mem));
        let early = self.order.as_ref().is_some_and(|order| !order.early.is_empty());
        if early || self.recorded.is_some() || self.broken() || refreshed.is_err() {
            return self.complete_each(mem, done);
        }
        let now = Now {
            generation: self.generation,
            in_flight: u64::from(self.in_flight),
        };
        let oldest = self.order.as_ref().map(|order| order.oldest);
        let busy = &mut self.busy;
        // One loop for each format, and with order or without, so that what a ring knows lives in registers.
        let (count, dropped, end) = each!(&mut self.ring, ring => {
            match oldest {
                Some(oldest) => complete_ordered(ring, mem, (now, oldest), &mut done, busy),
                None => complete_as_they_come(ring, mem, now, &mut done, busy),
            }
        });
        if let Some(order) = &mut self.order {
            order.oldest += count;
        }
        self.in_flight = self.in_flight.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        self.counters.pushed += count;
        self.counters.dropped += dropped;
        match end {
            Stop::Done => Ok(count),
            Stop::Early(ticket, written) => Ok(count + self.complete_each(mem, once((ticket, written)).chain(done))?),
            Stop::TooBig(written, writable) => Err(written_too_big(written, writable)),
            Stop::Stale => Err(stale_chain()),
            Stop::Unmapped(error) => Err(self.ring_lost(error).into()),
        }
    }

    /// Say that this many chains are about to be completed; nothing more than a hint.
    #[inline]
    pub fn prefetch_used<A: Access>(&self, mem: &A, count: usize) {
        let count = u16::try_from(count).unwrap_or(u16::MAX);
        each!(&self.ring, ring => ring.prefetch_used(mem, count));
    }

    /// As `complete_many`, where something becomes of a completion beside its used entry.
    #[cold]
    fn complete_each<A: Access>(
        &mut self,
        mem: &A,
        done: impl Iterator<Item = (Ticket, u64)>,
    ) -> Result<u64, QueueError> {
        let mut count = 0;
        for (ticket, written) in done {
            count += u64::from(self.complete(mem, &ticket, written)?);
        }
        Ok(count)
    }

    /// Of a queue that keeps a record, or of a chain before whose turn there are others, or after.
    #[cold]
    fn complete_kept<A: Access>(&mut self, mem: &A, ticket: &Ticket, written: u32) -> Result<(), Fault> {
        let &Ticket { head, slots, entry, .. } = ticket;
        let done = Done {
            head,
            slots,
            written,
            entry,
        };
        let Some(order) = &mut self.order else {
            return self.use_up(mem, done);
        };
        if ticket.seq < self.next_seq {
            order.keep(ticket.seq, done);
        }
        while let Some(done) = self.order.as_ref().and_then(InOrder::due) {
            self.use_up(mem, done)?;
            if let Some(order) = &mut self.order {
                order.pass();
            }
        }
        Ok(())
    }

    /// Write the used entry of a chain, or keep it until it is published, where that is recorded.
    fn use_up<A: Access>(&mut self, mem: &A, done: Done) -> Result<(), Fault> {
        if self.keep_done(done) {
            self.busy.remove(done.head);
            return Ok(());
        }
        self.use_up_now(mem, done.head, done.slots, done.written)
    }

    #[inline(always)]
    fn use_up_now<A: Access>(&mut self, mem: &A, head: u16, slots: u16, written: u32) -> Result<(), Fault> {
        let refreshed = each!(&mut self.ring, ring => ring.refresh(mem));
        if let Err(error) = refreshed.and_then(|()| stage(&mut self.ring, mem, head, slots, written)) {
            return Err(self.ring_lost(error));
        }
        self.busy.remove(head);
        Ok(())
    }
}

#[inline(always)]
pub(super) fn stage<A: Access>(
    ring: &mut Ring,
    mem: &A,
    head: u16,
    slots: u16,
    written: u32,
) -> Result<(), MemoryError> {
    each!(ring, ring => {
        let mut staging = ring.staging(mem);
        ring.stage(mem, &mut staging, head, slots, written)?;
        ring.settle(staging);
        Ok(())
    })
}

#[cold]
fn written_too_big(written: u64, writable: u64) -> QueueError {
    Misuse::WrittenTooBig { written, writable }.into()
}

#[cold]
fn stale_chain() -> QueueError {
    Misuse::StaleChain.into()
}
