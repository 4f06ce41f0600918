//! Taking used buffers back: every one judged by what is private here, one after the other or many in one call.
//!
//! What one used entry completed together (IN_ORDER) and what was put back waits in `ready`; else nothing is kept, and a
//! buffer goes from the ring to the caller in registers.

use super::{DriverQueue, Ring, Shadow};
use crate::error::Fault;
use crate::mem::{Access, MemoryError, any_lost};
use crate::queue::Used;
use crate::rule::Rule;

impl DriverQueue {
    /// Whether a used buffer can be taken. What is broken counts: `get_used` says what it is.
    ///
    /// Who hears that there is nothing goes to sleep, so it asks the device for a call as `get_used` does.
    pub fn has_used<A: Access>(&mut self, mem: &A) -> bool {
        if !self.running() {
            return false;
        }
        let found = self.ready.is_empty().then(|| self.look_or_arm(mem));
        found.is_none_or(|found| self.intact(mem).and(found).unwrap_or(true))
    }

    /// Whether something was used; if not, the device is asked for a call, unless calls are disabled. Asking and
    /// then looking once more, in this order, is what keeps a call from being lost.
    #[inline(always)]
    fn look_or_arm<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        let refreshed = each!(&mut self.ring, ring => ring.refresh(mem));
        if let Err(error) = refreshed {
            return Err(self.unmapped(error));
        }
        if self.look(mem)? {
            return Ok(true);
        }
        if !self.calls || self.armed {
            return Ok(false);
        }
        self.arm_and_look(mem)
    }

    #[cold]
    fn arm_and_look<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        let armed = each!(&mut self.ring, ring => ring.arm(mem));
        armed.map_err(|error| self.unmapped(error))?;
        self.armed = true;
        self.look(mem)
    }

    #[cold]
    fn unmapped(&self, error: MemoryError) -> Fault {
        each!(&self.ring, ring => ring.unmapped(&self.rules, error))
    }

    #[inline(always)]
    fn look<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        match &mut self.ring {
            Ring::Split(ring) if ring.ready() != 0 => Ok(true),
            Ring::Split(ring) => {
                let unseen = u32::try_from(self.next_token - self.published).unwrap_or(u32::MAX);
                let visible = self.in_flight.saturating_sub(unseen);
                ring.look(mem, &self.rules, visible)
            }
            Ring::Packed(ring) => ring.look(mem, &self.rules),
        }
    }

    /// The next used buffer: its token and the bytes written.
    ///
    /// A call that finds none asks the device for a call, unless calls are disabled.
    ///
    /// # Errors
    /// The rule that the device broke; the queue is then latched.
    #[inline(always)]
    pub fn get_used<A: Access>(&mut self, mem: &A) -> Result<Option<(u64, u32)>, Fault> {
        if !self.running() {
            return Ok(None);
        }
        if !self.ready.is_empty() || self.order.is_some() {
            return self.get_kept(mem);
        }
        match self.take_next(mem) {
            Ok(Some((token, len))) => {
                if any_lost() {
                    return self.withdraw(mem, (token, len));
                }
                self.counters.popped += 1;
                Ok(Some((token, len)))
            }
            Ok(None) => {
                self.check_intact(mem)?;
                Ok(None)
            }
            Err(fault) => Err(self.broken(mem, fault)),
        }
    }

    /// As `get_used`, of those that one used entry completed together.
    #[cold]
    fn get_kept<A: Access>(&mut self, mem: &A) -> Result<Option<(u64, u32)>, Fault> {
        match self.take_kept(mem) {
            Ok(Some(used)) => self.withdraw(mem, used),
            Ok(None) => {
                self.check_intact(mem)?;
                Ok(None)
            }
            Err(fault) => Err(self.broken(mem, fault)),
        }
    }

    /// A used buffer, if the memory that told of it is intact; else it stays where `detach` finds it.
    #[cold]
    fn withdraw<A: Access>(&mut self, mem: &A, used: (u64, u32)) -> Result<Option<(u64, u32)>, Fault> {
        if let Err(fault) = self.check_intact(mem) {
            self.ready.push_front(used);
            return Err(fault);
        }
        self.counters.popped += 1;
        Ok(Some(used))
    }

    #[cold]
    fn broken<A: Access>(&mut self, mem: &A, fault: Fault) -> Fault {
        match self.check_intact(mem) {
            Ok(()) => self.latched_by(fault),
            Err(lost) => lost,
        }
    }

    /// Up to `limit` used buffers. A broken one behind good ones is left for the next call; of memory that is lost, none
    /// is good.
    ///
    /// # Errors
    /// As [`DriverQueue::get_used`], when the first one is broken.
    pub fn get_used_many<A: Access>(&mut self, mem: &A, limit: usize) -> Result<Vec<(u64, u32)>, Fault> {
        let mut taken = Vec::new();
        self.get_used_into(mem, limit, &mut taken)?;
        Ok(taken)
    }

    /// As [`DriverQueue::get_used_many`], appended to `used`; their number.
    ///
    /// # Errors
    /// As [`DriverQueue::get_used`], when the first one is broken; `used` is then as it was.
    pub fn get_used_into<A: Access>(
        &mut self,
        mem: &A,
        limit: usize,
        used: &mut Vec<(u64, u32)>,
    ) -> Result<usize, Fault> {
        let start = used.len();
        let mut broken = None;
        let mut count = 0;
        let kept = !self.ready.is_empty() || self.order.is_some();
        while count < limit && self.running() {
            let taken = if kept {
                self.keep_into(mem, used)
            } else {
                self.take_into(mem, used)
            };
            match taken {
                Ok(true) => count += 1,
                Ok(false) => break,
                Err(_) if count > 0 => break,
                Err(fault) => {
                    broken = Some(fault);
                    break;
                }
            }
        }
        self.counters.popped += count as u64;
        if let Err(fault) = self.check_intact(mem) {
            self.give_back(used.split_off(start));
            return Err(fault);
        }
        broken.map_or(Ok(count), |fault| Err(self.latched_by(fault)))
    }

    /// Put used buffers back that were just taken, as if they had not been: the next calls take them.
    pub fn give_back(&mut self, taken: Vec<(u64, u32)>) {
        self.counters.popped = self.counters.popped.saturating_sub(taken.len() as u64);
        taken.into_iter().rev().for_each(|used| self.ready.push_front(used));
    }

    /// As `take_into`, where some wait.
    #[cold]
    fn keep_into<A: Access>(&mut self, mem: &A, used: &mut Vec<(u64, u32)>) -> Result<bool, Fault> {
        let taken = self.take_kept(mem)?;
        used.extend(taken);
        Ok(taken.is_some())
    }

    /// Append the next used buffer; whether there was one.
    #[inline(always)]
    fn take_into<A: Access>(&mut self, mem: &A, used: &mut Vec<(u64, u32)>) -> Result<bool, Fault> {
        match self.take_next(mem) {
            Ok(Some((token, len))) => {
                used.push((token, len));
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// The next used buffer with IN_ORDER, or of those that were put back.
    #[cold]
    fn take_kept<A: Access>(&mut self, mem: &A) -> Result<Option<(u64, u32)>, Fault> {
        if self.ready.is_empty() {
            let Some((used, id, shadow, written)) = self.peek(mem)? else {
                return Ok(None);
            };
            if self.order.is_none() {
                self.forget(id, &shadow);
                return Ok(Some((shadow.token, written)));
            }
            self.finish_in_order(used, id, written)?;
        }
        Ok(self.ready.pop_front())
    }

    /// The next used buffer of the ring.
    #[inline(always)]
    fn take_next<A: Access>(&mut self, mem: &A) -> Result<Option<(u64, u32)>, Fault> {
        match self.peek(mem) {
            Ok(Some((_, id, shadow, written))) => {
                self.forget(id, &shadow);
                Ok(Some((shadow.token, written)))
            }
            Ok(None) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// The next used entry, judged: its id, what is known of it, and the bytes written.
    #[inline(always)]
    fn peek<A: Access>(&mut self, mem: &A) -> Result<Option<(Used, u16, Shadow, u32)>, Fault> {
        // Known already, when the table is still the one that the ring was resolved in.
        let known = matches!(&self.ring, Ring::Split(ring) if ring.ready() != 0 && ring.is_fresh(mem));
        if !known && !self.look_or_arm(mem)? {
            return Ok(None);
        }
        let used = match &mut self.ring {
            Ring::Split(ring) => ring.peek(mem, &self.rules)?,
            Ring::Packed(ring) => match ring.peek(mem, &self.rules)? {
                Some(used) => used,
                None => return Ok(None),
            },
        };
        // 2.7.8, 2.8.4: the id is the head of a chain, or the id of a buffer, that this queue can have.
        let id = match u16::try_from(used.id) {
            Ok(id) if id < self.layout.size => id,
            _ => return Err(self.no_such_id(used)),
        };
        let shadow = match self.shadow.get(usize::from(id)) {
            Some(&Some(shadow)) if shadow.token < self.published => shadow,
            _ => return Err(self.not_in_flight(used, id)),
        };
        let mut written = used.len;
        if u64::from(written) > shadow.writable {
            written = self.check_len(used, shadow)?;
        }
        self.armed = false;
        Ok(Some((used, id, shadow, written)))
    }

    /// The descriptors of `id` are free again.
    #[inline(always)]
    fn forget(&mut self, id: u16, shadow: &Shadow) {
        if let Some(slot) = self.shadow.get_mut(usize::from(id)) {
            *slot = None;
        }
        match &mut self.ring {
            Ring::Split(ring) => ring.advance(id, shadow.tail, shadow.descriptors),
            Ring::Packed(ring) => ring.advance(id, shadow.descriptors),
        }
        self.in_flight -= 1;
    }

    #[cold]
    fn no_such_id(&self, used: Used) -> Fault {
        let message = format!("used id {} is beyond a queue of {}", used.id, self.layout.size);
        self.used_fault(Rule::UsedIdOutOfRange, &used, message)
    }

    #[cold]
    fn not_in_flight(&self, used: Used, id: u16) -> Fault {
        let message = format!("used id {id} is no buffer in flight");
        self.used_fault(Rule::UsedIdNotInFlight, &used, message)
    }

    /// 2.7.8.2, 2.8.4: the length counts bytes written to the buffer's writable part; here it is more.
    #[cold]
    fn check_len(&self, used: Used, shadow: Shadow) -> Result<u32, Fault> {
        if !used.told {
            // What cannot be a length is what is reserved.
            return Ok(0);
        }
        if self.rules.policy.used_len_beyond {
            return Ok(u32::try_from(shadow.writable).unwrap_or(u32::MAX));
        }
        let message = format!(
            "used length {} for a buffer of {} writable bytes",
            used.len, shadow.writable
        );
        Err(self.used_fault(Rule::UsedLenTooBig, &used, message))
    }

    /// 2.7.9, 2.8.8: with IN_ORDER one used entry may stand for all buffers up to its own; those before it
    /// count as written whole.
    fn finish_in_order(&mut self, used: Used, id: u16, written: u32) -> Result<(), Fault> {
        let mut order = self.order.take().unwrap_or_default();
        let batch = order.iter().position(|&other| other == id).map_or(1, |place| place + 1);
        let room = match &self.ring {
            Ring::Split(ring) => usize::from(ring.ready()),
            Ring::Packed(_) => batch,
        };
        if batch > room {
            self.order = Some(order);
            let message = format!("used id {id} completes {batch} buffers in order, used.idx says {room}");
            return Err(self.used_fault(Rule::UsedIdNotInFlight, &used, message));
        }
        for member in order.drain(..batch) {
            self.release(member, (member == id).then_some(written));
        }
        self.order = Some(order);
        Ok(())
    }

    /// Give the descriptors of `id` back; None means that its writable part was written whole.
    fn release(&mut self, id: u16, written: Option<u32>) {
        let Some(shadow) = self.shadow.get(usize::from(id)).copied().flatten() else {
            return;
        };
        self.forget(id, &shadow);
        let whole = u32::try_from(shadow.writable).unwrap_or(u32::MAX);
        self.ready.push_back((shadow.token, written.unwrap_or(whole)));
    }

    #[cold]
    fn used_fault(&self, rule: Rule, used: &Used, message: String) -> Fault {
        let mut fault = self.rules.fault(rule, message);
        fault.position = Some(used.position);
        fault.head = u16::try_from(used.id).ok();
        fault.address = Some(used.address);
        fault
    }
}
