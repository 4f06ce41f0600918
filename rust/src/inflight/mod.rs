//! The record of what is in flight, which outlives the device end: the next one goes on from it.
//!
//! # Theory
//!
//! A device end that uses buffers out of order is the only one that knows which of them it has taken and not given back.
//! It writes that into memory of the *other* side ([`Area`]), one [`Part`] for each queue, and whoever comes after it finds
//! it there, wherever the first one was killed: between any two stores. The format is that of vhost-user.rst, "Inflight I/O
//! tracking", and so are the order of the stores and what they mean. Where the document leaves it open:
//!
//! - Used buffers are recorded and published **one by one**. The document lets a batch be settled as a whole; others' code
//!   settles one buffer at the most, and in a packed ring the flags of all but the first descriptor of a batch are in the
//!   ring before the batch is, where the next device end would leave them for the driver to find.
//! - Of a packed ring, what belongs together is one store: an index and its wrap counter, which mean nothing without each
//!   other, and their old values with them.
//!
//! What follows for requests: a buffer that was taken and not published is handed out again, so its request is executed **at
//! least once**; what was published is never handed out again, so its completion is delivered **exactly once**.
//!
//! The area is the other side's, and may be written by it at any time. It is therefore judged once, whole, when a queue
//! starts ([`BadRecord`]); afterwards it is only written, from private state, and never read.

mod packed;
mod split;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use packed::PackedRecord;
use split::SplitRecord;

use crate::mem::{Access, At, Backing, Mapped, Mediated, MemoryError, Region, RegionError, Table, Trace, Want};
use crate::queue::QueueState;
use crate::ring::RingLayout;
use crate::ring::desc::Raw;

/// `version` of a record; 0 is one that nobody has written yet.
const VERSION: u16 = 1;
const FEATURES_AT: u64 = 0;
const VERSION_AT: u64 = 8;
const DESC_NUM_AT: u64 = 10;

/// A record that no device end can have left for this queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadRecord(String);

fn bad<T>(text: String) -> Result<T, BadRecord> {
    Err(BadRecord(text))
}

impl From<MemoryError> for BadRecord {
    fn from(error: MemoryError) -> Self {
        Self(error.to_string())
    }
}

/// The other side's memory for the records of all queues; mapped with the guards of guest memory, and known as that from
/// address 0 on.
#[derive(Debug)]
pub struct Area {
    table: Table,
    trace: Option<Arc<Trace>>,
}

impl Area {
    /// Map `size` bytes, a multiple of 8.
    ///
    /// # Errors
    /// As [`Region::new`].
    pub fn new(size: u64, backing: Backing, trace: Option<Arc<Trace>>) -> Result<Self, RegionError> {
        let region = Arc::new(Region::new(0, size, backing)?);
        // No memory has that number: no transfer can be of this one, since nothing of it is remote.
        let table = Table::new(u64::MAX, 0, vec![region], false)?;
        Ok(Self { table, trace })
    }

    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.table.regions().iter().map(|region| region.size()).sum()
    }
}

/// Run `$body` with `$mem` bound to a view of the area.
macro_rules! with_area {
    ($area:expr, |$mem:ident| $body:expr) => {{
        let area: &Area = $area;
        match &area.trace {
            None => {
                let $mem = &Mapped::new(&area.table);
                $body
            }
            Some(trace) => {
                let $mem = &Mediated::new(&area.table, Some(trace));
                $body
            }
        }
    }};
}

/// Where the record of one queue lies.
#[derive(Clone, Debug)]
pub struct Part {
    area: Arc<Area>,
    base: u64,
    entries: u16,
}

impl Part {
    /// The part from byte `base` of `area` on, for `entries` descriptors.
    #[must_use]
    pub const fn new(area: Arc<Area>, base: u64, entries: u16) -> Self {
        Self { area, base, entries }
    }

    /// Bytes of a record of `entries` descriptors.
    #[must_use]
    pub const fn bytes(packed: bool, entries: u16) -> u64 {
        if packed {
            packed::BYTES + packed::STATE * entries as u64
        } else {
            split::BYTES + split::STATE * entries as u64
        }
    }

    /// Descriptors that it has room for.
    #[must_use]
    pub const fn entries(&self) -> u16 {
        self.entries
    }

    /// Make it one that nobody has written: nothing is in flight any more, and nothing is known of the ring.
    ///
    /// # Errors
    /// When it does not lie in the area.
    pub fn clear(&self) -> Result<(), MemoryError> {
        with_area!(&self.area, |own| own.store_u16(
            At::unresolved(self.base),
            VERSION_AT,
            0
        ))
    }

    /// What was accessed of it was its file's own.
    #[cold]
    fn find_lost(&self, packed: bool) -> Result<(), MemoryError> {
        with_area!(&self.area, |own| own
            .intact(self.base, Self::bytes(packed, self.entries)))
    }
}

/// The memory of a part, resolved: the table behind an area never changes.
#[derive(Clone, Copy, Debug)]
struct Sheet {
    at: At,
    entries: u16,
}

impl Sheet {
    fn new<A: Access>(own: &A, part: &Part, packed: bool) -> Result<Self, MemoryError> {
        let entries = part.entries;
        let at = own.resolve(part.base, Part::bytes(packed, entries), Want::Write)?;
        Ok(Self { at, entries })
    }

    /// The version, of a header that can be one: `features` has no bit yet, and `desc_num` is the area's.
    fn version<A: Access>(self, own: &A, layout: &RingLayout) -> Result<u16, BadRecord> {
        let entries = self.entries;
        if layout.size > entries {
            return bad(format!("a ring of {} and a record for {entries}", layout.size));
        }
        let version = own.load_u16(self.at, VERSION_AT)?;
        if version == 0 {
            return Ok(0);
        }
        if version != VERSION {
            return bad(format!("version {version}, where {VERSION} is the only one"));
        }
        let features = own.load_u64(self.at, FEATURES_AT)?;
        if features != 0 {
            return bad(format!("features {features:#x}, where there are none"));
        }
        let count = own.load_u16(self.at, DESC_NUM_AT)?;
        if count != entries {
            return bad(format!("states of {count} descriptors, not {entries}"));
        }
        Ok(version)
    }

    /// The last stores of a new record: from here on it counts.
    fn begin<A: Access>(self, own: &A) -> Result<(), MemoryError> {
        own.store_u64(self.at, FEATURES_AT, 0)?;
        own.store_u16(self.at, DESC_NUM_AT, self.entries)?;
        step();
        own.store_u16(self.at, VERSION_AT, VERSION)
    }
}

/// Stores before this one and behind it stay on their sides. A process that is killed has executed a part of its program
/// up to some point, and the processor completes all of that: only the compiler could mix it.
#[inline]
fn step() {
    compiler_fence(Ordering::SeqCst);
}

/// One buffer that an earlier device end has taken and not given back.
#[derive(Clone, Debug)]
pub(crate) struct Left {
    /// Its entry of the record: the head descriptor, for a split ring.
    pub(crate) entry: u16,
    counter: u64,
    /// The descriptors that it has in a packed ring, as they were when it was taken.
    pub(crate) descs: Vec<Raw>,
}

/// The number of the buffer that is taken after all of these.
fn next_counter(left: &[Left]) -> u64 {
    left.iter()
        .map(|left| left.counter.saturating_add(1))
        .max()
        .unwrap_or(0)
}

/// What a record says when it is opened.
#[derive(Debug)]
struct Opened {
    book: Book,
    state: QueueState,
    left: Vec<Left>,
    found: bool,
}

/// What a record of either format keeps of itself.
#[derive(Debug)]
enum Book {
    Split(SplitRecord),
    Packed(PackedRecord),
}

/// Where the queue of a record goes on.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) state: QueueState,
    /// What is in flight, in the order in which it was taken.
    pub(crate) left: VecDeque<Left>,
    /// Whether there was a record.
    pub(crate) found: bool,
}

/// The record of one queue, from the side that writes it.
#[derive(Debug)]
pub(crate) struct Record {
    part: Part,
    book: Book,
}

/// Run `$body` with the book of `$record` and its area.
macro_rules! write {
    ($record:expr, |$own:ident, $split:ident| $one:expr, |$packed:ident| $other:expr) => {{
        let Self { part, book } = $record;
        match book {
            Book::Split($split) => with_area!(&part.area, |$own| $one),
            Book::Packed($packed) => with_area!(&part.area, |$own| $other),
        }
    }};
}

impl Record {
    /// Judge what lies in `part`, settle the last half-done update with the ring's help, or begin a new record with `state`.
    ///
    /// # Errors
    /// `BadRecord`; nothing was changed.
    pub(crate) fn open<A: Access>(
        part: Part,
        mem: &A,
        layout: &RingLayout,
        state: QueueState,
    ) -> Result<(Self, Start), BadRecord> {
        let Opened {
            book,
            state,
            mut left,
            found,
        } = if layout.packed {
            with_area!(&part.area, |own| packed::open(own, &part, mem, layout, state))
        } else {
            with_area!(&part.area, |own| split::open(own, &part, mem, layout, state))
        }?;
        part.find_lost(layout.packed)?;
        left.sort_by_key(|left| left.counter);
        let left = left.into();
        Ok((Self { part, book }, Start { state, left, found }))
    }

    /// Whether all of it is there.
    #[cold]
    pub(crate) fn intact(&self) -> Result<(), MemoryError> {
        self.part.find_lost(matches!(self.book, Book::Packed(_)))
    }

    /// A buffer was taken: `head` (split), `descs` (packed); its entry.
    pub(crate) fn take(&mut self, head: u16, descs: &[Raw]) -> Result<u16, MemoryError> {
        write!(self, |own, split| split.take(own, head), |packed| packed
            .take(own, descs))
    }

    /// The newest buffer goes back to the ring.
    pub(crate) fn untake(&mut self, entry: u16) -> Result<(), MemoryError> {
        write!(self, |own, split| split.untake(own, entry), |packed| packed
            .untake(own, entry))
    }

    /// The buffer of `entry` is published next, and the ring's used index or place is then `used`.
    pub(crate) fn before(&mut self, entry: u16, used: u16) -> Result<(), MemoryError> {
        write!(self, |own, split| split.before(own, entry), |packed| packed
            .before(own, entry, used))
    }

    /// That was done.
    pub(crate) fn after(&mut self, entry: u16, used: u16) -> Result<(), MemoryError> {
        write!(self, |own, split| split.after(own, entry, used), |packed| packed
            .after(own, entry))
    }
}
