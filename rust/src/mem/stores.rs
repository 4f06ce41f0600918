//! As [`words`](super::words), for what is written: descriptors, and entries of the avail ring and of the used ring.
//!
//! Each call says whether it stored; where it did not, nothing was touched and the seam itself has to be asked.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use super::fetch::fetch;
use super::{Want, host_size};

/// Groups of `SIZE` bytes in one area that may be written.
#[derive(Clone, Copy, Debug)]
pub struct Stores<'a, const SIZE: u64> {
    base: *mut u8,
    len: u64,
    pinned: PhantomData<&'a ()>,
}

/// Descriptors of either format.
pub type DescStores<'a> = Stores<'a, 16>;
/// Entries of an avail ring.
pub type HeadStores<'a> = Stores<'a, 2>;
/// Entries of a used ring.
pub type UsedStores<'a> = Stores<'a, 8>;

impl<const SIZE: u64> Stores<'_, SIZE> {
    /// None at all.
    #[inline(always)]
    #[must_use]
    pub const fn none() -> Self {
        Self {
            base: std::ptr::null_mut(),
            len: 0,
            pinned: PhantomData,
        }
    }

    /// Those in the `len` bytes from `base` on.
    ///
    /// # Safety
    /// The `len` bytes from `base` on stay mapped and writable as long as the result lives (M1, M2), and `base` is aligned for
    /// the largest word of a group: 8 for descriptors, 4 for entries of a used ring, 2 for those of an avail ring.
    #[inline(always)]
    pub(super) const unsafe fn new(base: *mut u8, len: u64) -> Self {
        Self {
            base,
            len,
            pinned: PhantomData,
        }
    }

    /// The same, with its length as one number in the eyes of the compiler, which else asks at each store whether there are
    /// any words at all.
    #[inline(always)]
    #[must_use]
    pub fn settled(self) -> Self {
        let len = std::hint::black_box(self.len);
        Self { len, ..self }
    }

    /// Host address of the group at `off`, a multiple of its alignment and a small one: valid for `SIZE` bytes.
    #[inline(always)]
    fn group(&self, off: u32) -> Option<*mut u8> {
        let off = u64::from(off);
        (off + SIZE <= self.len).then(|| self.base.wrapping_add(host_size(off)))
    }
}

macro_rules! put {
    ($atomic:ty, $group:expr, $at:literal, $value:expr, $order:ident) => {{
        // SAFETY: `group` is the address of a whole group, mapped and writable while `self` lives and aligned as its words
        // are (M1, M3): `new` was promised so, and all offsets here are multiples.
        let atom = unsafe { <$atomic>::from_ptr($group.wrapping_add($at).cast()) };
        atom.store($value.to_le(), Ordering::$order);
    }};
}

impl Stores<'_, 16> {
    /// Say that descriptor `index` is about to be written; nothing more than a hint, for which no place is a wrong one.
    #[inline(always)]
    pub fn prefetch(&self, index: u16) {
        fetch(self.base.wrapping_add(16 * usize::from(index)), Want::Write);
    }

    /// The two words of split descriptor `index`: two relaxed stores.
    #[inline(always)]
    #[must_use]
    pub fn split(&self, index: u16, (addr, rest): (u64, u64)) -> bool {
        let Some(group) = self.group(16 * u32::from(index)) else {
            return false;
        };
        put!(AtomicU64, group, 0, addr, Relaxed);
        put!(AtomicU64, group, 8, rest, Relaxed);
        true
    }

    /// Address, length and id of packed descriptor `slot`: three relaxed stores.
    #[inline(always)]
    #[must_use]
    pub fn packed(&self, slot: u16, (addr, len, id): (u64, u32, u16)) -> bool {
        let Some(group) = self.group(16 * u32::from(slot)) else {
            return false;
        };
        put!(AtomicU64, group, 0, addr, Relaxed);
        put!(AtomicU32, group, 8, len, Relaxed);
        put!(AtomicU16, group, 12, id, Relaxed);
        true
    }

    /// Length and id of used packed descriptor `slot`: two relaxed stores.
    #[inline(always)]
    #[must_use]
    pub fn packed_used(&self, slot: u16, (len, id): (u32, u16)) -> bool {
        let Some(group) = self.group(16 * u32::from(slot)) else {
            return false;
        };
        put!(AtomicU32, group, 8, len, Relaxed);
        put!(AtomicU16, group, 12, id, Relaxed);
        true
    }

    /// The flags of packed descriptor `slot`, stored with release ordering.
    #[inline(always)]
    #[must_use]
    pub fn flags(&self, slot: u16, flags: u16) -> bool {
        let Some(group) = self.group(16 * u32::from(slot)) else {
            return false;
        };
        put!(AtomicU16, group, 14, flags, Release);
        true
    }
}

impl Stores<'_, 8> {
    /// Entry `slot` of the used ring, whose `flags` and `idx` come first: two relaxed stores.
    #[inline(always)]
    #[must_use]
    pub fn used(&self, slot: u16, (id, len): (u32, u32)) -> bool {
        let Some(group) = self.group(4 + 8 * u32::from(slot)) else {
            return false;
        };
        put!(AtomicU32, group, 0, id, Relaxed);
        put!(AtomicU32, group, 4, len, Relaxed);
        true
    }
}

impl Stores<'_, 2> {
    /// Entry `slot` of the avail ring, whose `flags` and `idx` come first: a relaxed store.
    #[inline(always)]
    #[must_use]
    pub fn head(&self, slot: u16, head: u16) -> bool {
        let Some(group) = self.group(4 + 2 * u32::from(slot)) else {
            return false;
        };
        put!(AtomicU16, group, 0, head, Relaxed);
        true
    }
}
