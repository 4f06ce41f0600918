//! Chains that are put back: into the ring when they are the newest, else they wait here for the next pop.

use super::{DeviceQueue, Ring, Ticket};
use crate::chain::{Element, Segment};
use crate::error::Misuse;

/// A chain that was put back while a later one was popped: in flight for the driver, and nobody's here.
#[derive(Debug)]
pub(super) struct Returned {
    element: Element,
    segments: Vec<Segment>,
}

impl DeviceQueue {
    #[cold]
    pub(super) fn pop_returned(&mut self, segments: &mut Vec<Segment>) -> Option<Element> {
        let returned = self.returned.pop_front()?;
        let first = segments.len();
        segments.extend(returned.segments);
        Some(Element {
            first,
            ..returned.element
        })
    }

    /// Put the newest popped chain back, as if it had not been popped. A stale one is dropped.
    ///
    /// # Errors
    /// `NotNewest` when a later chain was popped and not put back, or an earlier device end has popped it first.
    pub fn unpop(&mut self, ticket: &Ticket) -> Result<(), Misuse> {
        if ticket.generation != self.generation || self.broken() {
            return Ok(());
        }
        if ticket.seq + 1 != self.next_seq || self.resubmitted(ticket.seq) {
            return Err(Misuse::NotNewest);
        }
        self.undo_pop(ticket);
        // What was put back before it may be the newest now.
        while self.returned.back().is_some_and(|last| {
            let seq = last.element.seq;
            seq + 1 == self.next_seq && !self.resubmitted(seq)
        }) {
            if let Some(last) = self.returned.pop_back() {
                self.undo_pop(&last.element.ticket());
            }
        }
        Ok(())
    }

    fn undo_pop(&mut self, ticket: &Ticket) {
        if self.recorded.is_some() {
            self.note_untaken(ticket.entry);
        }
        match &mut self.ring {
            Ring::Split(ring) => ring.unpop(),
            Ring::Packed(ring) => ring.unpop(ticket.slots),
        }
        self.next_seq = self.next_seq.saturating_sub(1);
        self.in_flight = self.in_flight.saturating_sub(1);
        self.counters.popped = self.counters.popped.saturating_sub(1);
        self.armed = false;
        self.busy.remove(ticket.head);
        if let Some(order) = &mut self.order {
            order.forget(ticket.seq);
        }
    }

    /// Put any chain back that was popped and not completed: into the ring when it is the newest, else it is kept
    /// and handed out again by the next pop, so that none is ever lost. `segments` are the chain's own.
    pub fn put_back(&mut self, element: &Element, segments: &[Segment]) {
        if self.unpop(&element.ticket()).is_err() {
            let place = self.returned.partition_point(|other| other.element.seq < element.seq);
            let returned = Returned {
                element: element.clone(),
                segments: segments.to_vec(),
            };
            self.returned.insert(place, returned);
        }
    }
}
