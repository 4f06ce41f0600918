//! The file behind a block device: between it and guest memory without a copy of ours, where memory allows that.
//!
//! Every range was checked by whoever asks. A file that has become shorter is an error (EIO), and so is one that takes no
//! more bytes. What earlier pieces of a request have moved stays moved.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use crate::iov::Iov;
use crate::mem::{Access, MemoryError, Want};

/// Bytes that are moved at once where they have to be copied.
const PIECE: usize = 256 << 10;
/// Bytes of zeros that are written at once.
const ZEROS: usize = 64 << 10;

/// Why bytes could not be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The file's, or the operating system's.
    Host(Errno),
    /// The guest's memory has gone.
    Memory(MemoryError),
}

impl From<Errno> for Trouble {
    fn from(errno: Errno) -> Self {
        Self::Host(errno)
    }
}

impl From<MemoryError> for Trouble {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

/// A file, and what is needed to copy from and to it.
#[derive(Debug)]
pub(super) struct Image {
    file: OwnedFd,
    buffer: Vec<u8>,
    punches: bool,
}

impl Image {
    pub(super) const fn new(file: OwnedFd) -> Self {
        Self {
            file,
            buffer: Vec::new(),
            punches: true,
        }
    }

    /// Fill `len` bytes of the writable part of a chain from `place` of the file on.
    pub(super) fn read<A: Access>(&mut self, mem: &A, iov: Iov<'_>, place: u64, len: u64) -> Result<(), Trouble> {
        let mut done = 0;
        while done < len {
            let at = place.checked_add(done).ok_or(Errno::IO)?;
            let vector = iov.vector(mem, Want::Write, done, len - done);
            let count = if vector.is_worth_it() {
                retry_on_intr(|| vector.read_from(self.file.as_fd(), at))
            } else {
                Err(Errno::FAULT)
            };
            let count = match count {
                Err(Errno::FAULT) => self.read_copied(mem, iov, at, done, len - done)?,
                count => count?,
            };
            if count == 0 {
                return Err(Errno::IO.into());
            }
            iov.intact(mem, true, done, count)?;
            done = done.saturating_add(count as u64);
        }
        Ok(())
    }

    #[cold]
    fn read_copied<A: Access>(
        &mut self,
        mem: &A,
        iov: Iov<'_>,
        at: u64,
        done: u64,
        rest: u64,
    ) -> Result<usize, Trouble> {
        let piece = piece(&mut self.buffer, rest);
        let count = retry_on_intr(|| pread(&self.file, &mut *piece, at))?;
        let read = piece.get(..count).unwrap_or_default();
        Ok(iov.write(mem, done, read)?)
    }

    /// Write `len` bytes of the readable part of a chain, from byte `skip` of it on, to `place` of the file; `moved` hears
    /// of each piece.
    pub(super) fn write<A: Access>(
        &mut self,
        mem: &A,
        iov: Iov<'_>,
        skip: u64,
        (place, len): (u64, u64),
        mut moved: impl FnMut(u64),
    ) -> Result<(), Trouble> {
        let mut done = 0;
        while done < len {
            let at = place.checked_add(done).ok_or(Errno::IO)?;
            let vector = iov.vector(mem, Want::Read, skip.saturating_add(done), len - done);
            let count = if vector.is_worth_it() {
                retry_on_intr(|| vector.write_to(self.file.as_fd(), at))
            } else {
                Err(Errno::FAULT)
            };
            let count = match count {
                Err(Errno::FAULT) => {
                    let piece = piece(&mut self.buffer, len - done);
                    let count = iov.read(mem, skip.saturating_add(done), piece)?;
                    let data = piece.get(..count).unwrap_or_default();
                    retry_on_intr(|| pwrite(&self.file, data, at))?
                }
                count => count?,
            };
            if count == 0 {
                return Err(Errno::IO.into());
            }
            iov.intact(mem, false, skip.saturating_add(done), count)?;
            moved(count as u64);
            done = done.saturating_add(count as u64);
        }
        Ok(())
    }

    /// Make `len` bytes at `place` read as zeros; with `unmap` the host may take their place back.
    pub(super) fn zero(&mut self, place: u64, len: u64, unmap: bool) -> Result<(), Errno> {
        if unmap && self.punch(place, len)? {
            return Ok(());
        }
        let most = |len: u64| usize::try_from(len).unwrap_or(ZEROS).min(ZEROS);
        self.buffer.clear();
        self.buffer.resize(most(len), 0);
        let mut done = 0;
        while done < len {
            let length = most(len - done);
            let zeros = self.buffer.get(..length).unwrap_or_default();
            let at = place.checked_add(done).ok_or(Errno::IO)?;
            match retry_on_intr(|| pwrite(&self.file, zeros, at))? {
                0 => return Err(Errno::IO),
                count => done = done.saturating_add(count as u64),
            }
        }
        Ok(())
    }

    /// Nobody needs these bytes any more.
    pub(super) fn discard(&mut self, place: u64, len: u64) -> Result<(), Errno> {
        self.punch(place, len).map(drop)
    }

    /// Return once everything written is on stable storage.
    pub(super) fn sync(&self) -> Result<(), Errno> {
        retry_on_intr(|| fdatasync(&self.file))
    }

    /// Make a hole, which reads as zeros; false where the host cannot, as one of no bytes.
    fn punch(&mut self, place: u64, len: u64) -> Result<bool, Errno> {
        if !self.punches {
            return Ok(false);
        }
        let how = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE;
        match retry_on_intr(|| fallocate(&self.file, how, place, len)) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.punches = false;
                Ok(false)
            }
            Err(Errno::INVAL | Errno::PERM) => Ok(false),
            Err(errno) => Err(errno),
        }
    }
}

/// As much of the buffer as `len` bytes need at once.
fn piece(buffer: &mut Vec<u8>, len: u64) -> &mut [u8] {
    buffer.resize(PIECE, 0);
    let length = usize::try_from(len).unwrap_or(PIECE).min(PIECE);
    buffer.get_mut(..length).unwrap_or_default()
}
