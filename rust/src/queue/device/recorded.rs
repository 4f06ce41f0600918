//! A device end that keeps a record of what is in flight, and goes on from one (see `inflight`).
//!
//! What the last device end left is handed out first, in its order, and validated like everything else: its chains lie in
//! guest memory, and the record itself in memory of the other side. Such a chain does not go back into the ring, where
//! there may be another one in its place by now: put back, it waits here.

use std::collections::VecDeque;

use super::{DeviceQueue, Ring, stage, unmapped};
use crate::chain::{Element, Segment};
use crate::error::Fault;
use crate::inflight::{BadRecord, Left, Part, Record, Start};
use crate::mem::{Access, any_lost};
use crate::queue::{QueueConfig, QueueState};
use crate::ring::desc::Raw;

/// Why a queue with a record cannot begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// The queue itself cannot be.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The record cannot be this queue's.
    #[error(transparent)]
    Record(#[from] BadRecord),
}

/// A chain that is completed and not published yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) head: u16,
    pub(super) slots: u16,
    pub(super) written: u32,
    pub(super) entry: u16,
}

/// The record of a queue and what it makes the queue do.
#[derive(Debug)]
pub(super) struct Recorded {
    record: Record,
    /// What an earlier device end left and nobody was handed yet.
    pub(super) left: VecDeque<Left>,
    /// How many that were at first: the pops with lower numbers.
    pub(super) resubmitted: u64,
    done: VecDeque<Done>,
    pub(super) copies: Vec<Raw>,
}

impl DeviceQueue {
    /// Build a queue that keeps its record in `part`, and goes on from what lies there; from `state`, when that is nothing.
    ///
    /// # Errors
    /// As [`DeviceQueue::new`]; `BadRecord`, and then the record was not changed.
    pub fn recorded<A: Access>(
        mem: &A,
        config: QueueConfig,
        state: Option<QueueState>,
        part: Part,
    ) -> Result<Self, StartError> {
        let fresh = Self::new(mem, config, state)?;
        let (record, start) = Record::open(part, mem, &fresh.layout, fresh.state())?;
        let Start { state, left, found } = start;
        let mut queue = Self::new(mem, config, Some(state))?;
        let count = |left: &Left| u32::try_from(left.descs.len()).unwrap_or(u32::MAX);
        if let Ring::Packed(ring) = &mut queue.ring {
            ring.count_taken(left.iter().map(count).sum());
        }
        // The driver has not heard of what was published last, as far as anybody here knows.
        queue.unsignalled = found;
        queue.in_flight = u32::try_from(left.len()).unwrap_or(u32::MAX);
        queue.recorded = Some(Box::new(Recorded {
            record,
            resubmitted: left.len() as u64,
            left,
            done: VecDeque::new(),
            copies: Vec::new(),
        }));
        Ok(queue)
    }

    /// Whether a record is kept.
    #[must_use]
    pub const fn keeps_record(&self) -> bool {
        self.recorded.is_some()
    }

    /// Chains that an earlier device end left and that were not popped yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.recorded.as_ref().map_or(0, |recorded| recorded.left.len())
    }

    /// Whether the pop of this number was of such a chain.
    pub(super) fn resubmitted(&self, seq: u64) -> bool {
        self.recorded
            .as_ref()
            .is_some_and(|recorded| seq < recorded.resubmitted)
    }

    /// Pop the next chain that an earlier device end left. On a fault it stays.
    #[cold]
    pub(super) fn pop_left<A: Access>(
        &mut self,
        mem: &A,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<Element>, Fault> {
        let rules = &self.rules;
        let Some(recorded) = &mut self.recorded else {
            return Ok(None);
        };
        let Some(left) = recorded.left.front() else {
            return Ok(None);
        };
        each!(&mut self.ring, ring => ring.refresh(mem).map_err(|error| ring.unmapped(rules, error)))?;
        let mut element = match &self.ring {
            Ring::Split(ring) => ring.pop_again(mem, rules, segments, left.entry)?,
            Ring::Packed(ring) => ring.pop_again(mem, rules, segments, &left.descs)?,
        };
        if let Some(element) = &mut element {
            element.entry = left.entry;
            recorded.left.pop_front();
        }
        Ok(element)
    }

    /// Note a chain that was just popped from the ring.
    #[cold]
    pub(super) fn note_taken(&mut self, element: &mut Element) -> Result<(), Fault> {
        let Some(recorded) = &mut self.recorded else {
            return Ok(());
        };
        let entry = recorded.record.take(element.head, &recorded.copies);
        element.entry = entry.map_err(|error| unmapped(&self.rules, error))?;
        Ok(())
    }

    /// Note that the newest chain goes back into the ring.
    #[cold]
    pub(super) fn note_untaken(&mut self, entry: u16) {
        let Some(recorded) = &mut self.recorded else { return };
        if let Err(error) = recorded.record.untake(entry) {
            let fault = unmapped(&self.rules, error);
            self.latch(fault);
        }
    }

    /// Keep a completed chain until it is published; false when no record is kept.
    #[inline]
    pub(super) fn keep_done(&mut self, done: Done) -> bool {
        let Some(recorded) = &mut self.recorded else {
            return false;
        };
        recorded.done.push_back(done);
        true
    }

    /// Publish what is completed, one by one, each with its record before and after.
    #[cold]
    pub(super) fn publish_recorded<A: Access>(&mut self, mem: &A) -> Result<(), Fault> {
        let Some(mut recorded) = self.recorded.take() else {
            return Ok(());
        };
        let mut published = Ok(());
        while let (Ok(()), Some(done)) = (&published, recorded.done.pop_front()) {
            published = self.publish_one(mem, &mut recorded.record, done);
        }
        self.recorded = Some(recorded);
        published
    }

    fn publish_one<A: Access>(&mut self, mem: &A, record: &mut Record, done: Done) -> Result<(), Fault> {
        let Done {
            head,
            slots,
            written,
            entry,
        } = done;
        self.check_intact(mem)?;
        let rules = self.rules;
        let used = match &self.ring {
            Ring::Split(ring) => ring.used_after(),
            Ring::Packed(ring) => ring.used_after(slots),
        };
        self.with_ring(mem, |ring| stage(ring, mem, head, slots, written))?;
        let noted = record.before(entry, used).and_then(|()| {
            if any_lost() {
                record.intact()?;
            }
            Ok(())
        });
        noted.map_err(|error| self.latched_by(unmapped(&rules, error)))?;
        self.unsignalled |= self.with_intact_ring(mem, |ring| each!(ring, ring => ring.publish(mem)))?;
        let noted = record.after(entry, used);
        noted.map_err(|error| self.latched_by(unmapped(&rules, error)))
    }

    /// As `intact`, of the record: asked when something in this process is lost.
    pub(super) fn find_lost_record(&self) -> Result<(), Fault> {
        let Some(recorded) = &self.recorded else { return Ok(()) };
        recorded.record.intact().map_err(|error| {
            let mut fault = unmapped(&self.rules, error);
            // What is named elsewhere is a guest address.
            fault.address = None;
            fault.message = format!("the record of what is in flight is lost: {error}");
            fault
        })
    }
}
