//! The block service (VIRTIO 1.4, 5.2): requests answered from a file, as `devices/blk.py` answers them.
//!
//! # Theory
//!
//! A request is a header, data and a status byte, however it is cut into descriptors (2.7.4): the header is the first 16
//! readable bytes, the status byte is the last writable one, and data is what lies between.
//!
//! **Judged whole, then done.** Type, length, sectors and flags are checked before the first byte of the file is touched. What
//! breaks a rule is answered IOERR, what this device does not do, or was not agreed upon, UNSUPP (5.2.6.2). With no room for
//! a status byte there is no answer: 0 bytes. Nothing of this breaks the queue.
//!
//! **The used length** covers the status byte, so all bytes before it count as written, and they are: what a request leaves
//! of its writable buffers is zeroed.
//!
//! What was agreed upon is the owner's to say ([`Terms`]), at any time: a request is judged by what holds when it is taken.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};

use super::image::{Image, Trouble};
use super::{Answer, Bounds, Burst, Service, Turn, each};
use crate::chain::Element;
use crate::error::{Fault, QueueError};
use crate::iov::Iov;
use crate::mem::{Access, MemoryError};
use crate::queue::DeviceQueue;

/// Bytes of the sectors that the protocol counts in (5.2.5).
const SECTOR: u64 = 512;
/// Bytes of a request's header: type, reserved, sector (5.2.6).
const HEADER: usize = 16;
/// Bytes of one segment: sector, number of sectors, flags (5.2.6).
const SEGMENT: u64 = SEGMENT_BYTES as u64;
const SEGMENT_BYTES: usize = 16;
/// The one defined flag of a segment.
const UNMAP: u32 = 1;
/// Making the file stable counts as that many bytes of a turn's work.
const SYNC_WORK: u64 = 1 << 20;

/// What a request asks for (5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    /// The legacy interface's other name for FLUSH (5.2.6.3).
    pub(super) const FLUSH_OUT: u32 = 5;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const GET_LIFETIME: u32 = 10;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// The last byte of a request (5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// Bits of [`Terms::flags`].
pub mod term {
    /// Nothing may be written.
    pub const READ_ONLY: u32 = 1;
    /// FLUSH is offered.
    pub const FLUSH: u32 = 1 << 1;
    /// VERSION_1 was not agreed upon.
    pub const LEGACY: u32 = 1 << 2;
    /// A write is completed when it is stable (5.2.6.2).
    pub const WRITE_THROUGH: u32 = 1 << 3;
    /// DISCARD was agreed upon.
    pub const DISCARD: u32 = 1 << 4;
    /// WRITE_ZEROES was agreed upon.
    pub const WRITE_ZEROES: u32 = 1 << 5;
    /// LIFETIME was agreed upon.
    pub const LIFETIME: u32 = 1 << 6;
}

/// What was agreed upon, and how large the device is.
#[derive(Debug, Default)]
pub struct Terms {
    /// Sectors that the device has.
    pub capacity: AtomicU64,
    /// Bits of [`term`].
    pub flags: AtomicU32,
}

/// What the device is made of, once and for all.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    /// The device ID string.
    pub serial: [u8; 20],
    /// Wear of the storage, as 5.2.6 has it.
    pub lifetime: [u8; 6],
    /// Sectors of a segment and segments of a request: discard.
    pub max_discard: (u32, u32),
    /// The same of write zeroes.
    pub max_write_zeroes: (u32, u32),
}

/// What it has met since it was made; may be read meanwhile. See `BlkCounters`.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "as the Python class says")]
pub struct FileCounters {
    pub ok: AtomicU64,
    pub ioerr: AtomicU64,
    pub unsupp: AtomicU64,
    pub no_status: AtomicU64,
    pub host_errors: AtomicU64,
    pub read: AtomicU64,
    pub written: AtomicU64,
    pub flushes: AtomicU64,
    /// What the operating system said last.
    pub last_errno: AtomicI32,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// The service; see the module's head.
#[derive(Debug)]
pub struct File {
    disk: Disk,
    burst: Burst,
}

#[derive(Debug)]
struct Disk {
    image: Image,
    traits: Traits,
    terms: Arc<Terms>,
    counters: Arc<FileCounters>,
}

impl File {
    /// One that answers from `file`, open for what it is to do.
    #[must_use]
    pub fn new(file: OwnedFd, traits: Traits) -> Self {
        let disk = Disk {
            image: Image::new(file),
            traits,
            terms: Arc::default(),
            counters: Arc::default(),
        };
        let burst = Burst::default();
        Self { disk, burst }
    }

    /// What was agreed upon.
    #[must_use]
    pub const fn terms(&self) -> &Arc<Terms> {
        &self.disk.terms
    }

    /// What it has met.
    #[must_use]
    pub const fn counters(&self) -> &Arc<FileCounters> {
        &self.disk.counters
    }
}

impl Service for File {
    fn queues(&self) -> usize {
        1
    }

    fn turn<A: Access>(&mut self, mem: &A, queues: &mut [&mut DeviceQueue], bounds: Bounds) -> Result<Turn, Fault> {
        let Self { disk, burst } = self;
        let Some(queue) = queues.first_mut() else {
            return Ok(Turn::default());
        };
        let failed = disk.counters.host_errors.load(Ordering::Relaxed);
        let turn = each(burst, mem, queue, bounds, |queue, element, iov| {
            disk.answer(mem, queue, element, iov)
        });
        let notable = disk.counters.host_errors.load(Ordering::Relaxed) != failed;
        turn.map(|turn| Turn { notable, ..turn })
    }
}

/// A request under way.
struct Request<'a, A> {
    mem: &'a A,
    iov: Iov<'a>,
    element: &'a Element,
    /// Bytes of work beside its buffers.
    charge: u64,
}

impl<A: Access> Request<'_, A> {
    /// Bytes to be read from the file.
    const fn room(&self) -> u64 {
        self.element.writable.saturating_sub(1)
    }

    /// Bytes behind the header.
    const fn data(&self) -> u64 {
        self.element.readable.saturating_sub(HEADER as u64)
    }
}

impl Disk {
    fn answer<A: Access>(
        &mut self,
        mem: &A,
        queue: &mut DeviceQueue,
        element: &Element,
        iov: Iov<'_>,
    ) -> Result<Answer, Fault> {
        if element.writable == 0 {
            count(&self.counters.no_status, 1);
            return Ok(Answer { used: 0, charge: 0 });
        }
        let mut request = Request {
            mem,
            iov,
            element,
            charge: 0,
        };
        let used = match self.request(&mut request) {
            Ok(()) => Ok(element.writable),
            Err(error) => queue.copied(Err(error)),
        };
        let used = match used {
            Ok(used) => used,
            Err(QueueError::Violation(fault)) => return Err(fault),
            Err(QueueError::Misuse(_)) => {
                // A transfer of remote memory has failed. Who looks at the status byte alone must not find an old one.
                count(&self.counters.ioerr, 1);
                let _ = iov.write(mem, request.room(), &[Status::IoErr as u8]);
                0
            }
        };
        Ok(Answer {
            used,
            charge: request.charge,
        })
    }

    /// Do a request that has room for its status, and write that.
    fn request<A: Access>(&mut self, request: &mut Request<'_, A>) -> Result<(), MemoryError> {
        let mut produced = 0;
        let status = match self.judge(request, &mut produced) {
            Ok(status) => status,
            Err(Trouble::Memory(error)) => return Err(error),
            Err(Trouble::Host(errno)) => {
                produced = 0;
                count(&self.counters.host_errors, 1);
                self.counters.last_errno.store(errno.raw_os_error(), Ordering::Relaxed);
                Status::IoErr
            }
        };
        let room = request.room();
        let rest = usize::try_from(room.saturating_sub(produced)).unwrap_or(usize::MAX);
        if rest > 0 {
            request.iov.fill(request.mem, produced, rest, 0)?;
        }
        request.iov.write(request.mem, room, &[status as u8])?;
        let counters = &self.counters;
        let met = match status {
            Status::Ok => &counters.ok,
            Status::IoErr => &counters.ioerr,
            Status::Unsupp => &counters.unsupp,
        };
        count(met, 1);
        Ok(())
    }

    /// Do one request: its status; `produced` bytes of its writable data are written then.
    fn judge<A: Access>(&mut self, request: &mut Request<'_, A>, produced: &mut u64) -> Result<Status, Trouble> {
        let mut header = [0; HEADER];
        if request.iov.read(request.mem, 0, &mut header)? < HEADER {
            return Ok(Status::IoErr);
        }
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
        let flags = self.terms.flags.load(Ordering::Relaxed);
        let agreed = |term| flags & term != 0;
        match kind {
            kind::IN => self.read(request, sector, produced),
            kind::OUT => self.write(request, sector, flags),
            kind::FLUSH => self.flush(request, flags),
            kind::FLUSH_OUT if agreed(term::LEGACY) => self.flush(request, flags),
            kind::GET_ID => Self::give(request, &self.traits.serial, produced),
            kind::GET_LIFETIME if agreed(term::LIFETIME) => Self::give(request, &self.traits.lifetime, produced),
            kind::DISCARD if agreed(term::DISCARD) => self.segments(request, flags, true),
            kind::WRITE_ZEROES if agreed(term::WRITE_ZEROES) => self.segments(request, flags, false),
            _ => Ok(Status::Unsupp),
        }
    }

    fn read<A: Access>(
        &mut self,
        request: &Request<'_, A>,
        sector: u64,
        produced: &mut u64,
    ) -> Result<Status, Trouble> {
        let len = request.room();
        let Some(place) = self.within(sector, len) else {
            return Ok(Status::IoErr);
        };
        self.image.read(request.mem, request.iov, place, len)?;
        count(&self.counters.read, len);
        *produced = len;
        Ok(Status::Ok)
    }

    fn write<A: Access>(&mut self, request: &mut Request<'_, A>, sector: u64, flags: u32) -> Result<Status, Trouble> {
        let len = request.data();
        let place = self.within(sector, len);
        let Some(place) = place.filter(|_| flags & term::READ_ONLY == 0) else {
            return Ok(Status::IoErr);
        };
        let written = &self.counters.written;
        let moved = |bytes| count(written, bytes);
        self.image
            .write(request.mem, request.iov, HEADER as u64, (place, len), moved)?;
        self.stable(request, flags)
    }

    fn flush<A>(&self, request: &mut Request<'_, A>, flags: u32) -> Result<Status, Trouble> {
        // Offered is enough: a legacy driver may flush without having negotiated it (5.2.6.3).
        if flags & term::FLUSH == 0 {
            return Ok(Status::Unsupp);
        }
        self.sync(request)?;
        Ok(Status::Ok)
    }

    fn give<A: Access>(request: &Request<'_, A>, data: &[u8], produced: &mut u64) -> Result<Status, Trouble> {
        if request.room() != data.len() as u64 {
            return Ok(Status::IoErr);
        }
        *produced = request.iov.write(request.mem, 0, data)? as u64;
        Ok(Status::Ok)
    }

    fn segments<A: Access>(
        &mut self,
        request: &mut Request<'_, A>,
        flags: u32,
        discard: bool,
    ) -> Result<Status, Trouble> {
        let (most_sectors, most) = if discard {
            self.traits.max_discard
        } else {
            self.traits.max_write_zeroes
        };
        let len = request.data();
        if len == 0 || len > u64::from(most).saturating_mul(SEGMENT) || len & (SEGMENT - 1) != 0 {
            return Ok(Status::IoErr);
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        request.iov.read(request.mem, HEADER as u64, &mut bytes)?;
        let parsed = || bytes.chunks_exact(SEGMENT_BYTES).filter_map(parse);
        let allowed = if discard { 0 } else { UNMAP };
        if parsed().any(|(_, _, flags)| flags & !allowed != 0) {
            return Ok(Status::Unsupp);
        }
        let good = |(sector, sectors, _)| {
            sectors <= most_sectors && self.within(sector, u64::from(sectors).saturating_mul(SECTOR)).is_some()
        };
        if !parsed().all(good) {
            return Ok(Status::IoErr);
        }
        for (sector, sectors, how) in parsed() {
            let (place, len) = (sector.saturating_mul(SECTOR), u64::from(sectors).saturating_mul(SECTOR));
            // One of no sectors is a call to the host all the same.
            request.charge = request.charge.saturating_add(len.max(SECTOR));
            if discard {
                self.image.discard(place, len)?;
            } else {
                self.image.zero(place, len, how & UNMAP != 0)?;
            }
        }
        if discard {
            return Ok(Status::Ok);
        }
        self.stable(request, flags)
    }

    /// Where in the file `len` bytes of `sector` lie: whole sectors that the device has (5.2.6.1).
    fn within(&self, sector: u64, len: u64) -> Option<u64> {
        let place = sector.checked_mul(SECTOR)?;
        let end = place.checked_add(len)?;
        let size = self.terms.capacity.load(Ordering::Relaxed).saturating_mul(SECTOR);
        (len & (SECTOR - 1) == 0 && end <= size).then_some(place)
    }

    fn stable<A>(&self, request: &mut Request<'_, A>, flags: u32) -> Result<Status, Trouble> {
        if flags & term::WRITE_THROUGH != 0 {
            self.sync(request)?;
        }
        Ok(Status::Ok)
    }

    fn sync<A>(&self, request: &mut Request<'_, A>) -> Result<(), Trouble> {
        request.charge = request.charge.saturating_add(SYNC_WORK);
        count(&self.counters.flushes, 1);
        Ok(self.image.sync()?)
    }
}

/// Sector, number of sectors, flags; none of what is no whole segment.
fn parse(segment: &[u8]) -> Option<(u64, u32, u32)> {
    let (sector, rest) = segment.split_first_chunk()?;
    let (sectors, rest) = rest.split_first_chunk()?;
    let flags = rest.first_chunk()?;
    Some((
        u64::from_le_bytes(*sector),
        u32::from_le_bytes(*sectors),
        u32::from_le_bytes(*flags),
    ))
}
