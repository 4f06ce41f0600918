//! The words of a ring's area, found and judged once for many accesses.
//!
//! # Theory
//!
//! An area of a ring is resolved once for each table, yet each access through an `At` shows anew that this very table
//! resolved it, and how the place is aligned. [`Area`] knows the latter from when it was resolved. [`Words`] shows the
//! former once: it borrows the pinned view that made it, so the table stays, and with it the mapping (M1). What is left to
//! judge at each access is its place. It holds nothing where the area cannot be reached directly. There, and behind its end,
//! the answer is None, and the seam itself has to be asked.
//!
//! A group is what lies side by side and is of one entry: a descriptor of 16 bytes, an entry of the used ring of 8, one of
//! the avail ring of 2.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::fetch::fetch;
use super::{At, Want, host_size};

/// An area of groups of `SIZE` bytes as it was resolved; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct Area<const SIZE: u64>(At);

impl<const SIZE: u64> Area<SIZE> {
    /// What was resolved at `at`: nothing, where that is not aligned for the largest word of a group, or holds none.
    #[inline(always)]
    #[must_use]
    pub fn of(at: At) -> Self {
        let align = if SIZE < 8 { SIZE } else { 8 };
        if at.len < SIZE || at.ptr.addr() & host_size(align - 1) != 0 {
            return Self(At::unresolved(at.gpa));
        }
        // What may be written may be read.
        let (len, stamp) = (at.len - SIZE + 1, at.stamp | 1);
        Self(At { len, stamp, ..at })
    }

    /// Its words under a pin of the table with this stamp.
    ///
    /// # Safety
    /// The table stays pinned as long as the result lives (M1).
    #[inline(always)]
    pub(super) unsafe fn words<'a>(self, stamp: u64) -> Words<'a, SIZE> {
        if self.0.stamp != stamp {
            return Words::none();
        }
        Words {
            base: self.0.ptr,
            end: self.0.len,
            pinned: PhantomData,
        }
    }
}

/// Groups of `SIZE` bytes in one area; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a, const SIZE: u64> {
    base: *mut u8,
    /// From this offset on no whole group begins.
    end: u64,
    pinned: PhantomData<&'a ()>,
}

/// Descriptors of either format.
pub type Descs<'a> = Words<'a, 16>;
/// Entries of an avail ring.
pub type Heads<'a> = Words<'a, 2>;
/// Entries of a used ring.
pub type Useds<'a> = Words<'a, 8>;

impl<const SIZE: u64> Words<'_, SIZE> {
    /// None at all.
    #[inline(always)]
    #[must_use]
    pub const fn none() -> Self {
        Self {
            base: std::ptr::null_mut(),
            end: 0,
            pinned: PhantomData,
        }
    }

    /// Those in the `len` bytes from `base` on.
    ///
    /// # Safety
    /// The `len` bytes from `base` on stay mapped as long as the result lives (M1, M2), and `base` is aligned for the largest
    /// word of a group: 8 for descriptors, 4 for entries of a used ring, 2 for those of an avail ring.
    #[inline(always)]
    pub(super) const unsafe fn new(base: *mut u8, len: u64) -> Self {
        let end = if len < SIZE { 0 } else { len - SIZE + 1 };
        Self {
            base,
            end,
            pinned: PhantomData,
        }
    }

    /// The same, with its end as one number in the eyes of the compiler, which else asks at each access whether there are
    /// any words at all.
    #[inline(always)]
    #[must_use]
    pub fn settled(self) -> Self {
        let end = std::hint::black_box(self.end);
        Self { end, ..self }
    }

    /// Host address of the group at `off`, a multiple of its alignment: valid for `SIZE` bytes.
    #[inline(always)]
    fn group(&self, off: u64) -> Option<*mut u8> {
        (off < self.end).then(|| self.base.wrapping_add(host_size(off)))
    }
}

macro_rules! word {
    ($atomic:ty, $word:ident, $group:expr, $at:literal) => {{
        // SAFETY: `group` is the address of a whole group, mapped while `self` lives (M2: the table that is pinned resolved
        // it, or `new` was promised so) and aligned as its words are (M3: `Area::of` looked, or the same, and all offsets
        // here are multiples). A relaxed load is defined for read-only memory.
        let atom = unsafe { <$atomic>::from_ptr($group.wrapping_add($at).cast()) };
        $word::from_le(atom.load(Ordering::Relaxed))
    }};
}

impl Words<'_, 16> {
    /// Say that descriptor `index` is about to be read; nothing more than a hint.
    #[inline(always)]
    pub fn prefetch(&self, index: u16) {
        if let Some(group) = self.group(16 * u64::from(index)) {
            fetch(group, Want::Read);
        }
    }

    /// The two words of split descriptor `index`: two relaxed loads.
    #[inline(always)]
    #[must_use]
    pub fn split(&self, index: u32) -> Option<(u64, u64)> {
        let group = self.group(16 * u64::from(index))?;
        Some((word!(AtomicU64, u64, group, 0), word!(AtomicU64, u64, group, 8)))
    }

    /// The flags of packed descriptor `slot`, loaded with acquire ordering.
    #[inline(always)]
    #[must_use]
    pub fn flags(&self, slot: u16) -> Option<u16> {
        let group = self.group(16 * u64::from(slot))?;
        let flags = word!(AtomicU16, u16, group, 14);
        fence(Ordering::Acquire);
        Some(flags)
    }

    /// Address, length and id of packed descriptor `slot`: three relaxed loads.
    #[inline(always)]
    #[must_use]
    pub fn packed(&self, slot: u16) -> Option<(u64, u32, u16)> {
        let group = self.group(16 * u64::from(slot))?;
        let (addr, len) = (word!(AtomicU64, u64, group, 0), word!(AtomicU32, u32, group, 8));
        Some((addr, len, word!(AtomicU16, u16, group, 12)))
    }

    /// Length and id of used packed descriptor `slot`: two relaxed loads.
    #[inline(always)]
    #[must_use]
    pub fn packed_used(&self, slot: u16) -> Option<(u32, u16)> {
        let group = self.group(16 * u64::from(slot))?;
        Some((word!(AtomicU32, u32, group, 8), word!(AtomicU16, u16, group, 12)))
    }
}

impl Words<'_, 8> {
    /// Entry `slot` of the used ring, whose `flags` and `idx` come first: two relaxed loads.
    #[inline(always)]
    #[must_use]
    pub fn used(&self, slot: u16) -> Option<(u32, u32)> {
        let group = self.group(4 + 8 * u64::from(slot))?;
        Some((word!(AtomicU32, u32, group, 0), word!(AtomicU32, u32, group, 4)))
    }
}

impl Words<'_, 2> {
    /// The `idx` of the avail ring, loaded with acquire ordering.
    #[inline(always)]
    #[must_use]
    pub fn idx(&self) -> Option<u16> {
        let group = self.group(2)?;
        let idx = word!(AtomicU16, u16, group, 0);
        fence(Ordering::Acquire);
        Some(idx)
    }

    /// Entry `slot` of the avail ring, whose `flags` and `idx` come first: a relaxed load.
    #[inline(always)]
    #[must_use]
    pub fn head(&self, slot: u16) -> Option<u16> {
        let group = self.group(4 + 2 * u64::from(slot))?;
        Some(word!(AtomicU16, u16, group, 0))
    }
}
