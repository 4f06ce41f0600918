//! Indirect tables, deep: a chain of direct descriptors and a table, judged by a second opinion.
//!
//! | byte | chooses |
//! |---|---|
//! | 0 | bit 0 packed, 1 strict, 2 INDIRECT_DESC not negotiated, 3 NEXT beside INDIRECT, 4 to 6 direct descriptors before |
//! | 1, 2 | bytes of the table, little endian |
//! | 3 | where the table lies |
//!
//! Then come descriptors of 4 bytes, first the direct ones: which address, which length, flags (bits 0 to 2), next. What
//! is not given is zero. The oracle is a walk over these few bytes, written apart from the core, that never sees memory.

use virtio_test::mem::{Access, At, Backing, GuestMemory, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, QueueConfig, feature};
use virtio_test::ring::RingLayout;
use virtio_test::rule::Rule;

use crate::setup::Bytes;
use crate::watched::Watched;

const SIZE: u16 = 8;
const BIG: u64 = 1 << 32;
const ROM: u64 = 0x10000;
/// First address, bytes, whether it may be written. The first two adjoin.
pub const REGIONS: [(u64, u64, bool); 4] = [
    (0, 0x1000, true),
    (0x1000, 0x1000, true),
    (ROM, 0x1000, false),
    (BIG, 256 << 20, true),
];
const ADDRESSES: [u64; 16] = [
    0x800,
    0xfff,
    0x1000,
    0x1fff,
    0x2000,
    ROM,
    ROM + 0xfff,
    BIG,
    BIG + 1,
    u64::MAX,
    u64::MAX - 15,
    1 << 40,
    0x1ff0,
    0xf00,
    0,
    ROM - 1,
];
const LENGTHS: [u32; 16] = [
    1,
    16,
    0,
    0x1000,
    0x1001,
    0x2000,
    256 << 20,
    (256 << 20) - 1,
    u32::MAX,
    1 << 31,
    2,
    15,
    0xf000,
    (256 << 20) + 1,
    4096,
    17,
];
const TABLES: [u64; 12] = [
    0x200,
    0x201,
    0x204,
    0x208,
    0xfe0,
    0xff7,
    ROM,
    0x1ff0,
    0x1ff1,
    u64::MAX - 15,
    1 << 40,
    0xe00,
];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

#[derive(Clone, Copy, Default)]
struct Desc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

struct Plan {
    packed: bool,
    negotiated: bool,
    policy: Policy,
    direct: Vec<Desc>,
    head: Desc,
    entries: Vec<Desc>,
}

/// The memory of `REGIONS`.
pub fn memory() -> GuestMemory {
    let region = |(gpa, size, writable): (u64, u64, bool)| RegionSpec {
        gpa,
        size,
        backing: if writable {
            Backing::Anonymous
        } else {
            Backing::fresh_read_only(gpa, size).expect("a file can be made")
        },
    };
    GuestMemory::new(REGIONS.into_iter().map(region).collect(), None).expect("fresh memory can be mapped")
}

/// What is wrong with a range, if anything.
pub fn unusable(addr: u64, len: u64, write: bool) -> Option<Rule> {
    let end = u128::from(addr) + u128::from(len);
    if end > u128::from(u64::MAX) {
        return Some(Rule::AddressWraps);
    }
    let mut at = addr;
    while u128::from(at) < end {
        let mut regions = REGIONS.iter();
        let Some(&(first, size, writable)) = regions.find(|region| at >= region.0 && at - region.0 < region.1) else {
            return Some(Rule::UnmappedAddress);
        };
        if write && !writable {
            return Some(Rule::ReadOnlyAddress);
        }
        at = first + size;
    }
    None
}

/// The second opinion.
#[derive(Default)]
struct Opinion {
    segments: Vec<(u64, u32, bool)>,
    count: u32,
    total: u64,
    /// Whether a writable descriptor was seen, be it of no bytes.
    late: bool,
}

impl Opinion {
    fn take(&mut self, plan: &Plan, desc: &Desc) -> Result<(), Rule> {
        self.count += 1;
        let write = desc.flags & WRITE != 0;
        if self.late && !write {
            return Err(Rule::OutOfOrder);
        }
        self.late |= write;
        if desc.len == 0 {
            return if plan.policy.zero_length {
                Ok(())
            } else {
                Err(Rule::ZeroLength)
            };
        }
        self.total += u64::from(desc.len);
        if self.total > 1 << 32 {
            return Err(Rule::ChainTooBig);
        }
        if let Some(rule) = unusable(desc.addr, u64::from(desc.len), write) {
            return Err(rule);
        }
        self.segments.push((desc.addr, desc.len, write));
        Ok(())
    }

    fn chain(&mut self, plan: &Plan) -> Result<(), Rule> {
        for desc in &plan.direct {
            self.take(plan, desc)?;
        }
        if plan.packed && !plan.direct.is_empty() {
            return Err(Rule::IndirectAfterDirect);
        }
        if !plan.negotiated {
            return Err(Rule::IndirectNotNegotiated);
        }
        if plan.head.flags & NEXT != 0 {
            return Err(Rule::IndirectAndNext);
        }
        let entries = plan.head.len / 16;
        if plan.head.len < 16 || !plan.head.len.is_multiple_of(16) {
            return Err(Rule::IndirectBadLen);
        }
        if entries
            > if plan.policy.indirect_beyond_queue {
                1024
            } else {
                u32::from(SIZE)
            }
        {
            return Err(Rule::IndirectTooLong);
        }
        if unusable(plan.head.addr, u64::from(plan.head.len), false).is_some() {
            return Err(Rule::IndirectUnmapped);
        }
        if plan.packed {
            self.packed(plan, entries)
        } else {
            self.split(plan, entries)
        }
    }

    fn packed(&mut self, plan: &Plan, entries: u32) -> Result<(), Rule> {
        for index in 0..entries {
            let desc = plan.entry(index);
            if desc.flags & INDIRECT != 0 && !plan.policy.packed_table_flags {
                return Err(Rule::NestedIndirect);
            }
            self.take(plan, &desc)?;
        }
        Ok(())
    }

    fn split(&mut self, plan: &Plan, entries: u32) -> Result<(), Rule> {
        let mut visited = 0;
        let mut index = 0;
        while visited < entries {
            visited += 1;
            let desc = plan.entry(index);
            if desc.flags & INDIRECT != 0 {
                return Err(Rule::NestedIndirect);
            }
            if self.count >= u32::from(SIZE) && !plan.policy.indirect_beyond_queue {
                return Err(Rule::ChainTooLong);
            }
            self.take(plan, &desc)?;
            if desc.flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(desc.next);
            if index >= entries {
                return Err(Rule::NextOutOfRange);
            }
        }
        Err(Rule::ChainTooLong)
    }
}

impl Plan {
    fn new(bytes: &mut Bytes<'_>) -> Option<Self> {
        let choice = bytes.byte()?;
        let len = u32::from(bytes.word()?);
        let table = bytes.byte()?;
        let packed = choice & 1 != 0;
        let mut descs = std::iter::from_fn(|| {
            let &[addr, len, flags, next] = bytes.take(4) else {
                return None;
            };
            Some(Desc {
                addr: ADDRESSES[usize::from(addr) % 16],
                len: LENGTHS[usize::from(len) % 16],
                flags: u16::from(flags & 7),
                next: u16::from(next),
            })
        });
        let mut direct: Vec<Desc> = descs.by_ref().take(usize::from(choice >> 4 & 7)).collect();
        for (next, desc) in (1..).zip(&mut direct) {
            (desc.flags, desc.next) = (desc.flags & WRITE | NEXT, next);
        }
        let addr = TABLES[usize::from(table) % TABLES.len()];
        // No table there is written: all its entries are zero.
        let entries = if unusable(addr, u64::from(len), true).is_none() {
            descs.collect()
        } else {
            Vec::new()
        };
        Some(Self {
            packed,
            negotiated: choice & 4 == 0,
            policy: if choice & 2 != 0 {
                Policy::STRICT
            } else {
                Policy::INTEROP
            },
            direct,
            head: Desc {
                addr,
                len,
                flags: INDIRECT | if choice & 8 != 0 { NEXT } else { 0 },
                next: u16::MAX,
            },
            entries,
        })
    }

    fn entry(&self, index: u32) -> Desc {
        self.entries.get(index as usize).copied().unwrap_or_default()
    }

    fn encode(&self, desc: &Desc, table: bool, avail: bool) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        let flags = desc.flags | if avail { 1 << 7 } else { 0 };
        let last = if self.packed && !table { 5 } else { desc.next };
        let (low, high) = if self.packed { (last, flags) } else { (flags, last) };
        bytes[12..14].copy_from_slice(&low.to_le_bytes());
        bytes[14..].copy_from_slice(&high.to_le_bytes());
        bytes
    }

    /// Ring, table, and everything that makes the chain available.
    fn write<A: Access>(&self, mem: &A, layout: &RingLayout) {
        let put = |gpa: u64, bytes: &[u8]| mem.write(At::unresolved(gpa), 0, bytes).expect("it is mapped");
        mem.fill(At::unresolved(0), 0, 0x2000, 0).expect("it is mapped");
        for (slot, desc) in (0..).zip(self.direct.iter().chain([&self.head])) {
            put(layout.desc + 16 * slot, &self.encode(desc, false, self.packed));
        }
        let room = self.head.len as usize / 16;
        for (index, desc) in (0..).zip(self.entries.iter().take(room)) {
            put(self.head.addr + 16 * index, &self.encode(desc, true, false));
        }
        if !self.packed {
            put(layout.driver + 2, &[1, 0]);
        }
    }
}

/// See the module's head.
pub fn run(data: &[u8]) {
    thread_local!(static MEMORY: GuestMemory = memory());
    MEMORY.with(|memory| play(&memory.pin().mapped(), data));
}

fn play<A: Access>(mem: &A, data: &[u8]) {
    let Some(plan) = Plan::new(&mut Bytes(data)) else {
        return;
    };
    let layout = RingLayout::contiguous(SIZE, plan.packed, 0).expect("it is small");
    plan.write(mem, &layout);
    let features = if plan.packed { feature::RING_PACKED } else { 0 };
    let indirect = if plan.negotiated { feature::INDIRECT_DESC } else { 0 };
    let config = QueueConfig {
        size: u32::from(SIZE),
        desc: layout.desc,
        driver: layout.driver,
        device: layout.device,
        index: 0,
        features: features | indirect,
        policy: plan.policy,
    };
    let mut opinion = Opinion::default();
    let judged = opinion.chain(&plan);
    let watched = Watched::new(mem);
    let mut queue = DeviceQueue::new(&watched, config, None).expect("the ring is mapped");
    let mut segments = Vec::new();
    let popped = queue.pop(&watched, &mut segments);
    assert_eq!(watched.stores(), 0, "what is available is not asked for");
    match (popped, judged) {
        (Ok(Some(element)), Ok(())) => {
            let found: Vec<_> = segments.iter().map(|s| (s.at.gpa, s.len, s.writable)).collect();
            assert_eq!(found, opinion.segments);
            assert_eq!(
                (element.descriptors, element.head),
                (opinion.count, if plan.packed { 5 } else { 0 })
            );
            assert_eq!(element.readable + element.writable, opinion.total);
        }
        (Err(fault), Err(rule)) => {
            assert_eq!(fault.rule, rule, "{fault}");
            assert!(segments.is_empty() && fault.head.is_some() && fault.descriptor.is_some());
        }
        (popped, judged) => panic!("popped {popped:?}, judged {judged:?}"),
    }
}
