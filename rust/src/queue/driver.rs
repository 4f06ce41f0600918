//! The driver end of a virtqueue: private shadow state, and no trust in anything that is read back.

use std::collections::VecDeque;

use super::areas::{IndirectArea, write_table, zero};
use super::device::unmapped;
use super::{Buffer, Counters, Life, QueueConfig, QueueState, Used, feature};
use crate::chain::ChainRules;
use crate::error::{Fault, Misuse, QueueError};
use crate::mem::{Access, At, MemoryError, Want, any_lost};
use crate::ring::packed::PackedDriver;
use crate::ring::split::SplitDriver;
use crate::ring::{RingLayout, desc};
use crate::rule::Rule;

#[derive(Debug)]
enum Ring {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// A buffer in flight.
#[derive(Clone, Copy, Debug)]
struct Shadow {
    token: u64,
    descriptors: u16,
    writable: u64,
}

/// The driver end of one queue, in either format.
#[derive(Debug)]
pub struct DriverQueue {
    config: QueueConfig,
    layout: RingLayout,
    rules: ChainRules,
    ring: Ring,
    indirect: Option<IndirectArea>,
    life: Life,
    generation: u64,
    next_token: u64,
    /// Tokens below this one are visible to the device.
    published: u64,
    shadow: Vec<Option<Shadow>>,
    in_flight: u32,
    /// With IN_ORDER: ids in the order in which they were made available.
    order: Option<VecDeque<u16>>,
    /// Used buffers that one used entry completed together (IN_ORDER).
    ready: VecDeque<(u64, u32)>,
    scratch: Vec<Buffer>,
    calls: bool,
    armed: bool,
    counters: Counters,
}

impl DriverQueue {
    common_to_both_ends!();

    /// Build a queue; without `state` its areas are zeroed first (2.7.10.1).
    ///
    /// # Errors
    /// A configuration rule (`QueueSize…`, `RingMisaligned`, `RingUnmapped`) or `StateOutOfRange`.
    pub fn new<A: Access>(
        mem: &A,
        config: QueueConfig,
        state: Option<QueueState>,
        indirect: Option<IndirectArea>,
    ) -> Result<Self, Fault> {
        let layout = config.layout()?;
        let start = config.start(&layout, state)?;
        let rules = config.rules(layout.size);
        // The device will complete what is in flight, and nothing here would know what that is.
        if start.avail != start.used {
            let message = format!(
                "a driver goes on where nothing is in flight: avail {:#x} is not used {:#x}",
                start.avail, start.used
            );
            return Err(rules.fault(Rule::StateOutOfRange, message));
        }
        let (event_idx, in_order) = (config.has(feature::EVENT_IDX), config.has(feature::IN_ORDER));
        let ring = if config.packed() {
            PackedDriver::new(mem, layout, event_idx, start.avail, start.used).map(Ring::Packed)
        } else {
            SplitDriver::new(mem, layout, event_idx, in_order, start.avail, start.used).map(Ring::Split)
        };
        let ring = ring.map_err(|error| unmapped(&rules, error))?;
        if state.is_none() {
            zero(mem, &layout).map_err(|error| unmapped(&rules, error))?;
        }
        let queue = Self {
            config,
            layout,
            rules,
            ring,
            indirect,
            life: Life::Running,
            generation: 0,
            next_token: 0,
            published: 0,
            shadow: vec![None; usize::from(layout.size)],
            in_flight: 0,
            order: in_order.then(VecDeque::new),
            ready: VecDeque::new(),
            scratch: Vec::new(),
            calls: true,
            armed: false,
            counters: Counters::default(),
        };
        queue.intact(mem)?;
        Ok(queue)
    }

    /// There is no other memory that it relies on.
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "as the device end has it")]
    const fn intact_beside(&self) -> Result<(), Fault> {
        Ok(())
    }

    /// All memory that the ring and its tables are made of.
    fn spans(&self) -> [(u64, u64); 4] {
        let [desc, driver, device] = self.layout.spans();
        let tables = self.indirect.map_or((0, 0), |area| {
            let bytes = desc::BYTES * u64::from(area.entries) * u64::from(self.layout.size);
            (area.address, bytes)
        });
        [desc, driver, device, tables]
    }

    /// A new generation: everything in flight is forgotten, a latch is cleared. Tokens go on counting, so that
    /// one of before is never mistaken for one of after.
    ///
    /// # Errors
    /// As [`DriverQueue::new`]; nothing changes then.
    pub fn reset<A: Access>(
        &mut self,
        mem: &A,
        config: Option<QueueConfig>,
        state: Option<QueueState>,
    ) -> Result<(), Fault> {
        let fresh = Self::new(mem, config.unwrap_or(self.config), state, self.indirect)?;
        let (generation, next_token) = (self.generation + 1, self.next_token);
        *self = Self {
            generation,
            next_token,
            published: next_token,
            ..fresh
        };
        Ok(())
    }

    /// Buffers added and not yet taken back.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
            .saturating_add(u32::try_from(self.ready.len()).unwrap_or(u32::MAX))
    }

    /// Descriptors that are free.
    #[must_use]
    pub fn free(&self) -> u16 {
        each!(&self.ring, ring => ring.free())
    }

    const fn running(&self) -> bool {
        matches!(self.life, Life::Running)
    }

    fn latched_by(&mut self, fault: Fault) -> Fault {
        self.life = Life::Latched(fault.clone());
        fault
    }

    /// Write a chain of `(address, length)` buffers; the device does not see it before `publish`. Its token.
    ///
    /// # Errors
    /// `QueueFull`, `Invalid`, `NoIndirect`, `Latched`, with nothing changed; a violation when the ring is no
    /// longer mapped.
    pub fn add<A: Access>(
        &mut self,
        mem: &A,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        indirect: bool,
    ) -> Result<u64, QueueError> {
        if !self.running() {
            return Err(Misuse::Latched.into());
        }
        let total = self.check_buffers(readable, writable)?;
        let count = readable.len() + writable.len();
        let table = if indirect { Some(self.table(mem, count)?) } else { None };
        let needed = if indirect { 1 } else { count };
        each!(&self.ring, ring => ring.check_room(needed))?;
        let mut buffers = std::mem::take(&mut self.scratch);
        buffers.clear();
        buffers.extend(readable.iter().map(|&(addr, len)| Buffer { addr, len, flags: 0 }));
        buffers.extend(writable.iter().map(|&(addr, len)| Buffer {
            addr,
            len,
            flags: desc::WRITE,
        }));
        let packed = self.layout.packed;
        let added = self.with_ring(mem, |ring| {
            if let Some(table) = table {
                let addr = write_table(mem, table, packed, &buffers)?;
                let len = u32::try_from(16 * count).unwrap_or(u32::MAX);
                let entry = Buffer {
                    addr,
                    len,
                    flags: desc::INDIRECT,
                };
                each!(ring, ring => ring.add(mem, &[entry]))
            } else {
                each!(ring, ring => ring.add(mem, &buffers))
            }
        });
        self.scratch = buffers;
        let id = added?;
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight += 1;
        let descriptors = u16::try_from(needed).unwrap_or(u16::MAX);
        if let Some(slot) = self.shadow.get_mut(usize::from(id)) {
            *slot = Some(Shadow {
                token,
                descriptors,
                writable: total,
            });
        }
        if let Some(order) = &mut self.order {
            order.push_back(id);
        }
        Ok(token)
    }

    /// Our own caller's buffers; the writable bytes.
    fn check_buffers(&self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Result<u64, Misuse> {
        let count = readable.len() + writable.len();
        if count == 0 {
            return Err(Misuse::Invalid("a chain has at least one buffer".to_owned()));
        }
        if count > usize::from(self.layout.size) {
            let size = self.layout.size;
            return Err(Misuse::Invalid(format!(
                "a chain of {count} buffers does not fit a queue of {size}"
            )));
        }
        if readable.iter().chain(writable).any(|&(_, len)| len == 0) {
            return Err(Misuse::Invalid("a buffer has at least one byte".to_owned()));
        }
        let sum = |buffers: &[(u64, u32)]| buffers.iter().map(|&(_, len)| u64::from(len)).sum::<u64>();
        let total = sum(writable);
        if total + sum(readable) > 1 << 32 {
            return Err(Misuse::Invalid(
                "a chain has at most 2^32 bytes (VIRTIO 1.4, 2.7.5.2)".to_owned(),
            ));
        }
        Ok(total)
    }

    /// Address of the indirect table that belongs to the next head or id.
    fn table<A: Access>(&self, mem: &A, count: usize) -> Result<At, Misuse> {
        let negotiated = self.config.has(feature::INDIRECT_DESC);
        let area = self.indirect.filter(|_| negotiated).ok_or(Misuse::NoIndirect)?;
        if count > usize::from(area.entries) {
            let entries = area.entries;
            return Err(Misuse::Invalid(format!(
                "{count} buffers do not fit an indirect table of {entries}"
            )));
        }
        let head = each!(&self.ring, ring => ring.next_head());
        let table = desc::BYTES * u64::from(area.entries);
        let bytes = desc::BYTES * count as u64;
        // The area is our caller's: where it does not lie in memory that is no fault of the device.
        let address = area.address.saturating_add(u64::from(head) * table);
        mem.resolve(address, bytes, Want::Write)
            .map_err(|error| Misuse::Invalid(format!("the indirect table of {bytes} bytes at {address:#x}: {error}")))
    }

    /// Make everything added visible; the number of buffers.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    pub fn publish<A: Access>(&mut self, mem: &A) -> Result<u16, Fault> {
        if !self.running() {
            return Ok(0);
        }
        let count = self.with_intact_ring(mem, |ring| each!(ring, ring => ring.publish(mem)))?;
        self.published = self.next_token;
        self.counters.pushed += u64::from(count);
        Ok(count)
    }

    /// Whether the device must be kicked for what was published since the last call; counts the answer.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    pub fn wants_kick<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        if !self.running() {
            return Ok(false);
        }
        let wants = self.with_intact_ring(mem, |ring| each!(ring, ring => ring.wants_kick(mem)))?;
        let counter = if wants {
            &mut self.counters.notified
        } else {
            &mut self.counters.suppressed
        };
        *counter += 1;
        Ok(wants)
    }

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
    fn look_or_arm<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        each!(&mut self.ring, ring => ring.refresh(mem).map_err(|error| ring.unmapped(&self.rules, error)))?;
        if self.look(mem)? {
            return Ok(true);
        }
        if !self.calls || self.armed {
            return Ok(false);
        }
        let armed = each!(&mut self.ring, ring => ring.arm(mem));
        armed.map_err(|error| each!(&self.ring, ring => ring.unmapped(&self.rules, error)))?;
        self.armed = true;
        self.look(mem)
    }

    fn look<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        let unseen = u32::try_from(self.next_token - self.published).unwrap_or(u32::MAX);
        let visible = self.in_flight.saturating_sub(unseen);
        match &mut self.ring {
            Ring::Split(ring) => ring.look(mem, &self.rules, visible),
            Ring::Packed(ring) => ring.look(mem, &self.rules),
        }
    }

    /// The next used buffer: its token and the bytes written.
    ///
    /// A call that finds none asks the device for a call, unless calls are disabled.
    ///
    /// # Errors
    /// The rule that the device broke; the queue is then latched.
    pub fn get_used<A: Access>(&mut self, mem: &A) -> Result<Option<(u64, u32)>, Fault> {
        if !self.running() {
            return Ok(None);
        }
        if self.ready.is_empty() {
            let taken = self.take_used(mem);
            // What zeros made of it stays where `detach` finds it.
            self.check_intact(mem)?;
            taken.map_err(|fault| self.latched_by(fault))?;
        }
        let used = self.ready.pop_front();
        self.counters.popped += u64::from(used.is_some());
        Ok(used)
    }

    /// Up to `limit` used buffers. A broken one behind good ones is left for the next call; of memory that is lost, none
    /// is good.
    ///
    /// # Errors
    /// As [`DriverQueue::get_used`], when the first one is broken.
    pub fn get_used_many<A: Access>(&mut self, mem: &A, limit: usize) -> Result<Vec<(u64, u32)>, Fault> {
        let (mut taken, mut broken) = (Vec::new(), None);
        while taken.len() < limit && self.running() {
            if self.ready.is_empty() {
                match self.take_used(mem) {
                    Ok(()) => {}
                    Err(_) if !taken.is_empty() => break,
                    Err(fault) => {
                        broken = Some(fault);
                        break;
                    }
                }
            }
            let Some(used) = self.ready.pop_front() else { break };
            taken.push(used);
        }
        self.counters.popped += taken.len() as u64;
        if let Err(fault) = self.check_intact(mem) {
            self.give_back(taken);
            return Err(fault);
        }
        broken.map_or(Ok(taken), |fault| Err(self.latched_by(fault)))
    }

    /// Put used buffers back that were just taken, as if they had not been: the next calls take them.
    pub fn give_back(&mut self, taken: Vec<(u64, u32)>) {
        self.counters.popped = self.counters.popped.saturating_sub(taken.len() as u64);
        taken.into_iter().rev().for_each(|used| self.ready.push_front(used));
    }

    fn take_used<A: Access>(&mut self, mem: &A) -> Result<(), Fault> {
        if !self.look_or_arm(mem)? {
            return Ok(());
        }
        let used = match &mut self.ring {
            Ring::Split(ring) => Some(ring.peek(mem, &self.rules)?),
            Ring::Packed(ring) => ring.peek(mem, &self.rules)?,
        };
        let Some(used) = used else { return Ok(()) };
        let (id, shadow) = self.check_used(&used)?;
        let written = self.check_len(&used, &shadow)?;
        self.armed = false;
        self.finish_used(&used, id, written)
    }

    /// The buffer that a used entry names, when it can be one.
    fn check_used(&self, used: &Used) -> Result<(u16, Shadow), Fault> {
        // 2.7.8, 2.8.4: the id is the head of a chain, or the id of a buffer, that this queue can have.
        let id = u16::try_from(used.id).ok().filter(|&id| id < self.layout.size);
        let Some(id) = id else {
            let message = format!("used id {} is beyond a queue of {}", used.id, self.layout.size);
            return Err(self.used_fault(Rule::UsedIdOutOfRange, used, message));
        };
        let shadow = self.shadow.get(usize::from(id)).copied().flatten();
        if let Some(shadow) = shadow.filter(|shadow| shadow.token < self.published) {
            return Ok((id, shadow));
        }
        let message = format!("used id {id} is no buffer in flight");
        Err(self.used_fault(Rule::UsedIdNotInFlight, used, message))
    }

    /// 2.7.8.2, 2.8.4: the length counts bytes written to the buffer's writable part.
    fn check_len(&self, used: &Used, shadow: &Shadow) -> Result<u32, Fault> {
        if u64::from(used.len) <= shadow.writable {
            return Ok(used.len);
        }
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
        Err(self.used_fault(Rule::UsedLenTooBig, used, message))
    }

    /// 2.7.9, 2.8.8: with IN_ORDER one used entry may stand for all buffers up to its own; those before it
    /// count as written whole.
    fn finish_used(&mut self, used: &Used, id: u16, written: u32) -> Result<(), Fault> {
        let Some(mut order) = self.order.take() else {
            self.release(id, Some(written));
            return Ok(());
        };
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
        let Some(shadow) = self.shadow.get_mut(usize::from(id)).and_then(Option::take) else {
            return;
        };
        each!(&mut self.ring, ring => ring.advance(id, shadow.descriptors));
        self.in_flight -= 1;
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

    /// Tokens of everything in flight, each once, oldest first. The queue is then stopped until its reset:
    /// the device may still own the descriptors.
    pub fn detach(&mut self) -> Vec<u64> {
        let mut tokens: Vec<u64> = self.ready.drain(..).map(|(token, _)| token).collect();
        tokens.extend(
            self.shadow
                .iter_mut()
                .filter_map(Option::take)
                .map(|shadow| shadow.token),
        );
        tokens.sort_unstable();
        self.in_flight = 0;
        if let Some(order) = &mut self.order {
            order.clear();
        }
        if matches!(self.life, Life::Running) {
            self.life = Life::Stopped;
        }
        tokens
    }

    /// Whether `detach` was called since the last reset.
    #[must_use]
    pub const fn detached(&self) -> bool {
        matches!(self.life, Life::Stopped)
    }

    /// Ask for calls; whether something was used already.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    pub fn enable_calls<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        self.calls = true;
        if !self.running() {
            return Ok(false);
        }
        self.with_ring(mem, |ring| each!(ring, ring => ring.arm(mem)))?;
        self.armed = true;
        Ok(self.has_used(mem))
    }

    /// Ask for no calls.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    pub fn disable_calls<A: Access>(&mut self, mem: &A) -> Result<(), Fault> {
        self.calls = false;
        self.armed = false;
        if !self.running() {
            return Ok(());
        }
        self.with_ring(mem, |ring| each!(ring, ring => ring.disarm(mem)))
    }
}
