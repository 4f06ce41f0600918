//! Gather and scatter: copies between a chain's segments and host buffers.
//!
//! Host buffers are raw pointers, since a Python buffer can be changed by other threads while we copy, and a
//! reference would promise that it is not. Segments resolved in an older epoch are translated again.

use crate::chain::Segment;
use crate::mem::{Access, At, MemoryError, Vector, Want, any_lost};

/// The segments of one chain, with the epoch that they were resolved for.
#[derive(Clone, Copy, Debug)]
pub struct Iov<'a> {
    segments: &'a [Segment],
    epoch: u64,
}

/// Buffers that are fetched at once: a processor waits for no more than some of them.
const FETCHED: usize = 32;

/// Ask the processor to fetch the starts of the first buffers, which are about to be copied.
#[inline]
pub fn prefetch<A: Access>(mem: &A, segments: &[Segment]) {
    for segment in segments.iter().take(FETCHED) {
        mem.prefetch(segment.at, 0, if segment.writable { Want::Write } else { Want::Read });
    }
}

/// A stretch of one segment that a copy touches.
struct Piece {
    at: At,
    off: u64,
    len: usize,
}

impl<'a> Iov<'a> {
    /// All segments of a chain; the two kinds are told apart at each copy.
    #[must_use]
    pub const fn new(segments: &'a [Segment], epoch: u64) -> Self {
        Self { segments, epoch }
    }

    /// Call `f` with every piece of the readable or writable part between `offset` and `offset + len`, in
    /// order, and with the number of bytes before it. Returns the number of bytes covered.
    #[inline]
    fn pieces<A: Access>(
        &self,
        mem: &A,
        writable: bool,
        offset: u64,
        len: usize,
        mut f: impl FnMut(Piece, usize) -> Result<(), MemoryError>,
    ) -> Result<usize, MemoryError> {
        let fresh = mem.epoch() == self.epoch;
        let mut skip = offset;
        let mut done = 0;
        for segment in self.segments.iter().filter(|segment| segment.writable == writable) {
            let size = u64::from(segment.len);
            if skip >= size {
                skip -= size;
                continue;
            }
            if done == len {
                break;
            }
            let room = usize::try_from(size - skip).unwrap_or(usize::MAX);
            let piece = room.min(len - done);
            let at = if fresh {
                segment.at
            } else {
                At::unresolved(segment.at.gpa)
            };
            f(
                Piece {
                    at,
                    off: skip,
                    len: piece,
                },
                done,
            )?;
            done += piece;
            skip = 0;
        }
        Ok(done)
    }

    /// The first buffer of the kind, if it alone holds `len` bytes from its start, can be reached directly, and is where most
    /// requests have it: at the start of the chain, or behind one buffer of the other kind.
    #[inline(always)]
    fn alone<A: Access>(&self, mem: &A, want: Want, offset: u64, len: usize) -> Option<At> {
        let writable = want == Want::Write;
        let first = match self.segments {
            [first, ..] if first.writable == writable => first,
            [_, second, ..] if second.writable == writable => second,
            _ => return None,
        };
        // What was resolved for other memory is not reached directly, so its epoch need not be asked for.
        let direct = offset == 0 && mem.direct(first.at, 0, len as u64, want).is_some();
        direct.then_some(first.at)
    }

    /// In a newer epoch: whether all that a copy into the writable part would touch can still be written, so
    /// that what vanished is found before the first byte is written. In the chain's own epoch it all can.
    #[inline]
    fn check_writable<A: Access>(&self, mem: &A, offset: u64, len: usize) -> Result<(), MemoryError> {
        if mem.epoch() == self.epoch {
            return Ok(());
        }
        self.pieces(mem, true, offset, len, |piece, _| {
            // A segment never wraps: that was checked when its chain was popped.
            let gpa = piece.at.gpa.saturating_add(piece.off);
            mem.resolve(gpa, piece.len as u64, Want::Write).map(drop)
        })
        .map(drop)
    }

    /// After a copy: whether memory that it touched is lost, and what it brought therefore worth nothing.
    #[inline]
    pub(crate) fn intact<A: Access>(
        &self,
        mem: &A,
        writable: bool,
        offset: u64,
        len: usize,
    ) -> Result<(), MemoryError> {
        if any_lost() {
            self.find_lost(mem, writable, offset, len)
        } else {
            Ok(())
        }
    }

    #[cold]
    fn find_lost<A: Access>(&self, mem: &A, writable: bool, offset: u64, len: usize) -> Result<(), MemoryError> {
        self.pieces(mem, writable, offset, len, |piece, _| {
            mem.intact(piece.at.gpa.saturating_add(piece.off), piece.len as u64)
        })
        .map(drop)
    }

    /// As much of the readable (`Read`) or writable (`Write`) part from `offset` on, `len` bytes at most, as a system call
    /// can be given at once; of no bytes when it cannot be given what lies at `offset`. The chain is of the present epoch.
    pub fn vector<'m, A: Access>(&self, mem: &'m A, want: Want, offset: u64, len: u64) -> Vector<'m, A> {
        let mut vector = Vector::new(mem, want);
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // The first piece that cannot be in it ends it.
        let _ = self.pieces(mem, want == Want::Write, offset, len, |piece, _| {
            let fits = vector.push(piece.at, piece.off, piece.len);
            fits.then_some(()).ok_or(MemoryError::Unmapped { gpa: piece.at.gpa })
        });
        vector
    }

    /// Gather up to `len` bytes of the readable part from `offset` on; the number copied.
    ///
    /// # Safety
    /// `dst` is valid for writes of `len` bytes. It may overlap guest memory (a live view does).
    ///
    /// # Errors
    /// When memory of the chain is no longer mapped, or lost; `dst` may then be partly written.
    #[inline(always)]
    pub unsafe fn gather<A: Access>(
        &self,
        mem: &A,
        offset: u64,
        dst: *mut u8,
        len: usize,
    ) -> Result<usize, MemoryError> {
        if let Some(at) = self.alone(mem, Want::Read, offset, len) {
            // SAFETY: our caller's promise.
            unsafe { mem.read_raw(at, 0, dst, len) }?;
            self.intact(mem, false, 0, len)?;
            return Ok(len);
        }
        // SAFETY: as above.
        unsafe { self.gather_pieces(mem, offset, dst, len) }
    }

    /// `gather`, of several buffers, or not from the first one's start.
    ///
    /// # Safety
    /// As [`Iov::gather`].
    unsafe fn gather_pieces<A: Access>(
        &self,
        mem: &A,
        offset: u64,
        dst: *mut u8,
        len: usize,
    ) -> Result<usize, MemoryError> {
        let copied = self.pieces(mem, false, offset, len, |piece, before| {
            // SAFETY: `before + piece.len <= len`, so the target stays inside what the caller vouches for.
            let target = unsafe { dst.add(before) };
            // SAFETY: as above, `target` is valid for `piece.len` bytes.
            unsafe { mem.read_raw(piece.at, piece.off, target, piece.len) }
        })?;
        self.intact(mem, false, offset, len)?;
        Ok(copied)
    }

    /// Scatter up to `len` bytes into the writable part from `offset` on; the number copied.
    ///
    /// # Safety
    /// `src` is valid for reads of `len` bytes. It may overlap guest memory (a live view does).
    ///
    /// # Errors
    /// When memory of the chain is no longer mapped, and then nothing was written; or when it is lost.
    #[inline(always)]
    pub unsafe fn scatter<A: Access>(
        &self,
        mem: &A,
        offset: u64,
        src: *const u8,
        len: usize,
    ) -> Result<usize, MemoryError> {
        if let Some(at) = self.alone(mem, Want::Write, offset, len) {
            // SAFETY: our caller's promise.
            unsafe { mem.write_raw(at, 0, src, len) }?;
            self.intact(mem, true, 0, len)?;
            return Ok(len);
        }
        // SAFETY: as above.
        unsafe { self.scatter_pieces(mem, offset, src, len) }
    }

    /// `scatter`, to several buffers, or not from the first one's start.
    ///
    /// # Safety
    /// As [`Iov::scatter`].
    unsafe fn scatter_pieces<A: Access>(
        &self,
        mem: &A,
        offset: u64,
        src: *const u8,
        len: usize,
    ) -> Result<usize, MemoryError> {
        self.check_writable(mem, offset, len)?;
        let copied = self.pieces(mem, true, offset, len, |piece, before| {
            // SAFETY: `before + piece.len <= len`, so the source stays inside what the caller vouches for.
            let source = unsafe { src.add(before) };
            // SAFETY: as above, `source` is valid for `piece.len` bytes.
            unsafe { mem.write_raw(piece.at, piece.off, source, piece.len) }
        })?;
        self.intact(mem, true, offset, len)?;
        Ok(copied)
    }

    /// Gather into a slice; the number of bytes copied.
    ///
    /// # Errors
    /// As [`Iov::gather`].
    #[inline(always)]
    pub fn read<A: Access>(&self, mem: &A, offset: u64, dst: &mut [u8]) -> Result<usize, MemoryError> {
        // SAFETY: a slice of ours is valid for its length and never lies in guest memory.
        unsafe { self.gather(mem, offset, dst.as_mut_ptr(), dst.len()) }
    }

    /// Scatter from a slice; the number of bytes copied.
    ///
    /// # Errors
    /// As [`Iov::scatter`].
    #[inline(always)]
    pub fn write<A: Access>(&self, mem: &A, offset: u64, src: &[u8]) -> Result<usize, MemoryError> {
        // SAFETY: a slice of ours is valid for its length and never lies in guest memory.
        unsafe { self.scatter(mem, offset, src.as_ptr(), src.len()) }
    }

    /// Set up to `len` bytes of the writable part from `offset` on to `value`; the number set.
    ///
    /// # Errors
    /// As [`Iov::scatter`].
    pub fn fill<A: Access>(&self, mem: &A, offset: u64, len: usize, value: u8) -> Result<usize, MemoryError> {
        self.check_writable(mem, offset, len)?;
        let set = self.pieces(mem, true, offset, len, |piece, _| {
            mem.fill(piece.at, piece.off, piece.len as u64, value)
        })?;
        self.intact(mem, true, offset, len)?;
        Ok(set)
    }
}
