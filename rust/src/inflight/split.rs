//! The record of a split queue: a flag and a number for each head, and a list of the buffers that were used last.

use super::{BadRecord, Book, Left, Opened, Part, Sheet, bad, step};
use crate::mem::{Access, At, MemoryError};
use crate::queue::QueueState;
use crate::ring::RingLayout;
use crate::ring::layout::USED_IDX;

/// Bytes of the header and of one state.
pub(super) const BYTES: u64 = 16;
pub(super) const STATE: u64 = 16;

const LAST_BATCH_HEAD: u64 = 12;
const USED_IDX_AT: u64 = 14;
// Of a state. `inflight` is a byte, and the padding behind it is stored with it.
const INFLIGHT: u64 = 0;
const NEXT: u64 = 6;
const COUNTER: u64 = 8;

const fn state(head: u16) -> u64 {
    BYTES + STATE * head as u64
}

#[derive(Debug)]
pub(super) struct SplitRecord {
    sheet: Sheet,
    /// Number of the next buffer.
    counter: u64,
    last: u16,
}

/// See [`Record::open`](super::Record::open).
pub(super) fn open<R: Access, A: Access>(
    own: &R,
    part: &Part,
    mem: &A,
    layout: &RingLayout,
    fresh: QueueState,
) -> Result<Opened, BadRecord> {
    let sheet = Sheet::new(own, part, false)?;
    if sheet.version(own, layout)? == 0 {
        return Ok(begin(own, sheet, fresh)?);
    }
    let used = mem.load_u16_acquire(At::unresolved(layout.device), USED_IDX)?;
    let (last, recorded) = (
        own.load_u16(sheet.at, LAST_BATCH_HEAD)?,
        own.load_u16(sheet.at, USED_IDX_AT)?,
    );
    let (states, mut flying) = (0..part.entries)
        .map(|head| {
            // One load: a flag of a byte, five bytes of padding, the link.
            let word = own.load_u64(sheet.at, state(head) + INFLIGHT)?;
            let counter = own.load_u64(sheet.at, state(head) + COUNTER)?;
            let flag = word & 0xff;
            if flag > 1 || (flag == 1 && head >= layout.size) {
                return bad(format!(
                    "the state of descriptor {head} of {} has inflight {flag}",
                    layout.size
                ));
            }
            let next = u16::try_from(word >> 48).unwrap_or(u16::MAX);
            Ok((next, (flag == 1).then_some(counter)))
        })
        .collect::<Result<(Vec<_>, Vec<_>), _>>()?;
    let used_up = last_batch(&states, &flying, last, used.wrapping_sub(recorded), layout.size)?;
    for &head in &used_up {
        if let Some(counter) = flying.get_mut(usize::from(head)) {
            *counter = None;
        }
    }
    let left: Vec<Left> = (0u16..)
        .zip(&flying)
        .filter_map(|(entry, counter)| {
            let descs = Vec::new();
            counter.map(|counter| Left { entry, counter, descs })
        })
        .collect();
    // Judged whole; from here on the record is written.
    for &head in &used_up {
        own.store_u16(sheet.at, state(head) + INFLIGHT, 0)?;
    }
    step();
    own.store_u16(sheet.at, USED_IDX_AT, used)?;
    let taken = u16::try_from(left.len()).unwrap_or(u16::MAX);
    Ok(Opened {
        book: Book::Split(SplitRecord {
            sheet,
            counter: super::next_counter(&left),
            last: last.min(part.entries.saturating_sub(1)),
        }),
        state: QueueState {
            avail: used.wrapping_add(taken),
            used,
        },
        left,
        found: true,
    })
}

/// The buffers that were published and perhaps not taken off the record: `count` of the list from `last` on. A record
/// in which nothing is in flight says nothing of a ring that has begun anew since.
fn last_batch(next: &[u16], flying: &[Option<u64>], last: u16, count: u16, size: u16) -> Result<Vec<u16>, BadRecord> {
    let mut batch = Vec::new();
    if flying.iter().all(Option::is_none) {
        return Ok(batch);
    }
    if count > size {
        return bad(format!(
            "{count} buffers were used since the last record, by a ring of {size}"
        ));
    }
    let (mut head, mut seen) = (last, vec![false; next.len()]);
    for _ in 0..count {
        let at = usize::from(head);
        let (Some(seen), Some(&following), true) = (seen.get_mut(at), next.get(at), head < size) else {
            return bad(format!("descriptor {head} of {size} is said to have been used last"));
        };
        if std::mem::replace(seen, true) {
            return bad(format!("descriptor {head} is said to have been used twice at once"));
        }
        batch.push(head);
        head = following;
    }
    Ok(batch)
}

fn begin<R: Access>(own: &R, sheet: Sheet, fresh: QueueState) -> Result<Opened, MemoryError> {
    for head in 0..sheet.entries {
        own.store_u64(sheet.at, state(head) + INFLIGHT, 0)?;
        own.store_u64(sheet.at, state(head) + COUNTER, 0)?;
    }
    own.store_u16(sheet.at, LAST_BATCH_HEAD, 0)?;
    own.store_u16(sheet.at, USED_IDX_AT, fresh.used)?;
    sheet.begin(own)?;
    Ok(Opened {
        book: Book::Split(SplitRecord {
            sheet,
            counter: 0,
            last: 0,
        }),
        state: fresh,
        left: Vec::new(),
        found: false,
    })
}

impl SplitRecord {
    pub(super) fn take<R: Access>(&mut self, own: &R, head: u16) -> Result<u16, MemoryError> {
        own.store_u64(self.sheet.at, state(head) + COUNTER, self.counter)?;
        self.counter = self.counter.saturating_add(1);
        step();
        own.store_u16(self.sheet.at, state(head) + INFLIGHT, 1)?;
        Ok(head)
    }

    pub(super) fn untake<R: Access>(&self, own: &R, head: u16) -> Result<(), MemoryError> {
        own.store_u16(self.sheet.at, state(head) + INFLIGHT, 0)
    }

    pub(super) fn before<R: Access>(&mut self, own: &R, head: u16) -> Result<(), MemoryError> {
        own.store_u16(self.sheet.at, state(head) + NEXT, self.last)?;
        step();
        own.store_u16(self.sheet.at, LAST_BATCH_HEAD, head)?;
        self.last = head;
        step();
        Ok(())
    }

    pub(super) fn after<R: Access>(&self, own: &R, head: u16, used: u16) -> Result<(), MemoryError> {
        step();
        own.store_u16(self.sheet.at, state(head) + INFLIGHT, 0)?;
        step();
        own.store_u16(self.sheet.at, USED_IDX_AT, used)?;
        step();
        Ok(())
    }
}
