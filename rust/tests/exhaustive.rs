//! Small scopes, whole: every ring of one or two descriptors over a few values of each field, judged by a second opinion
//! that is written over plain arrays and knows nothing of memory.
//!
//! What no small scope can show is shown elsewhere: laps of 2^16 in `life`, orders of two threads in `fuzz/tests/races.rs`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use common::{AVAIL, INDIRECT, INDIRECT_DESC, NEXT, PACKED, USED, WRITE, config, region};
use virtio_test::chain::Segment;
use virtio_test::mem::{Access, At, GuestMemory};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, QueueState};
use virtio_test::ring::{PackedEvent, RingLayout, need_event, packed_need_event};
use virtio_test::rule::Rule;

/// One page of data behind the ring's; nothing is behind it.
const PAGE: u64 = 0x2000;
const END: u64 = PAGE + 0x1000;
const ROW: u64 = 0x1000;

type Desc = (u64, u32, u16, u16);
type Seen = Result<Vec<(u64, u32, bool)>, Rule>;

fn memory() -> GuestMemory {
    GuestMemory::new(vec![region(ROW, 0x2000)], None).unwrap()
}

/// `flags` of a packed descriptor lie behind the id, those of a split one before `next`.
fn bytes(packed: bool, (addr, len, flags, last): Desc) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    let (low, high) = if packed { (last, flags) } else { (flags, last) };
    bytes[12..14].copy_from_slice(&low.to_le_bytes());
    bytes[14..].copy_from_slice(&high.to_le_bytes());
    bytes
}

fn put<A: Access>(mem: &A, gpa: u64, bytes: &[u8]) {
    mem.write(At::unresolved(gpa), 0, bytes).unwrap();
}

/// A chain as the specification has it and the policy takes it.
struct Opinion {
    policy: Policy,
    seen: Vec<(u64, u32, bool)>,
    late: bool,
}

impl Opinion {
    const fn new(policy: Policy) -> Self {
        Self {
            policy,
            seen: Vec::new(),
            late: false,
        }
    }

    fn take(&mut self, (addr, len, flags, _): Desc) -> Result<(), Rule> {
        let writable = flags & WRITE != 0;
        if self.late && !writable {
            return Err(Rule::OutOfOrder);
        }
        self.late |= writable;
        if len == 0 {
            return if self.policy.zero_length {
                Ok(())
            } else {
                Err(Rule::ZeroLength)
            };
        }
        if addr < PAGE || addr + u64::from(len) > END {
            return Err(Rule::UnmappedAddress);
        }
        self.seen.push((addr, len, writable));
        Ok(())
    }

    fn split(mut self, table: &[Desc], head: u16) -> Seen {
        if usize::from(head) >= table.len() {
            return Err(Rule::HeadOutOfRange);
        }
        let mut index = usize::from(head);
        for _ in 0..table.len() {
            let desc = table[index];
            if desc.2 & INDIRECT != 0 {
                return Err(Rule::IndirectNotNegotiated);
            }
            self.take(desc)?;
            if desc.2 & NEXT == 0 {
                return Ok(self.seen);
            }
            index = usize::from(desc.3);
            if index >= table.len() {
                return Err(Rule::NextOutOfRange);
            }
        }
        Err(Rule::ChainTooLong)
    }

    /// None when the first slot is not available; the wrap counter is 1.
    fn packed(mut self, ring: &[Desc]) -> Option<Seen> {
        let available = |desc: &Desc| desc.2 & (AVAIL | USED) == AVAIL;
        if !available(&ring[0]) {
            return None;
        }
        for (slot, desc) in ring.iter().enumerate() {
            if !available(desc) {
                return Some(Err(Rule::ChainNotAvail));
            }
            if desc.2 & INDIRECT != 0 {
                let rule = if slot > 0 {
                    Rule::IndirectAfterDirect
                } else {
                    Rule::IndirectNotNegotiated
                };
                return Some(Err(rule));
            }
            if let Err(rule) = self.take(*desc) {
                return Some(Err(rule));
            }
            if desc.2 & NEXT == 0 {
                return Some(Ok(self.seen));
            }
        }
        Some(Err(Rule::ChainTooLong))
    }

    fn split_table(mut self, entries: &[Desc], size: usize) -> Seen {
        let mut index = 0;
        for visited in 0..entries.len() {
            let desc = entries[index];
            if desc.2 & INDIRECT != 0 {
                return Err(Rule::NestedIndirect);
            }
            if visited >= size && !self.policy.indirect_beyond_queue {
                return Err(Rule::ChainTooLong);
            }
            self.take(desc)?;
            if desc.2 & NEXT == 0 {
                return Ok(self.seen);
            }
            index = usize::from(desc.3);
            if index >= entries.len() {
                return Err(Rule::NextOutOfRange);
            }
        }
        Err(Rule::ChainTooLong)
    }

    fn packed_table(mut self, entries: &[Desc]) -> Seen {
        for &desc in entries {
            if desc.2 & INDIRECT != 0 && !self.policy.packed_table_flags {
                return Err(Rule::NestedIndirect);
            }
            self.take(desc)?;
        }
        Ok(self.seen)
    }
}

/// Every descriptor over a few values: good, over the end, outside; no byte, one, two; all flags of interest.
fn descs(flags: &[u16], lasts: &[u16]) -> Vec<Desc> {
    let mut descs = Vec::new();
    for addr in [PAGE, END - 1, END] {
        for len in [0, 1, 2] {
            for &flags in flags {
                descs.extend(lasts.iter().map(|&last| (addr, len, flags, last)));
            }
        }
    }
    descs
}

/// Every list of `count` of them.
fn lists(descs: &[Desc], count: u32, mut f: impl FnMut(&[Desc])) {
    let total = descs.len().pow(count);
    let mut list = vec![descs[0]; count as usize];
    for number in 0..total {
        let mut rest = number;
        for place in &mut list {
            *place = descs[rest % descs.len()];
            rest /= descs.len();
        }
        f(&list);
    }
}

fn segments(segments: &[Segment]) -> Vec<(u64, u32, bool)> {
    segments.iter().map(|s| (s.at.gpa, s.len, s.writable)).collect()
}

/// A fresh device end pops what is there; the second opinion says what that is.
fn judge<A: Access>(mem: &A, config: QueueConfig, expected: Option<&Seen>, what: &dyn std::fmt::Debug) {
    let mut queue = DeviceQueue::new(mem, config, None).unwrap();
    queue.disable_kicks(mem).unwrap();
    let mut arena = Vec::new();
    let popped = queue.pop(mem, &mut arena);
    let Some(expected) = expected else {
        assert_eq!(popped, Ok(None), "{what:?}");
        return;
    };
    match (popped, expected) {
        (Ok(Some(element)), Ok(seen)) => {
            assert_eq!(&segments(&arena), seen, "{what:?}");
            let sum = |writable| {
                seen.iter()
                    .filter(|s| s.2 == writable)
                    .map(|s| u64::from(s.1))
                    .sum::<u64>()
            };
            assert_eq!((element.readable, element.writable), (sum(false), sum(true)));
            assert_eq!(queue.in_flight(), 1);
        }
        (Err(fault), Err(rule)) => {
            assert_eq!(fault.rule, *rule, "{what:?}: {fault}");
            assert!(arena.is_empty() && queue.in_flight() == 0);
            assert_eq!(queue.pop(mem, &mut arena), Ok(None), "raised once");
        }
        (popped, expected) => panic!("{what:?}: {popped:?}, not {expected:?}"),
    }
}

fn ring(size: u16, features: u64, policy: Policy) -> QueueConfig {
    let config = config(size, features, policy);
    assert_eq!(config.desc, ROW);
    config
}

#[test]
fn every_split_ring_of_one_or_two_descriptors() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    for (size, policy) in [(1, Policy::STRICT), (2, Policy::INTEROP), (2, Policy::STRICT)] {
        let config = ring(size, 0, policy);
        // NEXT and WRITE in all ways, INDIRECT once; next inside and outside.
        let descs = descs(&[0, NEXT, WRITE, NEXT | WRITE, INDIRECT], &[0, 1, size]);
        lists(&descs, u32::from(size), |table| {
            for (index, &desc) in (0..).zip(table) {
                put(&mem, config.desc + 16 * index, &bytes(false, desc));
            }
            for head in 0..=size {
                put(&mem, config.driver + 2, &[1, 0, head.to_le_bytes()[0], 0]);
                let expected = Opinion::new(policy).split(table, head);
                judge(&mem, config, Some(&expected), &(head, table));
            }
        });
    }
}

#[test]
fn every_packed_ring_of_one_or_two_descriptors() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    for (size, policy) in [(1, Policy::STRICT), (2, Policy::INTEROP), (2, Policy::STRICT)] {
        let config = ring(size, PACKED, policy);
        let mut flags = Vec::new();
        for mark in [0, AVAIL, USED, AVAIL | USED] {
            flags.extend([0, NEXT, WRITE, NEXT | WRITE, INDIRECT].map(|bits| bits | mark));
        }
        lists(&descs(&flags, &[9]), u32::from(size), |ring| {
            for (slot, &desc) in (0..).zip(ring) {
                put(&mem, config.desc + 16 * slot, &bytes(true, desc));
            }
            let expected = Opinion::new(policy).packed(ring);
            judge(&mem, config, expected.as_ref(), &ring);
        });
    }
}

#[test]
fn every_indirect_table_of_one_to_three_entries() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    let table = ROW + 0x800;
    for packed in [false, true] {
        for policy in [Policy::STRICT, Policy::INTEROP] {
            let features = INDIRECT_DESC | if packed { PACKED } else { 0 };
            let config = ring(2, features, policy);
            put(&mem, config.driver, &[0; 8]);
            if !packed {
                put(&mem, config.driver + 2, &[1, 0, 0, 0]);
            }
            let mut check = |entries: &[Desc]| {
                let len = 16 * u32::try_from(entries.len()).unwrap();
                let mark = if packed { AVAIL } else { 0 };
                put(&mem, config.desc, &bytes(packed, (table, len, INDIRECT | mark, 0)));
                for (index, &desc) in (0..).zip(entries) {
                    put(&mem, table + 16 * index, &bytes(packed, desc));
                }
                let opinion = Opinion::new(policy);
                let expected = if entries.len() > 2 && !policy.indirect_beyond_queue {
                    Err(Rule::IndirectTooLong)
                } else if packed {
                    opinion.packed_table(entries)
                } else {
                    opinion.split_table(entries, 2)
                };
                judge(&mem, config, Some(&expected), &entries);
            };
            let all = descs(&[0, NEXT, WRITE, NEXT | WRITE, INDIRECT], &[0, 1, 2]);
            lists(&all, 1, &mut check);
            lists(&all, 2, &mut check);
            // Three: only what steers the walk.
            let few: Vec<Desc> = [0, NEXT, WRITE, NEXT | WRITE]
                .into_iter()
                .flat_map(|flags| [0, 1, 2, 3].map(|next| (PAGE, 1, flags, next)))
                .collect();
            lists(&few, 3, &mut check);
        }
    }
}

#[test]
fn every_length_of_an_indirect_table() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    for packed in [false, true] {
        for remainder in [false, true] {
            for limit in [1, 3, 0xffff] {
                let policy = Policy {
                    indirect_remainder: remainder,
                    max_indirect: limit,
                    ..Policy::INTEROP
                };
                let config = ring(1, INDIRECT_DESC | if packed { PACKED } else { 0 }, policy);
                put(
                    &mem,
                    config.driver + if packed { 0 } else { 2 },
                    &[u8::from(!packed), 0, 0, 0],
                );
                for len in 0..=100u32 {
                    // The last whole entry of 100 bytes ends with memory.
                    let table = END - u64::from(len);
                    let mark = if packed { AVAIL } else { 0 };
                    put(&mem, config.desc, &bytes(packed, (table, len, INDIRECT | mark, 0)));
                    let entries = len / 16;
                    let expected = if entries == 0 || (len % 16 != 0 && !remainder) {
                        Err(Rule::IndirectBadLen)
                    } else if entries > limit {
                        Err(Rule::IndirectTooLong)
                    } else {
                        Ok(Vec::new())
                    };
                    judge(&mem, config, Some(&expected), &(len, limit, remainder));
                    if expected.is_ok() {
                        let beyond = (table + u64::from(len % 16) + 1, len, INDIRECT | mark, 0);
                        put(&mem, config.desc, &bytes(packed, beyond));
                        judge(&mem, config, Some(&Err(Rule::IndirectUnmapped)), &(len, "one byte on"));
                    }
                }
            }
        }
    }
}

/// Every avail idx around the one consumed, at several starts: too far is too far, whatever the 16 bits say.
#[test]
fn every_avail_idx_of_a_small_ring() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    for size in [1, 2, 4] {
        let config = ring(size, 0, Policy::INTEROP);
        put(&mem, config.desc, &bytes(false, (PAGE, 1, 0, 0)));
        for start in [0, 1, 0x7fff, 0x8000, 0xffff] {
            for idx in 0..=u16::MAX {
                put(&mem, config.driver + 2, &idx.to_le_bytes());
                let state = QueueState {
                    avail: start,
                    used: start,
                };
                let mut queue = DeviceQueue::new(&mem, config, Some(state)).unwrap();
                let ahead = idx.wrapping_sub(start);
                let popped = queue.pop(&mem, &mut Vec::new());
                match popped {
                    Ok(None) => assert_eq!(ahead, 0),
                    Ok(Some(_)) => assert!((1..=size).contains(&ahead)),
                    Err(fault) => assert!(ahead > size && fault.rule == Rule::AvailIdxTooFar),
                }
            }
        }
    }
}

#[test]
fn need_event_is_the_formula_and_counts_steps() {
    // Boundaries of 16 bits, cubed; and every event between every near pair, counted step by step.
    let edges: [u16; 12] = [
        0, 1, 2, 3, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0xfffd, 0xfffe, 0xffff, 0x1234,
    ];
    for old in edges {
        for new in edges {
            for event in edges {
                let passed = event.wrapping_sub(old) < new.wrapping_sub(old);
                assert_eq!(need_event(event, new, old), passed, "{event:#x} {new:#x} {old:#x}");
            }
        }
        for steps in 0..6u16 {
            let new = old.wrapping_add(steps);
            for near in 0..16u16 {
                let event = old.wrapping_sub(5).wrapping_add(near);
                let passed = (0..steps).any(|step| old.wrapping_add(step) == event);
                assert_eq!(need_event(event, new, old), passed);
            }
        }
        for event in 0..=u16::MAX {
            assert_eq!(need_event(event, old.wrapping_add(3), old), event.wrapping_sub(old) < 3);
        }
    }
}

#[test]
fn packed_need_event_counts_slots_on_every_small_ring() {
    for size in 1..=5u16 {
        let places = || (0..size).flat_map(|slot| [(slot, false), (slot, true)]);
        let step = |(slot, wrap): (u16, bool)| if slot + 1 == size { (0, !wrap) } else { (slot + 1, wrap) };
        for (old, new) in places().flat_map(|old| places().map(move |new| (old, new))) {
            let mut passed = Vec::new();
            let mut at = old;
            while at != new {
                passed.push(at);
                at = step(at);
            }
            for off in 0..size + 2 {
                for wrap in [false, true] {
                    for flags in 0..8u16 {
                        for event_idx in [false, true] {
                            let event = PackedEvent {
                                off_wrap: off | u16::from(wrap) << 15,
                                flags,
                            };
                            let asked = flags % 4 == 2 && event_idx && off < size;
                            let expected = if asked {
                                passed.contains(&(off, wrap))
                            } else {
                                flags % 4 != 1
                            };
                            let found = packed_need_event(event, event_idx, size, new, old);
                            assert_eq!(found, expected, "{event:?} {event_idx} {size} {old:?} to {new:?}");
                        }
                    }
                }
            }
        }
    }
}

/// Every state that a small queue can be asked to go on from.
#[test]
fn every_start_state_of_a_small_ring() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    for size in 1..=4u16 {
        let config = ring(size, PACKED, Policy::INTEROP);
        let places: Vec<u16> = (0..=size + 1).flat_map(|slot| [slot, slot | 0x8000]).collect();
        for &used in &places {
            // From `used` on, at most `size` slots further.
            let mut reached = Vec::new();
            let mut place = used;
            for _ in 0..=size {
                reached.push(place);
                place = if (place & 0x7fff) + 1 == size {
                    (place ^ 0x8000) & 0x8000
                } else {
                    place + 1
                };
            }
            for &avail in &places {
                let good = used & 0x7fff < size && avail & 0x7fff < size && reached.contains(&avail);
                let state = Some(QueueState { avail, used });
                let device = DeviceQueue::new(&mem, config, state).map(|queue| queue.state());
                assert_eq!(
                    device.as_ref().ok(),
                    state.filter(|_| good).as_ref(),
                    "{size} {avail:#x} {used:#x}"
                );
                assert!(good || device.is_err_and(|fault| fault.rule == Rule::StateOutOfRange));
                let driver = DriverQueue::new(&mem, config, state, None).map(|queue| queue.state());
                assert_eq!(driver.ok(), state.filter(|_| good && avail == used));
            }
        }
    }
    let config = ring(4, 0, Policy::INTEROP);
    for used in [0, 5, 0xffff] {
        for avail in 0..=u16::MAX {
            let state = Some(QueueState { avail, used });
            let good = avail.wrapping_sub(used) <= 4;
            assert_eq!(DeviceQueue::new(&mem, config, state).is_ok(), good);
        }
    }
}

#[test]
fn fields_of_a_ring_never_overlap_and_fill_their_areas() {
    for size in [1u16, 2, 4, 8, 16] {
        for packed in [false, true] {
            let layout = RingLayout::contiguous(size, packed, 0x1000).unwrap();
            let mut owner = vec![None; 0x1000];
            for field in layout.fields() {
                for index in 0..field.count {
                    let first = field.address + index * field.stride - 0x1000;
                    for byte in first..first + field.size {
                        let place = &mut owner[usize::try_from(byte).unwrap()];
                        assert!(place.replace(field.name).is_none(), "{} of {size}", field.name);
                    }
                }
            }
            let areas = [
                (layout.desc, layout.desc_bytes()),
                (layout.driver, layout.driver_bytes()),
                (layout.device, layout.device_bytes()),
            ];
            let inside = |byte: u64| areas.iter().any(|&(first, len)| (first..first + len).contains(&byte));
            for (byte, owner) in (0x1000..).zip(&owner) {
                assert_eq!(owner.is_some(), inside(byte), "{byte:#x} of {size}, packed: {packed}");
            }
            assert!(RingLayout::contiguous(size, packed, u64::MAX - 15).is_none());
        }
    }
}
