//! The dirty log: which pages of guest memory a device has written, for whoever migrates the guest.
//!
//! # Theory
//!
//! One bit for each page of 4096 bytes of guest physical address, in memory that the front-end shares: it looks at a part of
//! the log, clears it and sends the pages. So a bit is set *after* the bytes were written, with release ordering, and
//! always: to look first whether it is set already would let the bytes be seen too late by somebody who clears it in between.
//! Others set bits of the same bytes, so it is an atomic operation of one byte, whatever the machine's order of bytes.
//!
//! A front-end can have the device's area of a ring logged elsewhere than where it lies, even beyond its memory
//! (`Elsewhere`). What lies beyond the log cannot be marked: whoever puts a log in place has seen to it that it is large
//! enough.
//!
//! Source: QEMU, docs/interop/vhost-user.rst, "Migration".

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use super::host_size;
use super::region::{Mapping, RegionError, log_file};

/// Bytes of guest memory that one bit stands for.
pub const LOG_PAGE: u64 = 4096;

/// A stretch of guest memory that is logged as if it lay at another address.
#[derive(Clone, Copy, Debug)]
pub struct Elsewhere {
    /// Guest physical address of its first byte.
    pub gpa: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where the first byte is logged.
    pub logged: u64,
}

/// A dirty log, mapped; see the module's head.
#[derive(Debug)]
pub struct Log {
    mapping: Mapping,
    /// Bytes, with eight pages in each.
    size: u64,
    elsewhere: Vec<Elsewhere>,
}

impl Log {
    /// Map `size` bytes of a file from `offset` on.
    ///
    /// # Errors
    /// `Empty`, `Wraps`, `FileTooShort`, or what the operating system says.
    pub fn new(fd: BorrowedFd<'_>, offset: u64, size: u64, elsewhere: Vec<Elsewhere>) -> Result<Self, RegionError> {
        if size == 0 {
            return Err(RegionError::Empty { gpa: 0 });
        }
        let mapping = Mapping::received(fd, offset, 0, size, true)?;
        Ok(Self {
            mapping,
            size,
            elsewhere,
        })
    }

    /// A new log of `size` bytes, for whoever reads it, and the file to share.
    ///
    /// # Errors
    /// As [`Log::new`].
    pub fn fresh(size: u64) -> Result<(Self, OwnedFd), RegionError> {
        let fd = log_file(size)?;
        Ok((Self::new(fd.as_fd(), 0, size, Vec::new())?, fd))
    }

    /// Its size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Whether its file was found cut short: nobody sees any more what is marked.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.mapping.lost()
    }

    /// `len` bytes at guest physical address `gpa`, all of one region, were written.
    pub(super) fn mark(&self, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len);
        let mut at = gpa;
        while at < end {
            let moved = self.elsewhere.iter().find(|one| at.wrapping_sub(one.gpa) < one.size);
            let next = self.elsewhere.iter().map(|one| one.gpa).filter(|&start| start > at);
            let (logged, stop) = match moved {
                Some(one) => {
                    let skip = at.wrapping_sub(one.gpa);
                    let rest = one.size.wrapping_sub(skip);
                    (one.logged.saturating_add(skip), at.saturating_add(rest))
                }
                None => (at, next.min().unwrap_or(end)),
            };
            let stop = stop.min(end);
            self.set(logged, stop.wrapping_sub(at));
            at = stop;
        }
    }

    /// Set the bits of the pages that `len` bytes at `from` touch, at least one byte.
    fn set(&self, from: u64, len: u64) {
        let last = from.saturating_add(len.saturating_sub(1)) / LOG_PAGE;
        let mut page = from / LOG_PAGE;
        while page <= last && page / 8 < self.size {
            // As many of the byte's pages as there are.
            let stop = last.min(page | 7);
            let mask = (0xff_u8 << (page % 8)) & (0xff_u8 >> (7 - stop % 8));
            self.byte(page / 8).fetch_or(mask, Ordering::Release);
            page = stop.saturating_add(1);
        }
    }

    /// Byte `at` of the log, which is smaller than its size.
    fn byte(&self, at: u64) -> &AtomicU8 {
        // SAFETY: every caller has compared `at` with the size, for which the mapping lives as long as `self` (M1); a
        // byte is aligned anywhere, and is accessed by atomic operations only.
        unsafe { AtomicU8::from_ptr(self.mapping.ptr().wrapping_add(host_size(at))) }
    }

    /// The pages that are marked, and are no more.
    #[must_use]
    pub fn take(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for at in 0..self.size {
            // Few are set, and what is not needs no write.
            if self.byte(at).load(Ordering::Relaxed) == 0 {
                continue;
            }
            let bits = self.byte(at).swap(0, Ordering::Acquire);
            pages.extend((0..8).filter(|bit| bits >> bit & 1 != 0).map(|bit| at * 8 + bit));
        }
        pages
    }
}
