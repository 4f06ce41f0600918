//! Both virtqueue formats, both ends of each, generic over [`crate::mem::Access`].
//!
//! # Theory
//!
//! A ring object is one end's private state: indices, wrap counters and resolved addresses of the three
//! areas. It never trusts what it reads back. `stage` writes an entry that the other side cannot see yet;
//! `publish` makes all staged entries visible with one release store. All positions are kept in range by
//! this code, so masks and remainders only ever see our own values.

pub(crate) mod desc;
mod event;
pub(crate) mod layout;
pub(crate) mod packed;
pub(crate) mod split;

pub use event::{PackedEvent, need_event, packed_need_event};
pub use layout::{Field, MAX_SIZE, RingLayout};

use crate::mem::{Access, Area, At, MemoryError, Want};
use crate::queue::Measured;

/// The three areas of a queue, resolved for one epoch of guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Areas {
    pub(crate) desc: At,
    pub(crate) driver: At,
    pub(crate) device: At,
    /// The same as `desc` and `driver`: descriptors, and entries of a split avail ring.
    pub(crate) descs: Area<16>,
    pub(crate) heads: Area<2>,
    epoch: u64,
}

/// Which end of the queue we are: decides which areas must be writable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Driver,
    Device,
}

impl Areas {
    /// Resolve all three areas, each as one operation.
    pub(crate) fn resolve<A: Access>(mem: &A, layout: &RingLayout, end: Side) -> Result<Self, MemoryError> {
        let ours = |yes: bool| if yes { Want::Write } else { Want::Read };
        // The packed ring is written by both ends; of the split ring each end writes its own part.
        let desc = ours(end == Side::Driver || layout.packed);
        let desc = mem.resolve(layout.desc, layout.desc_bytes(), desc)?;
        let driver = mem.resolve(layout.driver, layout.driver_bytes(), ours(end == Side::Driver))?;
        Ok(Self {
            desc,
            driver,
            descs: Area::of(desc),
            heads: Area::of(driver),
            device: mem.resolve(layout.device, layout.device_bytes(), ours(end == Side::Device))?,
            epoch: mem.epoch(),
        })
    }

    /// Resolve again if the memory table has changed since.
    #[inline(always)]
    pub(crate) fn refresh<A: Access>(&mut self, mem: &A, layout: &RingLayout, end: Side) -> Result<(), MemoryError> {
        if self.epoch == mem.epoch() {
            return Ok(());
        }
        self.anew(mem, layout, end)
    }

    /// Out of line: a search inlined wherever a table could have changed costs the callers their registers.
    #[cold]
    #[inline(never)]
    fn anew<A: Access>(&mut self, mem: &A, layout: &RingLayout, end: Side) -> Result<(), MemoryError> {
        *self = Self::resolve(mem, layout, end)?;
        Ok(())
    }
}

/// The avail side of a ring at its driver end, where the areas can be reached directly: what is put there is visible when it is
/// published.
pub(crate) trait AvailRing {
    /// Where chains go.
    type Adding<'a>: 'a;

    /// To be put into, and settled; None where the areas have to be asked for word by word.
    fn adding<'a, A: Access>(&self, mem: &'a A) -> Option<Self::Adding<'a>>;

    /// Write a chain; its head and its tail, of a list its id twice. None where it does not fit as it is: then nothing has
    /// changed but free descriptors.
    fn put(&mut self, adding: &mut Self::Adding<'_>, chain: Measured<'_>) -> Option<(u16, u16)>;

    /// That was put in.
    fn settle(&mut self, adding: Self::Adding<'_>);
}

/// The used side of a ring at its device end: what is written there is staged, and visible when it is published.
pub(crate) trait UsedRing {
    /// What is staged, and where more goes.
    type Staging<'a>: 'a;

    /// What is staged so far, to be added to and settled.
    fn staging<'a, A: Access>(&self, mem: &'a A) -> Self::Staging<'a>;

    /// Write an entry that is not visible yet: of a chain, or of a batch, of so many slots.
    fn stage<A: Access>(
        &self,
        mem: &A,
        staging: &mut Self::Staging<'_>,
        head: u16,
        slots: u16,
        written: u32,
    ) -> Result<(), MemoryError>;

    /// This is staged now.
    fn settle(&mut self, staging: Self::Staging<'_>);
}
