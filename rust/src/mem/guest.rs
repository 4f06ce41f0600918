//! `GuestMemory`: a table that can be exchanged, and the pins that hold it still.
//!
//! # Theory
//!
//! Whoever touches guest memory pins its table first: a [`Pin`] is a shared lock. Changing the table is the
//! exclusive lock, so it waits for running copies, and when it returns nobody uses the old table any more: that is
//! what "answered only after running copies have ended" means, for unmap, a new memory table and reset alike.
//!
//! Two rules for whoever holds a pin: do not pin the same memory again in the same thread (a writer that waits in
//! between would block both for ever), and run no foreign code (a Python callback may do exactly that). The one exception
//! is a transfer of remote memory, inside of which this thread is known to be (see `transfer`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, TryLockError};

use super::log::Log;
use super::mapped::Mapped;
use super::mediated::Mediated;
use super::region::{Backing, Mapping, Region, RegionError};
use super::table::{MAX_REGIONS, Table};
use super::traced::Trace;
use super::transfer::inside;
use super::{Access, At, MemoryError, Want};

/// A region to be made: guest address, size, where its bytes come from.
#[derive(Debug)]
pub struct RegionSpec {
    /// Guest address of the first byte.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// Where its bytes come from.
    pub backing: Backing,
}

impl RegionSpec {
    fn map(self) -> Result<Arc<Region>, RegionError> {
        Region::new(self.gpa, self.size, self.backing).map(Arc::new)
    }
}

/// A part of a region of another memory, to be shown at an address of an IOMMU.
#[derive(Debug)]
pub struct AliasSpec {
    /// Address of the first byte.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// What is shown, and from which of its bytes on.
    pub region: Arc<Region>,
    /// Offset of the first byte in it.
    pub skip: u64,
    /// Whether it may be read, and written.
    pub access: (bool, bool),
}

impl AliasSpec {
    fn make(self) -> Result<Arc<Region>, RegionError> {
        self.region
            .alias(self.gpa, self.skip, self.size, self.access)
            .map(Arc::new)
    }
}

/// A range of guest memory that stays mapped, whatever happens to the table.
#[derive(Debug)]
pub struct Live {
    pub(super) mapping: Arc<Mapping>,
    /// Offset of the first byte in the mapping's region; with `len` inside it.
    pub(super) skip: usize,
    pub(super) len: usize,
}

impl Live {
    /// Host address of the first byte, mapped as long as `self` lives.
    #[must_use]
    pub fn ptr(&self) -> *mut u8 {
        self.mapping.ptr().wrapping_add(self.skip)
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Number of the next memory of this process.
static NEXT_MEMORY: AtomicU64 = AtomicU64::new(0);

/// Guest memory; see the module's head.
#[derive(Debug)]
pub struct GuestMemory {
    /// As transfers know it.
    number: u64,
    table: RwLock<Table>,
    trace: Option<Arc<Trace>>,
}

impl GuestMemory {
    /// Memory of these regions, epoch 0.
    ///
    /// # Errors
    /// When a region cannot be made, two overlap, or there are too many.
    pub fn new(regions: Vec<RegionSpec>, trace: Option<Arc<Trace>>) -> Result<Self, RegionError> {
        let number = NEXT_MEMORY.fetch_add(1, Ordering::Relaxed);
        let table = RwLock::new(Table::new(number, 0, map_all(regions)?, false)?);
        Ok(Self { number, table, trace })
    }

    /// Whether this thread is inside a transfer of this memory, and must neither pin nor change it.
    #[inline]
    #[must_use]
    pub fn in_transfer(&self) -> bool {
        inside(self.number)
    }

    /// As [`GuestMemory::pin`], if nobody changes the table or waits to change it.
    #[inline]
    #[must_use]
    pub fn try_pin(&self) -> Option<Pin<'_>> {
        let table = match self.table.try_read() {
            Ok(table) => table,
            Err(TryLockError::Poisoned(table)) => table.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Pin {
            table,
            trace: self.trace.as_deref(),
        })
    }

    /// Hold the table still; see the module's head for what not to do meanwhile.
    #[inline]
    #[must_use]
    pub fn pin(&self) -> Pin<'_> {
        // A table is exchanged whole, so there is nothing half done behind a poisoned lock.
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        Pin {
            table,
            trace: self.trace.as_deref(),
        }
    }

    /// What records accesses, if anything does.
    #[must_use]
    pub const fn trace(&self) -> Option<&Arc<Trace>> {
        self.trace.as_ref()
    }

    /// Number of the present table, from 0.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.pin().table.epoch()
    }

    /// The present regions by ascending address.
    #[must_use]
    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.pin().table.regions().to_vec()
    }

    /// Put a new table in place of the present one, after running copies have ended; all or nothing. A log stays.
    fn exchange(
        &self,
        translated: bool,
        regions: impl FnOnce(&Table) -> Result<Vec<Arc<Region>>, RegionError>,
    ) -> Result<(), RegionError> {
        if self.in_transfer() {
            return Err(RegionError::InTransfer);
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let epoch = table.epoch().saturating_add(1);
        let mut next = Table::new(self.number, epoch, regions(&table)?, translated)?;
        next.set_log(table.log().cloned());
        let old = std::mem::replace(&mut *table, next);
        // Unmapping large regions takes long: nobody need wait for it but our caller.
        drop(table);
        drop(old);
        Ok(())
    }

    /// Add one region.
    ///
    /// # Errors
    /// When it cannot be made, overlaps, or is one too many; `InTransfer`.
    pub fn add(&self, region: RegionSpec) -> Result<(), RegionError> {
        let region = region.map()?;
        self.exchange(false, |present| {
            if present.translated() {
                return Err(RegionError::Mixed);
            }
            Ok(present.regions().iter().cloned().chain([region]).collect())
        })
    }

    /// Remove exactly the region of `size` bytes at `gpa`; returns after running copies have ended.
    ///
    /// # Errors
    /// `NotFound`, `InTransfer`.
    pub fn remove(&self, gpa: u64, size: u64) -> Result<(), RegionError> {
        self.exchange(false, |present| {
            if present.translated() {
                return Err(RegionError::Mixed);
            }
            let regions = present.regions().iter();
            let others = regions.filter(|region| (region.gpa(), region.size()) != (gpa, size));
            let others: Vec<_> = others.cloned().collect();
            if others.len() == present.regions().len() {
                Err(RegionError::NotFound { gpa, size })
            } else {
                Ok(others)
            }
        })
    }

    /// Put a whole new table in place; returns after running copies have ended.
    ///
    /// # Errors
    /// As [`GuestMemory::new`], and `InTransfer`; then nothing has changed.
    pub fn replace(&self, regions: Vec<RegionSpec>) -> Result<(), RegionError> {
        let regions = map_all(regions)?;
        self.exchange(false, |_| Ok(regions))
    }

    /// Show the regions of `other` as they are now, at the same addresses; what was there goes.
    ///
    /// # Errors
    /// `InTransfer`.
    pub fn follow(&self, other: &Self) -> Result<(), RegionError> {
        if other.in_transfer() {
            return Err(RegionError::InTransfer);
        }
        let regions = other.regions();
        self.exchange(false, |_| Ok(regions))
    }

    /// Be the memory of an IOMMU: what is shown at exactly the addresses `gone` goes, `new` comes, in one change of the
    /// table. The first time everything else goes too, and it begins empty.
    ///
    /// # Errors
    /// When a part cannot be, two overlap, or there are too many; `InTransfer`. Then nothing has changed.
    pub fn translate(&self, mut gone: Vec<u64>, new: Vec<AliasSpec>) -> Result<(), RegionError> {
        gone.sort_unstable();
        let new = new.into_iter().map(AliasSpec::make).collect::<Result<Vec<_>, _>>()?;
        self.exchange(true, |present| {
            let shown = if present.translated() { present.regions() } else { &[] };
            let kept = shown
                .iter()
                .filter(|region| gone.binary_search(&region.gpa()).is_err())
                .cloned();
            Ok(kept.chain(new).collect())
        })
    }

    /// Mark what is written from now on in `log`, or nowhere; returns when nobody marks what was there before.
    ///
    /// # Errors
    /// `InTransfer`.
    pub fn set_log(&self, log: Option<Log>) -> Result<(), RegionError> {
        if self.in_transfer() {
            return Err(RegionError::InTransfer);
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let old = table.set_log(log.map(Arc::new));
        drop(table);
        drop(old);
        Ok(())
    }

    /// Copy `dst.len()` bytes at `gpa` out; not traced.
    ///
    /// # Errors
    /// When a byte of the range is not mapped.
    pub fn read(&self, gpa: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.pin().whole().read(At::unresolved(gpa), 0, dst)
    }

    /// Copy `src` to `gpa`; not traced.
    ///
    /// # Errors
    /// When a byte of the range is not mapped or not writable; then nothing was written.
    pub fn write(&self, gpa: u64, src: &[u8]) -> Result<(), MemoryError> {
        self.pin().whole().write(At::unresolved(gpa), 0, src)
    }

    /// Copy `len` bytes at `gpa` to `dst`; not traced.
    ///
    /// # Safety
    /// As [`Access::read_raw`].
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    pub unsafe fn read_raw(&self, gpa: u64, dst: *mut u8, len: usize) -> Result<(), MemoryError> {
        let pin = self.pin();
        // SAFETY: our caller's promise is the one that is asked for.
        unsafe { pin.whole().read_raw(At::unresolved(gpa), 0, dst, len) }
    }

    /// Copy `len` bytes from `src` to `gpa`; not traced.
    ///
    /// # Safety
    /// As [`Access::write_raw`].
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    pub unsafe fn write_raw(&self, gpa: u64, src: *const u8, len: usize) -> Result<(), MemoryError> {
        let pin = self.pin();
        // SAFETY: our caller's promise is the one that is asked for.
        unsafe { pin.whole().write_raw(At::unresolved(gpa), 0, src, len) }
    }

    /// Set `len` bytes at `gpa` to `value`; not traced.
    ///
    /// # Errors
    /// As [`GuestMemory::write`].
    pub fn fill(&self, gpa: u64, len: u64, value: u8) -> Result<(), MemoryError> {
        self.pin().whole().fill(At::unresolved(gpa), 0, len, value)
    }

    /// Copy `len` bytes from `src` to `dst`, as if all were read before the first is written; not traced.
    ///
    /// # Errors
    /// When a byte of either range is not mapped, or one of `dst` is not writable; then nothing was written.
    pub fn copy(&self, dst: u64, src: u64, len: u64) -> Result<(), MemoryError> {
        self.pin().whole().copy_within(dst, src, len)
    }

    /// Check that all `len` bytes at `gpa` are in regions, and writable if so wanted.
    ///
    /// # Errors
    /// As [`Access::resolve`].
    pub fn check(&self, gpa: u64, len: u64, want: Want) -> Result<(), MemoryError> {
        self.pin().check(gpa, len, want)
    }

    /// Whether all `len` bytes at `gpa` are in regions, remote ones included.
    #[must_use]
    pub fn is_mapped(&self, gpa: u64, len: u64) -> bool {
        self.check(gpa, len, Want::Read).is_ok()
    }

    /// The bytes themselves, kept mapped.
    ///
    /// # Errors
    /// `Unmapped` with the first address that the region of `gpa` does not hold, or `gpa` when that is remote; `ReadOnly`.
    pub fn live(&self, gpa: u64, len: u64, want: Want) -> Result<Live, MemoryError> {
        self.pin().live(gpa, len, want)
    }
}

fn map_all(specs: Vec<RegionSpec>) -> Result<Vec<Arc<Region>>, RegionError> {
    // Refused before hundreds of mappings are made for nothing.
    Table::check_count(specs.len(), MAX_REGIONS)?;
    specs.into_iter().map(RegionSpec::map).collect()
}

/// A table held still; see [`GuestMemory::pin`].
#[derive(Debug)]
pub struct Pin<'a> {
    table: RwLockReadGuard<'a, Table>,
    trace: Option<&'a Trace>,
}

impl Pin<'_> {
    /// The pinned table.
    #[inline]
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// Check that all `len` bytes at `gpa` are in regions, and writable if so wanted.
    ///
    /// # Errors
    /// As [`Access::resolve`].
    pub fn check(&self, gpa: u64, len: u64, want: Want) -> Result<(), MemoryError> {
        self.whole().check(gpa, len, want)
    }

    /// The bytes themselves, kept mapped; see [`GuestMemory::live`].
    ///
    /// # Errors
    /// As [`GuestMemory::live`].
    pub fn live(&self, gpa: u64, len: u64, want: Want) -> Result<Live, MemoryError> {
        self.table.live(gpa, len, want)
    }

    /// Number of the pinned table.
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.table.epoch()
    }

    /// Mapped memory through raw pointers; remote regions are not there.
    #[inline]
    #[must_use]
    pub fn mapped(&self) -> Mapped<'_> {
        Mapped::new(&self.table)
    }

    /// Memory of every kind, and its trace; None when mapped memory is all that there is. Prefer `with_access!`, which
    /// takes either.
    #[inline]
    #[must_use]
    pub fn mediated(&self) -> Option<Mediated<'_>> {
        let needed = self.trace.is_some() || self.table.needs_mediation();
        needed.then(|| Mediated::new(&self.table, self.trace))
    }

    /// Memory of every kind, not traced.
    #[must_use]
    pub fn whole(&self) -> Mediated<'_> {
        Mediated::new(&self.table, None)
    }
}

/// Run `$body` with `$mem` bound to `&impl Access`: `Mediated` if the memory of `$pin` is traced, logged or partly remote,
/// else `Mapped`.
///
/// The body is compiled once for each, so it may call functions that are generic over `Access`.
#[cfg(any(feature = "python", test))]
macro_rules! with_access {
    ($pin:expr, |$mem:ident| $body:expr) => {{
        let pin: &$crate::mem::Pin<'_> = &$pin;
        match pin.mediated() {
            None => {
                let $mem = &pin.mapped();
                $body
            }
            Some(mediated) => {
                let $mem = &mediated;
                $body
            }
        }
    }};
}
#[cfg(any(feature = "python", test))]
pub(crate) use with_access;
