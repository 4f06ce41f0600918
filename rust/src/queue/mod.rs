//! Both ends of a queue: one type each over both ring formats.
//!
//! # Theory
//!
//! A ring knows positions; a queue knows *life*: which generation it is in, whether it runs, is stopped or is
//! latched, what is in flight, and who must be told. One broken rule of the other side changes the life once:
//! from then on nothing is popped, nothing is written and nobody is notified, until a reset begins a new
//! generation. What was popped before belongs to its generation and can never be completed in another.
//!
//! A queue does not own guest memory. Every call takes a pinned [`crate::mem::Access`], and the ring's
//! addresses are resolved anew when its epoch has changed.

/// Run the same code for either format of a `Ring`.
macro_rules! each {
    ($ring:expr, $r:ident => $body:expr) => {
        match $ring {
            Ring::Split($r) => $body,
            Ring::Packed($r) => $body,
        }
    };
}

/// What both ends show of themselves, and how they reach their ring: from fields of the same names.
macro_rules! common_to_both_ends {
    () => {
        /// The configuration as it was given.
        #[must_use]
        pub const fn config(&self) -> &QueueConfig {
            &self.config
        }

        /// Where the fields lie.
        #[must_use]
        pub const fn layout(&self) -> &RingLayout {
            &self.layout
        }

        /// Number of resets so far.
        #[must_use]
        pub const fn generation(&self) -> u64 {
            self.generation
        }

        /// What has happened so far.
        #[must_use]
        pub const fn counters(&self) -> &Counters {
            &self.counters
        }

        /// The violation that latched the queue.
        #[must_use]
        pub const fn latched(&self) -> Option<&Fault> {
            if let Life::Latched(fault) = &self.life {
                Some(fault)
            } else {
                None
            }
        }

        /// Where the queue stands: what was published, and what was taken, so far.
        #[must_use]
        pub fn state(&self) -> QueueState {
            let (avail, used) = each!(&self.ring, ring => ring.state());
            QueueState { avail, used }
        }

        /// Nothing counts that was read from memory that is lost, and nothing is announced there: asked after the
        /// ring was read, and before what was written becomes visible.
        #[inline]
        fn intact<A: Access>(&self, mem: &A) -> Result<(), Fault> {
            if any_lost() { self.find_lost(mem) } else { Ok(()) }
        }

        #[cold]
        #[inline(never)]
        fn find_lost<A: Access>(&self, mem: &A) -> Result<(), Fault> {
            let mut spans = self.spans().into_iter();
            spans
                .try_for_each(|(gpa, len)| mem.intact(gpa, len))
                .map_err(|error| each!(&self.ring, ring => ring.unmapped(&self.rules, error)))?;
            self.intact_beside()
        }

        /// As `intact`, and the loss latches the queue.
        #[inline(always)]
        fn check_intact<A: Access>(&mut self, mem: &A) -> Result<(), Fault> {
            if any_lost() { self.latch_lost(mem) } else { Ok(()) }
        }

        #[cold]
        #[inline(never)]
        fn latch_lost<A: Access>(&mut self, mem: &A) -> Result<(), Fault> {
            self.find_lost(mem).map_err(|fault| self.latched_by(fault))
        }

        /// As `with_ring`, for what the other side is told or asked: nothing before the loss is looked for, and no
        /// answer after.
        #[inline(always)]
        fn with_intact_ring<A: Access, T>(
            &mut self,
            mem: &A,
            f: impl FnOnce(&mut Ring) -> Result<T, MemoryError>,
        ) -> Result<T, Fault> {
            self.check_intact(mem)?;
            let result = self.with_ring(mem, f);
            self.check_intact(mem)?;
            result
        }

        /// Run `f` with the ring resolved for the present memory; a memory error latches the queue.
        #[inline(always)]
        fn with_ring<A: Access, T>(
            &mut self,
            mem: &A,
            f: impl FnOnce(&mut Ring) -> Result<T, MemoryError>,
        ) -> Result<T, Fault> {
            let result = each!(&mut self.ring, ring => ring.refresh(mem)).and_then(|()| f(&mut self.ring));
            match result {
                Ok(value) => Ok(value),
                Err(error) => Err(self.ring_lost(error)),
            }
        }

        #[cold]
        #[inline(never)]
        fn ring_lost(&mut self, error: MemoryError) -> Fault {
            let fault = each!(&self.ring, ring => ring.unmapped(&self.rules, error));
            self.latched_by(fault)
        }
    };
}

mod areas;
mod config;
mod device;
mod driver;
pub(crate) mod heads;
mod waits;

pub use areas::IndirectArea;
pub use config::{QueueConfig, QueueState, feature};
pub use device::{DeviceQueue, StartError, Ticket};
pub use driver::{ChainBuffers, DriverQueue};

use crate::error::Fault;
use crate::ring::desc;

/// Address and length of each buffer that a driver makes available. The last one stands apart: its descriptor is the one
/// without NEXT, so nobody has to count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffers<'a> {
    pub(crate) readable: &'a [(u64, u32)],
    pub(crate) writable: &'a [(u64, u32)],
    pub(crate) last: (u64, u32),
    /// Of the last one: WRITE, INDIRECT, or none.
    pub(crate) flags: u16,
}

/// A chain of our own caller's: how many buffers, and the bytes that can be written to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measured<'a> {
    pub(crate) buffers: Buffers<'a>,
    pub(crate) count: u16,
    pub(crate) writable: u64,
}

impl<'a> Measured<'a> {
    /// None when they make no chain of any queue.
    #[inline(always)]
    pub(crate) fn of(readable: &'a [(u64, u32)], writable: &'a [(u64, u32)]) -> Option<Self> {
        let buffers = Buffers::new(readable, writable)?;
        let count = u16::try_from(readable.len().saturating_add(writable.len())).ok()?;
        // No sum of as many lengths leaves 64 bits.
        let (mut read, mut written) = (0u64, 0u64);
        for &(_, len) in readable {
            if len == 0 {
                return None;
            }
            read = read.wrapping_add(u64::from(len));
        }
        for &(_, len) in writable {
            if len == 0 {
                return None;
            }
            written = written.wrapping_add(u64::from(len));
        }
        let fits = read.wrapping_add(written) <= 1 << 32;
        fits.then_some(Self {
            buffers,
            count,
            writable: written,
        })
    }
}

impl<'a> Buffers<'a> {
    /// None when there are none.
    #[inline(always)]
    pub(crate) const fn new(readable: &'a [(u64, u32)], writable: &'a [(u64, u32)]) -> Option<Self> {
        if let Some((&last, writable)) = writable.split_last() {
            return Some(Self {
                readable,
                writable,
                last,
                flags: desc::WRITE,
            });
        }
        let Some((&last, readable)) = readable.split_last() else {
            return None;
        };
        Some(Self {
            readable,
            writable,
            last,
            flags: 0,
        })
    }

    /// An indirect table.
    pub(crate) const fn table(table: (u64, u32)) -> Self {
        Self {
            readable: &[],
            writable: &[],
            last: table,
            flags: desc::INDIRECT,
        }
    }

    /// Give each buffer to `each`, with the flags of its descriptor: WRITE, INDIRECT, NEXT.
    #[inline(always)]
    pub(crate) fn describe<E>(self, mut each: impl FnMut((u64, u32), u16) -> Result<(), E>) -> Result<(), E> {
        for &buffer in self.readable {
            each(buffer, desc::NEXT)?;
        }
        for &buffer in self.writable {
            each(buffer, desc::WRITE | desc::NEXT)?;
        }
        each(self.last, self.flags)
    }
}

/// A used entry as it was read, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    pub(crate) id: u32,
    pub(crate) len: u32,
    /// Whether the length is certainly one: a packed descriptor without WRITE has something reserved there (2.8.4).
    pub(crate) told: bool,
    pub(crate) position: u16,
    pub(crate) address: u64,
}

/// Whether a queue works.
#[derive(Clone, Debug)]
pub(crate) enum Life {
    Running,
    /// No new pops; completions are taken.
    Stopped,
    /// The other side broke this rule.
    Latched(Fault),
    /// Our own device gave the queue up.
    Broken,
}

/// What has happened at one end since it was built or reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Chains popped (device) or used buffers taken (driver).
    pub popped: u64,
    /// Chains used (device) or made available (driver).
    pub pushed: u64,
    /// Completions that came after a reset or a latch.
    pub dropped: u64,
    /// Chains completed with 0 bytes because they did not fit the handler.
    pub rejected: u64,
    /// Notifications sent.
    pub notified: u64,
    /// Notifications that the other side had not asked for.
    pub suppressed: u64,
}
