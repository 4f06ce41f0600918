//! `Mapped`: guest memory through raw pointers, at no cost beyond the access; of remote regions it knows nothing.
//!
//! # Theory
//!
//! `Mapped` borrows a table, so the regions of that table stay mapped while it lives (M1). An access through an
//! `At` that this very table resolved (same stamp) and that stays inside its range goes straight to memory; every
//! other is translated. Words are atomics. An acquire load is a relaxed load and an acquire fence, because a ring may
//! lie in memory that is mapped for reading only, where only relaxed atomic loads are defined.

use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use super::copy::copy;
use super::fetch::fetch;
use super::table::{Near, Table};
use super::{
    AHEAD, Access, Area, At, DescStores, Descs, HeadStores, Heads, MemoryError, Stores, UsedStores, Useds, Want, Words,
    any_lost, host_size,
};

/// A pinned view of guest memory; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct Mapped<'a>(&'a Table);

impl<'a> Mapped<'a> {
    /// View memory through `table`.
    #[inline]
    #[must_use]
    pub const fn new(table: &'a Table) -> Self {
        Self(table)
    }

    /// Host address of `len` bytes at `at + off`, if `at` gives it directly.
    ///
    /// M2: what this returns is valid for `len` bytes (for writes too if `want` is `Write`) while the table lives.
    #[inline(always)]
    pub(super) fn direct(self, at: At, off: u64, len: u64, want: Want) -> Option<*mut u8> {
        let stamp = if want == Want::Write { at.stamp } else { at.stamp | 1 };
        let fits = at.len.checked_sub(off).is_some_and(|left| left >= len);
        (stamp == self.0.stamp() && fits).then(|| at.ptr.wrapping_add(host_size(off)))
    }

    /// Host address of the word of `size` bytes (2, 4 or 8) at `at + off`, aligned to its size.
    #[inline(always)]
    fn word(self, at: At, off: u64, size: u64, want: Want) -> Result<*mut u8, MemoryError> {
        match self.words(at, off, size, size, want) {
            Some(ptr) => Ok(ptr),
            None => self.word_anew(at.gpa, off, size, want),
        }
    }

    /// Host address of several words of `len` bytes together at `at + off`, the first of them aligned to `align`, if `at`
    /// gives it directly.
    #[inline(always)]
    fn words(self, at: At, off: u64, len: u64, align: u64, want: Want) -> Option<*mut u8> {
        self.direct(at, off, len, want)
            .filter(|ptr| ptr.addr() & host_size(align - 1) == 0)
    }

    #[cold]
    #[inline(never)]
    fn word_anew(self, gpa: u64, off: u64, size: u64, want: Want) -> Result<*mut u8, MemoryError> {
        let gpa = address(At::unresolved(gpa), off)?;
        if gpa & (size - 1) != 0 {
            return Err(MemoryError::Misaligned { gpa, align: size });
        }
        let at = self.0.resolve(gpa, size, want)?;
        // Guest and host alignment agree and regions are multiples of 8 (M3): an aligned word is in one region.
        self.direct(at, 0, size, want).ok_or(MemoryError::Unmapped { gpa })
    }
}

/// `at + off`, if that is an address.
pub(super) fn address(at: At, off: u64) -> Result<u64, MemoryError> {
    at.gpa
        .checked_add(off)
        .ok_or(MemoryError::Wraps { gpa: at.gpa, len: off })
}

macro_rules! load {
    ($name:ident, $atomic:ty, $word:ty) => {
        #[inline(always)]
        fn $name(&self, at: At, off: u64) -> Result<$word, MemoryError> {
            let ptr = self.word(at, off, size_of::<$word>() as u64, Want::Read)?;
            // SAFETY: `word` gave an aligned address, valid while the table lives (M2, M3); all accesses to ring
            // words are atomic, and a relaxed load is defined for memory that is mapped read-only.
            let atom = unsafe { <$atomic>::from_ptr(ptr.cast()) };
            Ok(<$word>::from_le(atom.load(Ordering::Relaxed)))
        }
    };
}

macro_rules! store {
    ($name:ident, $atomic:ty, $word:ty, $order:ident) => {
        #[inline(always)]
        fn $name(&self, at: At, off: u64, value: $word) -> Result<(), MemoryError> {
            let ptr = self.word(at, off, size_of::<$word>() as u64, Want::Write)?;
            // SAFETY: `word` gave an aligned and writable address, valid while the table lives (M2, M3); all
            // accesses to ring words are atomic.
            let atom = unsafe { <$atomic>::from_ptr(ptr.cast()) };
            atom.store(value.to_le(), Ordering::$order);
            Ok(())
        }
    };
}

/// Words that lie side by side, each accessed on its own, but found and judged as one.
macro_rules! load_all {
    ($name:ident, $len:literal, $align:literal, $one:ident, ($($atomic:ty, $word:ident, $at:literal);+)) => {
        #[inline(always)]
        fn $name(&self, at: At, off: u64) -> Result<($($word,)+), MemoryError> {
            if let Some(ptr) = self.words(at, off, $len, $align, Want::Read) {
                return Ok(($({
                    // SAFETY: `words` gave an address aligned for the first word and valid for all of them while the
                    // table lives (M2, M3), and the others lie at multiples of their size from there.
                    let atom = unsafe { <$atomic>::from_ptr(ptr.wrapping_add($at).cast()) };
                    $word::from_le(atom.load(Ordering::Relaxed))
                },)+));
            }
            self.$one(at.gpa, off)
        }
    };
}

macro_rules! store_all {
    ($name:ident, $len:literal, $align:literal, $one:ident, ($($atomic:ty, $word:ident, $at:literal, $field:tt);+)) => {
        #[inline(always)]
        fn $name(&self, at: At, off: u64, words: ($($word,)+)) -> Result<(), MemoryError> {
            if let Some(ptr) = self.words(at, off, $len, $align, Want::Write) {
                $({
                    // SAFETY: `words` gave an address aligned for the first word, valid and writable for all of them
                    // while the table lives (M2, M3), and the others lie at multiples of their size from there.
                    let atom = unsafe { <$atomic>::from_ptr(ptr.wrapping_add($at).cast()) };
                    atom.store(words.$field.to_le(), Ordering::Relaxed);
                })+
                return Ok(());
            }
            self.$one(at.gpa, off, words)
        }
    };
}

impl Mapped<'_> {
    #[cold]
    #[inline(never)]
    fn desc_anew(self, gpa: u64, off: u64) -> Result<(u64, u64), MemoryError> {
        let at = At::unresolved(gpa);
        Ok((self.load_u64(at, off)?, self.load_u64(at, off + 8)?))
    }

    #[cold]
    #[inline(never)]
    fn packed_desc_anew(self, gpa: u64, off: u64) -> Result<(u64, u32, u16), MemoryError> {
        let at = At::unresolved(gpa);
        let (addr, len) = (self.load_u64(at, off)?, self.load_u32(at, off + 8)?);
        Ok((addr, len, self.load_u16(at, off + 12)?))
    }

    #[cold]
    #[inline(never)]
    fn used_anew(self, gpa: u64, off: u64) -> Result<(u32, u32), MemoryError> {
        let at = At::unresolved(gpa);
        Ok((self.load_u32(at, off)?, self.load_u32(at, off + 4)?))
    }

    #[cold]
    #[inline(never)]
    fn packed_used_anew(self, gpa: u64, off: u64) -> Result<(u32, u16), MemoryError> {
        let at = At::unresolved(gpa);
        Ok((self.load_u32(at, off)?, self.load_u16(at, off + 4)?))
    }

    #[cold]
    #[inline(never)]
    fn store_packed_used_anew(self, gpa: u64, off: u64, used: (u32, u16)) -> Result<(), MemoryError> {
        let at = At::unresolved(gpa);
        self.store_u32(at, off, used.0)?;
        self.store_u16(at, off + 4, used.1)
    }

    #[cold]
    #[inline(never)]
    fn store_desc_anew(self, gpa: u64, off: u64, desc: (u64, u64)) -> Result<(), MemoryError> {
        let at = At::unresolved(gpa);
        self.store_u64(at, off, desc.0)?;
        self.store_u64(at, off + 8, desc.1)
    }

    #[cold]
    #[inline(never)]
    fn store_packed_desc_anew(self, gpa: u64, off: u64, desc: (u64, u32, u16)) -> Result<(), MemoryError> {
        let at = At::unresolved(gpa);
        self.store_u64(at, off, desc.0)?;
        self.store_u32(at, off + 8, desc.1)?;
        self.store_u16(at, off + 12, desc.2)
    }

    #[cold]
    #[inline(never)]
    fn store_used_anew(self, gpa: u64, off: u64, entry: (u32, u32)) -> Result<(), MemoryError> {
        let at = At::unresolved(gpa);
        self.store_u32(at, off, entry.0)?;
        self.store_u32(at, off + 4, entry.1)
    }
}

impl Mapped<'_> {
    /// `read_raw`, of what has to be translated.
    ///
    /// # Safety
    /// `dst` is valid for writes of `len` bytes.
    #[cold]
    #[inline(never)]
    unsafe fn read_pieces(self, (gpa, off): (u64, u64), mut dst: *mut u8, len: usize) -> Result<(), MemoryError> {
        for piece in self.0.pieces(address(At::unresolved(gpa), off)?, len, Want::Read)? {
            // SAFETY: a piece is valid for its length (M1); pieces add up to `len`, for which `dst` is valid.
            unsafe { piece.ptr.cast_const().copy_to(dst, piece.len) };
            dst = dst.wrapping_add(piece.len);
        }
        Ok(())
    }

    /// `write_raw`, of what has to be translated.
    ///
    /// # Safety
    /// `src` is valid for reads of `len` bytes.
    #[cold]
    #[inline(never)]
    unsafe fn write_pieces(self, (gpa, off): (u64, u64), mut src: *const u8, len: usize) -> Result<(), MemoryError> {
        for piece in self.0.pieces(address(At::unresolved(gpa), off)?, len, Want::Write)? {
            // SAFETY: a piece is valid for its length (M1) and was checked to be writable; pieces add up to `len`,
            // for which `src` is valid.
            unsafe { src.copy_to(piece.ptr, piece.len) };
            src = src.wrapping_add(piece.len);
        }
        Ok(())
    }
}

impl Access for Mapped<'_> {
    #[inline]
    fn epoch(&self) -> u64 {
        self.0.epoch()
    }

    #[inline]
    fn resolve(&self, gpa: u64, len: u64, want: Want) -> Result<At, MemoryError> {
        self.0.resolve(gpa, len, want)
    }

    #[inline(always)]
    fn resolve_near<'a>(&'a self, near: &mut Near<'a>, gpa: u64, len: u64, want: Want) -> Option<At> {
        self.0.resolve_near(near, gpa, len, want)
    }

    #[inline]
    fn prefetch(&self, at: At, off: u64, want: Want) {
        if let Some(ptr) = self.direct(at, off, 1, want) {
            fetch(ptr, want);
            fetch(ptr.wrapping_add(AHEAD / 2), want);
        }
    }

    #[inline]
    fn intact(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        if any_lost() { self.0.intact(gpa, len) } else { Ok(()) }
    }

    #[inline]
    fn direct(&self, at: At, off: u64, len: u64, want: Want) -> Option<*mut u8> {
        Mapped::direct(*self, at, off, len, want)
    }

    #[inline(always)]
    fn relay<const N: usize>(
        &self,
        from: At,
        to: At,
        len: u64,
        head: impl FnOnce(&[u8; N]) -> Option<[u8; N]>,
    ) -> bool {
        let Some(rest) = len.checked_sub(N as u64).map(host_size) else {
            return false;
        };
        let Some(src) = self.direct(from, 0, len, Want::Read) else {
            return false;
        };
        let Some(dst) = self.direct(to, 0, len, Want::Write) else {
            return false;
        };
        // SAFETY: `src` is valid for `len` bytes (M2), which are `N` at least; any bytes are a value. M4 for races, here and
        // below.
        let Some(head) = head(&unsafe { src.cast::<[u8; N]>().read_unaligned() }) else {
            return false;
        };
        // SAFETY: `N` and `rest` are `len`, for which both are valid, `dst` for writes (M2).
        unsafe { copy(src.wrapping_add(N).cast_const(), dst.wrapping_add(N), rest) };
        // SAFETY: as above.
        unsafe { dst.cast::<[u8; N]>().write_unaligned(head) };
        true
    }

    #[inline(always)]
    fn descs(&self, area: Area<16>) -> Descs<'_> {
        // SAFETY: `self` has the table pinned, and the result borrows it.
        unsafe { area.words(self.0.stamp()) }
    }

    #[inline(always)]
    fn heads(&self, area: Area<2>) -> Heads<'_> {
        // SAFETY: as above.
        unsafe { area.words(self.0.stamp()) }
    }

    #[inline(always)]
    fn useds(&self, at: At) -> Option<Useds<'_>> {
        let base = self.words(at, 0, at.len, 4, Want::Read)?;
        // SAFETY: as above, aligned to 4.
        Some(unsafe { Words::new(base, at.len) })
    }

    #[inline(always)]
    fn desc_stores(&self, at: At) -> Option<DescStores<'_>> {
        let base = self.words(at, 0, at.len, 8, Want::Write)?;
        // SAFETY: as above, aligned to 8, and writable, as was asked (M2).
        Some(unsafe { Stores::new(base, at.len) })
    }

    #[inline(always)]
    fn head_stores(&self, at: At) -> Option<HeadStores<'_>> {
        let base = self.words(at, 0, at.len, 2, Want::Write)?;
        // SAFETY: as above, aligned to 2, and writable, as was asked (M2).
        Some(unsafe { Stores::new(base, at.len) })
    }

    #[inline(always)]
    fn used_stores(&self, at: At) -> Option<UsedStores<'_>> {
        let base = self.words(at, 0, at.len, 4, Want::Write)?;
        // SAFETY: as above, aligned to 4, and writable, as was asked (M2).
        Some(unsafe { Stores::new(base, at.len) })
    }

    load!(load_u16, AtomicU16, u16);
    load!(load_u32, AtomicU32, u32);
    load!(load_u64, AtomicU64, u64);
    store!(store_u16, AtomicU16, u16, Relaxed);
    store!(store_u16_release, AtomicU16, u16, Release);
    store!(store_u32, AtomicU32, u32, Relaxed);
    store!(store_u64, AtomicU64, u64, Relaxed);
    load_all!(load_desc, 16, 8, desc_anew, (AtomicU64, u64, 0; AtomicU64, u64, 8));
    load_all!(load_packed_desc, 14, 8, packed_desc_anew, (AtomicU64, u64, 0; AtomicU32, u32, 8; AtomicU16, u16, 12));
    load_all!(load_used, 8, 4, used_anew, (AtomicU32, u32, 0; AtomicU32, u32, 4));
    load_all!(load_packed_used, 6, 4, packed_used_anew, (AtomicU32, u32, 0; AtomicU16, u16, 4));
    store_all!(store_packed_used, 6, 4, store_packed_used_anew, (AtomicU32, u32, 0, 0; AtomicU16, u16, 4, 1));
    store_all!(store_desc, 16, 8, store_desc_anew, (AtomicU64, u64, 0, 0; AtomicU64, u64, 8, 1));
    store_all!(store_packed_desc, 14, 8, store_packed_desc_anew, (AtomicU64, u64, 0, 0; AtomicU32, u32, 8, 1; AtomicU16, u16, 12, 2));
    store_all!(store_used, 8, 4, store_used_anew, (AtomicU32, u32, 0, 0; AtomicU32, u32, 4, 1));

    #[inline(always)]
    fn load_u16_acquire(&self, at: At, off: u64) -> Result<u16, MemoryError> {
        let value = self.load_u16(at, off)?;
        fence(Ordering::Acquire);
        Ok(value)
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    #[inline]
    fn read(&self, at: At, off: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        // SAFETY: a slice is valid for writes of its length.
        unsafe { self.read_raw(at, off, dst.as_mut_ptr(), dst.len()) }
    }

    #[inline]
    fn write(&self, at: At, off: u64, src: &[u8]) -> Result<(), MemoryError> {
        // SAFETY: a slice is valid for reads of its length.
        unsafe { self.write_raw(at, off, src.as_ptr(), src.len()) }
    }

    #[inline(always)]
    unsafe fn read_raw(&self, at: At, off: u64, dst: *mut u8, len: usize) -> Result<(), MemoryError> {
        if let Some(src) = self.direct(at, off, len as u64, Want::Read) {
            // SAFETY: `src` is valid for `len` bytes (M2), `dst` by our caller's promise. The other side may write
            // the bytes meanwhile: the racing bulk copy of M4.
            unsafe { copy(src.cast_const(), dst, len) };
            return Ok(());
        }
        // SAFETY: our caller's promise.
        unsafe { self.read_pieces((at.gpa, off), dst, len) }
    }

    #[inline(always)]
    unsafe fn write_raw(&self, at: At, off: u64, src: *const u8, len: usize) -> Result<(), MemoryError> {
        if let Some(dst) = self.direct(at, off, len as u64, Want::Write) {
            // SAFETY: `dst` is valid for writes of `len` bytes (M2), `src` for reads by our caller's promise. The
            // other side may access the bytes meanwhile: the racing bulk copy of M4.
            unsafe { copy(src, dst, len) };
            return Ok(());
        }
        // SAFETY: our caller's promise.
        unsafe { self.write_pieces((at.gpa, off), src, len) }
    }

    fn fill(&self, at: At, off: u64, len: u64, value: u8) -> Result<(), MemoryError> {
        for piece in self.0.pieces(address(at, off)?, host_size(len), Want::Write)? {
            // SAFETY: a piece is valid for its length (M1) and was checked to be writable; M4 for races.
            unsafe { piece.ptr.write_bytes(value, piece.len) };
        }
        Ok(())
    }
}
