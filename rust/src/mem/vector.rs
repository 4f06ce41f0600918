//! Guest memory as the operating system reads and writes it: files straight into and out of buffers of a driver.
//!
//! # Theory
//!
//! A [`Vector`] is a list of host addresses, made under a pin and used under it: it borrows the pinned view. Only what
//! `Mapped` reaches directly can be in one: memory that is remote, logged or traced is copied by those who must know of it.
//! The kernel copies as everybody else does (M4), and where a file that was mapped has become shorter it says EFAULT: no
//! signal is raised. Whoever gets that copies by itself, which finds the memory lost.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use smallvec::SmallVec;

use super::{Access, At, Want};

/// Parts of one system call at most.
const MOST_PARTS: usize = 64;
/// Bytes that a full vector has at least: a chain of many tiny buffers is copied, rather than looked through for each 64.
const WORTH: usize = 16 << 10;

/// Buffers in guest memory for one system call.
#[derive(Debug)]
pub struct Vector<'a, A> {
    mem: &'a A,
    want: Want,
    parts: SmallVec<[libc::iovec; 8]>,
    len: usize,
}

impl<'a, A: Access> Vector<'a, A> {
    /// An empty one, to be read from a file (`Write`) or written to one (`Read`).
    #[must_use]
    pub fn new(mem: &'a A, want: Want) -> Self {
        let (parts, len) = (SmallVec::new(), 0);
        Self { mem, want, parts, len }
    }

    /// Append `len` bytes at `at + off`; false when they cannot be in one, or it is full.
    pub fn push(&mut self, at: At, off: u64, len: usize) -> bool {
        let host = self.mem.direct(at, off, len as u64, self.want);
        let Some(host) = host.filter(|_| self.parts.len() < MOST_PARTS) else {
            return false;
        };
        self.parts.push(libc::iovec {
            iov_base: host.cast(),
            iov_len: len,
        });
        self.len = self.len.saturating_add(len);
        true
    }

    /// Whether a system call with it is worth its price: it has bytes, and not many small parts that are followed by more.
    #[must_use]
    pub fn is_worth_it(&self) -> bool {
        self.len > 0 && (self.parts.len() < MOST_PARTS || self.len >= WORTH)
    }

    /// Fill it from `offset` of a file on; how many bytes that were, 0 at the file's end. Of a vector to be written.
    ///
    /// # Errors
    /// What the operating system says; FAULT also for a vector that is to be read.
    pub fn read_from(&self, file: BorrowedFd<'_>, offset: u64) -> Result<usize, Errno> {
        if self.want != Want::Write {
            return Err(Errno::FAULT);
        }
        let (offset, count) = (position(offset)?, count(&self.parts)?);
        // SAFETY: each part was direct for writing under the pin that `mem` is (M1, M2), which `self` borrows; the
        // kernel's copy races as ours do (M4).
        let done = unsafe { libc::preadv(file.as_raw_fd(), self.parts.as_ptr(), count, offset) };
        usize::try_from(done).map_err(|_| last())
    }

    /// Write it to `offset` of a file; how many bytes that were.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: u64) -> Result<usize, Errno> {
        let (offset, count) = (position(offset)?, count(&self.parts)?);
        // SAFETY: each part was direct under the pin that `mem` is (M1, M2), which `self` borrows; M4 for races.
        let done = unsafe { libc::pwritev(file.as_raw_fd(), self.parts.as_ptr(), count, offset) };
        usize::try_from(done).map_err(|_| last())
    }
}

fn position(offset: u64) -> Result<libc::off_t, Errno> {
    libc::off_t::try_from(offset).map_err(|_| Errno::INVAL)
}

fn count(parts: &[libc::iovec]) -> Result<libc::c_int, Errno> {
    libc::c_int::try_from(parts.len()).map_err(|_| Errno::INVAL)
}

fn last() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
