//! Walk and validate a whole descriptor chain into owned segments.
//!
//! # Theory
//!
//! A chain is parsed whole before anything of it is handed out: every descriptor is read exactly once into a
//! local, checked, translated, and appended to an arena of segments. On the first broken rule the arena is
//! cut back, so nothing is half done, and the fault says where.
//!
//! The walkers of the two formats (`ring::split`, `ring::packed`) differ in how they find the next descriptor;
//! what a descriptor may be is the same, and is decided here, in [`Walk`].
//!
//! Σ lengths is bounded by 2^32 (2.7.5.2), so sums fit a `u64` with room to spare.

use crate::error::{Fault, Missing, Violation};
use crate::mem::{Access, Area, At, Descs, MemoryError, Near, Want};
use crate::policy::Policy;
use crate::queue::Ticket;
use crate::ring::desc::{self, Desc};
use crate::rule::Rule;

/// Bytes of one chain at most (2.7.5.2).
const MAX_BYTES: u64 = 1 << 32;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Where it lies; the host pointer holds for the element's epoch only.
    pub at: At,
    /// Bytes.
    pub len: u32,
    /// Device-writable.
    pub writable: bool,
}

/// A popped chain; its segments are `count` entries of an arena from `first` on.
///
/// In this order, since the compiler stores four small fields side by side as a vector that it first has to make.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Element {
    /// Bytes that the device may read.
    pub readable: u64,
    /// Bytes that the device may write.
    pub writable: u64,
    /// First segment in the arena.
    pub first: usize,
    /// Number of segments.
    pub count: usize,
    /// Epoch of the memory table that the segments were resolved for.
    pub epoch: u64,
    /// Number of this pop in its queue and generation.
    pub seq: u64,
    /// Generation of the queue that it was popped in.
    pub generation: u64,
    /// Head descriptor index (split) or buffer id (packed).
    pub head: u16,
    /// Position in the avail ring (split) or slot of the first descriptor (packed).
    pub position: u16,
    /// Descriptors walked, those of indirect tables included.
    pub descriptors: u32,
    /// Ring slots that it occupies: 1 (split) or its number of descriptors in the ring (packed).
    pub slots: u16,
    /// Entry of the record of what is in flight, if the queue keeps one.
    pub entry: u16,
}

impl Element {
    /// What completing it needs.
    #[must_use]
    pub const fn ticket(&self) -> Ticket {
        Ticket {
            generation: self.generation,
            seq: self.seq,
            head: self.head,
            slots: self.slots,
            writable: self.writable,
            entry: self.entry,
        }
    }
}

/// Where elements go; the newest can still be looked at, and taken away.
pub(crate) trait Elements {
    fn put(&mut self, element: Element);
    /// The newest `count`, oldest first.
    fn newest(&mut self, count: usize) -> &mut [Element];
    fn drop_newest(&mut self, count: usize);
}

impl Elements for Vec<Element> {
    #[inline(always)]
    fn put(&mut self, element: Element) {
        self.push(element);
    }

    fn newest(&mut self, count: usize) -> &mut [Element] {
        let start = self.len().saturating_sub(count);
        self.get_mut(start..).unwrap_or_default()
    }

    fn drop_newest(&mut self, count: usize) {
        self.truncate(self.len().saturating_sub(count));
    }
}

/// One at a time.
impl Elements for Option<Element> {
    #[inline(always)]
    fn put(&mut self, element: Element) {
        *self = Some(element);
    }

    fn newest(&mut self, count: usize) -> &mut [Element] {
        self.as_mut_slice().get_mut(..count).unwrap_or_default()
    }

    fn drop_newest(&mut self, count: usize) {
        if count > 0 {
            *self = None;
        }
    }
}

/// What its queue gives an element: number and generation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stamp {
    pub(crate) seq: u64,
    pub(crate) generation: u64,
}

impl Stamp {
    /// Of the chain that comes `count` later.
    #[inline(always)]
    pub(crate) const fn later(self, count: u64) -> Self {
        Self {
            seq: self.seq.wrapping_add(count),
            generation: self.generation,
        }
    }
}

/// What ended a burst of pops.
#[derive(Debug)]
pub(crate) enum End {
    /// Its limit, or very many segments, or there may be more elsewhere.
    More,
    /// Nothing is available.
    Empty,
    Fault(Fault),
}

/// How far a burst may go: chains, and segments in the arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) chains: u64,
    pub(crate) segments: usize,
}

/// What the walk of one queue needs to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChainRules {
    pub(crate) policy: Policy,
    pub(crate) packed: bool,
    pub(crate) queue: u16,
    pub(crate) size: u16,
    pub(crate) indirect: bool,
}

impl ChainRules {
    /// Entries that one indirect table may have.
    fn table_limit(&self) -> u32 {
        if self.policy.indirect_beyond_queue {
            self.policy.max_indirect
        } else {
            self.policy.max_indirect.min(u32::from(self.size))
        }
    }

    /// A fault of this queue.
    #[cold]
    #[inline(never)]
    pub(crate) fn fault(&self, rule: Rule, message: String) -> Fault {
        Box::new(Violation {
            rule,
            packed: self.packed,
            queue: self.queue,
            position: None,
            head: None,
            descriptor: None,
            address: None,
            message,
            missing: None,
        })
    }

    /// A fault of a chain: position, head and descriptor.
    #[cold]
    #[inline(never)]
    fn fault_at(
        &self,
        rule: Rule,
        (position, head): (u16, u16),
        index: u32,
        address: Option<u64>,
        message: String,
    ) -> Fault {
        let mut fault = self.fault(rule, message);
        fault.position = Some(position);
        fault.head = Some(head);
        fault.descriptor = Some(index);
        fault.address = address;
        fault
    }

    /// The buffer of a descriptor, address and length, cannot be used.
    #[cold]
    #[inline(never)]
    fn unresolved(&self, place: (u16, u16), index: u32, buffer: (u64, u32), error: MemoryError) -> Fault {
        let rule = match error {
            MemoryError::Wraps { .. } => Rule::AddressWraps,
            MemoryError::ReadOnly { .. } => Rule::ReadOnlyAddress,
            MemoryError::Lost { .. } => Rule::MemoryLost,
            MemoryError::Unmapped { .. }
            | MemoryError::Untranslated { .. }
            | MemoryError::Misaligned { .. }
            | MemoryError::Transfer { .. } => Rule::UnmappedAddress,
        };
        let (addr, len) = buffer;
        let message = format!("a buffer of {len} bytes: {error}");
        let mut fault = self.fault_at(rule, place, index, Some(error.address()), message);
        fault.missing = missing(addr, u64::from(len), error);
        fault
    }
}

/// An indirect table that was found good.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub(crate) at: At,
    pub(crate) entries: u32,
}

/// The state of one walk. It goes from hand to hand by value, and what is cold gets copies of its fields: so it lives in
/// registers.
pub(crate) struct Walk<'a, 'n, A> {
    mem: &'a A,
    near: &'n mut Near<'a>,
    rules: &'n ChainRules,
    segments: &'n mut Vec<Segment>,
    first: usize,
    position: u16,
    head: u16,
    descriptors: u32,
    /// Bytes of either kind, and of the writable one.
    total: u64,
    writable: u64,
    seen_writable: bool,
}

impl<'a, 'n, A: Access> Walk<'a, 'n, A> {
    #[inline(always)]
    pub(crate) fn new(
        (mem, near): (&'a A, &'n mut Near<'a>),
        rules: &'n ChainRules,
        segments: &'n mut Vec<Segment>,
        position: u16,
        head: u16,
    ) -> Self {
        let first = segments.len();
        Self {
            mem,
            near,
            rules,
            segments,
            first,
            position,
            head,
            descriptors: 0,
            total: 0,
            writable: 0,
            seen_writable: false,
        }
    }

    /// A fault at descriptor `index` of this chain; the arena is cut back.
    #[inline(always)]
    pub(crate) fn fault(&mut self, rule: Rule, index: u32, address: Option<u64>, message: String) -> Fault {
        self.segments.truncate(self.first);
        self.rules
            .fault_at(rule, (self.position, self.head), index, address, message)
    }

    /// The descriptor table or ring itself vanished while we walk.
    #[inline(always)]
    pub(crate) fn ring_fault(&mut self, index: u32, error: MemoryError) -> Fault {
        self.memory_fault(Rule::RingUnmapped.of_memory(&error), index, error)
    }

    #[inline(always)]
    fn memory_fault(&mut self, rule: Rule, index: u32, error: MemoryError) -> Fault {
        self.fault(rule, index, Some(error.address()), describe(&error))
    }

    /// The id of a packed chain is known only from its last descriptor (2.8.1).
    #[inline(always)]
    pub(crate) fn set_head(&mut self, head: u16) {
        self.head = head;
    }

    /// Give the segments back.
    #[inline(always)]
    pub(crate) fn cut(self) {
        self.segments.truncate(self.first);
    }

    /// Take one data descriptor: order, length, sum, translation.
    #[inline(always)]
    pub(crate) fn take(&mut self, index: u32, addr: u64, len: u32, writable: bool) -> Result<(), Fault> {
        self.descriptors += 1;
        // 2.7.4.2, 2.8.17: device-writable elements are placed after any device-readable ones.
        if writable {
            self.seen_writable = true;
            return self.place::<true>(index, addr, len);
        }
        if self.seen_writable && !self.rules.policy.mixed_order {
            let message = "a device-readable descriptor follows a device-writable one".to_owned();
            return Err(self.fault(Rule::OutOfOrder, index, Some(addr), message));
        }
        self.place::<false>(index, addr, len)
    }

    /// Length, sum and translation of one buffer; compiled for either kind, which then is no question any more.
    #[inline(always)]
    fn place<const WRITABLE: bool>(&mut self, index: u32, addr: u64, len: u32) -> Result<(), Fault> {
        // No clause forbids length 0 in so many words: R10 of the robustness catalogue makes it a switch.
        if len == 0 {
            if self.rules.policy.zero_length {
                return Ok(());
            }
            let message = "the descriptor has length 0".to_owned();
            return Err(self.fault(Rule::ZeroLength, index, Some(addr), message));
        }
        self.total += u64::from(len);
        if WRITABLE {
            self.writable += u64::from(len);
        }
        // 2.7.5.2: no chain is longer than 2^32 bytes in total.
        if self.total > MAX_BYTES {
            return Err(self.fault(Rule::ChainTooBig, index, Some(addr), too_big(self.total)));
        }
        let (want, writable) = (if WRITABLE { Want::Write } else { Want::Read }, WRITABLE);
        let at = match self.mem.resolve_near(self.near, addr, u64::from(len), want) {
            Some(at) => at,
            None => match resolve(self.mem, addr, len, want) {
                Ok(at) => at,
                Err(error) => {
                    self.segments.truncate(self.first);
                    let place = (self.position, self.head);
                    return Err(self.rules.unresolved(place, index, (addr, len), error));
                }
            },
        };
        self.segments.push(Segment { at, len, writable });
        Ok(())
    }

    /// Check an INDIRECT descriptor and find its table (2.7.5.3, 2.8.7).
    pub(crate) fn table(&mut self, index: u32, addr: u64, len: u32, flags: u16) -> Result<Table, Fault> {
        // 2.7.5.3.1, 2.8.19: INDIRECT only with VIRTIO_F_INDIRECT_DESC negotiated.
        if !self.rules.indirect {
            let message = "INDIRECT is set and VIRTIO_F_INDIRECT_DESC was not negotiated".to_owned();
            return Err(self.fault(Rule::IndirectNotNegotiated, index, Some(addr), message));
        }
        // 2.7.5.3.1, 2.8.19: INDIRECT and NEXT never together. WRITE is ignored here (2.7.5.3.2).
        if flags & desc::NEXT != 0 {
            let message = "INDIRECT and NEXT are both set".to_owned();
            return Err(self.fault(Rule::IndirectAndNext, index, Some(addr), message));
        }
        // 2.7.5.3, 2.8.7: the table is len / 16 descriptors.
        let entries = len / 16;
        if entries == 0 || (len % 16 != 0 && !self.rules.policy.indirect_remainder) {
            let message = format!("an indirect table of {len} bytes is no whole number of descriptors");
            return Err(self.fault(Rule::IndirectBadLen, index, Some(addr), message));
        }
        // 2.7.5.3.1, 2.8.19: no chain longer than the queue size, or the policy's limit.
        let limit = self.rules.table_limit();
        if entries > limit {
            let message = format!("an indirect table of {entries} descriptors, at most {limit} are taken");
            return Err(self.fault(Rule::IndirectTooLong, index, Some(addr), message));
        }
        let bytes = u64::from(entries) * desc::BYTES;
        if let Some(at) = self.mem.resolve_near(self.near, addr, bytes, Want::Read) {
            return Ok(Table { at, entries });
        }
        match self.mem.resolve(addr, bytes, Want::Read) {
            Ok(at) => Ok(Table { at, entries }),
            Err(error) => {
                let message = format!("an indirect table of {len} bytes: {error}");
                let mut fault = self.fault(Rule::IndirectUnmapped, index, Some(error.address()), message);
                fault.missing = missing(addr, bytes, error);
                Err(fault)
            }
        }
    }

    /// Entry `index` of an indirect table, which `words` may reach directly: two relaxed 8-byte loads.
    #[inline(always)]
    pub(crate) fn load_entry(&mut self, table: &Table, words: Descs<'_>, index: u32) -> Result<Desc, Fault> {
        let (addr, rest) = if let Some(words) = words.split(index) {
            words
        } else {
            match load_entry(self.mem, table, index) {
                Ok(both) => desc::halves(both),
                Err(error) => return Err(self.memory_fault(Rule::IndirectUnmapped, index, error)),
            }
        };
        Ok(Desc::from_words(addr, rest))
    }

    /// The words of a table.
    #[inline(always)]
    pub(crate) fn words(&self, table: &Table) -> Descs<'a> {
        self.mem.descs(Area::of(table.at))
    }

    /// Whether a table that was walked lies in memory that is lost: then nothing is made of it.
    #[inline(always)]
    pub(crate) fn read_from(&mut self, table: &Table) -> Result<(), Fault> {
        let bytes = u64::from(table.entries) * desc::BYTES;
        self.mem.intact(table.at.gpa, bytes).map_err(|error| {
            let text = format!("an indirect table of {bytes} bytes: {error}");
            self.fault(Rule::MemoryLost, 0, Some(error.address()), text)
        })
    }

    /// Entry `index` of a packed indirect table: address, length, id, flags (2.8.13); the id is reserved here.
    #[inline(always)]
    pub(crate) fn load_packed_entry(&mut self, table: &Table, words: Descs<'_>, index: u32) -> Result<Desc, Fault> {
        // Both formats are two 8-byte words that differ only in which half-word holds the flags.
        let entry = self.load_entry(table, words, index)?;
        Ok(Desc {
            flags: entry.next,
            next: entry.flags,
            ..entry
        })
    }

    /// Whether a table may make the chain longer than the queue.
    #[inline(always)]
    pub(crate) const fn beyond_queue(&self) -> bool {
        self.rules.policy.indirect_beyond_queue
    }

    /// Descriptors taken so far.
    #[inline(always)]
    pub(crate) const fn descriptors(&self) -> u32 {
        self.descriptors
    }

    /// The finished chain.
    #[inline(always)]
    pub(crate) fn finish(self, slots: u16, stamp: Stamp) -> Element {
        Element {
            head: self.head,
            position: self.position,
            slots,
            descriptors: self.descriptors,
            readable: self.total.wrapping_sub(self.writable),
            writable: self.writable,
            first: self.first,
            count: self.segments.len().wrapping_sub(self.first),
            epoch: self.mem.epoch(),
            seq: stamp.seq,
            generation: stamp.generation,
            entry: 0,
        }
    }
}

/// A buffer that was not found near.
#[cold]
#[inline(never)]
fn resolve<A: Access>(mem: &A, addr: u64, len: u32, want: Want) -> Result<At, MemoryError> {
    mem.resolve(addr, u64::from(len), want)
}

/// An entry of a table that words do not reach: it need not be aligned at all (2.7.5.3 asks for none).
#[cold]
#[inline(never)]
fn load_entry<A: Access>(mem: &A, table: &Table, index: u32) -> Result<u128, MemoryError> {
    Desc::load_entry(mem, table.at, index).map(desc::whole)
}

#[cold]
#[inline(never)]
fn describe(error: &MemoryError) -> String {
    error.to_string()
}

#[cold]
#[inline(never)]
fn too_big(total: u64) -> String {
    format!("the chain describes {total} bytes so far, more than 2^32")
}

/// What of `len` bytes at `addr` is missing, if that is what went wrong.
fn missing(addr: u64, len: u64, error: MemoryError) -> Option<Missing> {
    let MemoryError::Untranslated { gpa, want } = error else {
        return None;
    };
    // The range does not wrap: that would have been the error.
    let len = addr.saturating_add(len).saturating_sub(gpa);
    Some(Missing {
        address: gpa,
        len,
        want,
    })
}

#[cfg(test)]
mod tests {
    use super::{Element, Elements};

    const ELEMENT: Element = Element {
        readable: 1,
        writable: 2,
        first: 3,
        count: 4,
        epoch: 5,
        seq: 6,
        generation: 7,
        head: 8,
        position: 9,
        descriptors: 10,
        slots: 11,
        entry: 12,
    };

    #[test]
    fn as_many_are_dropped_as_is_said_wherever_they_go() {
        let (mut many, mut one) = (Vec::new(), None);
        for into in [&mut many as &mut dyn Elements, &mut one] {
            into.put(ELEMENT);
            into.drop_newest(0);
            assert_eq!(into.newest(1), [ELEMENT]);
            into.drop_newest(1);
            assert!(into.newest(1).is_empty());
        }
    }
}
