//! Putting frames into receive buffers (VIRTIO 1.4, 5.1.9.3, 5.1.9.4).

use super::{Finding, Setup, Told};
use crate::chain::{Element, Segment};
use crate::error::{Fault, QueueError};
use crate::iov::prefetch;
use crate::mem::{Access, At, Want, any_lost};
use crate::queue::DeviceQueue;
use crate::service::{buffers, complete_all};

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// It is in receive buffers, which are to be completed and published.
    Done,
    /// There are none.
    Empty,
    /// There are too few of them, or their memory cannot be written.
    Few,
    /// It does not fit into the next one.
    Small,
}

/// Receive buffers that were taken: those from `next` on are not yet used, those before it are full, and completed up to
/// `completed`: many at once cost less.
#[derive(Debug, Default)]
pub(super) struct Receive {
    segments: Vec<Segment>,
    elements: Vec<Element>,
    /// Bytes used of each full one.
    used: Vec<u64>,
    completed: usize,
    next: usize,
}

impl Receive {
    /// Put a header and its frame into the next buffers, all of them or none; take `ahead` when there are no more. The header
    /// is that of a frame in one buffer.
    ///
    /// # Errors
    /// The rule that the driver broke; the queue is latched, and what was taken is gone with it.
    #[inline(always)]
    pub(super) fn place<A: Access>(
        &mut self,
        mem: &A,
        queue: &mut DeviceQueue,
        setup: &Setup,
        whole: &mut [u8],
        ahead: usize,
        told: &Told,
    ) -> Result<Placed, Fault> {
        let total = whole.len() as u64;
        // Where nobody else has to be asked nothing fails; of lost memory nothing is told here.
        let direct = |at: &At| mem.direct(*at, 0, total, Want::Write).is_some();
        if let Some(at) = self.next_alone(total).filter(direct) {
            if mem.write(at, 0, whole).is_ok() && !any_lost() {
                self.fill_next(total);
                return Ok(Placed::Done);
            }
        }
        self.place_over(mem, queue, setup, whole, ahead, told)
    }

    /// The next buffer, if there is one and its frame of so many bytes, header and all, fits into it alone.
    #[inline(always)]
    pub(super) fn next_alone(&self, total: u64) -> Option<At> {
        let element = self.elements.get(self.next)?;
        if element.count != 1 || element.writable < total {
            return None;
        }
        Some(self.segments.get(element.first)?.at)
    }

    /// That one is full.
    #[inline(always)]
    pub(super) fn fill_next(&mut self, total: u64) {
        self.used.push(total);
        self.next += 1;
    }

    /// As `place`, over several buffers, or when there is none yet.
    #[inline(never)]
    fn place_over<A: Access>(
        &mut self,
        mem: &A,
        queue: &mut DeviceQueue,
        setup: &Setup,
        whole: &mut [u8],
        ahead: usize,
        told: &Told,
    ) -> Result<Placed, Fault> {
        if self.next == self.elements.len() {
            self.complete(mem, queue)?;
            self.clear();
        }
        let total = whole.len() as u64;
        let (first, mut room, mut count) = (self.next, 0_u64, 0_usize);
        while room < total && (count == 0 || setup.mergeable) {
            if first + count == self.elements.len() && !self.take(mem, queue, ahead)? {
                break;
            }
            let writable = self.elements.get(first + count).map_or(0, |element| element.writable);
            count += 1;
            // 5.1.9.3.1: the first buffer holds the header at least.
            if count == 1 && writable < setup.header as u64 {
                break;
            }
            room = room.saturating_add(writable);
        }
        if room < total {
            if count > 0 && (room == 0 || !setup.mergeable) {
                self.too_small(first, queue, setup, whole.len(), told);
                return Ok(Placed::Small);
            }
            return Ok(if count == 0 { Placed::Empty } else { Placed::Few });
        }
        // 5.1.9.3.2: num_buffers counts them, and is 1 without MRG_RXBUF.
        number(whole, setup, count);
        let written = self.write(mem, queue, first, count, whole);
        number(whole, setup, 1);
        if !written? {
            return Ok(Placed::Few);
        }
        let mut left = total;
        for element in self.elements.get(first..first + count).unwrap_or_default() {
            let used = left.min(element.writable);
            self.used.push(used);
            left -= used;
        }
        self.next = first + count;
        Ok(Placed::Done)
    }

    /// Take up to `ahead` buffers; whether there are any.
    #[inline]
    fn take<A: Access>(&mut self, mem: &A, queue: &mut DeviceQueue, ahead: usize) -> Result<bool, Fault> {
        // What is full stays so, whatever is found broken now.
        self.complete(mem, queue)?;
        let (before, first) = (self.elements.len(), self.segments.len());
        queue.pop_many(mem, ahead.max(1), &mut self.segments, &mut self.elements)?;
        prefetch(mem, self.segments.get(first..).unwrap_or_default());
        queue.prefetch_used(mem, self.elements.len() - before);
        Ok(self.elements.len() > before)
    }

    /// Complete what is full; not visible before it is published.
    ///
    /// # Errors
    /// As [`complete_all`].
    #[inline]
    pub(super) fn complete<A: Access>(&mut self, mem: &A, queue: &mut DeviceQueue) -> Result<(), Fault> {
        let full = self.completed..self.next;
        self.completed = self.next;
        let elements = self.elements.get(full.clone()).unwrap_or_default();
        let used = self.used.get(full).unwrap_or_default();
        complete_all(mem, queue, elements.iter().zip(used.iter().copied()))
    }

    fn clear(&mut self) {
        self.segments.clear();
        self.elements.clear();
        self.used.clear();
        (self.completed, self.next) = (0, 0);
    }

    /// Write all of it before the first buffer is shown (CVE-2021-3748); all but the last are full. False when the
    /// memory of one of them cannot be written.
    #[inline]
    fn write<A: Access>(
        &self,
        mem: &A,
        queue: &mut DeviceQueue,
        first: usize,
        count: usize,
        whole: &[u8],
    ) -> Result<bool, Fault> {
        let mut rest = whole;
        for element in self.elements.get(first..first + count).unwrap_or_default() {
            let size = usize::try_from(element.writable).unwrap_or(usize::MAX).min(rest.len());
            let (own, others) = rest.split_at_checked(size).unwrap_or((rest, &[]));
            match queue.copied(buffers(&self.segments, element).write(mem, 0, own)) {
                Ok(_) => rest = others,
                Err(QueueError::Violation(fault)) => return Err(fault),
                Err(QueueError::Misuse(_)) => return Ok(false),
            }
        }
        Ok(true)
    }

    #[cold]
    fn too_small(&self, first: usize, queue: &DeviceQueue, setup: &Setup, total: usize, told: &Told) {
        let Some(element) = self.elements.get(first) else {
            return;
        };
        let length = total.saturating_sub(setup.header);
        told.note(Finding {
            rule: "BufferTooSmall",
            clause: "5.1.9.3.1",
            message: format!(
                "{} bytes for a header of {} and a frame of {length}",
                element.writable, setup.header
            ),
            queue: queue.config().index,
            head: element.head,
        });
    }

    /// Put back what was not used, newest first; what is full was completed.
    pub(super) fn put_back(&mut self, queue: &mut DeviceQueue) {
        while self.elements.len() > self.next {
            let Some(element) = self.elements.pop() else { break };
            let segments = self.segments.get(element.first..).unwrap_or_default();
            queue.put_back(&element, segments.get(..element.count).unwrap_or_default());
        }
        self.clear();
    }
}

/// Say in a header over how many buffers its frame lies, if it can say so.
fn number(whole: &mut [u8], setup: &Setup, count: usize) {
    if let Some(field @ [_, _]) = whole.get_mut(10..setup.header) {
        field.copy_from_slice(&u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes());
    }
}
