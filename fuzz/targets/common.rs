//! From fuzzer bytes to a queue in guest memory: shared by the targets.
//!
//! The first bytes choose format, size, features, policy and start index; the rest is the memory image, so
//! that every field of both rings, of tables and of descriptors is the fuzzer's.

use virtio_test::mem::{Access, At, Backing, GuestMemory, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{QueueConfig, QueueState, feature};
use virtio_test::ring::RingLayout;

/// Bytes of guest memory, from address 0 on.
pub const MEMORY: u64 = 8192;

/// What the first bytes chose, and the bytes that are left.
pub struct Setup<'a> {
    pub config: QueueConfig,
    pub state: Option<QueueState>,
    pub rest: &'a [u8],
}

/// A memory that every run of one process uses again: mapping is slower than the code under test.
pub fn memory() -> GuestMemory {
    let region = RegionSpec {
        gpa: 0,
        size: MEMORY,
        backing: Backing::Anonymous,
    };
    GuestMemory::new(vec![region], None).expect("fresh anonymous memory can be mapped")
}

pub fn setup(data: &[u8]) -> Option<Setup<'_>> {
    let (&[choice, size, start_low, start_high], rest) = data.split_first_chunk::<4>()?;
    let packed = choice & 1 != 0;
    let size = if packed { 1 + size % 9 } else { 1 << (size % 4) };
    let layout = RingLayout::contiguous(u16::from(size), packed, 0)?;
    let mut features = if packed { feature::RING_PACKED } else { 0 };
    for (bit, name) in [
        (2, feature::INDIRECT_DESC),
        (4, feature::EVENT_IDX),
        (8, feature::IN_ORDER),
    ] {
        if choice & bit != 0 {
            features |= name;
        }
    }
    let policy = if choice & 16 != 0 {
        Policy::STRICT
    } else {
        Policy::INTEROP
    };
    let start = u16::from_le_bytes([start_low, start_high]);
    let state = (choice & 32 != 0).then_some(QueueState {
        avail: start,
        used: start,
    });
    let config = QueueConfig {
        size: u32::from(size),
        desc: layout.desc,
        driver: layout.driver,
        device: layout.device,
        index: 0,
        features,
        policy,
    };
    Some(Setup { config, state, rest })
}

/// Lay a piece of the input over memory at `offset`.
pub fn overlay<A: Access>(mem: &A, offset: u64, bytes: &[u8]) {
    let room = usize::try_from(MEMORY - offset % MEMORY).expect("the memory is small");
    let bytes = &bytes[..bytes.len().min(room)];
    mem.write(At::unresolved(offset % MEMORY), 0, bytes)
        .expect("the range lies in the memory");
}
