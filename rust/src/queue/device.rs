//! The device end of a virtqueue.

mod complete;
mod pop;
mod recorded;
mod returned;

use std::collections::VecDeque;

use complete::{InOrder, stage};
use recorded::Recorded;
pub use recorded::StartError;
use returned::Returned;

use super::heads::HeadSet;
use super::waits::Waits;
use super::{Counters, Life, QueueConfig, QueueState, feature};
use crate::chain::ChainRules;
use crate::error::{Fault, Misuse, QueueError};
use crate::mem::{Access, MemoryError, any_lost};
use crate::ring::RingLayout;
use crate::ring::packed::PackedDevice;
use crate::ring::split::SplitDevice;
use crate::rule::Rule;

#[derive(Debug)]
enum Ring {
    Split(SplitDevice),
    Packed(PackedDevice),
}

/// What completing a chain needs to know of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Generation of the queue that the chain was popped in.
    pub generation: u64,
    /// Number of the pop in that generation.
    pub seq: u64,
    /// Head or buffer id.
    pub head: u16,
    /// Ring slots that it occupies.
    pub slots: u16,
    /// Bytes that can be written to it.
    pub writable: u64,
    /// Its entry of the record of what is in flight, if there is one.
    pub entry: u16,
}

/// Segments that `pop_many` gathers before it stops: hostile chains share descriptors, so their sum has no
/// bound of its own.
const MAX_SEGMENTS: usize = 1 << 17;

/// The device end of one queue, in either format.
#[derive(Debug)]
pub struct DeviceQueue {
    config: QueueConfig,
    layout: RingLayout,
    rules: ChainRules,
    ring: Ring,
    life: Life,
    generation: u64,
    next_seq: u64,
    in_flight: u32,
    busy: HeadSet,
    order: Option<InOrder>,
    /// Chains put back that could not go back into the ring, oldest first: the next pops hand them out again.
    returned: VecDeque<Returned>,
    /// The record of what is in flight, of queues that keep one.
    recorded: Option<Box<Recorded>>,
    kicks: bool,
    /// Whether the driver was asked for a kick since the ring moved last.
    armed: bool,
    unsignalled: bool,
    waits: Waits,
    counters: Counters,
}

impl DeviceQueue {
    common_to_both_ends!();

    /// Build a queue from a configuration that the other side chose; a fresh ring when `state` is None.
    ///
    /// # Errors
    /// A configuration rule (`QueueSize…`, `RingMisaligned`, `RingUnmapped`) or `StateOutOfRange`.
    pub fn new<A: Access>(mem: &A, config: QueueConfig, state: Option<QueueState>) -> Result<Self, Fault> {
        let layout = config.layout()?;
        let state = config.start(&layout, state)?;
        let rules = config.rules(layout.size);
        let event_idx = config.has(feature::EVENT_IDX);
        let ring = if config.packed() {
            PackedDevice::new(mem, layout, event_idx, state.avail, state.used).map(Ring::Packed)
        } else {
            SplitDevice::new(mem, layout, event_idx, state.avail, state.used).map(Ring::Split)
        };
        let queue = Self {
            config,
            layout,
            ring: ring.map_err(|error| unmapped(&rules, error))?,
            rules,
            life: Life::Running,
            generation: 0,
            next_seq: 0,
            in_flight: 0,
            busy: HeadSet::new(!config.policy.duplicate_heads),
            order: config.has(feature::IN_ORDER).then(InOrder::default),
            returned: VecDeque::new(),
            recorded: None,
            kicks: true,
            armed: false,
            unsignalled: false,
            waits: Waits::default(),
            counters: Counters::default(),
        };
        queue.intact(mem)?;
        Ok(queue)
    }

    /// All memory that the ring is made of.
    fn spans(&self) -> [(u64, u64); 3] {
        self.layout.spans()
    }

    fn intact_beside(&self) -> Result<(), Fault> {
        self.find_lost_record()
    }

    /// What became of a copy from or to a chain of this queue: lost memory latches it.
    ///
    /// # Errors
    /// `MemoryLost`, or `StaleMemory`.
    #[inline]
    pub fn copied<T>(&mut self, result: Result<T, MemoryError>) -> Result<T, QueueError> {
        result.map_err(|error| match error {
            MemoryError::Lost { .. } => self.latched_by(unmapped(&self.rules, error)).into(),
            _ => Misuse::StaleMemory(error).into(),
        })
    }

    /// A new generation: everything in flight is dropped, a latch is cleared. On a fault nothing changes. A record is kept no
    /// longer, and stays as it was.
    ///
    /// # Errors
    /// As [`DeviceQueue::new`].
    pub fn reset<A: Access>(
        &mut self,
        mem: &A,
        config: Option<QueueConfig>,
        state: Option<QueueState>,
    ) -> Result<(), Fault> {
        let fresh = Self::new(mem, config.unwrap_or(self.config), state)?;
        let generation = self.generation + 1;
        *self = Self { generation, ..fresh };
        Ok(())
    }

    /// Chains popped and not yet completed.
    #[must_use]
    pub const fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether pops are suspended by `stop`.
    #[must_use]
    pub const fn stopped(&self) -> bool {
        matches!(self.life, Life::Stopped)
    }

    /// Count chains that were completed with 0 bytes because they did not fit the handler.
    pub const fn count_rejected(&mut self, chains: u64) {
        self.counters.rejected += chains;
    }

    /// Break the queue: from now on nothing is popped, written or notified.
    pub fn latch(&mut self, fault: Fault) {
        if !self.broken() {
            self.life = Life::Latched(fault);
        }
    }

    /// Break the queue by decision of our own device; the same consequences as a broken rule.
    pub fn break_down(&mut self) {
        if !self.broken() {
            self.life = Life::Broken;
        }
    }

    /// Whether the queue is dead until its reset, by whoever's fault.
    #[must_use]
    pub const fn broken(&self) -> bool {
        matches!(self.life, Life::Latched(_) | Life::Broken)
    }

    fn latched_by(&mut self, fault: Fault) -> Fault {
        self.latch(fault.clone());
        fault
    }

    /// Whether something is available. What is broken counts as work: the next pop says what it is.
    ///
    /// Who hears that there is nothing goes to sleep, so it asks the driver for a kick as [`DeviceQueue::pop`] does.
    pub fn has_work<A: Access>(&mut self, mem: &A) -> bool {
        if !matches!(self.life, Life::Running) || self.waits.still(mem.epoch()) {
            return false;
        }
        !self.returned.is_empty() || self.left() > 0 || self.look_or_arm(mem).unwrap_or(true)
    }

    /// The rule that the next chain breaks if the translations that it lacks (`missing`) do not come.
    #[must_use]
    pub fn waits(&self) -> Option<&Fault> {
        self.waits.fault()
    }

    /// Whether it waits for translations that nobody was told of; that is only said once.
    pub fn waits_anew(&mut self) -> bool {
        self.waits.tell()
    }

    fn look_or_arm<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        Ok(self.look(mem)? || (self.arm(mem)? && self.look(mem)?))
    }

    fn look<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        let rules = &self.rules;
        let found = each!(&mut self.ring, ring => {
            ring.refresh(mem).map_err(|error| ring.unmapped(rules, error))?;
            ring.look(mem, rules)
        });
        self.intact(mem)?;
        found
    }

    /// Ask the driver for a kick, if kicks are wanted and it does not know yet; whether it was asked. Asking and
    /// then looking once more, in this order, is what keeps a kick from being lost.
    fn arm<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        if !self.kicks || self.armed {
            return Ok(false);
        }
        let armed = each!(&mut self.ring, ring => ring.arm(mem));
        armed.map_err(|error| each!(&self.ring, ring => ring.unmapped(&self.rules, error)))?;
        self.armed = true;
        Ok(true)
    }

    /// Whether a chain may still be touched: same generation, not latched.
    #[must_use]
    pub const fn is_current(&self, ticket: &Ticket) -> bool {
        ticket.generation == self.generation && !self.broken()
    }

    /// Make all completed chains visible to the driver.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped, or lost; the queue is then latched.
    #[inline]
    pub fn publish<A: Access>(&mut self, mem: &A) -> Result<(), Fault> {
        if self.broken() {
            return Ok(());
        }
        if self.recorded.is_some() {
            return self.publish_recorded(mem);
        }
        // Only what is visible can be announced: not what was completed since, or waits for earlier chains.
        self.unsignalled |= self.with_intact_ring(mem, |ring| each!(ring, ring => ring.publish(mem)))?;
        Ok(())
    }

    /// Whether the driver must be notified of what was published since the last call; counts the answer.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    #[inline]
    pub fn wants_call<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        if !self.unsignalled || self.broken() {
            return Ok(false);
        }
        let on_empty = self.config.notify_on_empty();
        let wants = self.with_intact_ring(mem, |ring| match ring {
            Ring::Split(ring) => Ok(ring.wants_call(mem)? || (on_empty && ring.ran_empty(mem)?)),
            Ring::Packed(ring) => ring.wants_call(mem),
        })?;
        self.unsignalled = false;
        let counter = if wants {
            &mut self.counters.notified
        } else {
            &mut self.counters.suppressed
        };
        *counter += 1;
        Ok(wants)
    }

    /// Ask for kicks; whether something is available already.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    pub fn enable_kicks<A: Access>(&mut self, mem: &A) -> Result<bool, Fault> {
        self.kicks = true;
        if !matches!(self.life, Life::Running) {
            return Ok(false);
        }
        self.with_ring(mem, |ring| each!(ring, ring => ring.arm(mem)))?;
        self.armed = true;
        Ok(self.has_work(mem))
    }

    /// Ask for no kicks.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    pub fn disable_kicks<A: Access>(&mut self, mem: &A) -> Result<(), Fault> {
        self.kicks = false;
        self.armed = false;
        if !matches!(self.life, Life::Running) {
            return Ok(());
        }
        self.with_ring(mem, |ring| each!(ring, ring => ring.disarm(mem)))
    }

    /// No more pops; completions are still taken.
    pub fn stop(&mut self) -> QueueState {
        if matches!(self.life, Life::Running) {
            self.life = Life::Stopped;
        }
        self.state()
    }

    /// Undo `stop`.
    pub fn resume(&mut self) {
        if matches!(self.life, Life::Stopped) {
            self.life = Life::Running;
        }
    }
}

#[cold]
pub(super) fn unmapped(rules: &ChainRules, error: MemoryError) -> Fault {
    let mut fault = rules.fault(Rule::RingUnmapped.of_memory(&error), error.to_string());
    fault.address = Some(error.address());
    fault
}
