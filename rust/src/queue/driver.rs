//! The driver end of a virtqueue: private shadow state, and no trust in anything that is read back.

mod shadow;
mod used;

use std::collections::VecDeque;
use std::ops::Range;

use self::shadow::{Shadow, Shadows};
use super::areas::{IndirectArea, write_table, zero};
use super::device::unmapped;
use super::{Buffers, Counters, Life, Measured, QueueConfig, QueueState, feature};
use crate::chain::ChainRules;
use crate::error::{Fault, Misuse, QueueError};
use crate::mem::{Access, At, MemoryError, Want, any_lost};
use crate::ring::packed::PackedDriver;
use crate::ring::split::SplitDriver;
use crate::ring::{AvailRing, RingLayout, desc};
use crate::rule::Rule;

#[derive(Debug)]
enum Ring {
    Split(SplitDriver),
    Packed(PackedDriver),
}

/// Address and length of each buffer of a chain: of those that can be read, and of those that can be written to.
pub type ChainBuffers = (Vec<(u64, u32)>, Vec<(u64, u32)>);

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
    shadows: Shadows,
    in_flight: u32,
    /// With IN_ORDER: ids in the order in which they were made available.
    order: Option<VecDeque<u16>>,
    /// Used buffers that one used entry completed together (IN_ORDER).
    ready: VecDeque<(u64, u32)>,
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
            shadows: Shadows::new(layout.size),
            in_flight: 0,
            order: in_order.then(VecDeque::new),
            ready: VecDeque::new(),
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
    #[inline(always)]
    pub fn add<A: Access>(
        &mut self,
        mem: &A,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        indirect: bool,
    ) -> Result<u64, QueueError> {
        if !indirect && self.running() {
            if let Some(token) = Measured::of(readable, writable).and_then(|chain| self.add_at_once(mem, chain)) {
                return Ok(token);
            }
        }
        self.add_anew(mem, readable, writable, indirect)
    }

    /// Write chains of `(address, length)` buffers, readable and writable, as [`DriverQueue::add`] does: as many as there is
    /// room for; their tokens. One that is no chain ends it, and is told of when it is the first.
    ///
    /// # Errors
    /// As [`DriverQueue::add`], but for a queue that is full. After a violation [`DriverQueue::detach`] gives the tokens of those
    /// that were added.
    pub fn add_many<A: Access>(&mut self, mem: &A, chains: &[ChainBuffers]) -> Result<Range<u64>, QueueError> {
        let (first, mut left) = (self.next_token, chains);
        loop {
            let measured = left
                .iter()
                .map_while(|(readable, writable)| Measured::of(readable, writable));
            let count = self.put_many(mem, measured);
            let Some(((readable, writable), rest)) = left.get(count..).and_then(<[_]>::split_first) else {
                break;
            };
            match self.add_anew(mem, readable, writable, false) {
                Ok(_) => left = rest,
                Err(QueueError::Misuse(Misuse::QueueFull { .. })) => break,
                Err(QueueError::Misuse(_)) if self.next_token > first => break,
                Err(error) => return Err(error),
            }
        }
        Ok(first..self.next_token)
    }

    /// A chain for which there is room in a ring that can be reached directly; None is for `add_anew` to explain.
    #[inline(always)]
    fn add_at_once<A: Access>(&mut self, mem: &A, chain: Measured<'_>) -> Option<u64> {
        let ends = each!(&mut self.ring, ring => {
            let mut adding = ring.adding(mem)?;
            let ends = ring.put(&mut adding, chain)?;
            ring.settle(adding);
            ends
        });
        Some(self.added(ends, chain.count, chain.writable))
    }

    /// As `add_at_once`, of one after the other up to one for `add_anew`; how many.
    #[inline(always)]
    fn put_many<'a, A: Access>(&mut self, mem: &A, chains: impl Iterator<Item = Measured<'a>>) -> usize {
        if !self.running() {
            return 0;
        }
        let (shadows, order, mut token) = (&mut self.shadows, &mut self.order, self.next_token);
        each!(&mut self.ring, ring => {
            let Some(mut adding) = ring.adding(mem) else { return 0 };
            for chain in chains {
                let Some((id, tail)) = ring.put(&mut adding, chain) else { break };
                shadows.set(id, Shadow::new(token, tail, chain.count, chain.writable));
                if let Some(order) = order {
                    order.push_back(id);
                }
                token += 1;
            }
            ring.settle(adding);
        });
        let count = token - self.next_token;
        self.next_token = token;
        self.in_flight += u32::try_from(count).unwrap_or(u32::MAX);
        usize::try_from(count).unwrap_or(usize::MAX)
    }

    #[inline(never)]
    fn add_anew<A: Access>(
        &mut self,
        mem: &A,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
        indirect: bool,
    ) -> Result<u64, QueueError> {
        if !self.running() {
            return Err(Misuse::Latched.into());
        }
        let measured = Measured::of(readable, writable).filter(|chain| chain.count <= self.layout.size);
        let Measured {
            buffers,
            count,
            writable,
        } = measured.ok_or_else(|| self.bad_buffers(readable, writable))?;
        if indirect {
            let ends = self.add_table(mem, count, buffers)?;
            return Ok(self.added(ends, 1, writable));
        }
        each!(&self.ring, ring => ring.check_room(count))?;
        let ends = self.with_ring(mem, |ring| each!(ring, ring => ring.add(mem, count, buffers)))?;
        Ok(self.added(ends, count, writable))
    }

    /// A chain is written, of which head and tail are these: it is in flight. Its token.
    #[inline(always)]
    fn added(&mut self, (id, tail): (u16, u16), descriptors: u16, writable: u64) -> u64 {
        let token = self.next_token;
        self.next_token += 1;
        self.in_flight += 1;
        self.shadows.set(id, Shadow::new(token, tail, descriptors, writable));
        if let Some(order) = &mut self.order {
            order.push_back(id);
        }
        token
    }

    /// Write a chain as an indirect table, and the one descriptor that names it.
    fn add_table<A: Access>(&mut self, mem: &A, count: u16, buffers: Buffers<'_>) -> Result<(u16, u16), QueueError> {
        let table = self.table(mem, count)?;
        each!(&self.ring, ring => ring.check_room(1))?;
        let packed = self.layout.packed;
        let added = self.with_ring(mem, |ring| {
            let addr = write_table(mem, table, packed, buffers)?;
            let table = Buffers::table((addr, 16 * u32::from(count)));
            each!(ring, ring => ring.add(mem, 1, table))
        });
        Ok(added?)
    }

    #[cold]
    fn bad_buffers(&self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Misuse {
        let size = self.layout.size;
        let count = readable.len().saturating_add(writable.len());
        Misuse::Invalid(if count == 0 {
            "a chain has at least one buffer".to_owned()
        } else if count > usize::from(size) {
            format!("a chain of {count} buffers does not fit a queue of {size}")
        } else if readable.iter().chain(writable).any(|&(_, len)| len == 0) {
            "a buffer has at least one byte".to_owned()
        } else {
            "a chain has at most 2^32 bytes (VIRTIO 1.4, 2.7.5.2)".to_owned()
        })
    }

    /// Address of the indirect table that belongs to the next head or id.
    fn table<A: Access>(&self, mem: &A, count: u16) -> Result<At, Misuse> {
        let negotiated = self.config.has(feature::INDIRECT_DESC);
        let area = self.indirect.filter(|_| negotiated).ok_or(Misuse::NoIndirect)?;
        if count > area.entries {
            let entries = area.entries;
            return Err(Misuse::Invalid(format!(
                "{count} buffers do not fit an indirect table of {entries}"
            )));
        }
        let head = each!(&self.ring, ring => ring.next_head());
        let table = desc::BYTES * u64::from(area.entries);
        let bytes = desc::BYTES * u64::from(count);
        // The area is our caller's: where it does not lie in memory that is no fault of the device.
        let address = area.address.saturating_add(u64::from(head) * table);
        mem.resolve(address, bytes, Want::Write)
            .map_err(|error| Misuse::Invalid(format!("the indirect table of {bytes} bytes at {address:#x}: {error}")))
    }

    /// Make everything added visible; the number of buffers.
    ///
    /// # Errors
    /// A violation when the ring is no longer mapped; the queue is then latched.
    #[inline]
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
    #[inline]
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

    /// Tokens of everything in flight, each once, oldest first. The queue is then stopped until its reset:
    /// the device may still own the descriptors.
    pub fn detach(&mut self) -> Vec<u64> {
        let mut tokens: Vec<u64> = self.ready.drain(..).map(|(token, _)| token).collect();
        tokens.extend(self.shadows.drain());
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
