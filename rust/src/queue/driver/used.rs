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
        let mut one = None;
        let (_, broken) = self.take(mem, 1, |token, len| one = Some((token, len)));
        if let Some(fault) = broken {
            return Err(self.broken(mem, fault));
        }
        if any_lost() {
            return self.withdraw(mem, one);
        }
        self.counters.popped += u64::from(one.is_some());
        Ok(one)
    }

    /// As `get_used`, of those that one used entry completed together.
    #[cold]
    fn get_kept<A: Access>(&mut self, mem: &A) -> Result<Option<(u64, u32)>, Fault> {
        match self.take_kept(mem) {
            Ok(used) => self.withdraw(mem, used),
            Err(fault) => Err(self.broken(mem, fault)),
        }
    }

    /// A used buffer, if the memory that told of it is intact; else it stays where `detach` finds it.
    #[cold]
    fn withdraw<A: Access>(&mut self, mem: &A, used: Option<(u64, u32)>) -> Result<Option<(u64, u32)>, Fault> {
        if let Err(fault) = self.check_intact(mem) {
            if let Some(used) = used {
                self.ready.push_front(used);
            }
            return Err(fault);
        }
        self.counters.popped += u64::from(used.is_some());
        Ok(used)
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
        if !self.running() {
            return Ok(0);
        }
        let start = used.len();
        let (count, broken) = if self.ready.is_empty() && self.order.is_none() {
            self.take(mem, limit, |token, len| used.push((token, len)))
        } else {
            self.take_kept_into(mem, limit, used)
        };
        self.counters.popped += count as u64;
        if let Err(fault) = self.check_intact(mem) {
            self.give_back(used.split_off(start));
            return Err(fault);
        }
        match broken {
            Some(fault) if count == 0 => Err(self.latched_by(fault)),
            _ => Ok(count),
        }
    }

    /// Put used buffers back that were just taken, as if they had not been: the next calls take them.
    pub fn give_back(&mut self, taken: Vec<(u64, u32)>) {
        self.counters.popped = self.counters.popped.saturating_sub(taken.len() as u64);
        taken.into_iter().rev().for_each(|used| self.ready.push_front(used));
    }

    /// As `take`, where some wait, or several may with one used entry.
    #[cold]
    fn take_kept_into<A: Access>(
        &mut self,
        mem: &A,
        limit: usize,
        used: &mut Vec<(u64, u32)>,
    ) -> (usize, Option<Fault>) {
        for count in 0..limit {
            match self.take_kept(mem) {
                Ok(Some(taken)) => used.push(taken),
                Ok(None) => return (count, None),
                Err(fault) => return (count, Some(fault)),
            }
        }
        (limit, None)
    }

    /// The next used buffer with IN_ORDER, or of those that were put back.
    #[cold]
    fn take_kept<A: Access>(&mut self, mem: &A) -> Result<Option<(u64, u32)>, Fault> {
        if self.ready.is_empty() {
            if self.order.is_none() {
                let mut one = None;
                let (_, broken) = self.take(mem, 1, |token, len| one = Some((token, len)));
                return broken.map_or(Ok(one), Err);
            }
            if !self.look_or_arm(mem)? {
                return Ok(None);
            }
            let Some(used) = self.load(mem)? else {
                return Ok(None);
            };
            let (id, written) = self.judge(&used)?;
            self.finish_in_order(&used, id, written)?;
        }
        Ok(self.ready.pop_front())
    }

    /// The next used entry, which was seen to be there.
    fn load<A: Access>(&self, mem: &A) -> Result<Option<Used>, Fault> {
        let used = match &self.ring {
            Ring::Split(ring) => ring.load(mem).map(Some),
            Ring::Packed(ring) => ring.load(mem, &self.rules),
        };
        used.map_err(|error| self.unmapped(error))
    }

    /// The buffer that a used entry names, and the bytes written.
    fn judge(&mut self, used: &Used) -> Result<(u16, u32), Fault> {
        // 2.7.8, 2.8.4: the id is that of a buffer that the device was shown and has not used yet.
        let id = match u16::try_from(used.id) {
            Ok(id) if id < self.layout.size => id,
            _ => return Err(self.no_such_id(used)),
        };
        let Some(shadow) = self.shadows.get(id, self.published) else {
            return Err(self.not_in_flight(used));
        };
        let written = if used.len > shadow.writable {
            self.check_len(used, shadow)?
        } else {
            used.len
        };
        self.armed = false;
        Ok((id, written))
    }

    /// Up to `limit` used buffers of the ring, each judged, to `out`; their number, and what is wrong with the one behind.
    #[inline(always)]
    fn take<A: Access>(&mut self, mem: &A, limit: usize, mut out: impl FnMut(u64, u32)) -> (usize, Option<Fault>) {
        let mut count = 0;
        while count < limit {
            // A packed ring tells with each entry, a split one of all that it has.
            let known = match &self.ring {
                Ring::Split(ring) => ring.ready() != 0,
                Ring::Packed(_) => true,
            };
            let mut odd = None;
            if known {
                let before = count;
                odd = self.take_at_once(mem, limit - count, |token, len| {
                    out(token, len);
                    count += 1;
                });
                if count > before {
                    self.armed = false;
                    self.in_flight -= u32::try_from(count - before).unwrap_or(u32::MAX);
                    if odd.is_none() {
                        continue;
                    }
                }
            }
            if odd.is_none() {
                match self.look_or_arm(mem) {
                    Ok(true) if known => {}
                    Ok(true) => continue,
                    Ok(false) => break,
                    Err(fault) => return (count, Some(fault)),
                }
            }
            match self.take_one(mem, odd) {
                Ok(Some((token, len))) => out(token, len),
                Ok(None) => break,
                Err(fault) => return (count, Some(fault)),
            }
            count += 1;
        }
        (count, None)
    }

    /// As many good ones as there are, up to `limit`, where the ring can be reached directly; the one behind that is not good.
    #[inline(always)]
    fn take_at_once<A: Access>(&mut self, mem: &A, limit: usize, mut out: impl FnMut(u64, u32)) -> Option<Used> {
        let (shadows, published) = (&mut self.shadows, self.published);
        let judge = |id, len| {
            let head = u16::try_from(id).ok()?;
            let shadow = shadows.take(head, len, published)?;
            out(shadow.token, len);
            Some((head, shadow.tail, shadow.descriptors))
        };
        match &mut self.ring {
            Ring::Split(ring) => ring.take_at_once(mem, limit, judge),
            Ring::Packed(ring) => ring.take_at_once(mem, limit, &self.rules, judge),
        }
    }

    /// The next used buffer, whose entry is `odd` if that was read already.
    #[inline(never)]
    fn take_one<A: Access>(&mut self, mem: &A, odd: Option<Used>) -> Result<Option<(u64, u32)>, Fault> {
        let used = match odd {
            Some(used) => used,
            None => match self.load(mem)? {
                Some(used) => used,
                None => return Ok(None),
            },
        };
        let (id, written) = self.judge(&used)?;
        Ok(self.forget(id).map(|shadow| (shadow.token, written)))
    }

    /// The descriptors of `id` are free again.
    fn forget(&mut self, id: u16) -> Option<Shadow> {
        let shadow = self.shadows.get(id, self.published)?;
        self.shadows.free(id);
        match &mut self.ring {
            Ring::Split(ring) => ring.advance(id, shadow.tail, shadow.descriptors),
            Ring::Packed(ring) => ring.advance(id, shadow.descriptors),
        }
        self.in_flight -= 1;
        Some(shadow)
    }

    #[cold]
    fn no_such_id(&self, used: &Used) -> Fault {
        let message = format!("used id {} is beyond a queue of {}", used.id, self.layout.size);
        self.used_fault(Rule::UsedIdOutOfRange, used, message)
    }

    #[cold]
    fn not_in_flight(&self, used: &Used) -> Fault {
        let message = format!("used id {} is no buffer in flight", used.id);
        self.used_fault(Rule::UsedIdNotInFlight, used, message)
    }

    /// 2.7.8.2, 2.8.4: the length counts bytes written to the buffer's writable part; here it is more.
    #[cold]
    fn check_len(&self, used: &Used, shadow: Shadow) -> Result<u32, Fault> {
        if !used.told {
            // What cannot be a length is what is reserved.
            return Ok(0);
        }
        if self.rules.policy.used_len_beyond {
            return Ok(shadow.writable);
        }
        let message = format!(
            "used length {} for a buffer of {} writable bytes",
            used.len, shadow.writable
        );
        Err(self.used_fault(Rule::UsedLenTooBig, used, message))
    }

    /// 2.7.9, 2.8.8: with IN_ORDER one used entry may stand for all buffers up to its own; those before it
    /// count as written whole.
    fn finish_in_order(&mut self, used: &Used, id: u16, written: u32) -> Result<(), Fault> {
        let mut order = self.order.take().unwrap_or_default();
        let batch = order.iter().position(|&other| other == id).map_or(1, |place| place + 1);
        let room = match &self.ring {
            Ring::Split(ring) => usize::from(ring.ready()),
            Ring::Packed(_) => batch,
        };
        if batch > room {
            self.order = Some(order);
            let message = format!("used id {id} completes {batch} buffers in order, used.idx says {room}");
            return Err(self.used_fault(Rule::UsedIdNotInFlight, used, message));
        }
        for member in order.drain(..batch) {
            self.release(member, (member == id).then_some(written));
        }
        self.order = Some(order);
        Ok(())
    }

    /// Give the descriptors of `id` back; None means that its writable part was written whole.
    fn release(&mut self, id: u16, written: Option<u32>) {
        if let Some(shadow) = self.forget(id) {
            let written = written.unwrap_or(shadow.writable);
            self.ready.push_back((shadow.token, written));
        }
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
