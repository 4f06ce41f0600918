//! `Mediated`: guest memory of every kind, with remote regions, a trace and a dirty log: what is not worth a fast way.
//!
//! # Theory
//!
//! `Mapped` must cost nothing, so it knows nothing but mapped memory. A memory that has remote regions, is traced or logged is
//! reached through `Mediated`, which asks `Mapped` first; what `Mapped` says is not mapped may be remote. An address of
//! a remote range, or of one that crosses from one kind to the other, stays unresolved, and each access looks again.
//!
//! A copy that crosses regions is checked whole before its first byte is written, as ever. That a transfer fails is only
//! known afterwards: then what came before it was written.
//!
//! The dirty log is marked after each write, for exactly the bytes that were written; a write of none marks nothing.

use super::log::Log;
use super::mapped::{Mapped, address};
use super::table::{Remote, Table};
use super::transfer::MAX_TRANSFER;
use super::{Access, AccessKind, At, MemoryError, Record, Trace, Want, any_lost, host_size};

/// A pinned view of guest memory of every kind; see the module's head.
#[derive(Clone, Copy, Debug)]
pub struct Mediated<'a> {
    table: &'a Table,
    mem: Mapped<'a>,
    trace: Option<&'a Trace>,
    log: Option<&'a Log>,
}

/// Bytes of guest memory that can be reached at once, at least 1.
#[derive(Clone, Copy)]
struct Part<'a> {
    gpa: u64,
    len: usize,
    place: Place<'a>,
}

#[derive(Clone, Copy)]
enum Place<'a> {
    /// Side by side in the host, from this address on (M1).
    Mapped(*mut u8),
    /// Behind one transfer.
    Remote(&'a Remote),
}

/// Which end of a stretch a part of it is taken from.
#[derive(Clone, Copy)]
enum End {
    Low,
    High,
}

impl Part<'_> {
    /// `len` bytes, at most all, of its low or its high end.
    fn cut(self, len: usize, end: End) -> Self {
        let len = len.min(self.len);
        let skip = match end {
            End::Low => 0,
            End::High => self.len.saturating_sub(len),
        };
        let place = match self.place {
            Place::Mapped(ptr) => Place::Mapped(ptr.wrapping_add(skip)),
            remote @ Place::Remote(_) => remote,
        };
        Self {
            gpa: self.gpa.saturating_add(skip as u64),
            len,
            place,
        }
    }

    /// Copy it to `dst`.
    ///
    /// # Safety
    /// `dst` is valid for writes of the part's length. It may overlap guest memory (a live view does).
    unsafe fn read(self, dst: *mut u8) -> Result<(), MemoryError> {
        match self.place {
            // SAFETY: a part is valid for its length (M1), and so is `dst` by our caller's promise; M4 for races.
            Place::Mapped(src) => unsafe { src.cast_const().copy_to(dst, self.len) },
            Place::Remote(remote) => {
                // Foreign code fills what is ours alone: no slice of `dst` may exist (M6, N1).
                let mut bytes = vec![0; self.len];
                remote.read(self.gpa, &mut bytes)?;
                // SAFETY: `bytes` has the part's length, for which `dst` is valid by our caller's promise.
                unsafe { bytes.as_ptr().copy_to(dst, self.len) };
            }
        }
        Ok(())
    }

    /// Copy it, which is writable, from `src`.
    ///
    /// # Safety
    /// `src` is valid for reads of the part's length. It may overlap guest memory (a live view does).
    unsafe fn write(self, src: *const u8) -> Result<(), MemoryError> {
        match self.place {
            // SAFETY: a part is valid for its length (M1), and so is `src` by our caller's promise; M4 for races.
            Place::Mapped(dst) => unsafe { src.copy_to(dst, self.len) },
            Place::Remote(remote) => {
                let mut bytes = vec![0; self.len];
                // SAFETY: `src` is valid for the part's length by our caller's promise, and `bytes` has that length.
                unsafe { src.copy_to(bytes.as_mut_ptr(), self.len) };
                remote.write(self.gpa, &bytes)?;
            }
        }
        Ok(())
    }

    /// Copy it, which is writable, from a part of the same length, as if all were read before the first byte is written.
    fn copy_from(self, from: Part<'_>) -> Result<(), MemoryError> {
        match (self.place, from.place) {
            // SAFETY: both parts are valid for their lengths (M1), which are the same; M4 for races.
            (Place::Mapped(dst), _) => unsafe { from.read(dst) },
            // SAFETY: as above.
            (Place::Remote(_), Place::Mapped(src)) => unsafe { self.write(src) },
            (Place::Remote(to), Place::Remote(remote)) => {
                let mut bytes = vec![0; from.len];
                remote.read(from.gpa, &mut bytes)?;
                to.write(self.gpa, &bytes)
            }
        }
    }
}

impl<'a> Mediated<'a> {
    /// View memory through `table`, recording in `trace`.
    #[must_use]
    pub fn new(table: &'a Table, trace: Option<&'a Trace>) -> Self {
        Self {
            table,
            mem: Mapped::new(table),
            trace,
            log: table.log().map(AsRef::as_ref),
        }
    }

    /// Record an access; whether it may write.
    fn note(&self, kind: AccessKind, at: At, off: u64, len: u64) -> bool {
        self.trace.is_none_or(|trace| {
            // What it changes, the other side changes.
            let unseen = Self {
                trace: None,
                log: None,
                ..*self
            };
            let gpa = at.gpa.saturating_add(off);
            trace.before(&unseen, Record { kind, gpa, len })
        })
    }

    /// `len` bytes at `gpa` were written.
    #[inline]
    fn mark(&self, gpa: u64, len: u64) {
        if let Some(log) = self.log {
            self.mark_in(log, gpa, len);
        }
    }

    /// Each region has its own physical addresses, and those are what the log is about.
    fn mark_in(&self, log: &Log, gpa: u64, len: u64) {
        let (mut at, mut left) = (gpa, len);
        while left > 0 {
            let Some(region) = self.table.region_of(at) else { return };
            let step = left.min(region.end().wrapping_sub(at));
            log.mark(region.physical().wrapping_add(at.wrapping_sub(region.gpa())), step);
            (at, left) = (at.wrapping_add(step), left - step);
        }
    }

    /// The bytes from `gpa` (`Low`) or before it (`High`) that can be reached at once, at most `limit`.
    fn part(&self, gpa: u64, limit: usize, end: End) -> Option<Part<'a>> {
        let inside = match end {
            End::Low => gpa,
            End::High => gpa.checked_sub(1)?,
        };
        let slot = self.table.find(inside);
        let mapped = slot.map(|slot| (slot.gpa, slot.size, limit, Place::Mapped(slot.ptr)));
        let remote = || {
            let remote = self.table.find_remote(inside)?;
            let limit = limit.min(MAX_TRANSFER);
            Some((remote.gpa, remote.size, limit, Place::Remote(remote)))
        };
        let (start, size, limit, place) = mapped.or_else(remote)?;
        // All of the region from `gpa` on, or before it, of which the near end is taken.
        let skip = gpa.wrapping_sub(start);
        let (first, rest) = match end {
            End::Low => (skip, size.saturating_sub(skip)),
            End::High => (0, skip),
        };
        let place = match place {
            Place::Mapped(ptr) => Place::Mapped(ptr.wrapping_add(host_size(first))),
            remote @ Place::Remote(_) => remote,
        };
        let all = Part {
            gpa: start.wrapping_add(first),
            len: host_size(rest),
            place,
        };
        Some(all.cut(limit, end))
    }

    /// Check that all `len` bytes at `gpa` are in regions of either kind, and writable if so wanted; names the first that
    /// is not.
    ///
    /// # Errors
    /// As [`Access::resolve`].
    pub fn check(&self, gpa: u64, len: u64, want: Want) -> Result<(), MemoryError> {
        let end = gpa.checked_add(len).ok_or(MemoryError::Wraps { gpa, len })?;
        let mut at = gpa;
        while at < end {
            let mapped = self.table.find(at).map(|slot| (slot.gpa, slot.size, slot.allows(want)));
            let remote = || {
                let remote = self.table.find_remote(at)?;
                Some((remote.gpa, remote.size, remote.writable || want == Want::Read))
            };
            let (start, size, allowed) = mapped.or_else(remote).ok_or_else(|| self.table.absent(at, want))?;
            if !allowed {
                return Err(self.table.refused(at, want));
            }
            at = start.saturating_add(size);
        }
        Ok(())
    }

    /// Do `work` on each part of `len` bytes at `gpa`, in order, once all of them are known to be usable; it is told how
    /// many bytes came before.
    fn each(
        &self,
        gpa: u64,
        len: usize,
        want: Want,
        mut work: impl FnMut(Part<'a>, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        self.check(gpa, len as u64, want)?;
        let mut done = 0;
        while done < len {
            let gpa = gpa.saturating_add(done as u64);
            let part = self.part(gpa, len.saturating_sub(done), End::Low);
            let part = part.ok_or_else(|| self.table.absent(gpa, want))?;
            work(part, done)?;
            done = done.saturating_add(part.len);
        }
        Ok(())
    }

    /// Copy `len` bytes from `src` to `dst`, as if all were read before the first is written.
    ///
    /// # Errors
    /// When a byte of either range is not mapped, or one of `dst` is not writable, and then nothing was written; or when
    /// a transfer fails or memory is lost.
    pub fn copy_within(&self, dst: u64, src: u64, len: u64) -> Result<(), MemoryError> {
        self.check(src, len, Want::Read)?;
        self.check(dst, len, Want::Write)?;
        // From whichever end the bytes still to be read are not overwritten; parts themselves may overlap.
        let end = if dst <= src { End::Low } else { End::High };
        let mut left = host_size(len);
        while left > 0 {
            let skip = match end {
                End::Low => len - left as u64,
                End::High => left as u64,
            };
            let (to, from) = (self.part(dst + skip, left, end), self.part(src + skip, left, end));
            let (Some(to), Some(from)) = (to, from) else {
                return Err(MemoryError::Unmapped { gpa: src });
            };
            let step = to.len.min(from.len);
            let to = to.cut(step, end);
            to.copy_from(from.cut(step, end))?;
            self.mark(to.gpa, to.len as u64);
            left -= step;
        }
        self.intact(src, len)?;
        self.intact(dst, len)
    }

    /// The remote region of a word that `Mapped` did not find: aligned, so it lies in one region (M3).
    fn remote_word(&self, error: MemoryError, want: Want) -> Result<(&'a Remote, u64), MemoryError> {
        let MemoryError::Unmapped { gpa } = error else {
            return Err(error);
        };
        let remote = self.table.find_remote(gpa).ok_or(error)?;
        if want == Want::Write && !remote.writable {
            return Err(MemoryError::ReadOnly { gpa });
        }
        Ok((remote, gpa))
    }
}

macro_rules! load {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64) -> Result<$word, MemoryError> {
            self.note(AccessKind::Load, at, off, size_of::<$word>() as u64);
            self.mem.$name(at, off).or_else(|error| {
                let (remote, gpa) = self.remote_word(error, Want::Read)?;
                let mut bytes = [0; size_of::<$word>()];
                remote.read(gpa, &mut bytes)?;
                Ok(<$word>::from_le_bytes(bytes))
            })
        }
    };
}

macro_rules! store {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64, value: $word) -> Result<(), MemoryError> {
            if !self.note(AccessKind::Store, at, off, size_of::<$word>() as u64) {
                return Ok(());
            }
            self.mem.$name(at, off, value).or_else(|error| {
                let (remote, gpa) = self.remote_word(error, Want::Write)?;
                remote.write(gpa, &value.to_le_bytes())
            })?;
            self.mark(at.gpa.wrapping_add(off), size_of::<$word>() as u64);
            Ok(())
        }
    };
}

impl Access for Mediated<'_> {
    fn epoch(&self) -> u64 {
        self.mem.epoch()
    }

    fn resolve(&self, gpa: u64, len: u64, want: Want) -> Result<At, MemoryError> {
        let unresolved = || self.check(gpa, len, want).map(|()| At::unresolved(gpa));
        self.mem.resolve(gpa, len, want).or_else(|_| unresolved())
    }

    fn intact(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        // A log that is lost is one that says nothing of what was written.
        if any_lost() && self.log.is_some_and(Log::lost) {
            return Err(MemoryError::Lost { gpa });
        }
        self.mem.intact(gpa, len)
    }

    load!(load_u16, u16);
    load!(load_u16_acquire, u16);
    load!(load_u32, u32);
    load!(load_u64, u64);
    store!(store_u16, u16);
    store!(store_u16_release, u16);
    store!(store_u32, u32);
    store!(store_u64, u64);

    fn fence(&self) {
        self.note(AccessKind::Fence, At::unresolved(0), 0, 0);
        self.mem.fence();
    }

    fn read(&self, at: At, off: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        // SAFETY: a slice is valid for writes of its length.
        unsafe { self.read_raw(at, off, dst.as_mut_ptr(), dst.len()) }
    }

    fn write(&self, at: At, off: u64, src: &[u8]) -> Result<(), MemoryError> {
        // SAFETY: a slice is valid for reads of its length.
        unsafe { self.write_raw(at, off, src.as_ptr(), src.len()) }
    }

    unsafe fn read_raw(&self, at: At, off: u64, dst: *mut u8, len: usize) -> Result<(), MemoryError> {
        self.note(AccessKind::Read, at, off, len as u64);
        if self.mem.direct(at, off, len as u64, Want::Read).is_some() {
            // SAFETY: our caller's promise is the one that is asked for.
            unsafe { self.mem.read_raw(at, off, dst, len) }?;
        } else {
            self.each(address(at, off)?, len, Want::Read, |part, done| {
                // SAFETY: parts add up to `len`, for which `dst` is valid.
                unsafe { part.read(dst.wrapping_add(done)) }
            })?;
        }
        self.intact(address(at, off)?, len as u64)
    }

    unsafe fn write_raw(&self, at: At, off: u64, src: *const u8, len: usize) -> Result<(), MemoryError> {
        if !self.note(AccessKind::Write, at, off, len as u64) {
            return Ok(());
        }
        if self.mem.direct(at, off, len as u64, Want::Write).is_some() {
            // SAFETY: our caller's promise is the one that is asked for.
            unsafe { self.mem.write_raw(at, off, src, len) }?;
            self.mark(at.gpa.wrapping_add(off), len as u64);
        } else {
            self.each(address(at, off)?, len, Want::Write, |part, done| {
                // SAFETY: the part was checked to be writable; parts add up to `len`, for which `src` is valid.
                unsafe { part.write(src.wrapping_add(done)) }?;
                self.mark(part.gpa, part.len as u64);
                Ok(())
            })?;
        }
        self.intact(address(at, off)?, len as u64)
    }

    fn fill(&self, at: At, off: u64, len: u64, value: u8) -> Result<(), MemoryError> {
        if !self.note(AccessKind::Write, at, off, len) {
            return Ok(());
        }
        self.each(address(at, off)?, host_size(len), Want::Write, |part, _| {
            match part.place {
                // SAFETY: a part is valid for its length (M1) and was checked to be writable; M4 for races.
                Place::Mapped(ptr) => unsafe { ptr.write_bytes(value, part.len) },
                Place::Remote(remote) => remote.write(part.gpa, &vec![value; part.len])?,
            }
            self.mark(part.gpa, part.len as u64);
            Ok(())
        })?;
        self.intact(address(at, off)?, len)
    }
}
