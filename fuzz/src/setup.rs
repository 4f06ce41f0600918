//! From bytes to a queue in guest memory: shared by the targets, and what the converter of seeds writes.
//!
//! | byte | chooses |
//! |---|---|
//! | 0 | bit 0 packed, 1 INDIRECT_DESC, 2 EVENT_IDX, 3 IN_ORDER, 4 strict, 5 a start state, 6 NOTIFY_ON_EMPTY, 7 kicks off |
//! | 1 | size: split `1 << byte % 4`, packed `1 + byte % 9` |
//! | 2, 3 | start index, little endian |
//! | 4, 5 | bytes of the memory image, little endian, modulo 1024 |
//!
//! The image follows and lies in memory from address 0 on, where the ring is contiguous; the rest of memory is zero. What
//! follows it are moves, each a byte with its operands: the module of each target says which.

use virtio_test::mem::{Access, At, Backing, GuestMemory, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{QueueConfig, QueueState, feature};
use virtio_test::ring::RingLayout;

/// Bytes of guest memory, from address 0 on.
pub const MEMORY: u64 = 4096;
/// No image is longer.
pub const IMAGE: usize = 1024;

/// Bytes that are eaten from the front.
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next byte.
    pub fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    /// The next two bytes, little endian.
    pub fn word(&mut self) -> Option<u16> {
        let (&word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u16::from_le_bytes(word))
    }

    /// Up to `count` bytes.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(self.0.len().min(count));
        self.0 = rest;
        taken
    }

    /// A place in memory and some bytes for it: what an overlay is made of.
    pub fn overlay(&mut self, what: u8) -> (u64, &'a [u8]) {
        let place = u64::from(self.word().unwrap_or(0));
        // The rings are what matters: most changes go there.
        let room = if what & 0x80 == 0 { 512 } else { MEMORY };
        (place % room, self.take(usize::from(what >> 3) % 16 + 1))
    }
}

/// What the first bytes chose, and the bytes that are left.
pub struct Setup<'a> {
    pub config: QueueConfig,
    pub layout: RingLayout,
    pub state: Option<QueueState>,
    pub kicks: bool,
    pub image: &'a [u8],
    pub moves: Bytes<'a>,
}

/// A memory that every run of one process uses again.
pub fn memory() -> GuestMemory {
    let region = RegionSpec {
        gpa: 0,
        size: MEMORY,
        backing: Backing::Anonymous,
    };
    GuestMemory::new(vec![region], None).expect("fresh anonymous memory can be mapped")
}

/// Features by the bits of the first byte.
const FEATURES: [(u8, u64); 4] = [
    (1 << 1, feature::INDIRECT_DESC),
    (1 << 2, feature::EVENT_IDX),
    (1 << 3, feature::IN_ORDER),
    (1 << 6, feature::NOTIFY_ON_EMPTY),
];

/// A queue, if there are enough bytes to choose one; in the format that `packed` says, if it does.
pub fn setup(data: &[u8], packed: Option<bool>) -> Option<Setup<'_>> {
    let (&[choice, size, start_low, start_high, image_low, image_high], rest) = data.split_first_chunk()?;
    let packed = packed.unwrap_or(choice & 1 != 0);
    let size = if packed { 1 + size % 9 } else { 1 << (size % 4) };
    let layout = RingLayout::contiguous(u16::from(size), packed, 0)?;
    let chosen = FEATURES.iter().filter(|(bit, _)| choice & bit != 0);
    let features: u64 = chosen.map(|(_, name)| name).sum();
    let packed_bit = if packed { feature::RING_PACKED } else { 0 };
    let strict = choice & 16 != 0;
    let start = u16::from_le_bytes([start_low, start_high]);
    let mut moves = Bytes(rest);
    let image = moves.take(usize::from(u16::from_le_bytes([image_low, image_high])) % IMAGE);
    Some(Setup {
        config: QueueConfig {
            size: u32::from(size),
            desc: layout.desc,
            driver: layout.driver,
            device: layout.device,
            index: 0,
            features: features | packed_bit,
            policy: if strict { Policy::STRICT } else { Policy::INTEROP },
        },
        layout,
        state: (choice & 32 != 0).then_some(QueueState {
            avail: start,
            used: start,
        }),
        kicks: choice & 128 == 0,
        image,
        moves,
    })
}

/// Lay `bytes` over memory at `offset`, as far as it reaches.
pub fn overlay<A: Access>(mem: &A, offset: u64, bytes: &[u8]) {
    let room = usize::try_from(MEMORY - offset).expect("the memory is small");
    mem.write(At::unresolved(offset), 0, &bytes[..bytes.len().min(room)])
        .expect("the range lies in the memory");
}

/// Memory as a run begins with it.
pub fn lay<A: Access>(mem: &A, image: &[u8]) {
    mem.fill(At::unresolved(0), 0, MEMORY, 0).expect("the memory is mapped");
    overlay(mem, 0, image);
}
