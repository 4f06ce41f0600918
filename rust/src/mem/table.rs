//! The table of regions: guest addresses to host addresses.
//!
//! # Theory
//!
//! A table never changes. Adding, removing or replacing regions builds a new one with the next epoch; tables share
//! the regions that they have in common. Each table has a *stamp* besides, unique in the process: it is what an `At`
//! carries, so that an address resolved by one table is never used directly under another, whosever it is (M2).
//!
//! Few regions are the rule, so up to 16 are scanned from the first on; more are searched by halving.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::region::{Region, RegionError};
use super::{At, Live, MemoryError, Want, host_size};

/// Regions that one table holds at most: what the kernel's vhost and QEMU use (509 memory slots).
pub const MAX_REGIONS: usize = 509;
/// Up to this many regions are scanned, more are searched.
const SCAN_LIMIT: usize = 16;

/// Next stamp; odd, so that the even number below marks an address that is for reading only, and never 1, which
/// an unresolved address (0) would then match.
static NEXT_STAMP: AtomicU64 = AtomicU64::new(3);

/// What translation needs of a region, side by side.
#[derive(Clone, Copy, Debug)]
struct Slot {
    gpa: u64,
    size: u64,
    ptr: *mut u8,
    writable: bool,
}

// SAFETY: a slot is numbers and an address; only `Mapped` dereferences it, while the table keeps the mapping (M1).
unsafe impl Send for Slot {}
// SAFETY: as above.
unsafe impl Sync for Slot {}

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
    regions: Vec<Arc<Region>>,
}

impl Table {
    /// The table of `regions`, in any order.
    ///
    /// # Errors
    /// `TooMany` or `Overlap`.
    pub fn new(epoch: u64, mut regions: Vec<Arc<Region>>) -> Result<Self, RegionError> {
        Self::check_count(regions.len())?;
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
        let slot = |region: &Arc<Region>| Slot {
            gpa: region.gpa(),
            size: region.size(),
            ptr: region.mapping().ptr(),
            writable: region.writable(),
        };
        let slots = regions.iter().map(slot).collect();
        let stamp = NEXT_STAMP.fetch_add(2, Ordering::Relaxed);
        Ok(Self {
            epoch,
            stamp,
            slots,
            regions,
        })
    }

    /// Whether one table holds `count` regions.
    pub(super) const fn check_count(count: usize) -> Result<(), RegionError> {
        if count > MAX_REGIONS {
            Err(RegionError::TooMany {
                count,
                limit: MAX_REGIONS,
            })
        } else {
            Ok(())
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
        let region = self.region_of(gpa).ok_or(MemoryError::Unmapped { gpa })?;
        if want == Want::Write && !region.writable() {
            return Err(MemoryError::ReadOnly { gpa });
        }
        let skip = gpa.wrapping_sub(region.gpa());
        if len > region.size().wrapping_sub(skip) {
            return Err(MemoryError::Unmapped { gpa: region.end() });
        }
        let mapping = Arc::clone(region.mapping());
        Ok(Live {
            mapping,
            skip: host_size(skip),
            len: host_size(len),
        })
    }

    /// This table's stamp (see the module's head).
    #[inline]
    pub(super) const fn stamp(&self) -> u64 {
        self.stamp
    }

    #[inline]
    fn find(&self, gpa: u64) -> Option<&Slot> {
        if self.slots.len() <= SCAN_LIMIT {
            self.slots.iter().find(|slot| gpa.wrapping_sub(slot.gpa) < slot.size)
        } else {
            let next = self.slots.partition_point(|slot| slot.gpa <= gpa);
            self.slots
                .get(next.checked_sub(1)?)
                .filter(|slot| gpa.wrapping_sub(slot.gpa) < slot.size)
        }
    }

    /// Resolve `len` bytes at `gpa` as one operation; see `Access::resolve`.
    #[inline]
    pub(super) fn resolve(&self, gpa: u64, len: u64, want: Want) -> Result<At, MemoryError> {
        if let Some(slot) = self.find(gpa) {
            let skip = gpa.wrapping_sub(slot.gpa);
            if len <= slot.size.wrapping_sub(skip) && (slot.writable || want == Want::Read) {
                let stamp = self.stamp & !u64::from(!slot.writable);
                return Ok(At {
                    gpa,
                    ptr: slot.ptr.wrapping_add(host_size(skip)),
                    len,
                    stamp,
                });
            }
        }
        self.check(gpa, len, want).map(|()| At::unresolved(gpa))
    }

    /// Check that all `len` bytes at `gpa` are mapped, and writable if so wanted; names the first that is not.
    #[cold]
    pub(super) fn check(&self, gpa: u64, len: u64, want: Want) -> Result<(), MemoryError> {
        let end = gpa.checked_add(len).ok_or(MemoryError::Wraps { gpa, len })?;
        let mut at = gpa;
        while at < end {
            let slot = self.find(at).ok_or(MemoryError::Unmapped { gpa: at })?;
            if want == Want::Write && !slot.writable {
                return Err(MemoryError::ReadOnly { gpa: at });
            }
            at = slot.gpa.saturating_add(slot.size);
        }
        Ok(())
    }

    /// The longest piece that starts at `gpa` and has at most `limit` bytes.
    pub(super) fn piece_from(&self, gpa: u64, limit: usize) -> Option<Piece> {
        let slot = self.find(gpa)?;
        let skip = host_size(gpa.wrapping_sub(slot.gpa));
        let len = limit.min(host_size(slot.size).saturating_sub(skip));
        Some(Piece {
            ptr: slot.ptr.wrapping_add(skip),
            len,
        })
    }

    /// The longest piece that ends before `end` (exclusive) and has at most `limit` bytes.
    pub(super) fn piece_before(&self, end: u64, limit: usize) -> Option<Piece> {
        let slot = self.find(end.checked_sub(1)?)?;
        let upto = host_size(end.wrapping_sub(slot.gpa));
        let len = limit.min(upto);
        Some(Piece {
            ptr: slot.ptr.wrapping_add(upto.saturating_sub(len)),
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
