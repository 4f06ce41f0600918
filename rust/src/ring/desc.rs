//! One descriptor, read once into a local (VIRTIO 1.4, 2.7.5 and 2.8.13).

#![allow(clippy::cast_possible_truncation, reason = "fields are cut out of wider words")]

use crate::mem::{Access, At, Descs, MemoryError};

/// The buffer continues in the next descriptor.
pub(crate) const NEXT: u16 = 1;
/// The buffer is device-writable; in a used packed descriptor: something was written.
pub(crate) const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub(crate) const INDIRECT: u16 = 4;
/// Packed: available, when it equals the driver's wrap counter and USED differs.
pub(crate) const AVAIL: u16 = 1 << 7;
/// Packed: used, when it equals the device's wrap counter and AVAIL does too.
pub(crate) const USED: u16 = 1 << 15;

/// Bytes of a descriptor in either format.
pub(crate) const BYTES: u64 = 16;

/// A snapshot of a split descriptor, or of an entry of an indirect table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Desc {
    #[inline(always)]
    pub(crate) const fn from_words(addr: u64, rest: u64) -> Self {
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// Whether the second word of a split descriptor has this flag: asked of the word itself, so that the flags need no
    /// register of their own.
    #[inline(always)]
    pub(crate) const fn has(rest: u64, flag: u16) -> bool {
        rest & (flag as u64) << 32 != 0
    }

    /// `len`, `flags` and `next` as the second word of a split descriptor.
    pub(crate) const fn rest(len: u32, flags: u16, next: u16) -> u64 {
        len as u64 | (flags as u64) << 32 | (next as u64) << 48
    }

    /// The words of entry `index` of an indirect table, which need not be aligned at all (2.7.5.3 asks for none).
    pub(crate) fn load_entry<A: Access>(mem: &A, table: At, index: u32) -> Result<(u64, u64), MemoryError> {
        let off = BYTES * u64::from(index);
        if table.gpa % 8 == 0 {
            return mem.load_desc(table, off);
        }
        let mut bytes = [0u8; 16];
        mem.read(table, off, &mut bytes)?;
        Ok(halves(u128::from_le_bytes(bytes)))
    }
}

/// Two words as one number: what a cold path gives back, so that the words of the other path need no place in memory.
pub(crate) fn whole((low, high): (u64, u64)) -> u128 {
    u128::from(low) | u128::from(high) << 64
}

/// Undo `whole`.
#[inline(always)]
pub(crate) const fn halves(both: u128) -> (u64, u64) {
    (both as u64, (both >> 64) as u64)
}

/// A packed descriptor as it was read from the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

/// The flags of packed descriptor `slot` of the ring at `ring`, which `words` may reach directly: acquire.
#[inline(always)]
pub(crate) fn load_flags<A: Access>(mem: &A, words: Descs<'_>, ring: At, slot: u16) -> Result<u16, MemoryError> {
    match words.flags(slot) {
        Some(flags) => Ok(flags),
        None => load_flags_anew(mem, ring, slot),
    }
}

#[cold]
fn load_flags_anew<A: Access>(mem: &A, ring: At, slot: u16) -> Result<u16, MemoryError> {
    mem.load_u16_acquire(ring, flags_off(slot))
}

/// The fields of a packed descriptor after its flags were loaded with acquire ordering.
#[inline(always)]
pub(crate) fn load_packed<A: Access>(
    mem: &A,
    words: Descs<'_>,
    ring: At,
    slot: u16,
) -> Result<(u64, u32, u16), MemoryError> {
    match words.packed(slot) {
        Some(fields) => Ok(fields),
        None => load_packed_anew(mem, ring, slot),
    }
}

#[cold]
fn load_packed_anew<A: Access>(mem: &A, ring: At, slot: u16) -> Result<(u64, u32, u16), MemoryError> {
    mem.load_packed_desc(ring, BYTES * u64::from(slot))
}

/// Offset of the flags of packed descriptor `slot`.
pub(crate) const fn flags_off(slot: u16) -> u64 {
    BYTES * slot as u64 + 14
}
