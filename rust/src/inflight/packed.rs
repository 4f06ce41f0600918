//! The record of a packed queue: copies of the descriptors that are in flight, since the ring's own are overwritten, and a
//! list of the entries that are free.
//!
//! Half of each update is thrown away or kept as a whole: `old_*` is what holds if the ring has not changed.

use super::{BadRecord, Book, Left, Opened, Part, Sheet, bad, step};
use crate::mem::{Access, At, MemoryError};
use crate::queue::QueueState;
use crate::ring::RingLayout;
use crate::ring::desc::{self, Raw};
use crate::ring::packed::Place;

/// Bytes of the header and of one state.
pub(super) const BYTES: u64 = 32;
pub(super) const STATE: u64 = 32;

/// `free_head` and `old_free_head`, as one word.
const FREE: u64 = 12;
/// `used_idx`, `old_used_idx`, `used_wrap_counter`, `old_used_wrap_counter`, and padding, as one word.
const USED: u64 = 16;
// Of a state: `inflight`, padding, `next`, `last` and `num` as one word, and `inflight` with its padding alone.
const LINKS: u64 = 0;
const NEXT: u64 = 2;
const COUNTER: u64 = 8;
/// `id`, `flags` and `len`, as one word.
const REST: u64 = 16;
const ADDR: u64 = 24;

const fn state(entry: u16) -> u64 {
    BYTES + STATE * entry as u64
}

/// 16 bits of a word.
#[allow(clippy::cast_possible_truncation, reason = "a field is cut out of a wider word")]
const fn half(word: u64, shift: u32) -> u16 {
    (word >> shift) as u16
}

const fn free_word(free: u16, old: u16) -> u32 {
    free as u32 | (old as u32) << 16
}

const fn used_word(used: Place, old: Place) -> u64 {
    used.slot as u64 | (old.slot as u64) << 16 | (used.wrap as u64) << 32 | (old.wrap as u64) << 40
}

/// A descriptor as a state has it.
#[allow(clippy::cast_possible_truncation, reason = "fields are cut out of wider words")]
const fn from_words(addr: u64, rest: u64) -> Raw {
    Raw {
        addr,
        len: (rest >> 32) as u32,
        id: half(rest, 0),
        flags: half(rest, 16),
    }
}

const fn rest(desc: Raw) -> u64 {
    desc.id as u64 | (desc.flags as u64) << 16 | (desc.len as u64) << 32
}

/// Links of one state.
#[derive(Clone, Copy, Debug)]
struct Links {
    flag: u16,
    next: u16,
    last: u16,
    num: u16,
}

#[derive(Debug)]
pub(super) struct PackedRecord {
    sheet: Sheet,
    /// Number of the next buffer.
    counter: u64,
    /// The link of each entry, and the last entry of each buffer that is in flight, by its head.
    next: Vec<u16>,
    last: Vec<u16>,
    free: u16,
    used: Place,
}

/// See [`Record::open`](super::Record::open).
pub(super) fn open<R: Access, A: Access>(
    own: &R,
    part: &Part,
    mem: &A,
    layout: &RingLayout,
    fresh: QueueState,
) -> Result<Opened, BadRecord> {
    let sheet = Sheet::new(own, part, true)?;
    if sheet.version(own, layout)? == 0 {
        return Ok(begin(own, sheet, fresh)?);
    }
    let word = own.load_u32(sheet.at, FREE)?;
    let (free, old_free) = (half(word.into(), 0), half(word.into(), 16));
    let word = own.load_u64(sheet.at, USED)?;
    let (wrap, old_wrap) = (word >> 32 & 0xff, word >> 40 & 0xff);
    let (slot, old_slot) = (half(word, 0), half(word, 16));
    if slot.max(old_slot) >= layout.size || wrap.max(old_wrap) > 1 {
        return bad(format!(
            "used indices {slot} and {old_slot}, wrap counters {wrap} and {old_wrap}, of a ring of {}",
            layout.size
        ));
    }
    let place = |slot, wrap| Place { slot, wrap: wrap == 1 };
    let (used, old) = (place(slot, wrap), place(old_slot, old_wrap));
    // Available still: the ring was not changed, and so the update is taken back.
    let done = used != old && {
        let flags = mem.load_u16_acquire(At::unresolved(layout.desc), desc::flags_off(old.slot))?;
        !old.is_avail(flags)
    };
    let (free, used) = if done { (free, used) } else { (old_free, old) };
    let links = (0..part.entries)
        .map(|entry| {
            let word = own.load_u64(sheet.at, state(entry) + LINKS)?;
            let links = Links {
                flag: half(word, 0) & 0xff,
                next: half(word, 16),
                last: half(word, 32),
                num: half(word, 48),
            };
            if links.flag > 1 {
                return bad(format!("the state of entry {entry} has inflight {}", links.flag));
            }
            Ok(links)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut seen = vec![false; links.len()];
    let idle = free_list(&links, free, &mut seen)?;
    let left = flying(own, &sheet, &links, &mut seen, layout.size)?;
    if let Some(entry) = seen.iter().position(|seen| !seen) {
        return bad(format!(
            "entry {entry} is neither free nor of a buffer that is in flight"
        ));
    }
    let taken: usize = left.iter().map(|left| left.descs.len()).sum();
    let taken = u16::try_from(taken).unwrap_or(u16::MAX);
    if taken > layout.size {
        return bad(format!(
            "{taken} descriptors of a ring of {} are in flight",
            layout.size
        ));
    }
    // Judged whole; from here on the record is written.
    own.store_u32(sheet.at, FREE, free_word(free, free))?;
    step();
    own.store_u64(sheet.at, USED, used_word(used, used))?;
    step();
    for entry in idle {
        own.store_u16(sheet.at, state(entry) + LINKS, 0)?;
    }
    Ok(Opened {
        book: Book::Packed(PackedRecord {
            sheet,
            counter: super::next_counter(&left),
            next: links.iter().map(|links| links.next).collect(),
            last: links.iter().map(|links| links.last).collect(),
            free,
            used,
        }),
        state: QueueState {
            avail: used.forward(taken, layout.size).bits(),
            used: used.bits(),
        },
        left,
        found: true,
    })
}

/// The free entries that are marked as in flight, by an update that was kept or taken back; all free ones are then seen.
fn free_list(links: &[Links], free: u16, seen: &mut [bool]) -> Result<Vec<u16>, BadRecord> {
    let (mut entry, mut marked) = (free, Vec::new());
    // Behind the last entry the list ends.
    while let (Some(link), Some(seen)) = (links.get(usize::from(entry)), seen.get_mut(usize::from(entry))) {
        if std::mem::replace(seen, true) {
            return bad(format!("the list of free entries comes back to {entry}"));
        }
        if link.flag == 1 {
            marked.push(entry);
        }
        entry = link.next;
    }
    Ok(marked)
}

/// Every buffer that is in flight, with its descriptors; their entries are then seen.
fn flying<R: Access>(
    own: &R,
    sheet: &Sheet,
    links: &[Links],
    seen: &mut [bool],
    size: u16,
) -> Result<Vec<Left>, BadRecord> {
    let mut found = Vec::new();
    for (head, first) in (0u16..).zip(links) {
        if first.flag != 1 || seen.get(usize::from(head)).is_none_or(|&seen| seen) {
            continue;
        }
        if first.num == 0 || first.num > size {
            return bad(format!(
                "entry {head} stands for {} descriptors of a ring of {size}",
                first.num
            ));
        }
        let (mut entry, mut descs) = (head, Vec::new());
        for at in 1..=first.num {
            let (Some(link), Some(seen)) = (links.get(usize::from(entry)), seen.get_mut(usize::from(entry))) else {
                return bad(format!(
                    "the buffer of entry {head} goes on in entry {entry}, which there is not"
                ));
            };
            if std::mem::replace(seen, true) || (link.flag == 1 && entry != head) {
                return bad(format!(
                    "the buffer of entry {head} goes on in entry {entry}, which is another's"
                ));
            }
            let addr = own.load_u64(sheet.at, state(entry) + ADDR)?;
            let desc = from_words(addr, own.load_u64(sheet.at, state(entry) + REST)?);
            let ends = at == first.num;
            if (entry == first.last) != ends || (desc.flags & desc::NEXT == 0) != ends {
                return bad(format!(
                    "the buffer of entry {head} has {} descriptors, and ends elsewhere than in entry {}",
                    first.num, first.last
                ));
            }
            descs.push(desc);
            entry = link.next;
        }
        let counter = own.load_u64(sheet.at, state(head) + COUNTER)?;
        let entry = head;
        found.push(Left { entry, counter, descs });
    }
    Ok(found)
}

fn begin<R: Access>(own: &R, sheet: Sheet, fresh: QueueState) -> Result<Opened, MemoryError> {
    let entries = sheet.entries;
    let next: Vec<u16> = (1..=entries).collect();
    for (entry, &following) in (0u16..).zip(&next) {
        own.store_u64(sheet.at, state(entry) + LINKS, u64::from(following) << 16)?;
    }
    let used = Place::from_bits(fresh.used);
    own.store_u32(sheet.at, FREE, free_word(0, 0))?;
    own.store_u64(sheet.at, USED, used_word(used, used))?;
    sheet.begin(own)?;
    Ok(Opened {
        book: Book::Packed(PackedRecord {
            sheet,
            counter: 0,
            next,
            last: vec![0; usize::from(entries)],
            free: 0,
            used,
        }),
        state: fresh,
        left: Vec::new(),
        found: false,
    })
}

impl PackedRecord {
    fn next_of(&self, entry: u16) -> u16 {
        self.next.get(usize::from(entry)).copied().unwrap_or(u16::MAX)
    }

    /// Its entries are the next free ones, which the last store makes its own.
    pub(super) fn take<R: Access>(&mut self, own: &R, descs: &[Raw]) -> Result<u16, MemoryError> {
        let (head, at) = (self.free, self.sheet.at);
        let (mut entry, mut last) = (head, head);
        for desc in descs {
            own.store_u64(at, state(entry) + ADDR, desc.addr)?;
            own.store_u64(at, state(entry) + REST, rest(*desc))?;
            last = entry;
            entry = self.next_of(entry);
        }
        own.store_u64(at, state(head) + COUNTER, self.counter)?;
        self.counter = self.counter.saturating_add(1);
        let num = u64::try_from(descs.len()).unwrap_or(u64::MAX);
        let links = 1 | u64::from(self.next_of(head)) << 16 | u64::from(last) << 32 | num << 48;
        own.store_u64(at, state(head) + LINKS, links)?;
        if let Some(known) = self.last.get_mut(usize::from(head)) {
            *known = last;
        }
        step();
        own.store_u32(at, FREE, free_word(entry, entry))?;
        self.free = entry;
        Ok(head)
    }

    /// Put its entries before the free ones; they are free once that list begins there.
    fn free<R: Access>(&mut self, own: &R, head: u16) -> Result<(), MemoryError> {
        let last = self.last.get(usize::from(head)).copied().unwrap_or(head);
        own.store_u16(self.sheet.at, state(last) + NEXT, self.free)?;
        if let Some(next) = self.next.get_mut(usize::from(last)) {
            *next = self.free;
        }
        step();
        Ok(())
    }

    pub(super) fn untake<R: Access>(&mut self, own: &R, head: u16) -> Result<(), MemoryError> {
        self.free(own, head)?;
        own.store_u32(self.sheet.at, FREE, free_word(head, head))?;
        self.free = head;
        step();
        own.store_u16(self.sheet.at, state(head) + LINKS, 0)
    }

    pub(super) fn before<R: Access>(&mut self, own: &R, head: u16, used: u16) -> Result<(), MemoryError> {
        self.free(own, head)?;
        own.store_u32(self.sheet.at, FREE, free_word(head, self.free))?;
        self.free = head;
        step();
        let used = Place::from_bits(used);
        own.store_u64(self.sheet.at, USED, used_word(used, self.used))?;
        self.used = used;
        step();
        Ok(())
    }

    pub(super) fn after<R: Access>(&self, own: &R, head: u16) -> Result<(), MemoryError> {
        step();
        own.store_u16(self.sheet.at, state(head) + LINKS, 0)?;
        step();
        own.store_u32(self.sheet.at, FREE, free_word(self.free, self.free))?;
        step();
        own.store_u64(self.sheet.at, USED, used_word(self.used, self.used))?;
        step();
        Ok(())
    }
}
