//! The one seam between queues and guest memory.
//!
//! # Theory
//!
//! Everything above this trait (`ring`, `chain`, `iov`, `queue`) reads and writes guest memory through
//! [`Access`] and through nothing else. An `Access` value is a *pinned view*: while it lives, the region
//! table cannot change, so an address that was resolved through it stays valid for as long as it does.
//! `Mapped` is raw pointers and costs nothing; `Mediated` reaches remote memory as well, records, and can change memory
//! between two accesses, as a racing other side would.
//!
//! A ring word is a naturally aligned 2, 4 or 8 byte word that both sides access at the same time: it is
//! always an atomic access. Bulk data is copied by [`Access::read`] and [`Access::write`] without
//! atomics: the other side may change it meanwhile, and then the copy holds some mixture, which is the
//! other side's own loss. No reference to guest memory is formed, but
//! to a single atomic word for the time of its access.
//!
//! Values are little endian in memory (VIRTIO 1.4, 2.7 and 2.8: `le16`, `le32`, `le64`); the words that
//! this trait returns and takes are in the host's order.

use super::{Area, DescStores, Descs, HeadStores, Heads, MemoryError, Near, UsedStores, Useds, Words};

/// A resolved guest address: where one region holds the whole range, the way to its bytes; else only the address,
/// and each access is translated anew.
///
/// What a pin may use directly is decided by the pin, not by the holder: the fields behind `gpa` are private to
/// this module, and each access compares the table that resolved the address (`stamp`) with its own and the
/// offset with `len`. An `At` of another epoch, of another memory or with an offset beyond its range is therefore
/// no error and no danger, only slow: it is translated anew and gives what lies at that address now.
#[derive(Clone, Copy, Debug)]
pub struct At {
    /// Guest address of the first byte.
    pub gpa: u64,
    /// Host address of the first byte; null when unresolved.
    pub(super) ptr: *mut u8,
    /// Bytes that may be used from `ptr` on; 0 when unresolved.
    pub(super) len: u64,
    /// Which table resolved it: that table's stamp (odd) when stores are allowed, one less when only loads are.
    pub(super) stamp: u64,
}

// SAFETY: `At` is an address and numbers; dereferencing it happens in `Mapped` only, which compares `stamp` with the
// table it has pinned (M2), in whatever thread that is.
unsafe impl Send for At {}
// SAFETY: as above; sharing an address is not accessing what it points to.
unsafe impl Sync for At {}

impl At {
    /// An address that no pin has resolved: every access through it is translated.
    #[must_use]
    pub const fn unresolved(gpa: u64) -> Self {
        Self {
            gpa,
            ptr: std::ptr::null_mut(),
            len: 0,
            stamp: 0,
        }
    }
}

/// Bytes that one [`Access::prefetch`] fetches: those of two cache lines.
pub(crate) const AHEAD: usize = 128;

/// What an access wants to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Only read it.
    Read,
    /// Write it (and perhaps read it).
    Write,
}

impl Want {
    /// As a word for messages.
    pub(super) const fn verb(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// Guest memory as queues see it; see the module's head.
///
/// `off` is a byte offset from `at`, meant to lie inside the range that `at` was resolved for (else it is translated,
/// which is slow and never unsound); `at.gpa + off` is aligned to the word's size, else `MemoryError::Misaligned`.
pub trait Access {
    /// Number of the region table that is pinned.
    fn epoch(&self) -> u64;

    /// Resolve `len` bytes at `gpa` as one operation.
    ///
    /// # Errors
    /// `Wraps` when `gpa + len` leaves the address space, `Unmapped` with the first address that is in no
    /// region, `ReadOnly` when `want` is `Write` and a region is not writable; in the memory of an IOMMU both are
    /// `Untranslated`. A `len` of 0 can be resolved at any address.
    fn resolve(&self, gpa: u64, len: u64, want: Want) -> Result<At, MemoryError>;

    /// Say that the first bytes at `at + off` are about to be accessed; nothing more than a hint.
    #[inline(always)]
    fn prefetch(&self, at: At, off: u64, want: Want) {
        let _ = (at, off, want);
    }

    /// As [`Access::resolve`] where one region holds the range, looked for first where the last one was found, which is noted:
    /// None says nothing.
    #[inline(always)]
    fn resolve_near<'a>(&'a self, near: &mut Near<'a>, gpa: u64, len: u64, want: Want) -> Option<At> {
        let _ = (near, gpa, len, want);
        None
    }

    /// Check that what was accessed of `len` bytes at `gpa` was their file's own: asked after accesses, and before anything
    /// is made of what they brought.
    ///
    /// # Errors
    /// `Lost` when a region of the range is lost.
    fn intact(&self, gpa: u64, len: u64) -> Result<(), MemoryError>;

    /// Host address of `len` bytes at `at + off`, where that is all there is to reaching them: none where somebody must be
    /// told, or has to carry it.
    #[inline]
    fn direct(&self, at: At, off: u64, len: u64, want: Want) -> Option<*mut u8> {
        let _ = (at, off, len, want);
        None
    }

    /// Copy `len` bytes from one place to another, which may overlap, but `N` first ones, in whose place is what `head` makes
    /// of them: where that is all there is to it, and where it makes something; whether it was so.
    #[inline(always)]
    fn relay<const N: usize>(
        &self,
        from: At,
        to: At,
        len: u64,
        head: impl FnOnce(&[u8; N]) -> Option<[u8; N]>,
    ) -> bool {
        let _ = (from, to, len, head);
        false
    }

    /// Relaxed 16-bit load.
    ///
    /// # Errors
    /// When the word is not mapped or misaligned.
    fn load_u16(&self, at: At, off: u64) -> Result<u16, MemoryError>;

    /// 16-bit load with acquire ordering.
    ///
    /// # Errors
    /// When the word is not mapped or misaligned.
    fn load_u16_acquire(&self, at: At, off: u64) -> Result<u16, MemoryError>;

    /// Relaxed 32-bit load.
    ///
    /// # Errors
    /// When the word is not mapped or misaligned.
    fn load_u32(&self, at: At, off: u64) -> Result<u32, MemoryError>;

    /// Relaxed 64-bit load.
    ///
    /// # Errors
    /// When the word is not mapped or misaligned.
    fn load_u64(&self, at: At, off: u64) -> Result<u64, MemoryError>;

    /// Relaxed 16-bit store.
    ///
    /// # Errors
    /// When the word is not mapped, not writable or misaligned.
    fn store_u16(&self, at: At, off: u64, value: u16) -> Result<(), MemoryError>;

    /// 16-bit store with release ordering.
    ///
    /// # Errors
    /// When the word is not mapped, not writable or misaligned.
    fn store_u16_release(&self, at: At, off: u64, value: u16) -> Result<(), MemoryError>;

    /// Relaxed 32-bit store.
    ///
    /// # Errors
    /// When the word is not mapped, not writable or misaligned.
    fn store_u32(&self, at: At, off: u64, value: u32) -> Result<(), MemoryError>;

    /// Relaxed 64-bit store.
    ///
    /// # Errors
    /// When the word is not mapped, not writable or misaligned.
    fn store_u64(&self, at: At, off: u64, value: u64) -> Result<(), MemoryError>;

    /// The descriptors of `area`, to be read many times: none, where each has to be asked for.
    #[inline(always)]
    fn descs(&self, area: Area<16>) -> Descs<'_> {
        let _ = area;
        Words::none()
    }

    /// The entries of the avail ring in `area`, to be read many times: none, where each has to be asked for.
    #[inline(always)]
    fn heads(&self, area: Area<2>) -> Heads<'_> {
        let _ = area;
        Words::none()
    }

    /// The entries of the used ring at `at`, to be read many times: none, where each has to be asked for.
    #[inline(always)]
    fn useds(&self, at: At) -> Option<Useds<'_>> {
        let _ = at;
        None
    }

    /// The descriptors at `at`, to be written many times: none, where each store goes its own way.
    #[inline(always)]
    fn desc_stores(&self, at: At) -> Option<DescStores<'_>> {
        let _ = at;
        None
    }

    /// The entries of the avail ring at `at`, to be written: none, where each store goes its own way.
    #[inline(always)]
    fn head_stores(&self, at: At) -> Option<HeadStores<'_>> {
        let _ = at;
        None
    }

    /// The entries of the used ring at `at`, to be written many times: none, where each store goes its own way.
    #[inline(always)]
    fn used_stores(&self, at: At) -> Option<UsedStores<'_>> {
        let _ = at;
        None
    }

    /// A split descriptor: two relaxed 64-bit loads, at `off` and 8 bytes on.
    ///
    /// # Errors
    /// As [`Access::load_u64`].
    #[inline]
    fn load_desc(&self, at: At, off: u64) -> Result<(u64, u64), MemoryError> {
        Ok((self.load_u64(at, off)?, self.load_u64(at, off + 8)?))
    }

    /// A packed descriptor without its flags: relaxed loads of 64, 32 and 16 bits, one after the other.
    ///
    /// # Errors
    /// As [`Access::load_u64`].
    #[inline]
    fn load_packed_desc(&self, at: At, off: u64) -> Result<(u64, u32, u16), MemoryError> {
        let (addr, len) = (self.load_u64(at, off)?, self.load_u32(at, off + 8)?);
        Ok((addr, len, self.load_u16(at, off + 12)?))
    }

    /// Length and id of a used packed descriptor: relaxed loads of 32 and 16 bits, at `off` and 4 bytes on.
    ///
    /// # Errors
    /// As [`Access::load_u32`].
    #[inline]
    fn load_packed_used(&self, at: At, off: u64) -> Result<(u32, u16), MemoryError> {
        Ok((self.load_u32(at, off)?, self.load_u16(at, off + 4)?))
    }

    /// A used entry: two relaxed 32-bit loads, at `off` and 4 bytes on.
    ///
    /// # Errors
    /// As [`Access::load_u32`].
    #[inline]
    fn load_used(&self, at: At, off: u64) -> Result<(u32, u32), MemoryError> {
        Ok((self.load_u32(at, off)?, self.load_u32(at, off + 4)?))
    }

    /// A split descriptor: two relaxed 64-bit stores, at `off` and 8 bytes on.
    ///
    /// # Errors
    /// As [`Access::store_u64`].
    #[inline]
    fn store_desc(&self, at: At, off: u64, desc: (u64, u64)) -> Result<(), MemoryError> {
        self.store_u64(at, off, desc.0)?;
        self.store_u64(at, off + 8, desc.1)
    }

    /// A packed descriptor without its flags: relaxed stores of 64, 32 and 16 bits, one after the other.
    ///
    /// # Errors
    /// As [`Access::store_u64`].
    #[inline]
    fn store_packed_desc(&self, at: At, off: u64, desc: (u64, u32, u16)) -> Result<(), MemoryError> {
        self.store_u64(at, off, desc.0)?;
        self.store_u32(at, off + 8, desc.1)?;
        self.store_u16(at, off + 12, desc.2)
    }

    /// Length and id of a used packed descriptor: relaxed stores of 32 and 16 bits, at `off` and 4 bytes on.
    ///
    /// # Errors
    /// As [`Access::store_u32`].
    #[inline]
    fn store_packed_used(&self, at: At, off: u64, used: (u32, u16)) -> Result<(), MemoryError> {
        self.store_u32(at, off, used.0)?;
        self.store_u16(at, off + 4, used.1)
    }

    /// A used entry: two relaxed 32-bit stores, at `off` and 4 bytes on.
    ///
    /// # Errors
    /// As [`Access::store_u32`].
    #[inline]
    fn store_used(&self, at: At, off: u64, entry: (u32, u32)) -> Result<(), MemoryError> {
        self.store_u32(at, off, entry.0)?;
        self.store_u32(at, off + 4, entry.1)
    }

    /// Sequentially consistent fence: orders a store of ours before a load of ours (notify and arm).
    fn fence(&self);

    /// Copy `dst.len()` bytes at `at + off` out of guest memory; crosses adjacent regions.
    ///
    /// # Errors
    /// When a byte of the range is not mapped; `dst` may then be partly written.
    fn read(&self, at: At, off: u64, dst: &mut [u8]) -> Result<(), MemoryError>;

    /// Copy `src` into guest memory at `at + off`; crosses adjacent regions.
    ///
    /// # Errors
    /// When a byte of the range is not mapped or not writable: checked before the first byte is written.
    fn write(&self, at: At, off: u64, src: &[u8]) -> Result<(), MemoryError>;

    /// Copy `len` bytes at `at + off` to `dst`, memory that foreign code may change meanwhile.
    ///
    /// # Safety
    /// `dst` is valid for writes of `len` bytes. It may overlap guest memory (a live view does).
    ///
    /// # Errors
    /// As [`Access::read`].
    unsafe fn read_raw(&self, at: At, off: u64, dst: *mut u8, len: usize) -> Result<(), MemoryError>;

    /// Copy `len` bytes from `src`, memory that foreign code may change meanwhile, to `at + off`.
    ///
    /// # Safety
    /// `src` is valid for reads of `len` bytes. It may overlap guest memory (a live view does).
    ///
    /// # Errors
    /// As [`Access::write`].
    unsafe fn write_raw(&self, at: At, off: u64, src: *const u8, len: usize) -> Result<(), MemoryError>;

    /// Set `len` bytes at `at + off` to `value`.
    ///
    /// # Errors
    /// As [`Access::write`].
    fn fill(&self, at: At, off: u64, len: u64, value: u8) -> Result<(), MemoryError>;
}
