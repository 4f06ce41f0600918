//! One descriptor, read once into a local (VIRTIO 1.4, 2.7.5 and 2.8.13).

#![allow(clippy::cast_possible_truncation, reason = "fields are cut out of wider words")]

use crate::mem::{Access, At, MemoryError};

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
    const fn from_words(addr: u64, rest: u64) -> Self {
        Self {
            addr,
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// `len`, `flags` and `next` as the second word of a split descriptor.
    pub(crate) const fn rest(len: u32, flags: u16, next: u16) -> u64 {
        len as u64 | (flags as u64) << 32 | (next as u64) << 48
    }

    /// Entry `index` of a split table: two relaxed 8-byte loads.
    #[inline]
    pub(crate) fn load<A: Access>(mem: &A, table: At, index: u32) -> Result<Self, MemoryError> {
        let off = BYTES * u64::from(index);
        Ok(Self::from_words(
            mem.load_u64(table, off)?,
            mem.load_u64(table, off + 8)?,
        ))
    }

    /// Entry `index` of an indirect table, which need not be aligned at all (2.7.5.3 asks for none).
    #[inline]
    pub(crate) fn load_entry<A: Access>(mem: &A, table: At, index: u32) -> Result<Self, MemoryError> {
        if table.gpa % 8 == 0 {
            return Self::load(mem, table, index);
        }
        let mut bytes = [0u8; 16];
        mem.read(table, BYTES * u64::from(index), &mut bytes)?;
        let both = u128::from_le_bytes(bytes);
        Ok(Self::from_words(both as u64, (both >> 64) as u64))
    }
}

/// A packed descriptor as it was read from the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raw {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

/// The fields of a packed descriptor after its flags were loaded with acquire ordering.
#[inline]
pub(crate) fn load_packed<A: Access>(mem: &A, ring: At, slot: u16) -> Result<(u64, u32, u16), MemoryError> {
    let off = BYTES * u64::from(slot);
    Ok((
        mem.load_u64(ring, off)?,
        mem.load_u32(ring, off + 8)?,
        mem.load_u16(ring, off + 12)?,
    ))
}

/// Offset of the flags of packed descriptor `slot`.
pub(crate) const fn flags_off(slot: u16) -> u64 {
    BYTES * slot as u64 + 14
}
