//! The table of regions: guest addresses to host addresses.
//!
//! # Theory
//!
//! A table never changes. Adding, removing or replacing regions builds a new one with the next epoch; tables share
//! the regions that they have in common. Each table has a *stamp* besides, unique in the process: it is what an `At`
//! carries, so that an address resolved by one table is never used directly under another, whosever it is (M2).
//!
//! Few regions are the rule, so up to 16 are scanned, more are searched by halving. A scan begins where [`Starts`] says: of
//! regions of like sizes it then looks at one. And who asks for many addresses, as for those of a queue's buffers, first looks
//! [`Near`] the last one.
//!
//! Remote regions have a list of their own. What is resolved, and all of [`Mapped`](super::Mapped), knows nothing of it:
//! only [`Mediated`](super::Mediated) looks there, when nothing is mapped at an address.
//!
//! The table of an IOMMU's memory is *translated*: its regions are parts of another memory's, shown at the addresses that
//! a device uses. What it does not show, or not for what is wanted, is no error of the other side: the IOMMU may show it
//! when it is asked. Hence an error of its own, `Untranslated`.
//!
//! A table can carry a dirty log, from one table to the next. It is put in place as a table is, so nobody marks the old
//! one any more when that returns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::log::Log;
use super::region::{Region, RegionError};
use super::transfer::{Inside, Transfer};
use super::{At, Live, MemoryError, Want, host_size};

/// Regions that one table holds at most: what the kernel's vhost and QEMU use (509 memory slots).
pub const MAX_REGIONS: usize = 509;
/// Translations that one table holds at most: 16 MiB in pages, more than any request of a real driver needs at once.
pub const MAX_TRANSLATIONS: usize = 4096;
/// Up to this many regions are scanned, more are searched.
const SCAN_LIMIT: usize = 16;
/// Pieces of guest memory that have a start of their own.
const PIECES: usize = 64;

/// Next stamp; odd, so that the even number below marks an address that is for reading only, and never 1, which
/// an unresolved address (0) would then match.
static NEXT_STAMP: AtomicU64 = AtomicU64::new(3);

/// What translation needs of a mapped region, side by side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) ptr: *mut u8,
    /// What an address gets that is resolved here to read and to write (see the module's head); 0 where that is not
    /// allowed.
    stamps: [u64; 2],
    pub(super) readable: bool,
    pub(super) writable: bool,
}

/// Holds no address.
static NOWHERE: Slot = Slot {
    gpa: 0,
    size: 0,
    ptr: std::ptr::null_mut(),
    stamps: [0; 2],
    readable: false,
    writable: false,
};

/// Where an address was found last, so that the next is looked for there first.
#[derive(Clone, Copy, Debug)]
pub struct Near<'a>(&'a Slot);

impl Near<'_> {
    /// Nowhere yet.
    #[inline(always)]
    #[must_use]
    pub const fn nothing() -> Self {
        Self(&NOWHERE)
    }
}

/// Where a scan for an address begins: guest memory as far as it reaches in pieces of like sizes, a power of two, and for
/// each of them the first region that ends in it or behind it.
#[derive(Debug)]
struct Starts {
    shift: u32,
    firsts: [u8; PIECES],
}

impl Starts {
    fn new(slots: &[Slot]) -> Self {
        let last = |slot: &Slot| slot.gpa.saturating_add(slot.size.saturating_sub(1));
        // The last address of all is in the last piece.
        let reach = slots.last().map_or(0, last);
        let shift = (u64::BITS - reach.leading_zeros()).saturating_sub(PIECES.ilog2());
        let mut firsts = [0; PIECES];
        for (piece, first) in (0u64..).zip(&mut firsts) {
            let before = slots.iter().take_while(|slot| last(slot) >> shift < piece).count();
            *first = u8::try_from(before).unwrap_or(u8::MAX);
        }
        Self { shift, firsts }
    }

    /// Slots before this one do not hold `gpa`.
    #[inline(always)]
    fn of(&self, gpa: u64) -> Option<usize> {
        self.firsts.get(host_size(gpa >> self.shift)).copied().map(usize::from)
    }
}

impl Slot {
    #[inline(always)]
    const fn holds(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.gpa) < self.size
    }

    /// The way to `len` bytes at `gpa`, which it holds, if it holds all of them and allows what is wanted.
    #[inline(always)]
    const fn resolve(&self, gpa: u64, len: u64, want: Want) -> Option<At> {
        let skip = gpa.wrapping_sub(self.gpa);
        let [read, write] = self.stamps;
        let stamp = match want {
            Want::Read => read,
            Want::Write => write,
        };
        if len > self.size.wrapping_sub(skip) || stamp == 0 {
            return None;
        }
        Some(At {
            gpa,
            ptr: self.ptr.wrapping_add(host_size(skip)),
            len,
            stamp,
        })
    }

    #[inline(always)]
    pub(super) const fn allows(&self, want: Want) -> bool {
        match want {
            Want::Read => self.readable,
            Want::Write => self.writable,
        }
    }
}

// SAFETY: a slot is numbers and an address; only `Mapped` dereferences it, while the table keeps the mapping (M1).
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

/// What is known of a remote region, and the way to it.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) writable: bool,
    /// Whose it is: as transfers know it that this thread is inside of.
    memory: u64,
    transfer: Arc<dyn Transfer>,
}

impl Remote {
    /// One transfer from guest address `gpa` on.
    pub(super) fn read(&self, gpa: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        let _inside = Inside::of(self.memory);
        let read = self.transfer.read(gpa, dst);
        read.map_err(|_| MemoryError::Transfer { gpa })
    }

    /// One transfer to guest address `gpa` on.
    pub(super) fn write(&self, gpa: u64, src: &[u8]) -> Result<(), MemoryError> {
        let _inside = Inside::of(self.memory);
        let written = self.transfer.write(gpa, src);
        written.map_err(|_| MemoryError::Transfer { gpa })
    }
}

/// Bytes of guest memory that lie side by side in the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Host address of the first byte.
    pub(super) ptr: *mut u8,
    /// How many bytes, at least 1.
    pub(super) len: usize,
}

/// A table of regions, sorted by guest address, none overlapping.
#[derive(Debug)]
pub struct Table {
    epoch: u64,
    stamp: u64,
    slots: Vec<Slot>,
    /// Where they are scanned from; None where they are searched.
    starts: Option<Starts>,
    remotes: Vec<Remote>,
    regions: Vec<Arc<Region>>,
    translated: bool,
    log: Option<Arc<Log>>,
    /// Whether `Mapped` is not enough: there are remote regions, or a log.
    mediated: bool,
}

impl Table {
    /// The table of `regions`, in any order, of the memory with the number `memory`; without a log.
    ///
    /// # Errors
    /// `TooMany` or `Overlap`.
    pub fn new(memory: u64, epoch: u64, mut regions: Vec<Arc<Region>>, translated: bool) -> Result<Self, RegionError> {
        Self::check_count(regions.len(), if translated { MAX_TRANSLATIONS } else { MAX_REGIONS })?;
        regions.sort_by_key(|region| region.gpa());
        for (low, high) in regions.iter().zip(regions.iter().skip(1)) {
            if low.end() > high.gpa() {
                let (gpa, size) = (high.gpa(), high.size());
                return Err(RegionError::Overlap {
                    gpa,
                    size,
                    other: low.gpa(),
                    other_size: low.size(),
                });
            }
        }
        let stamp = NEXT_STAMP.fetch_add(2, Ordering::Relaxed);
        let slot = |region: &Arc<Region>| {
            let (mapping, skip) = region.mapping()?;
            Some(Slot {
                gpa: region.gpa(),
                size: region.size(),
                ptr: mapping.ptr().wrapping_add(skip),
                stamps: [
                    if region.readable() {
                        stamp & !u64::from(!region.writable())
                    } else {
                        0
                    },
                    if region.writable() { stamp } else { 0 },
                ],
                readable: region.readable(),
                writable: region.writable(),
            })
        };
        let remote = |region: &Arc<Region>| {
            Some(Remote {
                gpa: region.gpa(),
                size: region.size(),
                writable: region.writable(),
                memory,
                transfer: Arc::clone(region.remote()?),
            })
        };
        let slots: Vec<Slot> = regions.iter().filter_map(slot).collect();
        let remotes: Vec<Remote> = regions.iter().filter_map(remote).collect();
        let mediated = !remotes.is_empty();
        Ok(Self {
            epoch,
            stamp,
            starts: (slots.len() <= SCAN_LIMIT).then(|| Starts::new(&slots)),
            slots,
            remotes,
            regions,
            translated,
            log: None,
            mediated,
        })
    }

    /// Whether one table holds `count` regions.
    pub(super) const fn check_count(count: usize, limit: usize) -> Result<(), RegionError> {
        if count > limit {
            Err(RegionError::TooMany { count, limit })
        } else {
            Ok(())
        }
    }

    /// Carry `log` from now on; what was carried until now. No address changes, so it is the same table.
    pub(super) fn set_log(&mut self, log: Option<Arc<Log>>) -> Option<Arc<Log>> {
        self.mediated = log.is_some() || !self.remotes.is_empty();
        std::mem::replace(&mut self.log, log)
    }

    /// The dirty log.
    #[must_use]
    pub const fn log(&self) -> Option<&Arc<Log>> {
        self.log.as_ref()
    }

    /// Whether it is that of an IOMMU's memory.
    #[must_use]
    pub const fn translated(&self) -> bool {
        self.translated
    }

    /// No region holds `gpa`.
    pub(super) const fn absent(&self, gpa: u64, want: Want) -> MemoryError {
        if self.translated {
            MemoryError::Untranslated { gpa, want }
        } else {
            MemoryError::Unmapped { gpa }
        }
    }

    /// The region that holds `gpa` does not allow what is wanted.
    pub(super) const fn refused(&self, gpa: u64, want: Want) -> MemoryError {
        if self.translated {
            MemoryError::Untranslated { gpa, want }
        } else {
            MemoryError::ReadOnly { gpa }
        }
    }

    /// Number of this table in its memory's life, from 0.
    #[inline]
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The regions by ascending address.
    #[must_use]
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The region that holds `gpa`.
    #[must_use]
    pub fn region_of(&self, gpa: u64) -> Option<&Arc<Region>> {
        let next = self.regions.partition_point(|region| region.gpa() <= gpa);
        self.regions
            .get(next.checked_sub(1)?)
            .filter(|region| gpa < region.end())
    }

    /// The bytes themselves, kept mapped; see `GuestMemory::live`.
    pub(super) fn live(&self, gpa: u64, len: u64, want: Want) -> Result<Live, MemoryError> {
        let region = self.region_of(gpa).ok_or_else(|| self.absent(gpa, want))?;
        if !(region.readable() && (region.writable() || want == Want::Read)) {
            return Err(self.refused(gpa, want));
        }
        let skip = gpa.wrapping_sub(region.gpa());
        if len > region.size().wrapping_sub(skip) {
            return Err(self.absent(region.end(), want));
        }
        // A remote region has no bytes to be alive: nothing is *mapped* there.
        let (mapping, before) = region.mapping().ok_or(MemoryError::Unmapped { gpa })?;
        let mapping = Arc::clone(mapping);
        Ok(Live {
            mapping,
            skip: before.saturating_add(host_size(skip)),
            len: host_size(len),
        })
    }

    /// This table's stamp (see the module's head).
    #[inline]
    pub(super) const fn stamp(&self) -> u64 {
        self.stamp
    }

    /// Whether it is reached through `Mediated`.
    #[inline]
    pub(super) const fn needs_mediation(&self) -> bool {
        self.mediated
    }

    /// Whether some of it can only be reached by messages.
    #[inline]
    #[must_use]
    pub fn has_remote(&self) -> bool {
        !self.remotes.is_empty()
    }

    /// The remote region that holds `gpa`.
    pub(super) fn find_remote(&self, gpa: u64) -> Option<&Remote> {
        let next = self.remotes.partition_point(|remote| remote.gpa <= gpa);
        self.remotes
            .get(next.checked_sub(1)?)
            .filter(|remote| gpa.wrapping_sub(remote.gpa) < remote.size)
    }

    /// The mapped region that holds `gpa`.
    #[inline(always)]
    pub(super) fn find(&self, gpa: u64) -> Option<&Slot> {
        let Some(starts) = &self.starts else {
            return self.search(gpa);
        };
        let first = starts.of(gpa)?;
        let slot = self.slots.get(first)?;
        if slot.holds(gpa) {
            return Some(slot);
        }
        self.scan(first, gpa)
    }

    #[cold]
    #[inline(never)]
    fn scan(&self, first: usize, gpa: u64) -> Option<&Slot> {
        let slots = self.slots.get(first..)?;
        slots.iter().find(|slot| slot.holds(gpa))
    }

    #[cold]
    #[inline(never)]
    fn search(&self, gpa: u64) -> Option<&Slot> {
        let next = self.slots.partition_point(|slot| slot.gpa <= gpa);
        self.slots.get(next.checked_sub(1)?).filter(|slot| slot.holds(gpa))
    }

    /// Resolve `len` bytes at `gpa` as one operation; see `Access::resolve`.
    pub(super) fn resolve(&self, gpa: u64, len: u64, want: Want) -> Result<At, MemoryError> {
        let slot = self.find(gpa);
        if let Some(at) = slot.and_then(|slot| slot.resolve(gpa, len, want)) {
            return Ok(at);
        }
        self.check(gpa, len, want).map(|()| At::unresolved(gpa))
    }

    /// See `Access::resolve_near`.
    #[inline(always)]
    pub(super) fn resolve_near<'a>(&'a self, near: &mut Near<'a>, gpa: u64, len: u64, want: Want) -> Option<At> {
        if !near.0.holds(gpa) {
            *near = Near(self.find(gpa)?);
        }
        near.0.resolve(gpa, len, want)
    }

    /// Check that all `len` bytes at `gpa` are mapped, and writable if so wanted; names the first that is not.
    #[cold]
    pub(super) fn check(&self, gpa: u64, len: u64, want: Want) -> Result<(), MemoryError> {
        let end = gpa.checked_add(len).ok_or(MemoryError::Wraps { gpa, len })?;
        let mut at = gpa;
        while at < end {
            let slot = self.find(at).ok_or_else(|| self.absent(at, want))?;
            if !slot.allows(want) {
                return Err(self.refused(at, want));
            }
            at = slot.gpa.saturating_add(slot.size);
        }
        Ok(())
    }

    /// Check that no region of the range is lost; see `Access::intact`.
    #[cold]
    pub(super) fn intact(&self, gpa: u64, len: u64) -> Result<(), MemoryError> {
        let end = gpa.saturating_add(len);
        let mut regions = self.regions.iter();
        let lost = regions.find(|region| region.gpa() < end && gpa < region.end() && region.lost());
        lost.map_or(Ok(()), |region| {
            let gpa = gpa.max(region.gpa());
            Err(MemoryError::Lost { gpa })
        })
    }

    /// The longest piece that starts at `gpa` and has at most `limit` bytes.
    fn piece_from(&self, gpa: u64, limit: usize) -> Option<Piece> {
        let slot = self.find(gpa)?;
        let skip = host_size(gpa.wrapping_sub(slot.gpa));
        let len = limit.min(host_size(slot.size).saturating_sub(skip));
        Some(Piece {
            ptr: slot.ptr.wrapping_add(skip),
            len,
        })
    }

    /// The host pieces of `len` bytes at `gpa`, in order, once all of them are known to be usable.
    pub(super) fn pieces(&self, gpa: u64, len: usize, want: Want) -> Result<Pieces<'_>, MemoryError> {
        self.check(gpa, len as u64, want)?;
        Ok(Pieces {
            table: self,
            gpa,
            left: len,
        })
    }
}

/// Iterator over the host pieces of a range; see [`Table::pieces`].
pub(super) struct Pieces<'a> {
    table: &'a Table,
    gpa: u64,
    left: usize,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.left == 0 {
            return None;
        }
        let piece = self.table.piece_from(self.gpa, self.left)?;
        self.gpa = self.gpa.saturating_add(piece.len as u64);
        self.left = self.left.saturating_sub(piece.len);
        Some(piece)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that panics has failed")]
mod tests {
    use super::*;
    use crate::mem::Backing;

    const PAGE: u64 = 4096;

    fn table(places: &[(u64, u64)]) -> Table {
        let region = |&(gpa, size): &(u64, u64)| Arc::new(Region::new(gpa, size, Backing::Anonymous).unwrap());
        Table::new(0, 0, places.iter().map(region).collect(), false).unwrap()
    }

    #[test]
    fn an_address_is_found_wherever_the_search_for_it_begins() {
        let side_by_side = |count: u64| (0..count).map(|i| (i * PAGE, PAGE)).collect::<Vec<_>>();
        let scattered = |count: u64| (0..count).map(|i| (i * i * i * PAGE, PAGE)).collect::<Vec<_>>();
        let layouts = [
            Vec::new(),
            vec![(0, PAGE)],
            vec![(5 * PAGE, PAGE)],
            vec![
                (0, 160 * PAGE),
                (1 << 20, 3 * PAGE),
                (4 << 30, PAGE),
                ((4 << 30) + PAGE, PAGE),
            ],
            vec![(0, PAGE), (1 << 52, PAGE), ((1 << 52) + 2 * PAGE, PAGE)],
            vec![(1 << 63, PAGE), (u64::MAX - 2 * PAGE + 1, PAGE)],
            side_by_side(8),
            side_by_side(16),
            side_by_side(17),
            scattered(16),
            scattered(17),
        ];
        for places in layouts {
            let table = table(&places);
            let mut near = Near::nothing();
            let ends = places.iter().flat_map(|&(gpa, size)| [gpa, gpa + size / 2, gpa + size]);
            let around = ends.flat_map(|at| [at.wrapping_sub(1), at, at.wrapping_add(1)]);
            // Forwards, backwards, and from one end to the other.
            let forth: Vec<u64> = around.chain([0, PAGE, 1 << 40, u64::MAX]).collect();
            let back = forth.iter().rev();
            let across = forth.iter().zip(back.clone()).flat_map(|(low, high)| [low, high]);
            for &gpa in forth.iter().chain(back).chain(across) {
                let holds = |region: &&Arc<Region>| gpa.wrapping_sub(region.gpa()) < region.size();
                let expected = table.regions().iter().find(holds).map(|region| {
                    let (mapping, skip) = region.mapping().unwrap();
                    mapping
                        .ptr()
                        .wrapping_add(skip)
                        .wrapping_add(host_size(gpa - region.gpa()))
                });
                let found = table.resolve_near(&mut near, gpa, 1, Want::Write);
                assert_eq!(found.map(|at| at.ptr), expected, "{gpa:#x} of {places:x?}");
                let found = table.resolve(gpa, 1, Want::Write).ok();
                assert_eq!(
                    found.map(|at| at.ptr),
                    expected,
                    "{gpa:#x} of {places:x?}, searched anew"
                );
            }
        }
    }

    #[test]
    fn what_is_near_is_refused_beyond_its_end_and_for_what_it_does_not_allow() {
        let table = table(&[(0, PAGE), (PAGE, PAGE)]);
        let mut near = Near::nothing();
        for (gpa, len, fits) in [
            (0, PAGE, true),
            (0, PAGE + 1, false),
            (PAGE - 8, 8, true),
            (PAGE - 8, 9, false),
        ] {
            let found = table.resolve_near(&mut near, gpa, len, Want::Read);
            assert_eq!(found.is_some(), fits, "{len} bytes at {gpa:#x}");
        }
        assert!(
            Slot {
                stamps: [3, 0],
                ..NOWHERE
            }
            .resolve(0, 0, Want::Read)
            .is_some()
        );
        assert!(
            Slot {
                stamps: [3, 0],
                ..NOWHERE
            }
            .resolve(0, 0, Want::Write)
            .is_none()
        );
    }
}
